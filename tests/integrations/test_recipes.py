"""docs/integrations*.md: every block runs, and those for another framework are held against it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import logsigmoid

from dpo_kernels.models.versions import transformers_before

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(p for p in (ROOT / "docs").glob("integrations*.md") if "tested" not in p.name)
TEXT = "\n".join(p.read_text() for p in PAGES)
BLOCK = re.compile(
    r"^##? (?P<title>[^\n]+)|(?:<!-- (?P<key>needs|check): (?P<names>[^>]+) -->\n)?"
    r"```python\n(?P<code>.*?)```",
    re.DOTALL | re.MULTILINE,
)


def recipes():
    title, found = "", []
    for match in BLOCK.finditer(TEXT):
        if match["title"]:
            title = match["title"]
        else:
            names = (match["names"] or "").split()
            number = sum(t == title for t, *_ in found)
            found.append((title, number, match["key"], names, match["code"]))
    return found


RECIPES = recipes()


def source_of(package: str, path: str) -> types.ModuleType:
    """One file of an installed package, without the package's own imports."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"pip install {package}")
    file = Path(spec.origin).parent / path
    text = re.sub(r"^from \.\S* import .*$", "", file.read_text(), flags=re.MULTILINE)
    module = types.ModuleType(path.replace("/", "."))
    exec(compile(text, str(file), "exec"), vars(module))
    return module


def check_torchtune(names):
    theirs = source_of("torchtune", "rlhf/loss/dpo.py").DPOLoss(beta=0.1, label_smoothing=0.1)
    given = torch.randn(4, 8)
    for a, b in zip(theirs(*given), names["loss_fn"](*given), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def check_openrlhf(names):
    module = source_of("openrlhf", "models/loss.py")
    given = torch.randn(4, 8)
    for options in ({}, {"label_smoothing": 0.1}, {"ipo": True}):
        theirs = module.DPOLoss(0.2, **options)(*given)
        for a, b in zip(theirs, names["FusedLoss"](0.2, **options)(*given), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def check_patched(name):
    """The client's trainer has our methods, below the page's one call."""
    module, kind = {
        "llamafactory": ("llamafactory.train.dpo.trainer", "CustomDPOTrainer"),
        "swift": ("swift.rlhf_trainers.dpo_trainer", "DPOTrainer"),
        "axolotl": ("axolotl.core.trainers.dpo.trainer", "AxolotlDPOTrainer"),
    }[name]
    assert hasattr(getattr(importlib.import_module(module), kind), "fused_default")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    for name in ("trl", "llamafactory", "swift"):
        module = sys.modules.get(f"dpo_kernels.integrations.{name}")
        if module is not None:
            getattr(module, f"unpatch_{name}")()


@pytest.mark.parametrize(
    ("title", "number", "key", "names", "code"), RECIPES, ids=[f"{t}-{n}" for t, n, *_ in RECIPES]
)
def test_recipe(title, number, key, names, code, tmp_path, monkeypatch):
    for name in names if key == "needs" else ():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"pip install {name}")
    if '"shared"' in code and transformers_before(4, 55):
        pytest.skip("transformers before 4.55 takes padded rows")
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    pairs = tiny.rows(12)
    policy = tiny.model()
    scope = {
        "__name__": "recipe",
        "model": policy,
        "ref_model": copy.deepcopy(policy),
        "tokenizer": tokenizer,
        "pairs": pairs,
        "examples": [{f"{k}_ids": tokenizer(row[k])["input_ids"] for k in row} for row in pairs],
    }
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    if "trainer" in code and "use_cpu" not in code and not torch.cuda.is_available():
        code = code.replace("report_to=[]", "report_to=[], use_cpu=True")
    exec(compile(code, "integrations.md", "exec"), scope)
    if key == "check":
        {"torchtune": check_torchtune, "openrlhf": check_openrlhf}[names[0]](scope)
    elif names and names[0] in ("llamafactory", "swift", "axolotl"):
        check_patched(names[0])
    elif "model" in code and "trainer" in code.lower():
        trained = scope.get("trainer")
        after = (trained.model if trained is not None else policy).state_dict()
        moved = [k for k, v in after.items() if k not in before or not torch.equal(v, before[k])]
        assert moved, "the recipe trained nothing"


def test_halos_recipe_is_apo_zero():
    code = next(c for t, _, _, _, c in RECIPES if t == "HALOs")
    scope: dict = {}
    exec(compile(code, "integrations.md", "exec"), scope)
    tokens = torch.randn(4, 3, 5)
    losses, *_ = scope["FusedHALO"]().loss(None, *tokens)
    a, b = (tokens[i].sum(-1) - tokens[2 + i].sum(-1) for i in (0, 1))
    wanted = 1 - torch.sigmoid(0.1 * a) + torch.sigmoid(0.1 * b)
    assert torch.allclose(losses, wanted, atol=1e-6)


def test_nemo_recipe_is_dpo():
    code = next(c for t, _, _, _, c in RECIPES if t == "NeMo-RL")
    scope: dict = {}
    exec(compile(code, "integrations.md", "exec"), scope)
    torch.manual_seed(0)
    logits, ids = torch.randn(4, 6, 9), torch.randint(0, 9, (4, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 4)
    ref = torch.full((4,), -8.0)
    got = scope["preference_loss"](logits, ids, mask, ref)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    ratio = logps.sum(1) - ref
    assert torch.allclose(got, -logsigmoid(0.05 * (ratio[::2] - ratio[1::2])).mean(), atol=1e-6)
