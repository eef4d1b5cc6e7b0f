"""Adapters, precisions, images and the step-0 check below TRL's DPOTrainer."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch

pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("peft", reason="pip install peft")

import trl
from peft import get_peft_model
from trl_runs import V1, VERSION, Run, assert_same, lora, make, run

from dpo_kernels.integrations.trl import DPOTrainer, WrongReference, patch_trl, unpatch_trl

TRLS_OWN = trl.DPOTrainer
INIT = TRLS_OWN.__init__


@pytest.fixture(autouse=True)
def unpatched():
    yield
    unpatch_trl()
    assert TRLS_OWN.__init__ is INIT


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
def test_a_vision_language_model(caplog):
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
    # Images stay padded, and it is said once.
    told = [r.getMessage() for r in caplog.records if r.name == "dpo_kernels.layouts"]
    assert told and all("padded rows, because" in t and "got pixel_values" in t for t in told)


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
