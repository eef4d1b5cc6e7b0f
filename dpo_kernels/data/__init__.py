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
from .pairs import Message, PairReader, PreferencePair, read_pairs
from .sequences import Limits, TokenPair, TokenSequence
from .tokenize import PairTokenizer, tokenize_pairs
from .truncation import Truncation

__all__ = [
    "Completion",
    "DataError",
    "LeftOut",
    "Limits",
    "Message",
    "NoUsableRow",
    "PairReader",
    "PairTokenizer",
    "PreferencePair",
    "Problem",
    "RowTokenizer",
    "ScoredBatch",
    "Sharing",
    "TokenPair",
    "TokenSequence",
    "Truncation",
    "TrunkCall",
    "make_batch",
    "make_sequence_batch",
    "read_conversations",
    "read_pairs",
    "read_scorable",
    "tokenize_conversations",
    "tokenize_pairs",
]
