"""Clients' own training commands below `dpo-kernels run`: the run that they make without it.

Minutes: behind `make test-integrations`, each client in an environment of its own (a client that is
absent is skipped).
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import client_runs
import pytest
import yaml

EXACT = 2e-5
if "CLIENTS" not in os.environ:
    pytest.skip("minutes: make test-integrations", allow_module_level=True)


def needs(package: str) -> Any:
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"pip install {package}")


def same_run(case: str, command: list[str], folder: Path, calls: int = 1) -> dict:
    """The command as it is and fused: the same losses, and every step was fused."""
    plain = client_runs.run(command, folder, fused=False)
    fused = client_runs.run(command, folder, fused=True)
    assert plain["fused_calls"] == 0 and plain["trunk"] == fused["trunk"]
    assert fused["fused_calls"] == calls * len(fused["losses"])
    assert len(re.findall("runs the fused head: strategy", fused["log"])) == 1
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
}


@needs("llamafactory")
@pytest.mark.parametrize("case", LLAMAFACTORY)
def test_llamafactory(case, tmp_path):
    command = llamafactory(tmp_path, **LLAMAFACTORY[case])
    runs = same_run(f"llamafactory-cli train: {case}", command, tmp_path)
    assert client_runs.worst(runs["plain"]["losses"], runs["fused"]["losses"]) <= EXACT
    assert runs["fused"]["trunk"] == ["torch.float32"]
    for a, b in zip(runs["plain"]["evaluations"], runs["fused"]["evaluations"], strict=True):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= EXACT for k in a)


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
        "import sys\nfrom dpo_kernels.integrations import patch_trl\npatch_trl()\n"
        "from llamafactory.cli import main\nmain()\n"
    )
    done = client_runs.run(["python", str(script), *command[1:]], tmp_path, fused=False, ok=False)
    assert "CustomDPOTrainer.concatenated_forward" in done["log"]
    assert "patch_llamafactory()" in done["log"]
