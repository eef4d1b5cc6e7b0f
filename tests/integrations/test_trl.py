"""What TRL's DPOTrainer refuses and ours does: losses, options, columns, memory, statistics."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch

import dpo_kernels as dk

pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("peft", reason="pip install peft")

import trl
from trl_runs import V1, assert_same, lora, make, run

from dpo_kernels.integrations.trl import DPOTrainer, patch_trl, unpatch_trl

CHECKED = 12  # tokens of the comparison of heads before the first step
TRLS_OWN = trl.DPOTrainer
INIT = TRLS_OWN.__init__


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()
    assert TRLS_OWN.__init__ is INIT


def expected_losses(made, **options):
    """Loss of the trainer's first batch by plain torch: per-token log-softmax, then the table."""
    batch = next(iter(made.get_train_dataloader()))
    policy, ids = made.model, batch["input_ids"]
    targets = ids[:, 1:]
    scored = batch["completion_mask"][:, 1:]
    with torch.no_grad():
        logits = policy(ids, attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        logps = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * scored
        ref = None
        if made.ref_model is not None:
            logits = made.ref_model(ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
            ref = logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0] * scored
    return batch, logps.sum(1), None if ref is None else ref.sum(1), scored.sum(1)


# --- losses and options that TRL does not have ---


EXTRA = {
    "dpop": {"loss_options": {"dpop_lambda": 5.0}},
    "rdpo": {"loss_options": {"rdpo_alpha": 0.02}},
    "cal_dpo": {},
    "beta_dpo": {},
    "ipo_sum": {},
    "simpo": {"loss_options": {"simpo_gamma": 0.3}},
    "alphapo": {},
    "cpo": {},
    "orpo": {},
    "slic": {},
    "rpo": {"loss_options": {"rpo_alpha": 0.7}},
    "dpo_norm": {},
}


@pytest.mark.parametrize("loss", EXTRA)
def test_losses_of_the_table_train(loss):
    ours = run(DPOTrainer, loss_type=loss, fused=EXTRA[loss] or None, max_steps=4)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in ours.history)


@pytest.mark.skipif(not V1, reason="batches of TRL 1.x")
@pytest.mark.parametrize("loss", ["dpop", "rdpo", "cal_dpo", "ipo_sum", "simpo", "orpo", "slic"])
def test_losses_are_the_tables(loss):
    reference = copy.deepcopy(tiny.model(seed=1))
    options = {"check_reference": False, **EXTRA[loss]}
    made = make(DPOTrainer, loss_type=loss, ref_model=reference, fused=options)
    batch, logps, ref, lengths = expected_losses(made)
    wanted = dk.preference_loss(
        *logps.chunk(2),
        *ref.chunk(2),
        loss_type=loss,
        beta=0.1,
        chosen_lengths=lengths.chunk(2)[0],
        rejected_lengths=lengths.chunk(2)[1],
        **options.get("loss_options", {}),
    ).loss
    got = made.compute_loss(made.model, batch)
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("fused", [None, {"head_stats": False}])
def test_label_smoothing_with_sigmoid_is_cdpo(fused):
    e = 0.2
    made = make(
        DPOTrainer,
        label_smoothing=e,
        ref_model=tiny.model(seed=1),
        fused={"check_reference": False, **(fused or {})},
    )
    made.train()
    row = made.state.log_history[0]
    # one batch of four: mean margin and loss do not determine each other, so bounds by convexity
    h = row["rewards/margins"]
    convex = -(1 - e) * math.log(1 / (1 + math.exp(-h))) - e * math.log(1 / (1 + math.exp(h)))
    plain = make(DPOTrainer, ref_model=tiny.model(seed=1), fused={"check_reference": False})
    plain.train()
    assert row["loss"] >= convex - 1e-4
    # cDPO = DPO + e h, pair by pair, so also in the mean
    assert row["loss"] == pytest.approx(plain.state.log_history[0]["loss"] + e * h, abs=2e-4)


def test_reference_free_loads_no_reference():
    fused = {"loss_options": {"reference_free": True}}
    options = {} if V1 else {"precompute_ref_log_probs": False}
    made = make(DPOTrainer, ref_model=None if V1 else "copy", fused=fused, **options)
    made.train()
    if V1:
        assert made.ref_model is None
    row = made.state.log_history[0]
    logps = row["logps/chosen"], row["logps/rejected"]
    if V1:
        assert row["rewards/chosen"] == pytest.approx(0.1 * logps[0], rel=1e-4)
    assert row["loss"] != pytest.approx(math.log(2), abs=1e-3)


COLUMNS = {
    "beta": lambda i: 0.05 + 0.02 * i,
    "weight": lambda i: float(i % 3),
    "margin": lambda i: 0.1 * i,
}


@pytest.mark.parametrize("column", COLUMNS)
def test_row_columns(column):
    """A column of one number is the option of that number; other columns change the loss."""
    data = tiny.rows(**{column: lambda i: {"beta": 0.3, "weight": 1.0, "margin": 0.0}[column]})
    plain = run(DPOTrainer, beta=0.3 if column == "beta" else 0.1, max_steps=4)
    constant = run(DPOTrainer, data=data, max_steps=4)
    assert_same(plain, constant, 1e-4, 1e-4)
    other = run(DPOTrainer, data=tiny.rows(**{column: COLUMNS[column]}), max_steps=4)
    assert abs(other.history[-1]["loss"] - plain.history[-1]["loss"]) > 1e-3
    assert other.history[-1]["grad_norm"] > 0


def test_weight_zero_drops_a_pair():
    """Training on pairs of weight 0 leaves the model as it was."""
    start = tiny.model()
    before = {k: v.clone() for k, v in start.state_dict().items()}
    data = tiny.rows(weight=lambda i: 0.0)
    after = run(DPOTrainer, model=start, data=data, max_steps=2, weight_decay=0.0)
    assert all(torch.equal(v, after.weights[k]) for k, v in before.items())


def test_odpo_takes_its_margin_from_the_data():
    with pytest.raises(ValueError, match="odpo needs offset"):
        run(DPOTrainer, loss_type="odpo", max_steps=1)
    ours = run(DPOTrainer, loss_type="odpo", data=tiny.rows(margin=COLUMNS["margin"]), max_steps=2)
    # at step 0 every h is 0: the loss is the mean of softplus(margin), over the batch's margins
    assert ours.history[0]["loss"] > math.log(2)


@pytest.mark.skipif(not V1, reason="TRL 1.x names the losses of the run in its config")
def test_unknown_loss_names_the_nearest():
    with pytest.raises(ValueError, match="sigmoid"):
        run(DPOTrainer, loss_type="sigmoidd", max_steps=1)
    with pytest.raises(ValueError, match="has no meaning"):
        run(DPOTrainer, loss_type="hinge", label_smoothing=0.1, max_steps=1)


# --- layouts, memory and statistics ---


@tiny.NEEDS_SEGMENTS
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("peft", [False, True])
def test_prefix_sharing_changes_nothing_but_work(attention, peft):
    config = lora() if peft else None
    plain, shared = (
        run(
            DPOTrainer,
            model=tiny.model(attn_implementation=attention),
            max_steps=10,
            data=long_prompts(),
            peft_config=config,
            fused={"share_prefix": share},
        )
        for share in (False, True)
    )
    assert_same(plain, shared, 1e-4, 1e-4)


def long_prompts():
    data = tiny.rows(8)
    return [{**row, "prompt": " ".join([row["prompt"]] * 4)} for row in data]


@tiny.NEEDS_SEGMENTS
def test_prefix_sharing_runs_fewer_tokens():
    seen = []
    model = tiny.model()
    model.model.register_forward_pre_hook(  # copies of the model, the reference too, take it along
        lambda m, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    tokens = []
    for share in (False, True):
        seen.clear()
        run(
            DPOTrainer,
            model=copy.deepcopy(model),
            data=long_prompts(),
            max_steps=1,
            fused={"share_prefix": share, "check_layout": False},  # which runs some rows twice
        )
        tokens.append(sum(n for n in seen if n != CHECKED))
    assert tokens[1] < 0.8 * tokens[0]


@tiny.NEEDS_SEGMENTS
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mistral", {"sliding_window": 4}),
        ("Gemma2", {"head_dim": 8, "sliding_window": 4}),
    ],
)
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_windows_are_laid_out_too(kind, options, layout):
    plain, laid = (
        run(
            DPOTrainer,
            model=tiny.model(kind, **options),
            data=long_prompts(),
            max_steps=5,
            fused={"layout": name},
        )
        for name in ("padded", layout)
    )
    assert_same(plain, laid, 1e-4, 1e-4)


@tiny.NEEDS_SEGMENTS
def test_the_patch_packs_and_shares_by_default(caplog):
    """The line of the first step says what it saves; layout="padded" opts out."""
    caplog.set_level("INFO", "dpo_kernels")
    lines = []
    for options in ({}, {"layout": "padded"}):
        caplog.clear()
        with patch_trl(**options):
            run(TRLS_OWN, data=long_prompts(), max_steps=1)
        lines.append(caplog.text)
    assert "layout shared" in lines[0] and "x fewer expected" in lines[0]
    assert "layout padded" in lines[1]


@tiny.NEEDS_SEGMENTS
@pytest.mark.skipif(not V1, reason="TRL 1.x")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_precomputed_references_evaluation_and_checkpointing(checkpointing):
    plain, laid = (
        run(
            DPOTrainer,
            data=long_prompts(),
            max_steps=4,
            precompute_ref_log_probs=True,
            gradient_checkpointing=checkpointing,
            fused={"layout": name},
        )
        for name in ("padded", "auto")
    )
    assert_same(plain, laid, 1e-4, 1e-4)


def test_without_head_stats_the_loss_streams():
    with_stats = run(DPOTrainer, max_steps=5)
    without = run(DPOTrainer, max_steps=5, fused={"head_stats": False})
    gone = {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    if V1:
        assert with_stats.history[0].keys() - without.history[0].keys() == gone
    for a, b in zip(with_stats.history, without.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


@pytest.mark.skipif(not V1, reason="TRL 0.x makes its loss from log-probs")
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", ["sigmoid", "sft"]])
def test_patched_with_its_defaults_it_streams(loss, monkeypatch):
    from dpo_kernels.integrations.trl import collated

    steps, strategies = collated.pair_step, []

    def seen(*args):
        out = steps(*args)
        strategies.append(out.strategy)
        return out

    monkeypatch.setattr(collated, "pair_step", seen)
    with patch_trl():
        made = run(TRLS_OWN, loss_type=loss, max_steps=2)
    assert strategies == ["streaming"] * 2
    assert {"entropy", "logits/chosen", "mean_token_accuracy"} <= made.history[0].keys()


def test_a_small_memory_budget_changes_nothing():
    a, b = (run(DPOTrainer, max_steps=3, fused=f) for f in (None, {"memory_budget": 1}))
    assert_same(a, b, 1e-4, 1e-4)


@pytest.mark.skipif(not V1, reason="TRL 0.x reduces its own metrics at every step")
def test_metrics_are_reduced_once_a_logging_step():
    calls = []
    made = make(DPOTrainer, max_steps=6, logging_steps=3)
    reduce = made.accelerator.reduce
    made.accelerator.reduce = lambda *a: (calls.append(a[0].shape), reduce(*a))[1]
    made.train()
    assert len(calls) == 2 and calls[0][0] == 3
