"""Preference data: readers that name every bad row, tokenisation, and batches without waste.

read_pairs (files) -> tokenize_pairs (ids, TRL's rule) -> make_batch (trunk calls + scored rows)
read_judged -> tokenize_judged: completions with a label, ranked lists
"""

from .batches import ScoredBatch, Sharing, TrunkCall, make_batch, make_sequence_batch
from .bulk import tokenize_many
from .completions import (
    Completion,
    Ranking,
    RowTokenizer,
    read_conversations,
    read_scorable,
    tokenize_conversations,
    tokenize_judged,
)
from .judged import JudgedReader, read_judged
from .left_out import DataError, LeftOut, NoUsableRow, Problem
from .pairs import PairReader, PreferencePair, read_pairs
from .sequences import (
    Limits,
    TokenCompletion,
    TokenPair,
    TokenRanking,
    TokenRow,
    TokenSequence,
    sequences_of,
)
from .stream import StreamedPairs, is_large, row_file
from .tokenize import PairTokenizer, tokenize_pairs
from .truncation import Truncation
from .turns import Message

__all__ = [
    "Completion",
    "DataError",
    "JudgedReader",
    "LeftOut",
    "Limits",
    "Message",
    "NoUsableRow",
    "PairReader",
    "PairTokenizer",
    "PreferencePair",
    "Problem",
    "Ranking",
    "RowTokenizer",
    "ScoredBatch",
    "Sharing",
    "StreamedPairs",
    "TokenCompletion",
    "TokenPair",
    "TokenRanking",
    "TokenRow",
    "TokenSequence",
    "Truncation",
    "TrunkCall",
    "is_large",
    "make_batch",
    "make_sequence_batch",
    "read_conversations",
    "read_judged",
    "read_pairs",
    "read_scorable",
    "row_file",
    "sequences_of",
    "tokenize_conversations",
    "tokenize_judged",
    "tokenize_many",
    "tokenize_pairs",
]
