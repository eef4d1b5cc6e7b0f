"""What transformers' Trainer and TRL's trainers share: the head check, beta-DPO's state, columns.

Beta-DPO's running mean and deviation of the margin are saved with a Trainer's checkpoint. Each rank
has its own, as it has its own state of the random numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..losses import fresh_state
from ..models.head_check import check_head
from ..models.structure import base_model_of
from .rows import ROW_OPTIONS


def check_head_of(trainer: Any) -> None:
    """The head check of a trainer's policy, where no framework has cut it up."""
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        policy = base_model_of(trainer.accelerator.unwrap_model(trainer.model))
        with trainer.accelerator.autocast():
            check_head(policy, trainer.fused.backend)


def model_dtype(trainer: Any) -> torch.dtype:
    """The dtype in which the model computes; of fp16 too it is bf16 that is said.

    ms-swift asks for fp16 with an fp32 model on a CPU, where accelerate leaves it at fp32.
    """
    accelerator = trainer.accelerator
    mixed = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if not mixed:
        with accelerator.autocast():
            mixed = torch.is_autocast_enabled(accelerator.device.type)
    if mixed and accelerator.mixed_precision in ("fp16", "bf16"):
        return torch.bfloat16
    return base_model_of(accelerator.unwrap_model(trainer.model)).dtype


def loss_state(trainer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`options` with the state that their loss keeps; an evaluation leaves it as it is."""
    if not fresh_state(options.get("loss_type", "sigmoid")):
        return options
    state = trainer._beta_dpo_state = trainer._beta_dpo_state.to(trainer.accelerator.device)
    return {**options, "beta_dpo_state": state if trainer.model.training else state.clone()}


def _file(trainer: Any, folder: str) -> Path:
    rank = f"_{trainer.args.process_index}" if trainer.args.world_size > 1 else ""
    return Path(folder) / f"beta_dpo_state{rank}.json"


def save_state(trainer: Any, folder: str) -> None:
    """Write the state, where training has made one."""
    if bool(trainer._beta_dpo_state.any()):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Python writes a float so that it reads back as itself.
        _file(trainer, folder).write_text(json.dumps(trainer._beta_dpo_state.tolist()))


def load_state(trainer: Any, folder: str | None) -> None:
    """Read what `save_state` wrote; nothing where there is none."""
    if folder is not None and (file := _file(trainer, folder)).is_file():
        values = json.loads(file.read_text())
        trainer._beta_dpo_state = torch.tensor(values, dtype=torch.float64)


def overrides() -> dict[str, Callable[[Any], Any]]:
    """Makers of the methods that TRL's trainers of any version get: columns and state."""

    def signature(original: Callable) -> Callable:
        @functools.wraps(original)
        def _set_signature_columns_if_needed(self: Any) -> None:
            original(self)
            self._signature_columns += [c for c in ROW_OPTIONS if c not in self._signature_columns]

        return _set_signature_columns_if_needed

    def save(original: Callable) -> Callable:
        @functools.wraps(original)
        def _save_optimizer_and_scheduler(self: Any, output_dir: Any, *args: Any) -> None:
            original(self, output_dir, *args)
            save_state(self, output_dir)

        return _save_optimizer_and_scheduler

    def load(original: Callable) -> Callable:
        @functools.wraps(original)
        def _load_optimizer_and_scheduler(self: Any, checkpoint: Any, *args: Any) -> None:
            original(self, checkpoint, *args)
            load_state(self, checkpoint)

        return _load_optimizer_and_scheduler

    return {
        "_set_signature_columns_if_needed": signature,
        "_save_optimizer_and_scheduler": save,
        "_load_optimizer_and_scheduler": load,
    }
