"""A judge by rule for the embedded data: is the answer in the tone, and about the place, asked for?

Words are weighed by how often the chosen answers of each tone have them (naive Bayes over the
embedded training pairs). The score of an answer is the probability of the tone that the prompt asks
for, halved where the place is not named. Length does not enter.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter

from ..data import embedded
from .records import Turn

# The words with which prompts ask for a tone; answers never have them.
ASKED = {
    "cheerful": ("cheerful", "happy", "joyful", "cheer", "smile"),
    "gloomy": ("gloomy", "sad", "melancholy", "tears", "break my heart"),
    "spooky": ("spooky", "scary", "eerie", "frighten", "goosebumps"),
    "calm": ("calm", "peaceful", "soothing", "unwind", "lull"),
    "grumpy": ("grumpy", "cranky", "sour", "complain", "grumble"),
    "formal": ("formal", "businesslike", "official", "committee", "lawyer"),
}
_WORD = re.compile(r"[a-z]+")
_PLACE = re.compile(r"\bthe (\w+)")


def asked_for(prompt: Turn) -> tuple[str | None, str | None]:
    """(tone, place) of the latest request that names each."""
    turns = (
        [prompt]
        if isinstance(prompt, str)
        else [m["content"] for m in prompt if m["role"] == "user"]
    )
    tone = place = None
    for text in reversed(turns):
        low = text.lower()
        if tone is None:
            tone = next((t for t, words in ASKED.items() if any(w in low for w in words)), None)
        if place is None:
            named = [w for w in _PLACE.findall(low) if w != "same"]
            place = named[-1] if named else None
    return tone, place


@functools.cache
def _weights() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(log-probs of words by tone, log-prob of an unknown word by tone)."""
    counts: dict[str, Counter[str]] = {tone: Counter() for tone in ASKED}
    with embedded.folder() as folder:
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        row = json.loads(line)
        tone, _ = asked_for(row["prompt"])
        if tone is not None:
            counts[tone].update(set(_WORD.findall(row["chosen"][-1]["content"].lower())))
    known = set().union(*counts.values())
    logs, unknown = {}, {}
    for tone, found in counts.items():
        total = sum(found.values()) + len(known)
        logs[tone] = {word: math.log((found[word] + 1) / total) for word in known}
        unknown[tone] = math.log(1 / total)
    return logs, unknown


def tone_score(prompt: Turn, completion: str) -> float:
    """From 0 to 1."""
    tone, place = asked_for(prompt)
    if tone is None:
        return 0.0
    logs, unknown = _weights()
    words = set(_WORD.findall(completion.lower()))
    scores = {t: sum(w.get(x, unknown[t]) for x in words) for t, w in logs.items()}
    top = max(scores.values())
    share = math.exp(scores[tone] - top) / sum(math.exp(s - top) for s in scores.values())
    return round(share * (1.0 if place is None or place in words else 0.5), 3)
