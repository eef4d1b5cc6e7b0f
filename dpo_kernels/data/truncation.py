"""What becomes of pairs that are longer than they may be: cut by a stated policy, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .left_out import Refused
from .sequences import Ids, Spans


@dataclass(frozen=True)
class Truncation:
    """What becomes of a pair that is too long.

    First the prompt is cut to `max_prompt_length` from its left and a completion to
    `max_completion_length` from its right. Then, of a sequence above `max_length`: `keep_start`
    cuts the completion from its right; `keep_end` cuts the prompt from its left as far as the
    longer side asks (both sides keep one prompt), and the completion from its right only where no
    prompt is left to cut; `drop` leaves the pair out.

    `assistant_only`: of a completion of several turns what others say is not scored.
    """

    max_length: int | None = None
    mode: str = "keep_start"
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    assistant_only: bool = True

    @classmethod
    def of(cls, value: Truncation | int | None) -> Truncation:
        return value if isinstance(value, Truncation) else cls(value)


def shortened(
    how: Truncation,
    sides: Sequence[Ids],
    start: int,
    spans: Sequence[Spans | None],
    notes: Counter[str],
) -> tuple[list[Ids], int, list[Spans | None], int]:
    """(sides, start of the completions, scored spans, completions cut) within the limits."""
    limit, P = how.max_length, how.max_prompt_length
    off = max(start - P, 0) if P is not None else 0
    room = [len(ids) - start for ids in sides]
    if how.max_completion_length is not None:
        room = [min(n, how.max_completion_length) for n in room]
    longest = start - off + max(room)
    if limit is not None and longest > limit:
        if how.mode == "drop":
            raise Refused(
                "chosen" if room[0] >= room[1] else "rejected",
                f"{longest} tokens with the prompt",
                f"at most max_length={limit} (truncation_mode drop)",
                "longer than max_length",
            )
        if how.mode == "keep_end":
            off += min(longest - limit, max(start - off - 1, 0))
        if start - off >= limit:
            raise Refused(
                "prompt", f"{start} tokens", f"fewer than max_length={limit}", "prompt too long"
            )
        room = [min(n, limit - (start - off)) for n in room]
    kept = [ids[off : start + n] for ids, n in zip(sides, room, strict=True)]
    lost = [len(ids) - start - n for ids, n in zip(sides, room, strict=True)]
    cut = sum(n > 0 for n in lost)
    if off:
        notes["prompts cut from the left"] += 1
        notes["tokens cut from prompts"] += off
    if cut:
        within = limit if limit is not None else how.max_completion_length
        notes[f"completions cut at max_length={within}"] += cut
        notes["tokens cut from completions"] += sum(lost)
    moved: list[Spans | None] = [
        None if found is None else tuple((b - off, e - off) for b, e in found) for found in spans
    ]
    return kept, start - off, moved, cut
