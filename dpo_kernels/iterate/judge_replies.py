"""From templates to a judge's prompt, and from its reply to a verdict: strict in both directions.

Templates are files with `[system]` and `[user]` parts. Fields are filled in one pass, so a text
that holds `{second}` is not filled again, and `{fence}` is a mark that occurs in none of the texts,
so no text can close its own quotation. A reply that is not exactly a verdict is an error.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..train.config_files import UserError
from .reply_cache import Reply

_FIELD = re.compile(r"\{(prompt|first|second|completion|principles|fence|lowest|highest)\}")
_WORD = re.compile(r"[\s\W_]*([ABC])[\s\W_]*")
_BRACKETS = re.compile(r"\[\[\s*([^\[\]]*?)\s*\]\]")
_MARKS = r"[\s*_`'\"\[\]().:]*"
_SCORE = re.compile(
    rf"{_MARKS}(?:score)?{_MARKS}(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?{_MARKS}", re.IGNORECASE
)


@dataclass(frozen=True)
class Template:
    system: str
    user: str

    @property
    def explains(self) -> bool:
        """Whether the verdict comes as [[A]] after an explanation."""
        return "[[A]]" in self.user + self.system

    def messages(self, **values: str) -> list[dict[str, str]]:
        """The chat that asks; `values` fill the fields of their names."""
        values["fence"] = _fence(values)

        def fill(text: str) -> str:
            return _FIELD.sub(lambda m: values.get(m.group(1), m.group(0)), text)

        system = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.user)}]


def _fence(values: dict[str, str]) -> str:
    text = "\0".join(values[k] for k in sorted(values))
    mark = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]
    while mark in text:
        mark = hashlib.sha256(mark.encode()).hexdigest()[:12]
    return mark


def load_template(path: str | None, shipped: str, needs: tuple[str, ...]) -> Template:
    """The template in a user's file, or the shipped one of that name."""
    if path is None:
        folder = resources.files("dpo_kernels.iterate").joinpath("judge_prompts")
        text = folder.joinpath(shipped + ".txt").read_text(encoding="utf-8")
    else:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"judge_template: {path} does not exist")
        text = file.read_text(encoding="utf-8")
    parts = re.split(r"^\[(system|user)\][ \t]*$", text, flags=re.MULTILINE)
    if len(parts) == 1:
        template = Template("", text.strip())
    else:
        named = dict(zip(parts[1::2], (p.strip() for p in parts[2::2]), strict=True))
        template = Template(named.get("system", ""), named.get("user", ""))
    both = template.system + template.user
    missing = [name for name in needs if f"{{{name}}}" not in both]
    if missing:
        raise UserError(
            f"judge_template: {path}: has no {{{missing[0]}}}; expected "
            + ", ".join(f"{{{name}}}" for name in needs)
        )
    return template


@dataclass(frozen=True)
class Read:
    """One reply as read: the side (+1 the one shown first, -1 second, 0 tie) or why not."""

    side: int | None
    error: str | None = None
    p: float | None = None  # probability of the one shown first, from log-probs


SIDES = {"A": 1, "B": -1, "C": 0}


def read_pairwise(reply: Reply, explained: bool) -> Read:
    """The verdict in a reply. One that was cut off, quotes two verdicts, or says more is unread."""
    if reply.text is None:
        return Read(None, reply.error or "no reply")
    if why := _cut_off(reply):
        return Read(None, why)
    text = reply.text.strip()
    if explained:
        found = set(_BRACKETS.findall(text))
        last = text.splitlines()[-1] if text else ""
        ends = re.fullmatch(r".*\[\[\s*([ABC])\s*\]\]\W*", last)
        if len(found) != 1 or not ends:
            return Read(
                None,
                f"unreadable: expected one [[A]], [[B]] or [[C]] at its end, got "
                f"{_shown(text[-80:])}",
            )
        return Read(SIDES[ends.group(1)])
    match = _WORD.fullmatch(text) if len(text) <= 16 else None
    if not match:
        return Read(None, f"unreadable: expected A, B or C alone, got {_shown(text)}")
    side = SIDES[match.group(1)]
    return Read(side, None, _probability(reply.logprobs, match.group(1)))


def _probability(logprobs: list[dict[str, Any]] | None, said: str) -> float | None:
    """P(A) among A and B (C is half of each) where the verdict stands; None if it contradicts."""
    for entry in logprobs or ():
        if entry["token"].strip(" \n*_[]().\"'") != said:
            continue
        mass = {"A": 0.0, "B": 0.0, "C": 0.0}
        top = {t["token"]: t["logprob"] for t in [*entry["top_logprobs"], entry]}
        for token, logprob in top.items():
            word = token.strip(" \n*_[]().\"'")
            if word in mass:
                mass[word] += math.exp(min(logprob, 0.0))
        total = sum(mass.values())
        if total <= 0 or mass[said] < max(mass.values()):
            return None  # the log-probs are not those of what it said
        if total > 1.01:
            return None
        if not entry["top_logprobs"]:
            return None
        return (mass["A"] + mass["C"] / 2) / total
    return None


def read_score(reply: Reply, lowest: float, highest: float) -> tuple[float | None, str | None]:
    """(score, None) or (None, why not)."""
    if reply.text is None:
        return None, reply.error or "no reply"
    if why := _cut_off(reply):
        return None, why
    match = _SCORE.fullmatch(reply.text.strip()) if len(reply.text) < 64 else None
    value = float(match.group(1)) if match else math.nan
    of = match.group(2) if match else None
    # "4/5" is no 4 of 10.
    if not lowest <= value <= highest or (of is not None and float(of) != highest):
        return None, (
            f"unreadable: expected a number from {lowest:g} to {highest:g}, got "
            f"{_shown(reply.text)}"
        )
    return value, None


def _cut_off(reply: Reply) -> str | None:
    """Why the reply is not whole, if it says so."""
    if reply.finish_reason == "length":
        return f"unreadable: cut off at its length: {_shown(reply.text or '')}"
    if reply.finish_reason == "content_filter":
        return f"unreadable: cut off by the server's filter: {_shown(reply.text or '')}"
    return None


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
