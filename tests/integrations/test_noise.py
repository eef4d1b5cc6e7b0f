"""The reference is the model in eval mode; the step-0 check sees the policy without its noise."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers
from torch import nn

pytest.importorskip("accelerate", reason="pip install accelerate")

from test_transformers import examples, plain_logps, trainer

from dpo_kernels.integrations import plain
from dpo_kernels.integrations.plain import PreferenceCollator, WrongReference
from dpo_kernels.models.structure import deterministic

BATCH = PreferenceCollator(0)(examples(4))
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
# Noise of every spelling (transformers#29865): dropout, jitter, layerdrop.
NOISY = {
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
    "Phimoe": {
        "router_jitter_noise": 0.05,
        "input_jitter_noise": 0.3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_theta": 10000.0,
    },
    "OPT": {"layerdrop": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "Mixtral": {"router_jitter_noise": 0.3, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama": {"attention_dropout": 0.5},
}


def noisy(kind, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **NOISY[kind]})
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()


@pytest.mark.parametrize("kind", NOISY)
def test_reference_logps_are_those_of_eval_mode(kind):
    """LlamaFactory#10779: a model handed over in training mode; its modes are put back."""
    model = noisy(kind)
    model.get_input_embeddings().eval()  # one module apart
    plain.attach(model)
    with torch.no_grad():
        modes = [m.training for m in model.modules()]
        got = plain.reference_logps(model, BATCH)
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(got, plain.reference_logps(model, BATCH))
        wanted = plain_logps(model.eval(), BATCH)
    assert torch.allclose(got.sum(1), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NOISY)
def test_noise_is_no_wrong_reference(tmp_path, kind, dtype):
    """transformers#29865: the check of heads and that of step 0 see no noise."""
    made = trainer(tmp_path, noisy(kind, dtype), max_steps=2)
    made.train()
    first = made.state.log_history[0]
    assert abs(first["rewards/margins"]) < 1e-3 and abs(first["rewards/chosen"]) < 1e-3


@pytest.mark.parametrize("kind", ["GPT2", "OPT"])
def test_noise_excuses_no_wrong_reference(tmp_path, kind):
    other = noisy(kind)
    with torch.no_grad():
        other.get_input_embeddings().weight.normal_()
    with pytest.raises(WrongReference):
        trainer(tmp_path, noisy(kind), ref_model=other, max_steps=1).train()


def test_neftune_is_no_wrong_reference(tmp_path):
    """unsloth-zoo#830"""
    made = trainer(tmp_path, neftune_noise_alpha=5.0, max_steps=2)
    made.train()
    assert abs(made.state.log_history[0]["rewards/margins"]) < 1e-5


@tiny.NEEDS_SEGMENTS
def test_neftunes_noise_is_as_strong_as_without_us(tmp_path):
    """It is divided by the root of a row's length: in a packed row of all it would be weaker."""
    losses = []
    for layout in ("padded", "auto"):
        made = trainer(tmp_path, neftune_noise_alpha=5.0, max_steps=3, fused={"layout": layout})
        made.train()
        losses.append([row["loss"] for row in made.state.log_history if "loss" in row])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"layout=shared.*NEFTune scales its noise"):
        trainer(tmp_path, neftune_noise_alpha=5.0, max_steps=1, fused={"layout": "shared"}).train()


def test_a_plain_loop_with_noise():
    model = noisy("GPT2")
    reference = copy.deepcopy(model)
    plain.attach(model)
    out = plain.dpo_step(model, BATCH, ref_logps=plain.reference_logps(reference, BATCH), beta=0.1)
    seen = plain.check_reference(model, out, BATCH, beta=0.1)
    assert seen.rewards.abs().max() < 1e-4 < out.rewards.abs().max()
    assert model.training


def test_modules_with_a_train_of_their_own_are_asked():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2), nn.Sequential(Merging(2, 2), nn.Dropout()))
    model.train()
    model[1].eval()
    with deterministic(model):
        assert model[0].merged and not any(m.training for m in model.modules())
    assert not model[0].merged and model[1][0].merged
    assert [m.training for m in model.modules()] == [True, True, False, False, False]
    with pytest.raises(KeyError), deterministic(model):
        raise KeyError
    assert model.training


# --- PEFT ---


def lora_policy(**options):
    peft = pytest.importorskip("peft", reason="pip install peft")
    base = noisy("GPT2")
    common = {"r": 2, "lora_dropout": 0.5, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**common, **options})
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_an_adapters_reference_is_the_base_in_eval_mode(tmp_path, options):
    """LlamaFactory#10779: dropout in the base and in the adapter."""
    policy = lora_policy(**options)
    base = noisy("GPT2").eval()
    still = {"check_first_step": False}
    made = trainer(tmp_path, policy, ref_model=None, max_steps=1, learning_rate=0.0, fused=still)
    made.train()
    policy.train()
    with torch.no_grad():
        inputs = {k: v for k, v in BATCH.items()}
        assert torch.allclose(made._reference(inputs).sum(1), plain_logps(base, BATCH), atol=1e-4)
    assert policy.training and abs(made.state.log_history[0]["rewards/margins"]) < 1e-5


def test_lightnings_reference_is_the_base_in_eval_mode():
    """LlamaFactory#10779"""
    pytest.importorskip("lightning", reason="pip install lightning")
    from test_lightning import fit

    from dpo_kernels.integrations.lightning import DPOModule

    module = DPOModule(lora_policy())
    module.train()
    with torch.no_grad():
        wanted = plain_logps(noisy("GPT2").eval(), BATCH)
        assert torch.allclose(module._reference(BATCH).sum(1), wanted, atol=1e-4)
    assert all(torch.isfinite(torch.tensor(v)) for v in fit(module, steps=1).values())


def test_adapters_that_transformers_has_loaded_are_switched_off(tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = tiny.model()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    made = trainer(tmp_path, model, ref_model=None, max_steps=2)
    made.train()
    assert abs(made.state.log_history[0]["rewards/margins"]) < 1e-5
    assert made.state.log_history[1]["rewards/margins"] != 0


@pytest.mark.parametrize("peft", [False, True])
def test_patched_trl_with_neftune(peft):
    """unsloth-zoo#830"""
    pytest.importorskip("trl", reason="pip install trl")
    pytest.importorskip("peft", reason="pip install peft")
    from trl_runs import lora, run

    from dpo_kernels.integrations.trl import DPOTrainer

    config = lora(lora_dropout=0.3) if peft else None
    model = tiny.model(attention_dropout=0.3)
    made = run(
        DPOTrainer,
        model=model,
        peft_config=config,
        neftune_noise_alpha=5.0,
        max_steps=2,
        disable_dropout=False,
    )
    made.trainer.model.train()
    if hasattr(made.trainer, "_packed"):  # TRL 0.x logs what it computed, noise and all
        assert abs(made.history[0]["rewards/margins"]) < 1e-5
    with pytest.raises(WrongReference):
        run(
            DPOTrainer,
            model=model,
            ref_model=tiny.model(seed=1),
            neftune_noise_alpha=5.0,
            max_steps=1,
            disable_dropout=False,
        )
