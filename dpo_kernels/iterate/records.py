"""The files of an iteration: prompts, samples, verdicts, pairs. JSONL, or Parquet by its ending.

A file is there whole or not at all: it is written beside its name and renamed. A stage that grows
line by line writes a journal, from which a half-written last line is dropped.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.files import read_rows
from ..data.left_out import BadField, DataError
from ..train.config_files import UserError
from ..train.ranks import ALONE, Ranks

Turn = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    prompt: Turn
    id: str


@dataclass(frozen=True)
class Sample:
    """One completion of a prompt, and how it was drawn."""

    prompt: Turn
    completion: str
    sample: int
    seed: int
    temperature: float
    finish_reason: str
    logps: list[float] | None = None  # of each sampled token, untempered
    id: str = ""
    token_ids: list[int] | None = None  # as drawn, where a model of this process drew them


@dataclass(frozen=True)
class PairItem:
    """Two completions of one prompt, to be compared."""

    prompt: Turn
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """What a judge says of two completions.

    `p_first`: probability that the first is better, None where there is no verdict (`error`).
    `score_first`, `score_second`: where the judge scores each alone.
    """

    p_first: float | None
    tie: bool
    error: str | None
    raw: str
    order: str = "single"  # "both": asked twice, each first once
    score_first: float | None = None
    score_second: float | None = None
    # Of two orders that disagree: +1 the one shown first both times, -1 the second, 0 neither.
    position: int | None = None

    def __post_init__(self) -> None:
        if (self.p_first is None) != (self.error is not None):
            raise ValueError("a verdict has either p_first or an error")


def digest(value: Any) -> str:
    """Hash of any JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def file_digest(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def prompt_id(prompt: Turn) -> str:
    return digest(prompt)[:16]


def prompt_text(prompt: Turn) -> str:
    """A prompt as a judge reads it."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def as_completion(prompt: Turn, text: str) -> Turn:
    """A completion in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def completion_text(completion: Turn) -> str:
    if isinstance(completion, str):
        return completion
    return "\n\n".join(str(m.get("content") or "") for m in completion)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL (or JSON, also packed) or Parquet file; a broken one is a `DataError`."""
    path = Path(path)
    if path.suffix == ".parquet":
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        return _parquet().read_table(path).to_pylist()
    rows = []
    for where, row in read_rows(path):
        if isinstance(row, BadField):
            raise DataError(str(row.at(where)))
        rows.append(row)
    return rows


def write_table(path: str | Path, rows: Iterable[Any]) -> None:
    """Write rows (dicts or dataclasses), whole or not at all."""
    path = Path(path)
    plain = [row if isinstance(row, dict) else asdict(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".writing")
    if path.suffix == ".parquet":
        import pyarrow

        _parquet().write_table(pyarrow.Table.from_pylist(plain), part)
    else:
        with part.open("w", encoding="utf-8") as file:
            for row in plain:
                file.write(json_line(row))
    with part.open("rb") as written:
        os.fsync(written.fileno())
    part.replace(path)


def json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install pyarrow, or use .jsonl") from None
    return pyarrow.parquet


def read_prompts(path: str | Path) -> list[Prompt]:
    """The distinct prompts of a file: rows with `prompt` (text or messages) and optional `id`."""
    found: dict[str, Prompt] = {}
    for number, row in enumerate(read_table(path), start=1):
        value: Any = row.get("prompt")
        if not is_turn(value):
            raise DataError(f"{path}: row {number}: prompt: expected a text or a list of messages")
        key = prompt_id(value)
        found.setdefault(key, Prompt(value, str(row.get("id") or key)))
    if not found:
        raise DataError(f"{path}: no prompt")
    if len({p.id for p in found.values()}) < len(found):
        raise DataError(f"{path}: two prompts have the same id")
    return list(found.values())


def is_turn(value: object) -> bool:
    if isinstance(value, str):
        return True
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(m, dict)
            and isinstance(m.get("content"), str)
            and isinstance(m.get("role"), str)
            for m in value
        )
    )


def read_samples(path: str | Path) -> list[Sample]:
    """Samples of a file; those of one prompt have different numbers."""
    samples, seen = [], set()
    for number, row in enumerate(read_table(path), start=1):
        where = f"{path}: row {number}"
        if not is_turn(row.get("prompt")) or not isinstance(row.get("completion"), str):
            raise DataError(f"{where}: expected prompt and completion (a text)")
        key = str(row.get("id") or prompt_id(row["prompt"]))
        n = row.get("sample", number)
        if not is_whole(n) or (key, n) in seen:
            raise DataError(f"{where}: sample: expected a number that no other has, got {n!r}")
        seen.add((key, n))
        for name in ("seed", "temperature"):
            if not is_number(row.get(name) or 0):
                raise DataError(f"{where}: {name}: expected a number, got {row[name]!r}")
        for name in ("logps", "token_ids"):
            if not isinstance(row.get(name), list | None):
                raise DataError(f"{where}: {name}: expected a list, got {row[name]!r}")
        samples.append(
            Sample(
                row["prompt"],
                row["completion"],
                n,
                int(row.get("seed") or 0),
                float(row.get("temperature") or 0.0),
                str(row.get("finish_reason") or ""),
                row.get("logps"),
                key,
                row.get("token_ids"),
            )
        )
    if not samples:
        raise DataError(f"{path}: no sample")
    return samples


def read_verdicts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of verdicts, whoever wrote them: each has what pairs are made of."""
    rows = read_table(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        if row.get("id") is None and not is_turn(row.get("prompt")):
            raise DataError(f"{where}: prompt: expected a text or a list of messages")
        sides = [row.get(name) for name in ("first", "second")]
        if not all(map(is_whole, sides)) or sides[0] == sides[1]:
            raise DataError(f"{where}: expected first and second, the numbers of two samples")
        for name in ("p_first", "score_first", "score_second"):
            if row.get(name) is not None and not is_number(row[name]):
                raise DataError(f"{where}: {name}: expected a number or null, got {row[name]!r}")
        if not isinstance(row.get("tie"), bool | None):
            raise DataError(f"{where}: tie: expected true or false, got {row['tie']!r}")
    return rows


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def by_prompt(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples grouped by prompt, in the order of the file."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.id, []).append(sample)
    return groups


def of_rank(ranks: Ranks, ids: Iterable[str]) -> set[str]:
    """This rank's part of prompts, by their ids: the same in every stage that is of these."""
    return set(sorted(set(ids))[ranks.rank :: ranks.world])


class Journal:
    """A JSONL file that grows a line at a time and survives being cut anywhere.

    Opening it drops a half-written last line. Of many ranks each writes a file of its own beside
    the first one's; `rows` are those that any of them, now or in an earlier run, had written when
    it was opened, and its own since. None may write before all have opened it.
    """

    def __init__(self, path: str | Path, ranks: Ranks = ALONE) -> None:
        self.whole, self.ranks = Path(path), ranks
        self.path = self.whole
        if not ranks.first:
            self.path = self.whole.with_name(f"{self.whole.name}.rank{ranks.rank}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine, good = _lines(self.path)
        if self.path.exists() and good < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(good)
        self.rows = [row for file in self._others() for row in _lines(file)[0]] + mine
        self._file = self.path.open("ab", buffering=0)

    @classmethod
    def of(cls, output: Path, what: Any, ranks: Ranks = ALONE) -> Journal:
        """The journal beside a file that is being made; one of other settings has another name."""
        return cls(output.with_name(f"{output.name}.{digest(what)[:12]}.part"), ranks)

    def _others(self) -> list[Path]:
        """The files of the other ranks that are there."""
        found = [*self.whole.parent.glob(f"{glob.escape(self.whole.name)}.rank*"), self.whole]
        return sorted(p for p in found if p != self.path and p.is_file())

    def every_row(self) -> list[dict[str, Any]]:
        """The rows of all ranks, once all have written theirs."""
        if not self.ranks.many:
            return self.rows
        return [row for file in (self.path, *self._others()) for row in _lines(file)[0]]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append these rows in one write."""
        if rows:
            self._file.write("".join(map(json_line, rows)).encode("utf-8"))
            self.rows.extend(rows)

    def close(self) -> None:
        self._file.close()

    def drop(self) -> None:
        """Remove it, whoever wrote it: the finished file is there."""
        self.close()
        for file in (self.path, *self._others()):
            file.unlink(missing_ok=True)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and their length in bytes."""
    rows: list[dict[str, Any]] = []
    good = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        rows.append(row)
        good += len(line)
    return rows, good
