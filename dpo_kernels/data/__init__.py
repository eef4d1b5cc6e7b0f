"""Preference data: readers that name every bad row, tokenisation, and batches without waste.

read_pairs (JSONL) -> tokenize_pairs (ids, TRL's rule) -> make_batch (trunk calls + scored rows)
"""

from .batches import ScoredBatch, Sharing, TrunkCall, make_batch, make_sequence_batch
from .pairs import (
    DataError,
    LeftOut,
    Message,
    PreferencePair,
    Problem,
    read_conversations,
    read_pairs,
)
from .tokenize import TokenPair, TokenSequence, tokenize_conversations, tokenize_pairs

__all__ = [
    "DataError",
    "LeftOut",
    "Message",
    "PreferencePair",
    "Problem",
    "ScoredBatch",
    "Sharing",
    "TokenPair",
    "TokenSequence",
    "TrunkCall",
    "make_batch",
    "make_sequence_batch",
    "read_conversations",
    "read_pairs",
    "tokenize_conversations",
    "tokenize_pairs",
]
