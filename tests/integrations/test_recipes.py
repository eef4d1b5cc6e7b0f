"""docs/integrations.md: every block runs, and those for another framework are held against it."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn.functional import logsigmoid

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "integrations.md").read_text()
BLOCK = re.compile(
    r"## (?P<title>[^\n]+)|(?:<!-- (?P<key>needs|check): (?P<names>[^>]+) -->\n)?"
    r"```python\n(?P<code>.*?)```",
    re.DOTALL,
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


def check_llamafactory(names, original):
    """Our forward against LLaMA-Factory's, on an object with what that reads."""
    from dpo_kernels.integrations.plain import PreferenceCollator

    policy = tiny.model()
    for loss in ("sigmoid", "ipo"):
        stub = types.SimpleNamespace(
            loss_type=loss,
            ld_alpha=None,
            finetuning_args=types.SimpleNamespace(use_ref_model=True),
            accelerator=types.SimpleNamespace(unwrap_model=lambda m: m),
        )
        batch = PreferenceCollator(0)(names["examples"][:4])
        theirs = original(stub, copy.deepcopy(policy), dict(batch))
        ours = names["concatenated_forward"](stub, policy, dict(batch))
        assert theirs.keys() == ours.keys()
        for key in ("chosen_logps", "rejected_logps", "chosen_logps_avg"):
            assert torch.allclose(theirs[key], ours[key], atol=1e-4), key


@pytest.mark.parametrize(
    ("title", "number", "key", "names", "code"), RECIPES, ids=[f"{t}-{n}" for t, n, *_ in RECIPES]
)
def test_recipe(title, number, key, names, code, tmp_path, monkeypatch):
    original = None
    for name in names if key == "needs" else ():
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"pip install {name}")
    if "llamafactory" in names:
        if importlib.util.find_spec("torchaudio") is None:
            stub = types.ModuleType("torchaudio")  # imported for speech data alone
            stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
            monkeypatch.setitem(sys.modules, "torchaudio", stub)
        from llamafactory.train.dpo.trainer import CustomDPOTrainer

        original = CustomDPOTrainer.concatenated_forward
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
    elif original is not None:
        check_llamafactory(scope, original)
        from llamafactory.train.dpo.trainer import CustomDPOTrainer

        CustomDPOTrainer.concatenated_forward = original
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
