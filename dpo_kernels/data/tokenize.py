"""From texts to token ids, by TRL's rule.

The prompt (with the template's generation prompt) and prompt + completion are tokenised separately;
the completion starts at the first divergence of the two, because a template may render a prompt
alone differently, and a tokenizer may merge the last characters of the prompt with the first of the
completion. Plain texts get one end-of-sequence token. Sequences keep their start (`max_length`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .pairs import DataError, LeftOut, Message, PreferencePair, Problem

Ids = tuple[int, ...]


@dataclass(frozen=True)
class TokenPair:
    """The ids of one pair, truncated: each sequence is `prompt` ++ completion."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    source: str
    offset: float | None = None

    @property
    def sequences(self) -> tuple[TokenSequence, TokenSequence]:
        """(chosen, rejected) as whole sequences."""
        return (
            TokenSequence(self.prompt + self.chosen, len(self.prompt), self.source),
            TokenSequence(self.prompt + self.rejected, len(self.prompt), self.source),
        )


@dataclass(frozen=True)
class TokenSequence:
    """Ids of which those from `start` on are scored (never the first: nothing predicts it)."""

    ids: Ids
    start: int
    source: str

    @property
    def first_scored(self) -> int:
        return max(self.start, 1)

    @property
    def num_scored(self) -> int:
        return max(len(self.ids) - self.first_scored, 0)


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: Any,
    max_length: int | None,
    left_out: LeftOut,
    warn: Callable[[str], None] = print,
) -> list[TokenPair]:
    """Token ids of each pair; pairs that `max_length` makes useless go to `left_out`.

    Raises `DataError` for conversational pairs and a tokenizer without a chat template.
    """
    _require_template(tokenizer, any(pair.conversational for pair in pairs))
    result, warned = [], False
    for pair in pairs:
        ids = _pair_ids(pair, tokenizer, left_out)
        if ids is None:
            continue
        alone, chosen, rejected = ids
        start = min(_common(alone, chosen), _common(alone, rejected))
        if start < len(alone) and not warned:
            warned = True
            warn(
                f"{pair.source}: the tokenised prompt is not a prefix of prompt + completion "
                f"(its end {tokenizer.decode(list(alone[start:]))!r} tokenises differently there); "
                "the completion starts where they diverge. Said once; other rows may be alike."
            )
        token_pair = _truncate(pair, chosen, rejected, start, max_length, left_out)
        if token_pair is not None:
            result.append(token_pair)
    return result


def tokenize_conversations(
    rows: Sequence[tuple[str, list[Message]]],
    tokenizer: Any,
    max_length: int | None,
    left_out: LeftOut,
) -> list[TokenSequence]:
    """Sequences for SFT: everything before the last (assistant) message is the prompt."""
    _require_template(tokenizer, True)
    result = []
    for source, messages in rows:
        alone = _apply(tokenizer, messages[:-1], True) if messages[:-1] else ()
        ids = _apply(tokenizer, messages, False)[:max_length]
        sequence = TokenSequence(ids, _common(alone, ids), source)
        if sequence.num_scored == 0:
            left_out.add(Problem(source, "messages", f"a prompt of {len(alone)} tokens",
                                 f"fewer than max_length={max_length}", "prompt too long")
                         )  # fmt: skip
        else:
            result.append(sequence)
    return result


def _require_template(tokenizer: Any, conversational: bool) -> None:
    if conversational and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the data is conversational (message lists) but the tokenizer has no chat template: "
            "pass one with --chat_template FILE (a Jinja template), or use data with plain texts"
        )


def _pair_ids(
    pair: PreferencePair, tokenizer: Any, left_out: LeftOut
) -> tuple[Ids, Ids, Ids] | None:
    if not pair.conversational:
        return tuple(  # type: ignore[return-value]
            _plain(tokenizer, text, completion)
            for text, completion in (
                (pair.prompt, ""), (pair.prompt, pair.chosen), (pair.prompt, pair.rejected)
            )
        )  # fmt: skip
    import jinja2

    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
    try:
        return (
            _apply(tokenizer, prompt, True),
            _apply(tokenizer, prompt + chosen, False),
            _apply(tokenizer, prompt + rejected, False),
        )
    except jinja2.TemplateError as error:
        left_out.add(Problem(pair.source, "messages", f"refused by the chat template ({error})",
                             "messages it can render", "chat template refuses"))  # fmt: skip
        return None


def _apply(tokenizer: Any, messages: list[Message], generation_prompt: bool) -> Ids:
    return tuple(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation_prompt, tokenize=True, return_dict=False
        )
    )


def _plain(tokenizer: Any, prompt: Any, completion: Any) -> Ids:
    text, eos = prompt + completion, tokenizer.eos_token
    if completion and eos and not text.endswith(eos):
        text += eos
    ids = tuple(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    if completion and end is not None and ids[-2:] == (end, end):
        ids = ids[:-1]  # the tokenizer appended its own
    return ids


def _common(a: Ids, b: Ids) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _truncate(
    pair: PreferencePair, chosen: Ids, rejected: Ids, start: int, max_length: int | None,
    left_out: LeftOut,
) -> TokenPair | None:  # fmt: skip
    if max_length is not None and start >= max_length:
        left_out.add(Problem(pair.source, "prompt", f"{start} tokens",
                             f"fewer than max_length={max_length}", "prompt too long"))  # fmt: skip
        return None
    prompt = chosen[:start]
    sides = []
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        completion = ids[start:max_length]
        if len(completion) - (start == 0) <= 0:
            left_out.add(Problem(pair.source, name, "no token left to score",
                                 "at least one token of completion", "completion too short")
                         )  # fmt: skip
            return None
        sides.append(completion)
    if sides[0] == sides[1]:
        left_out.add(Problem(pair.source, "rejected",
                             f"the same as chosen within max_length={max_length}",
                             "a difference within the limit", "same after truncation")
                     )  # fmt: skip
        return None
    return TokenPair(prompt, sides[0], sides[1], pair.source, pair.offset)
