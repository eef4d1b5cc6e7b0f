"""Fused kernels for Direct Preference Optimization.

    L = -log sigmoid(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)])

The log-probs come straight from logits (`fused_dpo_loss`) or from hidden states and the lm_head
weight (`fused_linear_dpo_loss`); the softmax is never materialised. See README.md.
"""

import contextlib as _contextlib
import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from . import backends, losses, memory, parallel
    from .front import (
        DPOOutput,
        FusedDPOLoss,
        FusedLinearDPOLoss,
        UnpairedOutput,
        fused_dpo_loss,
        fused_linear_dpo_loss,
        fused_linear_unpaired_loss,
        fused_unpaired_loss,
        kl_baseline,
        linear_sequence_logps,
        preference_loss,
        sequence_logps,
        unpaired_loss,
    )

__all__ = [
    "DPOOutput",
    "FusedDPOLoss",
    "FusedLinearDPOLoss",
    "UnpairedOutput",
    "__version__",
    "backends",
    "fused_dpo_loss",
    "fused_linear_dpo_loss",
    "fused_linear_unpaired_loss",
    "fused_unpaired_loss",
    "kl_baseline",
    "linear_sequence_logps",
    "losses",
    "memory",
    "parallel",
    "preference_loss",
    "sequence_logps",
    "unpaired_loss",
]
_MODULES = ("backends", "losses", "memory", "parallel")


def _load(name: str) -> object:
    """A public name or a module of the package, when it is first asked for."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in __all__:
        from .requirements import torch_problem

        if problem := torch_problem():
            raise ImportError(f"dpo_kernels.{name} needs torch; {problem}") from problem
        if name not in _MODULES:
            front = _importlib.import_module(".front", __name__)
            globals().update({public: getattr(front, public) for public in front.__all__})
            return globals()[name]
    if name == "_C":  # it takes the OpenMP that torch has loaded
        _load("backends")
    try:
        return _importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


# `dpo-kernels --version`, or a mistake in its options, must not wait for torch: where the process
# has not imported it, the names come when they are asked for. Not a plain `def __getattr__`: for
# type checkers it would make every name of the package exist.
globals()["__getattr__"] = _load
if "torch" in _sys.modules:
    with _contextlib.suppress(ImportError):  # of a torch that cannot be used: each name says so
        for _name in (*_MODULES, "DPOOutput"):
            _load(_name)
