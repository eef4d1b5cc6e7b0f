"""Fused kernels for Direct Preference Optimization.

    L = -log sigmoid(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)])

The log-probs come straight from logits (`fused_dpo_loss`) or from hidden states and the lm_head
weight (`fused_linear_dpo_loss`); the softmax is never materialised. See README.md.
"""

from .requirements import torch_problem as _torch_problem
from .version import __version__

if (_problem := _torch_problem()) is None:
    from . import backends, losses, memory
    from .dpo import fused_dpo_loss, preference_loss, sequence_logps
    from .linear import fused_linear_dpo_loss, linear_sequence_logps
    from .modules import FusedDPOLoss, FusedLinearDPOLoss
    from .pairs import DPOOutput
else:
    # Without torch only the version and `dpo-kernels doctor` are of use: any other name raises.
    # Not a plain `def`: for type checkers it would make every name of the package exist.
    def _raise(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(f"dpo_kernels.{name} needs torch; {_problem}") from _problem

    globals()["__getattr__"] = _raise

__all__ = [
    "DPOOutput",
    "FusedDPOLoss",
    "FusedLinearDPOLoss",
    "__version__",
    "backends",
    "fused_dpo_loss",
    "fused_linear_dpo_loss",
    "linear_sequence_logps",
    "losses",
    "memory",
    "preference_loss",
    "sequence_logps",
]
