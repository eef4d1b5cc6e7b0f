"""Token ids of the rows that are trained on and of single sequences, and what a model can be fed.

A row is a prompt with its completions: a pair, one that was judged alone, or a ranked list. A
sequence is prompt ++ completion; of the completion every token is scored but those of others'
turns. Positions count from the start of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

Ids = tuple[int, ...]
Spans = tuple[tuple[int, int], ...]
ENDING = 4  # ids: an end token and a line break, twice


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

    @property
    def size(self) -> int:
        """Tokens, those of the prompt once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class TokenCompletion:
    """The ids of one completion that was found good (`desirable`) or bad, truncated."""

    prompt: Ids
    completion: Ids
    source: str
    desirable: bool
    weight: float | None = None
    unscored: Spans = ()

    @property
    def sequences(self) -> tuple[TokenSequence]:
        ids = self.prompt + self.completion
        return (TokenSequence(ids, len(self.prompt), self.source, self.unscored),)

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class TokenRanking:
    """The ids of a prompt's completions, from the best to the last, truncated."""

    prompt: Ids
    completions: tuple[Ids, ...]
    source: str
    weight: float | None = None
    unscored: tuple[Spans, ...] = ()

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        P, unscored = len(self.prompt), self.unscored or ((),) * len(self.completions)
        return tuple(
            TokenSequence(self.prompt + ids, P, self.source, spans)
            for ids, spans in zip(self.completions, unscored, strict=True)
        )

    @property
    def size(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


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


# What an optimizer step is made of.
TokenRow = TokenPair | TokenCompletion | TokenRanking


def sequences_of(rows: Sequence[TokenRow]) -> list[TokenSequence]:
    """The sequences of these rows as a batch has them: the first of each row, then the second."""
    each = [row.sequences for row in rows]
    most = max(map(len, each), default=0)
    return [found[k] for k in range(most) for found in each if k < len(found)]


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


def doubled_end(ids: Sequence[int], known: Container[int]) -> int | None:
    """The end token that the last `ENDING` ids hold twice; None where they do not.

    Templates end a turn with it and a line break, so one token may stand behind each.
    """
    last = list(ids[-ENDING:])
    at = [i for i, token in enumerate(last) if token in known]
    if len(at) < 2 or at[-1] < len(last) - 2 or last[at[-1]] != last[at[-2]]:
        return None
    between = at[-1] - at[-2] - 1  # the same line break as behind the last
    ends_alike = last[at[-2] + 1 : at[-1]] == last[at[-1] + 1 :]
    return last[at[-1]] if not between or ends_alike else None
