"""What a file of pairs would train, counted in one pass with bounded memory.

Lengths and shares are sums and histograms. Equal and nearly equal rows are found by hashes, sorted
at the end: 8 bytes a row for the pair, the prompt and the swapped pair each, 64 for the sketch.

Nearly equal: the sketch is a MinHash of the words' 3-grams in eight bands; two rows of which a band
agrees are alike. With 90 % of 3-grams in common 99 % are found, with 40 % one in 200.
"""

from __future__ import annotations

import json
import re
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from .completions import Completion, Ranking
from .pairs import PreferencePair
from .sequences import TokenCompletion, TokenPair, TokenRanking
from .turns import Turn

BANDS, DEPTH = 8, 8
_PRIME = (1 << 61) - 1
_DRAW = np.random.default_rng(7)
_FACTORS = _DRAW.integers(1, 1 << 31, (BANDS * DEPTH, 1), dtype=np.uint64)
_SHIFTS = _DRAW.integers(0, 1 << 31, (BANDS * DEPTH, 1), dtype=np.uint64)
_WORDS = re.compile(r"\w+")


@dataclass
class Finding:
    """Something about the data; `wrong`: training on it as it is would be a mistake."""

    kind: str
    count: int
    text: str
    wrong: bool = False
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f" (first: {', '.join(self.examples)})" if self.examples else ""
        return f"{self.text}{where}"


def hash64(*parts: Any) -> int:
    """64 bits of a digest, as numpy keeps them."""
    text = "\0".join(p if isinstance(p, str) else json.dumps(p, sort_keys=True) for p in parts)
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def text_of(turn: Turn) -> str:
    return turn if isinstance(turn, str) else "\n".join(str(m["content"]) for m in turn)


def sketch(text: str) -> list[int]:
    """[BANDS] hashes, of which texts that are alike share some."""
    words = [w.encode("utf-8", "surrogatepass") for w in _WORDS.findall(text.lower())]
    grams = [b" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))] or [b""]
    hashes = np.fromiter({zlib.crc32(g) for g in grams}, np.uint64)
    least = ((hashes[None] * _FACTORS + _SHIFTS) % np.uint64(_PRIME)).min(1)
    return [hash((b, *row)) for b, row in enumerate(least.reshape(BANDS, DEPTH).tolist())]


class Marks:
    """Hashes of rows, and where each row is from."""

    def __init__(self, near: bool = True) -> None:
        self.near = near
        self.pairs, self.swapped, self.prompts = array("q"), array("q"), array("q")
        self.bands = array("q")
        self.places: list[str] = []  # names of files
        self.file, self.line = array("I"), array("q")

    def add(self, pair: PreferencePair | Completion | Ranking) -> None:
        prompt = text_of(pair.prompt)
        said = [text_of(t) for t in _completions(pair)]
        # What makes it another row: the order of the completions, or the label of a single one.
        label = [str(pair.label)] if isinstance(pair, Completion) else []
        other = [str(not pair.label)] if isinstance(pair, Completion) else []
        self.pairs.append(hash64(prompt, *said, *label))
        self.swapped.append(hash64(prompt, *said[::-1], *other))
        self.prompts.append(hash64(prompt))
        if self.near:
            self.bands.extend(sketch("\n".join([prompt, *said])))
        name, _, line = pair.source.rpartition(":")
        if not line.isdigit():
            name, line = pair.source, "0"
        if not self.places or self.places[-1] != name:
            self.places.append(name)
        self.file.append(len(self.places) - 1)
        self.line.append(int(line))

    def place(self, row: int) -> str:
        name, line = self.places[self.file[row]], self.line[row]
        return f"{name}:{line}" if line else name

    def __len__(self) -> int:
        return len(self.pairs)

    def column(self, name: str) -> np.ndarray:
        return np.frombuffer(getattr(self, name), dtype=np.int64)


def _repeated(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows whose value an earlier row has, that earlier row)."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = np.concatenate([[False], ordered[1:] == ordered[:-1]])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(ordered))))
    rows, earlier = order[same], order[first[same]]
    by_row = np.argsort(rows, kind="stable")
    return rows[by_row], earlier[by_row]


def _completions(row: PreferencePair | Completion | Ranking) -> tuple[Turn, ...]:
    if isinstance(row, Completion):
        return (row.completion,)
    return row.completions if isinstance(row, Ranking) else (row.chosen, row.rejected)


def repeats(marks: Marks, shown: int = 3, single: bool = False) -> list[Finding]:
    """Rows that are there twice, nearly twice, or once each way; `single`: without a partner."""
    found: list[Finding] = []
    if not len(marks):
        return found

    def add(kind: str, rows: Any, others: Any, text: str, wrong: bool) -> None:
        if len(rows):
            examples = [
                f"{marks.place(a)} and {marks.place(b)}"
                for a, b in list(zip(others.tolist(), rows.tolist(), strict=True))[:shown]
            ]
            found.append(Finding(kind, len(rows), f"{len(rows)} {text}", wrong, examples))

    rows, others = _repeated(marks.column("pairs"))
    add("duplicates", rows, others, "rows are there before", False)
    known = set(rows.tolist())
    pairs, swapped = marks.column("pairs"), marks.column("swapped")
    order = np.argsort(pairs, kind="stable")
    at = np.searchsorted(pairs[order], swapped)
    at = np.minimum(at, len(pairs) - 1)
    hit = pairs[order][at] == swapped
    rows, others = np.flatnonzero(hit), order[at[hit]]
    first = others < rows
    said = "rows prefer what another row rejects, of the same two completions"
    if single:
        said = "rows have a completion that another row labels the other way"
    add("contradictions", rows[first], others[first], said, True)
    if marks.near:
        near: dict[int, int] = {}
        bands = marks.column("bands").reshape(-1, BANDS)
        for band in range(BANDS):
            for a, b in zip(*(x.tolist() for x in _repeated(bands[:, band])), strict=True):
                if a not in known:
                    near.setdefault(a, b)
        rows = np.array(sorted(near), dtype=np.int64)
        others = np.array([near[r] for r in rows.tolist()], dtype=np.int64)
        add("near-duplicates", rows, others, "rows are nearly one that is there before", False)
    return found


def leaks(marks: Marks, held_out: Marks, shown: int = 3) -> list[Finding]:
    """Rows of the training data that are in the evaluation set as well."""
    found = []
    for kind, name, text in (
        ("leaked pairs", "pairs", "rows are in the evaluation set as they are"),
        ("leaked prompts", "prompts", "rows have a prompt of the evaluation set"),
    ):
        rows = np.flatnonzero(np.isin(marks.column(name), held_out.column(name)))
        if len(rows):
            where = [marks.place(r) for r in rows[:shown].tolist()]
            found.append(Finding(kind, len(rows), f"{len(rows)} {text}", True, where))
    if marks.near and held_out.near and len(marks) and len(held_out):
        mine, theirs = (m.column("bands").reshape(-1, BANDS) for m in (marks, held_out))
        near = np.zeros(len(mine), dtype=bool)
        for band in range(BANDS):
            near |= np.isin(mine[:, band], theirs[:, band])
        near &= ~np.isin(marks.column("pairs"), held_out.column("pairs"))
        rows = np.flatnonzero(near)
        if len(rows):
            where = [marks.place(r) for r in rows[:shown].tolist()]
            text = f"{len(rows)} rows are nearly one of the evaluation set"
            found.append(Finding("near leaks", len(rows), text, True, where))
    return found


@dataclass
class Lengths:
    """Sums and a histogram of lengths; of tokens, or of characters without a tokenizer."""

    unit: str = "characters"
    pairs: int = 0
    prompt: int = 0
    chosen: int = 0
    rejected: int = 0
    longer: int = 0  # pairs whose chosen is longer
    equal: int = 0
    longest: int = 0
    bins: Counter[int] = field(default_factory=Counter)  # of a pair's longer sequence, by bits

    def add(self, prompt: int, chosen: int, rejected: int) -> None:
        self.pairs += 1
        self.prompt += prompt
        self.chosen += chosen
        self.rejected += rejected
        self.longer += chosen > rejected
        self.equal += chosen == rejected
        longest = prompt + max(chosen, rejected)
        self.longest = max(self.longest, longest)
        self.bins[longest.bit_length()] += 1

    def add_texts(self, pair: PreferencePair) -> None:
        self.add(*(len(text_of(t)) for t in (pair.prompt, pair.chosen, pair.rejected)))

    def add_tokens(self, pair: TokenPair) -> None:
        self.unit = "tokens"
        self.add(len(pair.prompt), len(pair.chosen), len(pair.rejected))

    def middle(self) -> int:
        """The end of the bin in which the median is."""
        return _middle(self.bins)

    @property
    def prompt_share(self) -> float:
        """Of what a padded batch computes: the prompt, twice."""
        whole = 2 * self.prompt + self.chosen + self.rejected
        return 2 * self.prompt / whole if whole else 0.0

    @property
    def saving(self) -> float:
        """Share of the tokens that computing each prompt once saves."""
        return self.prompt_share / 2

    def lines(self, width: int = 80, plain: bool = False) -> list[str]:
        """The histogram, and what the sums say."""
        if not self.pairs:
            return []
        most = max(self.bins.values())
        labels = {b: f"{1 << (b - 1) if b else 0:,}-{(1 << b) - 1:,}" for b in self.bins}
        left, right = max(map(len, labels.values())), len(f"{most:,}")
        room = max(width - left - right - 4, 1)
        mark = "#" if plain else "█"
        out = [f"{self.unit} of a pair's longer sequence, and pairs:"]
        for bits in range(min(self.bins), max(self.bins) + 1):
            n = self.bins.get(bits, 0)
            label = labels.get(bits, f"{1 << (bits - 1) if bits else 0:,}-{(1 << bits) - 1:,}")
            bar = mark * max(round(room * n / most), 1 if n else 0)
            out.append(f"{label:>{left}} {bar:<{room}} {n:>{right},}".rstrip())
        mean = [x / self.pairs for x in (self.prompt, self.chosen, self.rejected)]
        out += [
            f"mean {self.unit}: prompt {mean[0]:.1f}, chosen {mean[1]:.1f}, rejected "
            f"{mean[2]:.1f}; longest {self.longest:,}",
            f"the chosen is longer in {self.longer / self.pairs:.1%} of the pairs, as long in "
            f"{self.equal / self.pairs:.1%}",
            f"prompts are {self.prompt_share:.1%} of what padded rows compute; computing each once "
            f"saves {self.saving:.1%}",
        ]
        return out

    def as_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "pairs": self.pairs,
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "longest": self.longest,
            "chosen_longer": self.longer,
            "equal_lengths": self.equal,
            "prompt_share": round(self.prompt_share, 6),
            "shared_prompt_saving": round(self.saving, 6),
            "histogram": {f"<{1 << b}": n for b, n in sorted(self.bins.items())},
        }


def _middle(bins: Counter[int]) -> int:
    """The end of the bin, of values by their bits, in which the median is."""
    seen = 0
    for bits in sorted(bins):
        seen += bins[bits]
        if 2 * seen >= bins.total():
            return 1 << bits
    return 0


@dataclass
class JudgedLengths:
    """Sums of lengths of labelled completions (good, bad) or ranked lists (best, last)."""

    kind: str  # unpaired | ranked
    unit: str = "characters"
    pairs: int = 0  # rows
    longest: int = 0
    prompt: int = 0
    counts: list[int] = field(default_factory=lambda: [0, 0])
    sums: list[int] = field(default_factory=lambda: [0, 0])
    sizes: Counter[int] = field(default_factory=Counter)  # completions of a list
    bins: Counter[int] = field(default_factory=Counter)  # of the longest sequence, by bits

    def _add(self, prompt: int, lengths: list[int], good: bool) -> None:
        self.pairs += 1
        self.prompt += prompt
        longest = prompt + max(lengths)
        self.longest = max(self.longest, longest)
        self.bins[longest.bit_length()] += 1
        self.sizes[len(lengths)] += 1
        sides = ((0, lengths[0]), (1, lengths[-1]))
        for side, n in sides if self.kind == "ranked" else [sides[0 if good else 1]]:
            self.counts[side] += 1
            self.sums[side] += n

    def add_texts(self, row: Completion | Ranking) -> None:
        lengths = [len(text_of(t)) for t in _completions(row)]
        self._add(len(text_of(row.prompt)), lengths, getattr(row, "label", None) is True)

    def add_tokens(self, row: TokenCompletion | TokenRanking) -> None:
        self.unit = "tokens"
        lengths = [len(s.ids) - len(row.prompt) for s in row.sequences]
        self._add(len(row.prompt), lengths, getattr(row, "desirable", False))

    def middle(self) -> int:
        return _middle(self.bins)

    @property
    def means(self) -> list[float]:
        return [total / max(n, 1) for total, n in zip(self.sums, self.counts, strict=True)]

    def lines(self, width: int = 80, plain: bool = False) -> list[str]:
        """What the sums say."""
        if not self.pairs:
            return []
        first, last = self.means
        out = [f"mean {self.unit} of a prompt {self.prompt / self.pairs:.1f}"]
        if self.kind == "unpaired":
            out.append(f"{self.counts[0]:,} good completions, {self.counts[1]:,} bad ones")
            out.append(f"mean {self.unit}: good {first:.1f}, bad {last:.1f}")
        else:
            sizes = ", ".join(f"{n:,} of {k}" for k, n in sorted(self.sizes.items()))
            out.append(f"completions of a list: {sizes}")
            out.append(f"mean {self.unit}: best {first:.1f}, last {last:.1f}")
        return out

    def as_json(self) -> dict[str, Any]:
        names = ("good", "bad") if self.kind == "unpaired" else ("best", "last")
        return {
            "unit": self.unit,
            "rows": self.pairs,
            "prompt": self.prompt,
            "longest": self.longest,
            **{name: n for name, n in zip(names, self.counts, strict=True)},
            **{f"{name}_mean": x for name, x in zip(names, self.means, strict=True)},
            "completions": {str(k): n for k, n in sorted(self.sizes.items())},
        }
