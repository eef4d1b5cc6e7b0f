"""The ops: schema, checks, fake implementation and backward of each, in one file an op."""

from .autocast import autocast_dtype, no_autocast
from .linear_head import LinearInputs
from .linear_logps import budget_of, choose_strategy, rows_scored
from .pair_loss import pair_loss
from .plan import Plan, chunks_of_pairs, plan_of
from .sequence_sum import sequence_sum
from .token_logps import (
    STATS,
    TokenLogps,
    check_rows,
    check_stats,
    joint_dtype,
    read_rows,
    token_logps,
)

__all__ = [
    "STATS",
    "LinearInputs",
    "Plan",
    "TokenLogps",
    "autocast_dtype",
    "budget_of",
    "check_rows",
    "check_stats",
    "choose_strategy",
    "chunks_of_pairs",
    "joint_dtype",
    "no_autocast",
    "pair_loss",
    "plan_of",
    "read_rows",
    "rows_scored",
    "sequence_sum",
    "token_logps",
]
