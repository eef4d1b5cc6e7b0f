"""A pair token by token: prompt, what is scored, what is not, and what was cut off.

Without colours the parts are told by their titles, so nothing is lost in a file or a pipe.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .sequences import Ids, TokenCompletion, TokenPair, TokenRow, TokenSequence

_COLOURS = {"prompt": "36", "scored": "32", "not scored": "90", "cut": "31;9"}
_BREAKS = {"\n": "⏎", "\t": "⇥", " ": "·", "\r": "␍"}
BETWEEN = "│"


def shown_pair(
    pair: TokenRow, whole: TokenRow | None, tokenizer: Any, width: int = 80, colour: bool = False
) -> Iterator[str]:
    """Lines of at most `width` columns, of a pair or another row. `whole`: it without limits."""

    def text(ids: Sequence[int]) -> list[str]:
        return [token_text(tokenizer, i) for i in ids]

    def part(title: str, kind: str, ids: Sequence[int]) -> Iterator[str]:
        if ids:
            yield f"  {title} ({len(ids)} token{'s' * (len(ids) != 1)})"
            yield from wrapped(text(ids), width, _painter(kind, colour))

    yield f"{pair.source}"
    dropped = _cut_off(whole.prompt, pair.prompt, left=True) if whole else ()
    yield from part("prompt, cut off", "cut", dropped)
    yield from part("prompt", "prompt", pair.prompt)
    every = whole.sequences if whole else pair.sequences
    for name, sequence, full in zip(_names(pair), pair.sequences, every, strict=False):
        for scored, run in _runs(sequence):
            kind = "scored" if scored else "not scored"
            yield from part(f"{name}, {kind}", kind, run)
        rest = _cut_off(full.ids[full.start :], sequence.ids[sequence.start :], left=False)
        yield from part(f"{name}, cut off", "cut", rest)


def _names(row: TokenRow) -> list[str]:
    if isinstance(row, TokenCompletion):
        return ["good completion" if row.desirable else "bad completion"]
    if isinstance(row, TokenPair):
        return ["chosen", "rejected"]
    return [f"rank {k + 1}" for k in range(len(row.completions))]


def _cut_off(whole: Ids, kept: Ids, left: bool) -> Ids:
    n = len(whole) - len(kept)
    return () if n <= 0 else whole[:n] if left else whole[len(kept) :]


def _runs(sequence: TokenSequence) -> Iterator[tuple[bool, list[int]]]:
    """The completion's tokens in runs that are scored or not."""
    scored = set(sequence.scored)
    run: list[int] = []
    last = None
    for t in range(sequence.start, len(sequence.ids)):
        now = t in scored
        if last is not None and now != last:
            yield last, run
            run = []
        run.append(sequence.ids[t])
        last = now
    if last is not None:
        yield last, run


def token_text(tokenizer: Any, i: int) -> str:
    """A token's text; of one that is a part of a letter alone, its bytes."""
    text = tokenizer.decode([i])
    if "\ufffd" not in text:
        return visible(text)
    raw = str(tokenizer.convert_ids_to_tokens(i))
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", raw)  # of sentencepiece
    if fallback is not None:
        return f"<{fallback[1].lower()}>"
    if not all(c in _BYTES for c in raw):
        return visible(text)
    return "".join(
        visible(chr(_BYTES[c])) if _BYTES[c] < 128 else f"<{_BYTES[c]:02x}>" for c in raw
    )


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE's letter of each byte (GPT-2's alphabet) -> the byte."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_letters()


def visible(text: str) -> str:
    """A token's text with its spaces and line breaks as signs."""
    out = []
    for c in text:
        if c in _BREAKS:
            out.append(_BREAKS[c])
        elif unicodedata.category(c)[0] in "CZ" or c == "\ufffd":  # what would not be seen
            out.append(f"<{ord(c):x}>" if c != "\ufffd" else "?")
        else:
            out.append(c)
    return "".join(out)


def columns(text: str) -> int:
    """How many columns a terminal gives a text."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def wrapped(
    tokens: Sequence[str], width: int, paint: Callable[[str], str], indent: str = "    "
) -> Iterator[str]:
    """Tokens with a bar between them, broken into lines of `width` columns."""
    line, used = "", 0
    room = width - len(indent)
    for token in tokens:
        for piece in _pieces(token, room - 1):
            n = columns(piece)
            if used and used + 1 + n > room:
                yield indent + line
                line, used = "", 0
            line += (BETWEEN if used else "") + paint(piece)
            used += n + (1 if used else 0)
    if used:
        yield indent + line


_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def folded(text: str, width: int) -> Iterator[str]:
    """A line as lines of at most `width` columns, broken between words where it can be."""
    if columns(_COLOUR.sub("", text)) <= width:
        yield text
        return
    line, used, empty = "", 0, True
    for word in text.split(" "):
        if not empty and used + 1 + columns(word) > width:
            yield line
            line, used, empty = "  ", 2, True
        *whole, rest = _pieces(word if empty else f" {word}", max(width - used, 1))
        for piece in whole:
            yield line + piece
            line, used = "", 0
        line, used, empty = line + rest, used + columns(rest), False
    yield line


def _pieces(token: str, room: int) -> Iterator[str]:
    piece, used = "", 0
    for c in token:
        n = columns(c)
        if used + n > room:
            yield piece
            piece, used = "", 0
        piece += c
        used += n
    yield piece


def _painter(kind: str, colour: bool) -> Callable[[str], str]:
    if not colour:
        return lambda text: text
    return lambda text: f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m"


def legend(colour: bool) -> str:
    names = [_painter(kind, colour)(kind) for kind in _COLOURS]
    return f"{', '.join(names)}; {BETWEEN} between tokens, · a space, ⏎ a line break"
