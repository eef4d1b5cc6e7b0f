"""What a run leaves for people to read: samples before and after, surprising pairs, its page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Message, TokenPair, TokenRow
from ..report import write_page
from .model import Policy, complete

SAMPLES = 3  # prompts that are completed before and after
SURPRISING = 20  # pairs

Prompt = tuple[str, list[int]]  # as it is shown, and its ids


def prompts_of(
    policy: Policy, wanted: str | None, pairs: Sequence[TokenRow], shown: Callable[[TokenRow], str]
) -> list[Prompt]:
    """The wanted text, if any, and the shortest prompts of these pairs, no prompt twice."""
    found = [] if wanted is None else [wanted_prompt(policy, wanted)]
    seen = {tuple(ids) for _, ids in found}
    for pair in sorted(pairs, key=lambda p: len(p.prompt)):
        if len(found) == SAMPLES:
            break
        if not found or (tuple(pair.prompt) not in seen and pair.prompt):
            seen.add(tuple(pair.prompt))
            found.append((shown(pair), list(pair.prompt)))
    return found


def wanted_prompt(policy: Policy, wanted: str) -> Prompt:
    """A text of the user's, as his turn where the model knows turns."""
    if policy.tokenizer.chat_template:
        messages: list[Message] = [{"role": "user", "content": wanted}]
        return wanted, policy.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return wanted, policy.tokenizer(wanted)["input_ids"]


def prompt_text(
    texts: Mapping[str, Any], decode: Callable[[Sequence[int]], str]
) -> Callable[[TokenRow], str]:
    """A row's prompt as people read it: its text, or the last message."""

    def shown(pair: TokenRow) -> str:
        if pair.source not in texts:
            return decode(pair.prompt)
        prompt = texts[pair.source].prompt
        return prompt if isinstance(prompt, str) else prompt[-1]["content"]

    return shown


def completions(policy: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """What the policy makes of each prompt; empty texts where nothing is asked for."""
    n = max_new_tokens
    return [complete(policy, ids, n) if n > 0 and ids else "" for _, ids in prompts]


def samples(
    prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """What summary.json says of them."""
    return [
        {"prompt": text, "before": a, "after": b}
        for (text, _), a, b in zip(prompts, before, after, strict=False)
    ]


def write_surprising(
    folder: Path,
    margins: Sequence[float],
    rows: Sequence[TokenRow],
    texts: Mapping[str, Any],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """The held-out pairs that the policy is most wrong about, by margin, one a line."""
    pairs = [row for row in rows if isinstance(row, TokenPair)]
    if not pairs or len(margins) != len(pairs):
        return
    wrong = [i for i, m in enumerate(margins) if math.isfinite(m) and m < 0]
    lines = []
    for i in sorted(wrong, key=lambda i: margins[i])[:SURPRISING]:
        pair, text = pairs[i], texts.get(pairs[i].source)
        row: dict[str, Any] = {
            "source": pair.source,
            "margin": margins[i],
            "p_chosen": 1 - 1 / (1 + math.exp(margins[i])),
        }
        for side in ("prompt", "chosen", "rejected"):
            row[side] = decode(getattr(pair, side)) if text is None else getattr(text, side)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (folder / "surprising_pairs.jsonl").write_bytes(
        "".join(lines).encode("utf-8", "backslashreplace")
    )


def write_report(folder: Path, say: Callable[..., None]) -> None:
    """`report.html` of the run."""
    try:
        write_page([folder])
    except Exception as error:  # the run is none the worse
        say(f"warning: report.html was not written: {error}")
