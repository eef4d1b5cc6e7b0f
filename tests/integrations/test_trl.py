"""What TRL's DPOTrainer refuses and ours does, the patch, the step-0 check, prefix sharing."""

from __future__ import annotations

import contextlib
import copy
import logging
import math

import pytest
import tiny
import torch

import dpo_kernels as dk

pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("peft", reason="pip install peft")

import transformers
import trl
from peft import get_peft_model
from trl_runs import V1, VERSION, Run, assert_same, lora, make, run

from dpo_kernels.integrations import announce, frameworks
from dpo_kernels.integrations import trl as integration
from dpo_kernels.integrations.trl import DPOTrainer, WrongReference, patch_trl, unpatch_trl

TRLS_OWN = trl.DPOTrainer
INIT = TRLS_OWN.__init__
CHECKED = 12  # tokens of the comparison of heads before the first step


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


# --- adapters ---


def test_lora_on_lm_head():
    """The adapter on lm_head is trained, as the model's own logits with it would be."""
    config = lora(target_modules=["q_proj", "lm_head"])
    ours = run(DPOTrainer, peft_config=config, max_steps=6, learning_rate=1e-2)
    moved = {k for k, v in ours.weights.items() if "lm_head.lora_B" in k and v.abs().max() > 0}
    assert moved
    assert ours.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert ours.history[-1]["loss"] < ours.history[0]["loss"]
    # The log-probs that were optimised are those of PEFT's own forward.
    made = ours.trainer
    made.model.eval()
    from dpo_kernels.models.head_check import check_head

    check_head(made.model)
    ids = torch.tensor([[5, 9, 17, 33, 21]])
    with_adapter = made.model(input_ids=ids).logits
    with made.model.disable_adapter():
        without = made.model(input_ids=ids).logits
    assert (with_adapter - without).abs().max() > 1e-3


def test_a_whole_trained_head():
    """PEFT's `modules_to_save`: the head is a trained copy, and the reference has the original."""
    config = lora(modules_to_save=["lm_head"])
    runs = [run(t, peft_config=config, max_steps=6) for t in (TRLS_OWN, DPOTrainer)]
    assert_same(*runs, 1e-4, 1e-4)


@pytest.mark.parametrize("options", [{"bf16": True}, {"dtype": torch.bfloat16}])
def test_bfloat16(options, monkeypatch):
    """Under autocast and with a bf16 model: the check passes, and the run is TRL's but for bf16."""
    # transformers 4 leaves its choice in the environment, for every later trainer of the process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    theirs = run(TRLS_OWN, max_steps=5, **options)
    seen = []
    with patch_trl():
        made = make(TRLS_OWN, max_steps=5, **options)
        for model in (made.model, made.ref_model):  # what a layer gives out tells what it ran in
            layer = model.model.layers[0].mlp.down_proj
            layer.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        made.train()
        ours = Run([r for r in made.state.log_history if "loss" in r], {}, made)
    assert seen and set(seen) == {torch.bfloat16}
    for a, b in zip(theirs.history, ours.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=0.05)
        assert b["logps/chosen"] == pytest.approx(a["logps/chosen"], rel=0.02)
    with pytest.raises(WrongReference):
        run(
            DPOTrainer,
            ref_model=tiny.model(seed=1, dtype=options.get("dtype", torch.float32)),
            max_steps=1,
            **options,
        )


@pytest.mark.skipif(VERSION < (1, 10), reason="vision batches as TRL makes them since 1.10")
def test_a_vision_language_model():
    """Images go to the model as TRL's vision collator gives them; loss and gradients are TRL's."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, **size)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **size)
    start = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=63,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )
    ids = torch.randint(2, 60, (4, 12))
    ids[:, 1:5] = 63  # four patches an image
    completion = (torch.arange(12) >= 7).long().expand(4, 12)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": completion,
        "pixel_values": torch.randn(4, 3, 8, 8),
    }
    results = []
    for trainer in (TRLS_OWN, DPOTrainer):
        model = copy.deepcopy(start)
        made = make(trainer, model, ref_model=copy.deepcopy(start))
        model.train()
        loss = made.compute_loss(made.model, dict(batch))
        loss.backward()
        grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append((float(loss.detach()), grads))
    (a, grads), (b, ours) = results
    assert a == pytest.approx(b, abs=1e-6) and grads.keys() == ours.keys()
    assert any("vision" in k for k in grads)
    assert all((grads[k] - ours[k]).abs().max() < 1e-5 for k in grads)


def test_dora_on_lm_head_is_refused():
    config = lora(target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="variant of LoRA"):
        run(DPOTrainer, peft_config=config, max_steps=1)


def test_pretrained_adapter_has_a_ref_copy():
    """A PEFT model with a trained adapter: that adapter is the reference, not the base."""
    start = get_peft_model(tiny.model(), lora())
    with torch.no_grad():
        for name, p in start.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    options = {}
    if not V1:
        start.add_adapter("ref", start.peft_config["default"])
        state = {k: v for k, v in start.state_dict().items() if ".default." in k}
        start.load_state_dict(
            {k.replace(".default.", ".ref."): v for k, v in state.items()}, strict=False
        )
        options = {"model_adapter_name": "default", "ref_adapter_name": "ref"}
    runs = [
        run(t, model=copy.deepcopy(start), max_steps=5, **options) for t in (TRLS_OWN, DPOTrainer)
    ]
    assert_same(*runs, 1e-4, 1e-4)
    assert runs[1].history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "ref" in runs[1].trainer.model.peft_config


def test_prompt_tuning():
    """Virtual tokens in front are cut off again."""
    from peft import PromptTuningConfig

    if VERSION < (1, 10):
        pytest.skip("TRL before 1.10 does not cut virtual tokens off again, and fails")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    runs = [
        run(t, peft_config=config, max_steps=4, fused=f)
        for t, f in ((TRLS_OWN, None), (DPOTrainer, {"check_reference": False}))
    ]
    assert_same(*runs, 1e-4, 1e-4)


# --- the step-0 check ---


def test_another_reference_is_an_error():
    with pytest.raises(WrongReference, match=r"differ by up to .* nats.*check_reference"):
        run(DPOTrainer, ref_model=tiny.model(seed=1), max_steps=1)
    chosen = run(
        DPOTrainer, ref_model=tiny.model(seed=1), max_steps=1, fused={"check_reference": False}
    )
    assert math.isfinite(chosen.history[0]["loss"])


def test_stale_precomputed_logps_are_an_error():
    made = make(DPOTrainer, precompute_ref_log_probs=True, max_steps=1)
    data = made.train_dataset
    if V1:
        data = data.remove_columns("ref_chosen_logps")
    else:
        made._precomputed_train_ref_log_probs = True  # as if this had been done, by another model
        data = data.add_column("ref_rejected_logps", [-20.0] * len(data))
    made.train_dataset = data.add_column("ref_chosen_logps", [-20.0] * len(data))
    with pytest.raises(WrongReference):
        made.train()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sppo_hard", "aot", "discopop"])
def test_the_check_passes_where_nothing_is_wrong(loss):
    first = run(DPOTrainer, loss_type=loss, max_steps=1).history[0]
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/margins"]) < 1e-5


def test_the_check_knows_dropout():
    model = tiny.model(attention_dropout=0.5)
    run(DPOTrainer, model=model, max_steps=1, disable_dropout=False)
    # An adapter of zeros with dropout is a no-op, one that is not a no-op is not excused by none.
    run(DPOTrainer, peft_config=lora(lora_dropout=0.3), max_steps=1, disable_dropout=False)
    with pytest.raises(WrongReference):
        run(DPOTrainer, peft_config=lora(init_lora_weights=False), max_steps=1)


def test_the_check_is_of_the_first_step_alone(tmp_path):
    first = make(DPOTrainer, folder=str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    again = make(DPOTrainer, folder=str(tmp_path), max_steps=3, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 3


def test_a_reference_free_loss_is_not_checked():
    run(DPOTrainer, loss_type="simpo", ref_model=tiny.model(seed=1), max_steps=1)


# --- prefix sharing, memory and statistics ---


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
            fused={"share_prefix": share},
        )
        tokens.append(sum(n for n in seen if n != CHECKED))
    assert tokens[1] < 0.8 * tokens[0]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Mistral", {"sliding_window": 4}, "sliding window"),
        ("Gemma2", {"head_dim": 8, "sliding_window": 4}, "sliding_attention"),
    ],
)
def test_prefix_sharing_refuses_what_one_mask_cannot_say(kind, options, message):
    with pytest.raises(ValueError, match=message):
        run(
            DPOTrainer, model=tiny.model(kind, **options), max_steps=1, fused={"share_prefix": True}
        )


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


# --- the patch ---


def test_patch_and_unpatch():
    assert patch_trl() is not None
    assert TRLS_OWN.__init__ is not INIT
    patched = run(TRLS_OWN, loss_type="dpop", max_steps=2)
    unpatch_trl()
    assert TRLS_OWN.__init__ is INIT
    assert not hasattr(TRLS_OWN, "fused_default")
    ours = run(DPOTrainer, loss_type="dpop", max_steps=2)
    assert_same(patched, ours, 1e-6, 1e-6)


def test_patch_as_a_context_with_options():
    with patch_trl(share_prefix=True, check_reference=False):
        made = make(TRLS_OWN)
        assert made.fused.share_prefix and not made.fused.check_reference
    assert TRLS_OWN.__init__ is INIT
    with pytest.raises(TypeError):
        make(TRLS_OWN, fused={})


def test_subclasses_follow_the_patch():
    class Custom(TRLS_OWN):
        def compute_loss(self, *args, **kwargs):
            self.seen = True
            return super().compute_loss(*args, **kwargs)

    patch_trl()
    made = run(Custom, loss_type="cal_dpo", max_steps=1)
    assert made.trainer.seen


def test_patching_twice_and_undoing_an_unpatched_trl():
    patch_trl(share_prefix=True)
    patch_trl(head_stats=False)
    assert TRLS_OWN.fused_default == integration.FusedOptions(head_stats=False)
    unpatch_trl()
    unpatch_trl()


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="dpop_lamda"):
        patch_trl(loss_options={"dpop_lamda": 3.0})
    with pytest.raises(TypeError):
        patch_trl(shared_prefix=True)
    with pytest.raises(ValueError, match="both"):
        patch_trl({"share_prefix": True}, head_stats=False)


def test_a_version_outside_the_range_is_refused(monkeypatch):
    monkeypatch.setitem(frameworks.TESTED, "trl", (("0.1", "0.2"),))
    with pytest.raises(frameworks.UnsupportedVersion, match=r"trl>=0.1,<0.2"):
        patch_trl()
    patch_trl(allow_untested=True)
    unpatch_trl()


@pytest.mark.parametrize("patched", [True, False])
def test_the_first_step_says_that_the_fused_head_runs(patched, caplog):
    """A patch that does nothing looks like one that works."""
    with patch_trl() if patched else contextlib.nullcontext():
        run(trl.DPOTrainer if patched else DPOTrainer, max_steps=2)
    (line,) = [r for r in caplog.records if r.name == "dpo_kernels.trl"]
    assert line.levelname == "INFO"
    parts = (
        "DPOTrainer",
        f"trl {trl.__version__}",
        transformers.__version__,
        "strategy",
        "backend",
    )
    assert all(part in line.message for part in parts), line.message


def test_that_line_is_seen_unless_silenced(monkeypatch, capsys):
    """Neither Python's logging nor transformers' shows INFO by default."""
    made = make(DPOTrainer)
    monkeypatch.setattr(announce.logger, "hasHandlers", lambda: False)
    announce.announce(made, torch.float32, "streaming")
    assert capsys.readouterr().err.count("runs the fused head: strategy streaming") == 1
    monkeypatch.setattr(logging.getLogger("dpo_kernels"), "level", logging.WARNING)
    announce.announce(made, torch.float32, "streaming")
    assert not capsys.readouterr().err
