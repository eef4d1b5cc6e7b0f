"""What a run asks of its machine: memory at its peak, a compiled model."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..models.structure import base_model_of, trunk_of
from .config import DPOTrainConfig


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what torch allocated, on a CPU the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def compiled(model: Any, config: DPOTrainConfig) -> Iterator[None]:
    """The model below its head compiled, where `torch_compile` asks for it.

    The head is left out: its kernels are ours. So are completions, whose shapes change with every
    token.
    """
    if not config.torch_compile:
        yield
        return
    trunk: Any = trunk_of(base_model_of(model))
    before = trunk._compiled_call_impl
    trunk.compile(
        backend=config.torch_compile_backend or "inductor",
        mode=config.torch_compile_mode,
        dynamic=True,
    )
    try:
        yield
    finally:
        trunk._compiled_call_impl = before
