"""Triton kernels: NVIDIA GPUs, AMD by compilation; CPU tensors under TRITON_INTERPRET=1 only."""

from .pair_loss import pair_loss_forward
from .scaled_copy import scaled_copy
from .sequence_sum import sequence_sum, sequence_sum_backward
from .token_kl import token_kl, token_kl_backward
from .token_logps import token_logps, token_logps_backward

name = "triton"
ROUNDS = True  # whether a backward may write a gradient narrower than its logits

__all__ = [
    "ROUNDS",
    "name",
    "pair_loss_forward",
    "scaled_copy",
    "sequence_sum",
    "sequence_sum_backward",
    "token_kl",
    "token_kl_backward",
    "token_logps",
    "token_logps_backward",
]
