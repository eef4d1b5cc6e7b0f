"""TRL's own trainer and ours: same seed, data and model, twenty steps, the same numbers."""

from __future__ import annotations

import pytest
import tiny
import torch

pytest.importorskip("trl", reason="pip install trl")
pytest.importorskip("peft", reason="pip install peft")

from trl import DPOTrainer as Theirs
from trl_runs import V1, VERSION, assert_same, lora, run

from dpo_kernels.integrations.trl import DPOTrainer as Ours

LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
}
SETTINGS = {
    "plain": {},
    "lora": {"peft": True},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora-precomputed": {"peft": True, "precompute_ref_log_probs": True},
}
# Loss and weights of steep losses move as far as their slope carries the rounding of a log-prob.
FLOAT32 = (1e-4, 1e-4)
FLOAT64 = (1e-9, 1e-9)


def both(dtype=torch.float32, **options):
    options = dict(options)
    peft = options.pop("peft", False)
    runs = []
    for trainer in (Theirs, Ours):
        extra = {"peft_config": lora()} if peft else {}
        runs.append(run(trainer, dtype=dtype, max_steps=20, **extra, **options))
    return runs


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_same_as_trl(loss, setting):
    assert_same(*both(loss_type=loss, **LOSSES[loss], **SETTINGS[setting]), *FLOAT32)


# TRL 1.10 and later score in fp32 whatever the model (their tiles are `.float()`).
@pytest.mark.skipif(VERSION >= (1, 10), reason="this TRL computes log-probs in fp32 only")
@pytest.mark.parametrize("setting", ["plain", "lora"])
@pytest.mark.parametrize(
    "loss",
    # TRL 1.x rounds EXO's epsilon to fp32
    ["sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "apo_zero"],
)
def test_same_as_trl_in_float64(loss, setting):
    theirs, ours = both(torch.float64, loss_type=loss, **LOSSES[loss], **SETTINGS[setting])
    # The printed history is rounded to fp32 by TRL's own logging in places; the weights are not.
    assert_same(theirs, ours, 2e-7, FLOAT64[1])


V1_ONLY = {
    "f_divergence": {"f_divergence_type": "js_divergence"},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "truncated": {"max_length": 10},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True},
}


@pytest.mark.skipif(not V1, reason="settings of TRL 1.x")
@pytest.mark.parametrize("name", V1_ONLY)
def test_same_settings(name):
    options = dict(V1_ONLY[name])
    if name == "evaluation":
        from datasets import Dataset

        held_out = Dataset.from_list(tiny.rows(6, seed=9))
        options["trainer_options"] = {"eval_dataset": held_out}
    theirs, ours = both(**options)
    assert_same(theirs, ours, *FLOAT32)
    if name == "evaluation":
        a, b = (
            [r for r in x.trainer.state.log_history if "eval_loss" in r] for x in (theirs, ours)
        )
        assert len(a) == len(b) == 5
        timing = ("runtime", "per_second")
        for x, y in zip(a, b, strict=True):
            for key in x:
                if not key.endswith(timing) and not (x["step"] == 0 and "accuracies" in key):
                    assert y[key] == pytest.approx(x[key], abs=1e-4, rel=1e-4), key


# keep_end leaves a token of each prompt: where none is left, TRL counts the row's last logits among
# those of its completion.
V0_ONLY = {
    "rpo": {"rpo_alpha": 0.5},
    "cdpo": {"label_smoothing": 0.1},
    "keep_end": {"max_length": 10, "truncation_mode": "keep_end"},
    "keep_start": {"max_length": 12},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "logits_to_keep": {"use_logits_to_keep": True},
    "reference_free": {"reference_free": True},
}


@pytest.mark.skipif(V1, reason="settings of TRL 0.x")
@pytest.mark.parametrize("name", V0_ONLY)
def test_same_old_settings(name):
    assert_same(*both(**V0_ONLY[name]), *FLOAT32)


@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2", "Granite", "Cohere"])
def test_same_for_other_heads(kind):
    """Soft-capped and scaled logits, tied weights."""
    options = {
        "Gemma2": {"head_dim": 8, "final_logit_softcapping": 10.0, "attn_implementation": "eager"},
        "Granite": {"logits_scaling": 4.0},
        "Cohere": {"logit_scale": 0.25},
        "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    }[kind]
    runs = [run(t, model=tiny.model(kind, **options), max_steps=8) for t in (Theirs, Ours)]
    assert_same(*runs, *FLOAT32)


@pytest.mark.skipif(VERSION < (1, 10), reason="TRL's auxiliary loss as it is since 1.10")
def test_same_mixture_of_experts():
    options = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    }
    runs = [run(t, model=tiny.model("Mixtral", **options), max_steps=8) for t in (Theirs, Ours)]
    assert_same(*runs, *FLOAT32)
    assert all("aux_loss" in row for row in runs[1].history)
