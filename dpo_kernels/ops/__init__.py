"""The ops: schema, checks, fake implementation and backward of each, in one file an op."""

from .linear_logps import linear_logps
from .pair_loss import pair_loss
from .sequence_sum import sequence_sum
from .small_batch import COLUMNS, small_batch
from .token_logps import STATS, TokenLogps, check_stats, token_logps

__all__ = [
    "COLUMNS",
    "STATS",
    "TokenLogps",
    "check_stats",
    "linear_logps",
    "pair_loss",
    "sequence_sum",
    "small_batch",
    "token_logps",
]
