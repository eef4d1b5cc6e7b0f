"""Preference data: readers that name every bad row, tokenisation, and batches without waste.

read_pairs (files) -> tokenize_pairs (ids, TRL's rule) -> make_batch (trunk calls + scored rows)
"""

from .batches import ScoredBatch, Sharing, TrunkCall, make_batch, make_sequence_batch
from .completions import (
    Completion,
    RowTokenizer,
    read_conversations,
    read_scorable,
    tokenize_conversations,
)
from .left_out import DataError, LeftOut, NoUsableRow, Problem
from .pairs import Message, PreferencePair, read_pairs
from .sequences import Limits, TokenPair, TokenSequence
from .tokenize import tokenize_pairs

__all__ = [
    "Completion",
    "DataError",
    "LeftOut",
    "Limits",
    "Message",
    "NoUsableRow",
    "PreferencePair",
    "Problem",
    "RowTokenizer",
    "ScoredBatch",
    "Sharing",
    "TokenPair",
    "TokenSequence",
    "TrunkCall",
    "make_batch",
    "make_sequence_batch",
    "read_conversations",
    "read_pairs",
    "read_scorable",
    "tokenize_conversations",
    "tokenize_pairs",
]
