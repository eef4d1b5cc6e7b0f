"""Many pairs to token ids: in several processes, and kept on disk by content.

What is kept is named by the texts, the tokenizer, its chat template, the limits and this package's
version; places of the rows are not in it, so a file that moved costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..version import __version__
from .left_out import LeftOut, Problem
from .pairs import PreferencePair
from .sequences import Limits, TokenPair
from .tokenize import LONG, PairTokenizer, Progress
from .truncation import Truncation

CHUNK = 256  # pairs handed to a process at a time


class Tokenised(NamedTuple):
    """What came of a run of pairs, each pair's ids or None."""

    pairs: list[TokenPair | None]
    problems: list[Problem]
    notes: Counter[str]
    said: list[str]  # once each
    warned: list[str]


def cache_root() -> Path:
    """The user's folder for what can be computed again."""
    own = os.environ.get("DPO_KERNELS_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo-kernels"
    return Path(own).expanduser() if own else base


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over a tokenizer's vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    made = (
        backend.to_str()
        if backend is not None
        else json.dumps(sorted(tokenizer.get_vocab().items()))
    )
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    whole = "\0".join((made, special, str(tokenizer.chat_template)))
    return hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def tokenize_many(
    pairs: Sequence[PreferencePair],
    tokenizer: Any,
    truncation: Truncation | int | None,
    left_out: LeftOut,
    warn: Callable[[str], None] = print,
    limits: Limits | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
    cache: Path | None = None,
) -> list[TokenPair]:
    """As `tokenize_pairs`; `LONG` pairs and more in `processes`, and from or into `cache`."""
    how, limits = Truncation.of(truncation), limits or Limits()
    file = None
    if cache is not None and len(pairs) >= LONG:
        file = cache / f"{_name(pairs, tokenizer, how, limits)}.npz"
        if (kept := _read(file, pairs)) is not None:
            left_out.once(f"token ids of {len(pairs)} pairs are in the cache")
            return _told(kept, left_out, warn)
    parts = _tokenised(pairs, tokenizer, how, limits, processes, progress)
    whole = Tokenised([], [], Counter(), [], [])
    for part in parts:
        whole.pairs.extend(part.pairs)
        whole.problems.extend(part.problems)
        whole.notes.update(part.notes)
        whole.said.extend(part.said)
        whole.warned.extend(part.warned)
        if left_out.strict and part.problems:
            break  # the first of them ends it
    if file is not None and len(whole.pairs) == len(pairs):
        _write(file, whole, pairs)
    return _told(whole, left_out, warn)


def _told(found: Tokenised, left_out: LeftOut, warn: Callable[[str], None]) -> list[TokenPair]:
    for text in found.warned[:1]:
        warn(text)
    for text in found.said:
        left_out.once(text)
    left_out.notes.update(found.notes)
    for problem in found.problems:
        left_out.add(problem)
    return [pair for pair in found.pairs if pair is not None]


def _tokenised(
    pairs: Sequence[PreferencePair],
    tokenizer: Any,
    how: Truncation,
    limits: Limits,
    processes: int | None,
    progress: Progress | None,
) -> Iterator[Tokenised]:
    chunks = [pairs[i : i + CHUNK] for i in range(0, len(pairs), CHUNK)]

    def shown(items: Iterable[Any]) -> Iterable[Any]:
        if progress is None or len(pairs) < LONG:
            return items
        return progress(items, "tokenising", len(chunks), f"parts of {CHUNK} pairs")

    if (processes or 1) < 2 or len(pairs) < LONG:
        _start(tokenizer, how, limits)
        yield from shown(map(_work, chunks))
        return
    # Forked, so that the tokenizer is not sent; its own threads would wait for ever in a child.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, _start, (tokenizer, how, limits)) as pool:
        yield from shown(pool.imap(_work, chunks))


_AT_WORK: list[Any] = []


def _start(*given: Any) -> None:
    _AT_WORK[:] = given


def _work(pairs: Sequence[PreferencePair]) -> Tokenised:
    tokenizer, how, limits = _AT_WORK
    warned: list[str] = []
    left_out = LeftOut()
    maker = PairTokenizer(tokenizer, how, left_out, warned.append, limits)
    found = [maker.usable(pair) for pair in pairs]
    return Tokenised(found, left_out.problems, left_out.notes, left_out.said(), warned)


# --- on disk ---


def _name(pairs: Sequence[PreferencePair], tokenizer: Any, how: Truncation, limits: Limits) -> str:
    found = hashlib.sha256(repr((__version__, how, limits)).encode())
    found.update(tokenizer_digest(tokenizer).encode())
    for p in pairs:
        row = (p.prompt, p.chosen, p.rejected, p.tools, p.template_kwargs)
        found.update(json.dumps(row, sort_keys=True).encode())
    return found.hexdigest()[:40]


def _write(file: Path, found: Tokenised, pairs: Sequence[PreferencePair]) -> None:
    rows = {pair.source: i for i, pair in enumerate(pairs)}
    lengths = np.full((len(found.pairs), 3), -1, np.int64)
    ids: list[np.ndarray] = []
    spans: dict[int, Any] = {}
    for i, pair in enumerate(found.pairs):
        if pair is None:
            continue
        parts = (pair.prompt, pair.chosen, pair.rejected)
        lengths[i] = [len(p) for p in parts]
        ids += [np.asarray(p, np.int32) for p in parts]
        if any(pair.unscored):
            spans[i] = pair.unscored
    told = {
        "spans": spans,
        "problems": [{**asdict(p), "where": rows[p.where]} for p in found.problems],
        "notes": found.notes,
        "said": found.said,
        "warned": found.warned[:1],
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as out:
            text = np.frombuffer(json.dumps(told).encode(), np.uint8)
            flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
            np.savez(out, ids=flat, lengths=lengths, told=text)
        os.replace(part, file)
    except OSError:
        return  # a full disk, or a home that cannot be written to: nothing is lost


def _read(file: Path, pairs: Sequence[PreferencePair]) -> Tokenised | None:
    """What is kept; None where there is nothing, or it is damaged (its parts have checksums)."""
    try:
        with np.load(file) as kept:
            flat, lengths = kept["ids"], kept["lengths"]
            told = json.loads(kept["told"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    found: list[TokenPair | None] = []
    at = 0
    for i, (pair, row) in enumerate(zip(pairs, lengths.tolist(), strict=True)):
        if row[0] < 0:
            found.append(None)
            continue
        parts = []
        for n in row:
            parts.append(tuple(flat[at : at + n].tolist()))
            at += n
        prompt, chosen, rejected = parts
        numbers = (pair.offset, pair.weight, pair.beta)
        made = TokenPair(prompt, chosen, rejected, pair.source, *numbers)
        spans = told["spans"].get(str(i), ((), ()))
        unscored = tuple(tuple((b, e) for b, e in side) for side in spans)
        found.append(
            replace(
                made,
                unscored=(unscored[0], unscored[1]),
                label_smoothing=pair.label_smoothing,
                group=pair.group,
            )
        )
    problems = [Problem(**{**p, "where": pairs[p["where"]].source}) for p in told["problems"]]
    return Tokenised(found, problems, Counter(told["notes"]), told["said"], told["warned"])
