"""The ops: schema, checks, fake implementation and backward of each, in one file an op."""

from ..inputs import checks
from .autocast import autocast_dtype, no_autocast
from .linear_head import LinearInputs
from .linear_kl import linear_kl
from .linear_logps import budget_of, check_head, choose_strategy, linear_logps, rows_scored
from .pair_loss import pair_loss
from .plan import Plan, chunks_of_pairs, plan_of
from .sequence_sum import sequence_sum
from .token_kl import TokenKL, token_kl
from .token_logps import STATS, TokenLogps, check_stats, check_writable, token_logps

__all__ = [
    "STATS",
    "LinearInputs",
    "Plan",
    "TokenKL",
    "TokenLogps",
    "autocast_dtype",
    "budget_of",
    "check_head",
    "check_stats",
    "check_writable",
    "checks",
    "choose_strategy",
    "chunks_of_pairs",
    "linear_kl",
    "linear_logps",
    "no_autocast",
    "pair_loss",
    "plan_of",
    "rows_scored",
    "sequence_sum",
    "token_kl",
    "token_logps",
]
