"""Fused kernels for Direct Preference Optimization.

    L = -log sigmoid(beta [(log pi/pi_ref)(chosen) - (log pi/pi_ref)(rejected)])

The log-probs come straight from logits (`fused_dpo_loss`) or from hidden states and the lm_head
weight (`fused_linear_dpo_loss`); the softmax is never materialised. See README.md.
"""

from . import backends, losses, memory
from .dpo import fused_dpo_loss, preference_loss, sequence_logps
from .linear import fused_linear_dpo_loss, linear_sequence_logps
from .modules import FusedDPOLoss, FusedLinearDPOLoss
from .pairs import DPOOutput
from .version import __version__

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
