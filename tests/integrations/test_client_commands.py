"""Clients' own training commands below `dpo-kernels run`: the run that they make without it.

Minutes: behind `make test-integrations`, each client in an environment of its own, which the
variable CLIENTS names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import client_runs
import pytest
import yaml

EXACT = 2e-5
CLIENTS = os.environ.get("CLIENTS", "").split()
if not CLIENTS:
    pytest.skip("minutes: make test-integrations", allow_module_level=True)


def needs(client: str) -> Any:
    return pytest.mark.skipif(client not in CLIENTS, reason=f"CLIENTS has no {client}")


def same_evaluations(runs: dict, allowed: float = EXACT) -> None:
    for a, b in zip(runs["plain"]["evaluations"], runs["fused"]["evaluations"], strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= allowed for k in a)


def same_run(case: str, command: list[str], folder: Path, calls: int = 1) -> dict:
    """The command as it is and fused: the same losses, and every step was fused."""
    plain = client_runs.run(command, folder, fused=False)
    fused = client_runs.run(command, folder, fused=True)
    assert plain["fused_calls"] == 0 and plain["trunk"] == fused["trunk"]
    assert any("eval_loss" in x for x in fused["evaluations"]) is ("evaluation" in case)
    assert fused["fused_calls"] == calls * len(fused["losses"])
    assert "dpo-kernels run: dpo_kernels" in fused["log"]
    assert "runs the fused head: strategy" in fused["log"]
    client_runs.record(case, plain, fused)
    return {"plain": plain, "fused": fused}


# --- LLaMA-Factory ---


def llamafactory(folder: Path, **options: Any) -> list[str]:
    rows = [{"instruction": r["prompt"], **r} for r in client_runs.pairs()]
    client_runs.write_json(folder / "data" / "pairs.json", rows)
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    client_runs.write_json(folder / "data" / "dataset_info.json", info)
    config = {
        "model_name_or_path": client_runs.write_model(folder / "model"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "pairs",
        "dataset_dir": str(folder / "data"),
        "template": "empty",
        "cutoff_len": 256,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
        "overwrite_cache": True,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "pref_beta": 0.1,
    }
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump({**config, **options}))
    return ["llamafactory-cli", "train", str(file)]


LLAMAFACTORY = {
    "full": {},
    "evaluation": {"val_size": 0.2, "eval_strategy": "epoch", "per_device_eval_batch_size": 4},
    "LoRA": {"finetuning_type": "lora", "lora_target": "all", "learning_rate": 5e-3},
    "LoRA, ld_alpha, pref_ftx": {"finetuning_type": "lora", "ld_alpha": 0.3, "pref_ftx": 0.5},
    "LoRA, orpo": {"finetuning_type": "lora", "pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo", "simpo_gamma": 0.3},
}


@needs("llamafactory")
@pytest.mark.parametrize("case", LLAMAFACTORY)
def test_llamafactory(case, tmp_path):
    command = llamafactory(tmp_path, **LLAMAFACTORY[case])
    runs = same_run(f"llamafactory-cli train: {case}", command, tmp_path)
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= EXACT
    assert runs["fused"]["trunk"] == ["torch.float32"]
    same_evaluations(runs)


@needs("llamafactory")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_llamafactory_in_bfloat16(kind, tmp_path):
    exact = client_runs.run(llamafactory(tmp_path, finetuning_type=kind), tmp_path, fused=False)
    command = llamafactory(tmp_path, finetuning_type=kind, bf16=True)
    runs = same_run(f"llamafactory-cli train: {kind}, bf16", command, tmp_path)
    assert runs["fused"]["trunk"] == ["torch.bfloat16"]
    scatter = client_runs.worst(exact["losses"], runs["plain"]["losses"])
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= 2 * scatter


@needs("llamafactory")
def test_llamafactory_patched_by_trl_alone_is_told(tmp_path):
    """LLaMA-Factory overrides what `patch_trl` exchanges: the first step says so and stops."""
    command = llamafactory(tmp_path, max_steps=2)
    script = tmp_path / "train.py"
    script.write_text(
        "import llamafactory.train.dpo.trainer\n"
        "from dpo_kernels.integrations import patch_trl\npatch_trl()\n"
        "from llamafactory.cli import main\nmain()\n"
    )
    done = client_runs.run(["python", str(script), *command[1:]], tmp_path, fused=False, ok=False)
    assert "CustomDPOTrainer.concatenated_forward" in done["log"]
    assert "patch_llamafactory()" in done["log"]


# --- ms-swift ---


def swift(folder: Path, *options: str) -> list[str]:
    model = client_runs.write_model(folder / "model")
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["chosen"]},
                ],
                "rejected_response": row["rejected"],
            }
        )
        for row in client_runs.pairs()
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    given = {
        "rlhf_type": "dpo",
        "model": model,
        "model_type": "llama",
        "template": "dummy",
        "dataset": folder / "pairs.jsonl",
        "tuner_type": "full",
        "torch_dtype": "float32",
        "output_dir": folder / "out",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": "true",
        "beta": 0.1,
        "max_length": 256,
        "split_dataset_ratio": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "check_model": "false",
        "attn_impl": "sdpa",
    }
    words = [str(x) for name, value in given.items() for x in (f"--{name}", value)]
    return ["swift", "rlhf", *words, *options]


SWIFT = {
    "full, ld_alpha, rpo_alpha": ["--ld_alpha", "0.3", "--rpo_alpha", "0.5"],
    "LoRA, two losses": ["--tuner_type", "lora", "--loss_type", "sigmoid", "ipo"],
    "LoRA, bf16": ["--tuner_type", "lora", "--bf16", "true", "--torch_dtype", "bfloat16"],
    "LoRA, evaluation": [
        *("--tuner_type", "lora", "--split_dataset_ratio", "0.2"),
        *("--eval_strategy", "steps", "--eval_steps", "5", "--per_device_eval_batch_size", "4"),
    ],
}


@needs("swift")
@pytest.mark.parametrize("case", SWIFT)
def test_swift(case, tmp_path):
    command = swift(tmp_path, *SWIFT[case])
    runs = same_run(f"swift rlhf: {case}", command, tmp_path)
    half = "bf16" in case
    assert runs["fused"]["trunk"] == ["torch.bfloat16" if half else "torch.float32"]
    allowed = EXACT
    if half:  # as far as bf16 itself is from fp32
        exact = client_runs.run(swift(tmp_path, *SWIFT[case][:2]), tmp_path, fused=False)
        allowed = 2 * client_runs.worst(exact["losses"], runs["plain"]["losses"])
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= allowed
    same_evaluations(runs, allowed)


@needs("swift")
def test_swift_with_packing_is_refused(tmp_path):
    command = swift(tmp_path, "--padding_free", "true", "--attn_impl", "flash_attn")
    done = client_runs.run(command, tmp_path, fused=True, ok=False)
    assert "does not take padding_free=true" in done["log"] or "flash" in done["log"]


@needs("swift")
def test_swift_patched_by_trl_alone_is_told(tmp_path):
    """Patched before ms-swift is imported, which overrides what was exchanged."""
    command = swift(tmp_path, "--max_steps", "2")
    script = tmp_path / "train.py"
    script.write_text(
        "from dpo_kernels.integrations import patch_trl\npatch_trl()\n"
        "from swift.pipelines import rlhf_main\nrlhf_main()\n"
    )
    done = client_runs.run(["python", str(script), *command[2:]], tmp_path, fused=False, ok=False)
    assert "DPOTrainer.get_batch_samples" in done["log"]
    assert "BypassedError" in done["log"] and "patch_swift()" in done["log"]


# --- axolotl ---


@needs("axolotl")
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_axolotl(adapter, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in client_runs.pairs()))
    config = {
        "base_model": client_runs.write_model(tmp_path / "model"),
        "rl": "dpo",
        "datasets": [
            {"path": str(file), "ds_type": "json", "type": "chatml.prompt_pairs", "split": "train"}
        ],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "sequence_len": 256,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
        "num_epochs": 1,
        "seed": 3,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "learning_rate": 1e-3,
        "output_dir": str(tmp_path / "out"),
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "val_set_size": 0,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "special_tokens": {"pad_token": "<pad>"},
        "use_cpu": True,
    }
    if adapter:
        config |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8}
        config |= {"lora_target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    command = ["axolotl", "train", str(tmp_path / "train.yaml"), "--launcher", "python"]
    runs = same_run(f"axolotl train: {adapter or 'full'}", command, tmp_path)
    assert runs["fused"]["trunk"] == ["torch.float32"]
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= EXACT


# --- TRL's command line ---


def trl_dpo(folder: Path, *options: str) -> list[str]:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(row) for row in client_runs.pairs())
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text(lines)
    given = {
        "model_name_or_path": client_runs.write_model(folder / "model"),
        "dataset_name": folder / "data",
        "output_dir": folder / "out",
        "per_device_train_batch_size": 4,
        "max_steps": 10,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": "true",
        "bf16": "false",
        "max_length": 256,
        "dtype": "float32",
        "gradient_checkpointing": "false",
    }
    words = [str(x) for name, value in given.items() for x in (f"--{name}", value)]
    return ["trl", "dpo", *words, *options]


TRL = {
    "evaluation": ["--eval_strategy", "steps", "--eval_steps", "5", "--save_strategy", "no"],
    "LoRA, precomputed reference": [
        *("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"),
        *("--precompute_ref_log_probs", "true", "--save_strategy", "no"),
    ],
    "gradient checkpointing": ["--gradient_checkpointing", "true", "--save_strategy", "no"],
}


@needs("trl")
@pytest.mark.parametrize("case", TRL)
def test_trl(case, tmp_path):
    runs = same_run(f"trl dpo: {case}", trl_dpo(tmp_path, *TRL[case]), tmp_path)
    assert runs["fused"]["trunk"] == ["torch.float32"]
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= EXACT
    same_evaluations(runs)


@needs("trl")
def test_trl_in_bfloat16(tmp_path):
    exact = client_runs.run(trl_dpo(tmp_path, "--save_strategy", "no"), tmp_path, fused=False)
    command = trl_dpo(tmp_path, "--bf16", "true", "--save_strategy", "no")
    runs = same_run("trl dpo: bf16", command, tmp_path)
    assert runs["fused"]["trunk"] == ["torch.bfloat16"]
    scatter = client_runs.worst(exact["losses"], runs["plain"]["losses"])
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= 2 * scatter


@needs("trl")
def test_trl_checkpoints_and_resumes(tmp_path):
    """Stopped after six steps and resumed, fused: the steps that a whole run makes, TRL's own."""
    saved = ("--save_strategy", "steps", "--save_steps", "6")
    plain = client_runs.run(trl_dpo(tmp_path, "--save_strategy", "no"), tmp_path, fused=False)
    whole = client_runs.run(trl_dpo(tmp_path, *saved), tmp_path, fused=True)
    assert client_runs.worst(plain["losses"], whole["losses"]) <= EXACT
    checkpoint = str(tmp_path / "out" / "checkpoint-6")
    rest = trl_dpo(tmp_path, *saved, "--resume_from_checkpoint", checkpoint)
    resumed = client_runs.run(rest, tmp_path, fused=True)
    assert resumed["fused_calls"] == len(resumed["losses"]) == 4
    assert client_runs.worst(plain["losses"][6:], resumed["losses"]) <= EXACT
