"""One line that says the fused head is in a trainer's place, and where such lines go."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers.utils import logging as of_transformers

from .. import backends
from ..models.layouts import layout_report
from ..version import __version__
from .at_start import OPTIONS, REPORT

logger = logging.getLogger("dpo_kernels.trl")
# top module of a trainer's class -> its package
_PACKAGES = {"swift": "ms-swift", "llamafactory": "llamafactory", "axolotl": "axolotl"}
_BELOW = ("trl", "transformers", "peft")


def announce(trainer: Any, dtype: torch.dtype, strategy: str | None) -> None:
    """The line, at the first fused step of a trainer, from the main process.

    `strategy`: of the loss; None where it is the framework's own, on our log-probs.
    """
    layout = layout_report(trainer.model) or "layout padded"
    backend = backends.choose(trainer.fused.backend, trainer.accelerator.device, dtype)
    owner = _owner(trainer)
    below = [n for n in _BELOW if n in sys.modules and not owner.startswith(f"{n} ")]
    others = ", ".join(f"{name} {_version(name)}" for name in below)
    text = (
        f"dpo_kernels {__version__}: {type(trainer).__name__} of {owner} ({others}) runs "
        f"the fused head: strategy {strategy or 'log-probs alone (the loss stays its own)'}, "
        f"{layout}, backend {backend}"
    )
    say(trainer, logging.INFO, text)
    report(f"fused {text}")


def say(trainer: Any, level: int, text: str) -> None:
    """A line of the logger "dpo_kernels.trl", from the main process, that is seen.

    INFO is not shown by default, neither by Python's logging nor by transformers', and a patch
    that does nothing looks like one that works; so the line goes out where transformers shows its
    warnings: to the handlers there are, or stderr where none takes it. A level above it on
    "dpo_kernels" or "dpo_kernels.trl", or transformers' verbosity above WARNING, silences it.
    """
    levels = (logging.getLogger(name).level for name in ("dpo_kernels.trl", "dpo_kernels"))
    least = max(next((x for x in levels if x), logging.INFO), logging.root.manager.disable + 1)
    if least > level or of_transformers.get_verbosity() > logging.WARNING:
        return
    if not trainer.is_world_process_zero():
        return
    record = logger.makeRecord(logger.name, level, __file__, 0, text, (), None)
    if _is_shown(record):
        logger.handle(record)
    else:
        logging.StreamHandler().handle(record)


def opt_out(trainer: Any, check: str) -> str:
    """What to write to leave out a check of `FusedOptions`, wherever this trainer comes from."""
    home = getattr(trainer, "_dpo_home", None)
    own = f"fused={{'{check}': False}}"
    if home is None:
        return own
    if OPTIONS in os.environ:
        return f"dpo-kernels run --no_{check} -- ..."
    patch = f"{home.patch.removesuffix(')')}{check}=False)"
    return f"{own} or {patch}" if home.patch == "patch_trl()" else patch


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a handler takes it; axolotl's takes no INFO but its own."""
    above: logging.Logger | None = logger
    while above is not None and logger.hasHandlers():
        if any(h.level <= record.levelno and h.filter(record) for h in above.handlers):
            return True
        above = above.parent if above.propagate else None
    return False


def report(line: str) -> None:
    """Leave a line for `dpo-kernels run`, below which this process may be."""
    if path := os.environ.get(REPORT):
        with open(path, "a") as file:
            file.write(line + "\n")


def _owner(trainer: Any) -> str:
    """The package whose trainer this is, with its version."""
    for base in type(trainer).__mro__:
        name = _PACKAGES.get(base.__module__.split(".")[0])
        if name is not None:
            return f"{name} {_version(name)}"
    return f"trl {_version('trl')}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown)"
