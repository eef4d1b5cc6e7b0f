"""TDPO under the trainers: the reference's states and head beside the policy's."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

pytest.importorskip("accelerate", reason="pip install accelerate")

from test_transformers import examples, trainer
from torch.nn.functional import logsigmoid

from dpo_kernels.integrations import plain
from dpo_kernels.integrations.plain import PreferenceCollator, WrongReference

BATCH = PreferenceCollator(0)(examples(4))
BETA = 0.3


def by_hand(model, reference, name, alpha=0.5):
    """TDPO's loss (arXiv 2404.11999, eq. 12 and 18) from all logits."""
    inputs = {k: BATCH[k] for k in ("input_ids", "attention_mask")}
    ours, theirs = (m(**inputs).logits[:, :-1].log_softmax(-1) for m in (model, reference))
    labels = BATCH["labels"][:, 1:]
    scored = labels != -100
    at = labels.clamp(min=0)[..., None]
    ratio = ((ours - theirs).gather(-1, at)[..., 0] * scored).sum(1)
    kl = ((theirs.exp() * (theirs - ours)).sum(-1) * scored).sum(1)
    (u, v), (k_w, k_l) = ratio.chunk(2), kl.chunk(2)
    if name == "tdpo1":
        return -logsigmoid(BETA * (u - v) - BETA * (k_l - k_w)).mean()
    return -logsigmoid(BETA * (u - v) - BETA * alpha * (k_l - k_w.detach())).mean()


@pytest.mark.parametrize("share", [False, pytest.param(True, marks=tiny.NEEDS_SEGMENTS)])
@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_a_step_is_the_papers(name, share):
    model, reference = tiny.model(), tiny.model(seed=1)
    plain.attach(model)
    fused = {"share_prefix": share}
    ref = plain.reference_states(reference, BATCH, fused=fused)
    out = plain.dpo_step(model, BATCH, ref_logps=ref, loss_type=name, beta=BETA, fused=fused)
    assert out.strategy == "streaming" and out.entropy is not None
    wanted = by_hand(model, reference, name)
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(x, parameters) for x in (out.loss, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_the_trainer(tmp_path):
    options = {"loss_type": "tdpo2", "beta": BETA}
    made = trainer(tmp_path, loss_options=options, eval_dataset=examples(6), max_steps=2)
    made.train()
    assert made.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert made.evaluate()["eval_loss"] > 0
    with pytest.raises(WrongReference):
        trainer(tmp_path, ref_model=tiny.model(seed=1), loss_options=options).train()


def test_lightning():
    pytest.importorskip("lightning", reason="pip install lightning")
    from test_lightning import fit

    from dpo_kernels.integrations.lightning import DPOModule

    model = tiny.model()
    made = DPOModule(model, ref_model=copy.deepcopy(model), loss_type="tdpo1")
    assert fit(made, steps=1)["loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("targets", [None, ["q_proj"], ["q_proj", "lm_head"]])
def test_trl(targets):
    pytest.importorskip("trl", reason="pip install trl")
    from trl_runs import V1, lora, run

    from dpo_kernels.integrations.trl import DPOTrainer

    if not V1:
        pytest.skip("TRL 0.x makes its loss from log-probs")
    adapter = None if targets is None else lora(target_modules=targets)
    fused = {"loss_options": {"loss_type": "tdpo2"}}
    options = {"data": tiny.rows(4), "max_steps": 3, "learning_rate": 3e-2}
    made = run(DPOTrainer, peft_config=adapter, fused=fused, **options)
    losses = [row["loss"] for row in made.history]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[2] < losses[0] - 3e-4


def test_scales_that_differ_are_refused():
    model, reference = tiny.model(), tiny.model("Granite", logits_scaling=4.0)
    plain.attach(model)
    ref = plain.reference_states(reference, BATCH)
    with pytest.raises(ValueError, match=r"scales its logits by .*0\.25"):
        plain.dpo_step(model, BATCH, ref_logps=ref, loss_type="tdpo1")
