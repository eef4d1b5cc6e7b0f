"""Preference data: readers that name every bad row, tokenisation, and batches without waste.

read_pairs (files) -> tokenize_pairs (ids, TRL's rule) -> make_batch (trunk calls + scored rows)
"""

from .batches import ScoredBatch, Sharing, TrunkCall, make_batch, make_sequence_batch
from .bulk import tokenize_many
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
from .stream import RowFile, StreamedPairs, row_file
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
    "RowFile",
    "RowTokenizer",
    "ScoredBatch",
    "Sharing",
    "StreamedPairs",
    "TokenPair",
    "TokenSequence",
    "Truncation",
    "TrunkCall",
    "make_batch",
    "make_sequence_batch",
    "read_conversations",
    "read_pairs",
    "read_scorable",
    "row_file",
    "tokenize_conversations",
    "tokenize_many",
    "tokenize_pairs",
]
