"""Token ids of pairs and single sequences, and what a model can be fed.

A sequence is prompt ++ completion; of the completion every token is scored but those of others'
turns. Positions count from the start of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Ids = tuple[int, ...]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenPair:
    """The ids of one pair, truncated: each sequence is `prompt` ++ completion."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    source: str
    offset: float | None = None
    weight: float | None = None
    beta: float | None = None
    unscored: tuple[Spans, Spans] = ((), ())  # of (chosen, rejected), as in `TokenSequence`
    label_smoothing: float | None = None  # of the pair, in place of the run's
    group: str | None = None  # of annotators or data, with an offset and temperature of its own

    @property
    def sequences(self) -> tuple[TokenSequence, TokenSequence]:
        """(chosen, rejected) as whole sequences."""
        P = len(self.prompt)
        return (
            TokenSequence(self.prompt + self.chosen, P, self.source, self.unscored[0]),
            TokenSequence(self.prompt + self.rejected, P, self.source, self.unscored[1]),
        )


@dataclass(frozen=True)
class TokenSequence:
    """Ids of which those from `start` on are scored (never the first: nothing predicts it)."""

    ids: Ids
    start: int
    source: str
    unscored: Spans = ()  # (begin, end) of positions behind `start` that are not: others' turns

    @property
    def first_scored(self) -> int:
        return max(self.start, 1)

    @property
    def scored(self) -> Sequence[int]:
        """The positions whose tokens are scored."""
        every = range(self.first_scored, max(len(self.ids), self.first_scored))
        if not self.unscored:
            return every
        return [t for t in every if not any(begin <= t < end for begin, end in self.unscored)]

    @property
    def num_scored(self) -> int:
        return len(self.scored)


@dataclass(frozen=True)
class Limits:
    """What a model can be fed: ids below `vocabulary`, sequences up to `positions` (None: any)."""

    vocabulary: int | None = None
    positions: int | None = None
    trained_positions: int | None = None  # rotary embeddings go further, less well

    @classmethod
    def of(cls, config: Any) -> Limits:
        """From a transformers configuration."""
        get = getattr(config, "get_text_config", None)
        text = get() if get else config
        length = getattr(text, "max_position_embeddings", None)
        length = length if isinstance(length, int) and length > 0 else None
        rotary = any(
            hasattr(text, name) for name in ("rope_theta", "rope_parameters", "rope_scaling")
        )
        free = rotary or bool(getattr(text, "alibi", False))
        return cls(
            getattr(text, "vocab_size", None), None if free else length, length if rotary else None
        )
