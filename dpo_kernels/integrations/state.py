"""Beta-DPO's running mean and deviation of the margin, saved with a Trainer's checkpoint.

Each rank has its own, as it has its own state of the random numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
    """Makers of a Trainer's two methods that write and read what training needs to go on."""

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

    return {"_save_optimizer_and_scheduler": save, "_load_optimizer_and_scheduler": load}
