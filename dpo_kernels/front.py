"""The functions and classes that the package offers, in one place; importing this needs torch."""

from .dpo import fused_dpo_loss, preference_loss, sequence_logps
from .linear_dpo import fused_linear_dpo_loss, linear_sequence_logps
from .loss.from_pairs import DPOOutput
from .modules import FusedDPOLoss, FusedLinearDPOLoss
from .unpaired import (
    UnpairedOutput,
    fused_linear_unpaired_loss,
    fused_unpaired_loss,
    kl_baseline,
    unpaired_loss,
)

__all__ = [
    "DPOOutput",
    "FusedDPOLoss",
    "FusedLinearDPOLoss",
    "UnpairedOutput",
    "fused_dpo_loss",
    "fused_linear_dpo_loss",
    "fused_linear_unpaired_loss",
    "fused_unpaired_loss",
    "kl_baseline",
    "linear_sequence_logps",
    "preference_loss",
    "sequence_logps",
    "unpaired_loss",
]
