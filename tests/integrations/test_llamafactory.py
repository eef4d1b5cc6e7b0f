"""LLaMA-Factory's trainer, patched: its own loss and gradients for every option that it has."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

pytest.importorskip("llamafactory", reason="make test-integrations has an environment for it")

from llamafactory.hparams import FinetuningArguments
from llamafactory.train.dpo.trainer import CustomDPOTrainer
from transformers import TrainingArguments

from dpo_kernels.integrations import (
    llamafactory,
    patch_llamafactory,
    patch_trl,
    unpatch_llamafactory,
)
from dpo_kernels.integrations.frameworks import UnsupportedShape
from dpo_kernels.integrations.plain import PreferenceCollator
from dpo_kernels.integrations.trl import BypassedError, unpatch_trl

INIT, FORWARD = CustomDPOTrainer.__init__, CustomDPOTrainer.concatenated_forward


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_llamafactory()
    unpatch_trl()
    assert CustomDPOTrainer.__init__ is INIT


def examples():
    tokenizer = tiny.tokenizer()
    return [{f"{k}_ids": tokenizer(r[k])["input_ids"] for k in r} for r in tiny.rows(4)]


def make(folder, model, reference, lora=False, kind=CustomDPOTrainer, **options):
    if lora:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.2)
    return kind(
        model=model,
        ref_model=None if lora else reference,
        args=TrainingArguments(
            str(folder), report_to=[], use_cpu=True, bf16=False, remove_unused_columns=False
        ),
        finetuning_args=FinetuningArguments(stage="dpo", **options),
        processor=None,
        tokenizer=tiny.tokenizer(),
        data_collator=PreferenceCollator(0),
        train_dataset=examples(),
    )


OPTIONS = {
    "sigmoid": {},
    "sigmoid with all": {
        "dpo_label_smoothing": 0.1,
        "pref_ftx": 0.4,
        "ld_alpha": 0.3,
        "pref_beta": 0.5,
    },
    "bco": {"pref_bco_weight": 0.7},
    "hinge": {"pref_loss": "hinge", "ld_alpha": 0.0},
    "ipo": {"pref_loss": "ipo", "pref_ftx": 0.2},
    "kto_pair": {"pref_loss": "kto_pair"},
    "orpo": {"pref_loss": "orpo", "ld_alpha": 0.5},
    "simpo": {"pref_loss": "simpo", "simpo_gamma": 0.3},
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("case", OPTIONS)
def test_loss_and_gradients_are_its_own(case, lora, tmp_path):
    results = []
    batch = PreferenceCollator(0)(examples())
    batch["labels"][0, -2] = -100  # a token in a completion's midst that is not scored
    for fused in (False, True):
        if fused:
            patch_llamafactory(check_reference=False)
        made = make(tmp_path, tiny.model(), tiny.model(seed=1), lora, **OPTIONS[case])
        loss, metrics = made.get_batch_loss_metrics(made.model, dict(batch))
        loss.backward()
        grads = {k: p.grad for k, p in made.model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), metrics, grads))
    (a, theirs, grads), (b, ours, fused_grads) = results
    assert float(a) == pytest.approx(float(b), abs=2e-5, rel=2e-6)
    assert theirs.keys() == ours.keys() and grads.keys() == fused_grads.keys()
    for key in theirs:
        if "logits" not in key:  # means over the scored tokens
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4, rel=1e-5), key
    for key in grads:
        scale = 1 + grads[key].abs().max()
        assert (grads[key] - fused_grads[key]).abs().max() < 1e-5 * scale, key


def test_its_loss_takes_no_options_of_ours():
    with pytest.raises(ValueError, match="set its own options instead of sft_weight"):
        patch_llamafactory(loss_options={"sft_weight": 0.1})


def test_the_patches_go_together_and_come_off_apart(tmp_path):
    """TRL's methods that it inherits stay TRL's for it."""
    with patch_trl():
        patch_llamafactory()
        model = tiny.model()
        made = make(tmp_path, model, copy.deepcopy(model))
        made.args.max_steps = 2
        made.train()
    assert CustomDPOTrainer.__init__ is not INIT


@pytest.mark.parametrize("name", llamafactory.overrides())
def test_a_method_that_a_subclass_overrides_is_named(name, tmp_path, caplog):
    """At its construction; and as it calls what it overrides, the fused head runs."""

    def method(self, *args, **kwargs):
        return getattr(super(Custom, self), name)(*args, **kwargs)

    Custom = type("Custom", (CustomDPOTrainer,), {name: method})
    with patch_llamafactory():
        model = tiny.model()
        made = make(tmp_path, model, copy.deepcopy(model), kind=Custom)
        said = [r.message for r in caplog.records if r.name == "dpo_kernels.trl"]
        assert f"Custom.{name}" in said[0] and "patch_llamafactory()" in said[0]
        made.args.max_steps = 1
        made.train()
    assert any("runs the fused head" in r.message for r in caplog.records)


def test_a_subclass_with_a_forward_of_its_own_stops_at_the_first_step(tmp_path):
    Custom = type("Custom", (CustomDPOTrainer,), {"concatenated_forward": FORWARD})
    with patch_llamafactory():
        model = tiny.model()
        made = make(tmp_path, model, copy.deepcopy(model), kind=Custom)
        with pytest.raises(BypassedError, match=r"Custom\.concatenated_forward"):
            made.train()


def test_another_shape_is_told(monkeypatch):
    monkeypatch.delattr(CustomDPOTrainer, "compute_preference_loss")
    with pytest.raises(UnsupportedShape, match="no compute_preference_loss"):
        patch_llamafactory()
