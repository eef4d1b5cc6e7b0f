"""Which backends exist, which is chosen, and why another is absent.

A backend is a module with one function per op: `token_logps`, `token_logps_backward`,
`sequence_sum`, `sequence_sum_backward`, `pair_loss`. `torch` is the specification; the others are
held to it by the tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch as _torch  # the name `torch` here is the submodule, the backend

NAMES = ("cuda", "triton", "cpu", "torch")
FUSED_DTYPES = (_torch.float32, _torch.bfloat16, _torch.float16)


class Availability(tuple[str, ...]):
    """The usable backends, as a tuple of names; `why_not[name]` says why another is absent."""

    why_not: dict[str, str]

    def __new__(cls, usable: tuple[str, ...], why_not: dict[str, str]) -> Availability:
        self = super().__new__(cls, usable)
        self.why_not = why_not
        return self

    def __repr__(self) -> str:
        return f"{tuple(self)!r}, absent: {self.why_not!r}"


def available() -> Availability:
    """The backends usable here and, in `.why_not`, why the others are not."""
    why_not = {name: reason for name in NAMES if (reason := _why_not(name))}
    return Availability(tuple(n for n in NAMES if n not in why_not), why_not)


def _why_not(name: str) -> str:
    """Why backend `name` cannot run here; empty if it can."""
    if name == "cuda":
        return "this version has no CUDA C++ kernels yet; on GPUs use backend='triton'"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if not _torch.cuda.is_available() and not interpreted():
            return "no GPU is visible to torch (and TRITON_INTERPRET=1 is not set)"
    if name == "cpu":
        try:
            importlib.import_module("dpo_kernels._C")
        except ImportError as error:
            return f"the compiled module dpo_kernels._C does not load: {error}"
    return ""


def interpreted() -> bool:
    """Whether Triton runs its interpreter, where it takes CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose(backend: str | None, device: _torch.device, dtype: _torch.dtype) -> str:
    """The backend for tensors of `dtype` on `device`; `backend` is the user's wish or None.

    Raises `ValueError` where the wish cannot be met; nothing falls back silently.
    """
    if backend is None:
        if dtype == _torch.float64:
            return "torch"
        return {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {NAMES} or None, got {backend!r}")
    if backend == "torch":
        return backend
    if dtype not in FUSED_DTYPES:
        raise ValueError(
            f"backend {backend!r} takes fp32, bf16 and fp16, got {dtype}; use backend='torch'"
        )
    takes_cpu = backend == "cpu" or (backend == "triton" and interpreted())
    if (device.type == "cuda" and backend == "cpu") or (device.type == "cpu" and not takes_cpu):
        raise ValueError(f"backend {backend!r} does not take tensors on {device}")
    return backend


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a backend; `RuntimeError` with the reason if it cannot run here."""
    reason = _why_not(name)
    if reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return importlib.import_module(f"dpo_kernels.backends.{name}")
