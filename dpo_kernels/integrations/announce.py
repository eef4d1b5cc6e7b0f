"""One line that says the fused head is in TRL's place."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers.utils import logging as of_transformers

from .. import backends
from ..models.layouts import layout_report
from ..version import __version__

logger = logging.getLogger("dpo_kernels.trl")


def announce(trainer: Any, dtype: torch.dtype, strategy: str | None) -> None:
    """The line, at the first fused step of a trainer, from the main process.

    It is INFO of the logger "dpo_kernels.trl". INFO is not shown by default, neither by Python's
    logging nor by transformers', and a patch that does nothing looks like one that works; so the
    line goes out where transformers shows its warnings: to the handlers there are, or stderr
    where there is none. A level above INFO on "dpo_kernels" or "dpo_kernels.trl", or transformers'
    verbosity above WARNING, silences it.
    """
    levels = (logging.getLogger(name).level for name in ("dpo_kernels.trl", "dpo_kernels"))
    level = next((x for x in levels if x), logging.INFO)
    quiet = max(level, logging.root.manager.disable + 1) > logging.INFO
    if quiet or of_transformers.get_verbosity() > logging.WARNING:
        return
    if not trainer.is_world_process_zero():
        return
    backend = backends.choose(trainer.fused.backend, trainer.accelerator.device, dtype)
    text = (
        f"dpo_kernels {__version__}: {type(trainer).__name__} of trl {_version('trl')} "
        f"(transformers {_version('transformers')}) runs the fused head: strategy "
        f"{strategy or 'log-probs alone (the loss is TRL 0.x)'}, backend {backend}"
    )
    if report := layout_report(trainer.model):
        text += f"; {report}"
    record = logger.makeRecord(logger.name, logging.INFO, __file__, 0, text, (), None)
    if logger.hasHandlers():
        logger.handle(record)
    else:
        logging.StreamHandler().handle(record)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown)"
