"""TRL's OnlineDPOTrainer: the same log-probs and the same run, without the softmax."""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch

pytest.importorskip("trl", reason="pip install trl")

from datasets import Dataset

from dpo_kernels.integrations.trl import FusedOptions, online, patch_trl, unpatch_trl
from dpo_kernels.models import attached

Online = online.trainer_class()
if Online is None:
    pytest.skip("this TRL's OnlineDPOTrainer needs more than trl", allow_module_level=True)
ORIGINAL = Online._forward


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()
    assert Online._forward is ORIGINAL


@pytest.mark.parametrize("max_length", [512, 6])
def test_forward_is_trls(max_length):
    model = tiny.model(dtype=torch.float64)
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, autocast=nullcontext)
    fused = FusedOptions()
    stub = SimpleNamespace(
        max_length=max_length, accelerator=accelerator, fused=fused, _dpo_announced=True
    )
    torch.manual_seed(0)
    prompt, completion = torch.randint(2, 64, (4, 5)), torch.randint(2, 64, (4, 3))
    prompt_mask, completion_mask = torch.ones_like(prompt), torch.ones_like(completion)
    prompt_mask[0, :2] = 0
    completion_mask[1, 2:] = 0
    given = (prompt, prompt_mask, completion, completion_mask)
    theirs = ORIGINAL(stub, copy.deepcopy(model), *given)
    ours = online.overrides()["_forward"](ORIGINAL)(stub, model, *given)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-12
    theirs_model = copy.deepcopy(model)
    weight = torch.randn_like(theirs)
    (ORIGINAL(stub, theirs_model, *given) * weight).sum().backward()
    (ours * weight).sum().backward()
    for a, b in zip(theirs_model.parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-10


def train():
    from trl_runs import VERSION

    if VERSION < (0, 24):
        pytest.skip("OnlineDPOTrainer takes reward functions since TRL 0.24")
    module = __import__(Online.__module__, fromlist=["OnlineDPOConfig"])
    args = module.OnlineDPOConfig(
        tempfile.mkdtemp(),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_new_tokens=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        seed=3,
        save_strategy="no",
        disable_tqdm=True,
        missing_eos_penalty=None,
    )
    model = tiny.model()
    made = Online(
        model=model,
        ref_model=copy.deepcopy(model),
        args=args,
        reward_funcs=lambda prompts, completions, **_: [float(len(set(c))) for c in completions],
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in tiny.rows()]),
        processing_class=tiny.tokenizer(),
    )
    made.train()
    return [row for row in made.state.log_history if "loss" in row]


def test_a_run_is_trls(caplog):
    theirs = train()
    patch_trl()
    ours = train()
    (line,) = [r.message for r in caplog.records if r.name == "dpo_kernels.trl"]
    assert "OnlineDPOTrainer of trl" in line and "runs the fused head" in line
    for a, b in zip(theirs, ours, strict=True):
        for name in a.keys() - {"step_time"}:
            assert b[name] == pytest.approx(a[name], abs=2e-4, rel=1e-4), name


LAYOUT = "dpo_kernels.layouts"
# TRL counts in these what stands behind an EOS, which a packed row does not run.
BEHIND_EOS = {f"objective/{n}" for n in ("entropy", "kl", "non_score_reward", "rlhf_reward")}


def test_rows_stay_padded_under_auto_and_it_is_said_why(caplog):
    patch_trl()
    train()
    (line,) = [r.getMessage() for r in caplog.records if r.name == LAYOUT]
    assert line.startswith("layout: padded rows, because OnlineDPOTrainer's objective/entropy")
    assert "layout='shared' by name" in line


def test_a_layout_by_name_is_run_with_the_same_loss(monkeypatch, caplog):
    from dpo_kernels.models import layouts

    padded = train()
    calls = []
    original = layouts.run_call
    monkeypatch.setattr(attached, "run_call", lambda *a, **k: calls.append(0) or original(*a, **k))
    patch_trl(layout="shared")
    shared = train()
    assert calls and not [r for r in caplog.records if r.name == LAYOUT]
    for a, b in zip(padded, shared, strict=True):
        for name in a.keys() - {"step_time"} - BEHIND_EOS:
            assert b[name] == pytest.approx(a[name], abs=2e-4, rel=1e-4), name
