"""Which backends exist, which is chosen, and why another is absent.

A backend is a module with one function per op: `token_logps`, `token_logps_backward`, `token_kl`,
`token_kl_backward`, `sequence_sum`, `sequence_sum_backward`, `pair_loss`. `torch` is the
specification; the others are held to it by the tests. What a backend lacks stands in `LACKS`.
Over logits sharded by vocabulary a backend is wrapped (`vocab_shards.py`) under a name of its own.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch as _torch  # the name `torch` here is the submodule, the backend

from .. import requirements
from . import openmp

openmp.share()  # before anything imports _C

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
        return _why_no_cuda()
    if name == "triton":
        if reason := requirements.why_not("triton"):
            return reason
        if not _torch.cuda.is_available() and not interpreted():
            return "no GPU is visible to torch (and TRITON_INTERPRET=1 is not set)"
    if name == "cpu":
        return _why_no_module()
    return ""


def _why_no_module() -> str:
    try:
        importlib.import_module("dpo_kernels._C")
    except ImportError as error:
        built = sorted(path.name for path in Path(__file__).parent.parent.glob("_C.*.so"))
        if not built:
            return (
                "the compiled module dpo_kernels._C is missing: install a wheel, or build it with "
                "'pip install .' in the source tree"
            )
        if not any(name == f"_C{suffix}" for name in built for suffix in EXTENSION_SUFFIXES):
            return (
                f"the compiled module is for another Python ({', '.join(built)}; this one takes "
                f"_C{EXTENSION_SUFFIXES[0]}): install dpo-kernels with {sys.executable}"
            )
        return f"the compiled module dpo_kernels._C does not load: {error}"
    return ""


def _why_no_cuda() -> str:
    if reason := _why_no_module():
        return reason
    module = importlib.import_module("dpo_kernels.backends.cuda")
    if module.on_host is not None:
        return ""
    built = module.architectures()
    if not built:
        return "this build has no CUDA kernels (nvcc was not found when it was built)"
    if not _torch.cuda.is_available():
        return "no GPU is visible to torch"
    if _torch.version.hip:
        return "the GPU is not NVIDIA's: use backend='triton'"
    major, minor = _torch.cuda.get_device_capability()
    if not module.code_for(major, minor):
        return f"this build has code for sm_{', sm_'.join(built)}; the GPU is sm_{major}{minor}"
    return ""


def interpreted() -> bool:
    """Whether Triton runs its interpreter, where it takes CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Preference:
    """Which backends `backend=None` prefers for an op on a kind of device, best first."""

    device: str
    op: str  # "*": every op
    backends: tuple[str, ...]
    measured: str  # where this comes from


# The first row that fits decides.
PREFERENCES = (
    Preference("cuda", "token_kl", ("triton", "torch"), "cuda has no kernel for it"),
    Preference("cuda", "*", ("cuda", "triton", "torch"), "make gpu-check: forward, backward"),
    Preference("cpu", "*", ("cpu",), "benchmarks: the suites from logits, every case"),
)
# Ops that a backend has no kernel for, and what they are: asked for there they are refused.
LACKS = {("cuda", "token_kl"): "the KL of reference and policy a token (tdpo1, tdpo2)"}


def choose(
    backend: str | None,
    device: _torch.device,
    dtype: _torch.dtype,
    op: str = "token_logps",
) -> str:
    """The backend of `op` for tensors of `dtype` on `device`; `backend` is the user's wish or None.

    Raises `ValueError` where the wish cannot be met; nothing falls back silently.
    """
    if backend is None:
        return "torch" if dtype == _torch.float64 else _preferred(device.type, op)
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {NAMES} or None, got {backend!r}")
    if backend == "torch":
        return backend
    if (backend, op) in LACKS:
        raise ValueError(
            f"backend {backend!r} has no kernel for {LACKS[backend, op]}; use backend='triton' or "
            "'torch', or None"
        )
    if dtype not in FUSED_DTYPES:
        raise ValueError(
            f"backend {backend!r} takes fp32, bf16 and fp16, got {dtype}; use backend='torch'"
        )
    takes_cpu = backend == "cpu" or (backend in ("triton", "cuda") and _on_host(backend))
    if (device.type == "cuda" and backend == "cpu") or (device.type == "cpu" and not takes_cpu):
        raise ValueError(f"backend {backend!r} does not take tensors on {device}")
    return backend


@functools.cache
def usable(name: str) -> bool:
    """Whether backend `name` can run here; looked at once."""
    return not _why_not(name)


def _preferred(device: str, op: str) -> str:
    for row in PREFERENCES:
        if row.device == device and row.op in (op, "*"):
            # A lone candidate is taken unseen: where it is absent, loading it says why.
            lone = len(row.backends) == 1
            return next(name for name in row.backends if lone or usable(name))
    return "torch"


def _on_host(backend: str) -> bool:
    """Whether a GPU's backend takes CPU tensors here, as in the tests."""
    if backend == "triton":
        return interpreted()
    module = sys.modules.get("dpo_kernels.backends.cuda")
    return module is not None and module.on_host is not None


_sharded: dict[str, Any] = {}  # by the names that `over_shards` gives


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a backend; `RuntimeError` with the reason if it cannot run here."""
    if name in _sharded:
        return _sharded[name]
    if name not in NAMES:
        raise ValueError(f"backend must be one of {NAMES}, got {name!r}")
    reason = _why_not(name)
    if reason:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return importlib.import_module(f"dpo_kernels.backends.{name}")


def over_shards(name: str, shards: Any) -> str:
    """The name by which ops find backend `name` over logits of `shards` (`VocabShards`)."""
    if name not in shards.names:
        from .vocab_shards import ShardedRows

        shards.names[name] = f"{name}@{len(_sharded)}"
        _sharded[shards.names[name]] = ShardedRows(load(name), shards)
    return shards.names[name]


def base(name: str) -> str:
    """The backend behind a name of `over_shards`; any other is its own."""
    return name.partition("@")[0]


def widest(name: str) -> int | None:
    """Columns of the largest shard behind a name of `over_shards`, None of any other."""
    return _sharded[name].shards.widest if name in _sharded else None
