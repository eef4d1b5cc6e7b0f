"""The options of a run, as files, the command line and TRL's own configurations give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_kernels.train import trl_options
from dpo_kernels.train.config import DPOTrainConfig, UserError, load_config, read_config_file


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'learing_rate'; did you mean 'learning_rate'"):
        load_config({"learing_rate": 1e-4})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("batch_size", "per_device_train_batch_size"),
        ("model", "model_name_or_path"),
        ("out", "output_dir"),
        ("lora_rank", "lora_r"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        load_config({name: 1})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.yaml", "beta: 0.1\nbeta: 0.5\n"),
        ("a.yaml", "max-length: 5\nmax_length: 6\n"),
        ("a.json", '{"beta": 0.1, "beta": 0.5}'),
    ],
)
def test_a_name_that_stands_twice(file: str, text: str, tmp_path: Path) -> None:
    """Either parser takes the last one and says nothing."""
    pytest.importorskip("yaml", reason="YAML files need pyyaml")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match="stands there twice"):
        read_config_file(tmp_path / file)
    with pytest.raises(UserError, match="dtype are one option, got 'bfloat16' and 'float32'"):
        load_config({"torch_dtype": "bfloat16", "dtype": "float32"})


def test_columns_as_yaml_would_write_them() -> None:
    assert load_config({"column_mapping": {"prompt": "question"}}).column_mapping == [
        "prompt=question"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "high"}, "beta must be float"),
        ({"max_length": 1.5}, "max_length must be int or null"),
        ({"strict": 1}, "strict must be bool"),
        ({"batch_layout": "rows"}, "layout must be one of"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be at least 1"),
        (
            {"loss_type": "aot", "ld_alpha": 0.5, "gradient_accumulation_steps": 2},
            "'aot' couples the pairs.*ld_alpha weighs tokens",
        ),
        ({"loss_type": "sigmoidal"}, "did you mean"),
        ({"loss_type": "exo_pair"}, "label_smoothing"),
        ({"loss_type": "tdpo1", "ld_alpha": 0.5}, "ld_alpha weighs log-probs"),
        ({"beta": -1.0}, "beta must be"),
        ({"simpo_gamma": 0.7}, "simpo_gamma"),
        ({"backend": "tpu"}, "backend must be one of"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"seed": 10**30}, "seed must be below"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(options)


def test_config_layers_and_files(tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="YAML files need pyyaml")
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-6\nloss_type: ipo\ntorch_dtype: bfloat16\n")
    config = load_config({"beta": 1, "loss_type": "hinge"}, read_config_file(tmp_path / "a.yaml"))
    assert (config.learning_rate, config.beta, config.loss_type) == (1e-6, 1, ["ipo"])
    assert config.dtype == "bfloat16"
    config.save(tmp_path / "c.json")
    assert load_config(read_config_file(tmp_path / "c.json")) == config
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a mapping"):
        read_config_file(tmp_path / "b.json")
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_config_file(tmp_path / "b.json")


# --- options of TRL's ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 2}, "warmup_ratio must be in"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "give one of them"),
        ({"push_to_hub": True}, "push_to_hub=True is an option of TRL's"),
        ({"disable_dropout": False}, "dropout is always off"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch'"),
        ({"eval_strategy": "steps"}, "eval_strategy='steps'"),
        ({"truncation_mode": "keep_middle"}, "truncation_mode must be one of keep_start"),
        ({"use_cpu": True, "device": "cuda"}, "contradicts"),
        ({"neftune_noise_alpha": 5.0}, "policy and reference differ"),
        ({"deepspeed": "ds.json"}, "one device"),
        ({"warmup_rato": 0.1}, "did you mean 'warmup_ratio'"),
    ],
)
def test_options_of_trl(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(options)


def test_trls_options_that_say_what_happens_anyway() -> None:
    taken = {
        "report_to": [],
        "save_strategy": "steps",
        "disable_dropout": True,
        "fp16": False,
        "precompute_ref_log_probs": True,
        "push_to_hub": False,
        "dataloader_num_workers": 0,
        "eval_strategy": "steps",
        "eval_steps": 5,
        "remove_unused_columns": True,
    }
    assert load_config(taken) == load_config({"eval_steps": 5})
    # no name is listed twice, none is an option of ours under another meaning
    names = " ".join(trl_options._REFUSED.values()).split()
    assert len(names) == len(set(names)) == len(trl_options.REASONS)
    ours = set(DPOTrainConfig.__dataclass_fields__)
    assert not (ours - {"bf16"}) & set(names)


def test_a_configuration_as_trl_writes_it() -> None:
    """`DPOConfig().to_dict()`: its defaults mean nothing here, or nothing alone."""
    dumped = {
        "optim": "adamw_torch_fused",
        "label_smoothing_factor": 0.0,
        "log_level": "passive",
        "log_on_each_node": True,
        "logging_nan_inf_filter": True,
        "log_level_replica": "warning",
        "project": "huggingface",
        "eval_do_concat_batches": True,
        "hub_token": "<HUB_TOKEN>",
        "hub_strategy": "every_save",
        "dataloader_in_order": True,
        "length_column_name": "length",
        "do_train": False,
        "ref_model_mixup_alpha": 0.6,
        "ref_model_sync_steps": 512,
        "pad_token": "<PAD_TOKEN>",
        "discopop_tau": 0.05,
        "f_alpha_divergence_coef": 0.5,
        "accelerator_config": {
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": True,
            "use_seedable_sampler": True,
            "non_blocking": False,
            "gradient_accumulation_kwargs": None,
        },
    }
    config = load_config(dumped)
    assert config.optim == "adamw_torch_fused" and config.discopop_tau == 0.05


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rpo_alpha": 1.0}, "sft_weight"),  # the loss's own default was dropped unseen
        ({"rpo_alpha": 0.5}, "rpo_alpha"),
        ({"simpo_gamma": 0.5}, "simpo_gamma"),
        ({"f_alpha_divergence_coef": 0.3}, "alpha_divergence"),
    ],
)
def test_options_of_a_loss_that_was_not_chosen(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        load_config(options)
    if "rpo_alpha" in options:
        assert load_config(options, {"loss_type": ["rpo"]}).rpo_alpha == options["rpo_alpha"]
