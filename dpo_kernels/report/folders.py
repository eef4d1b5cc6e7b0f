"""What a folder holds, read so that a run that was cut off, or is still at work, has its page.

A line that is no JSON (the last one, of a run that was killed) is left out and told of. Nothing is
taken for granted but that a step is a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class NoRun(ValueError):
    """The path holds nothing that a page could be made of."""


RUN_FILES = ("metrics.jsonl", "summary.json", "config.yaml")
Row = dict[str, Any]


@dataclass
class TrainingRun:
    """A folder of `train` or `sft`."""

    path: Path
    name: str
    rows: list[Row] = field(default_factory=list)  # of metrics.jsonl, by step
    sft_rows: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)
    config_text: str = ""
    left_out: list[Row] = field(default_factory=list)
    surprising: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was wrong with the files

    @property
    def last_step(self) -> int:
        return int(max((r["step"] for r in self.rows), default=0))

    @property
    def finished(self) -> bool:
        steps = self.summary.get("steps")
        return isinstance(steps, int) and steps >= self.last_step

    @property
    def supervised(self) -> bool:
        """A run of `sft`: it has rows and no pairs."""
        if self.summary:
            return "pairs" not in self.summary
        return bool(self.rows) and not any(
            k.removeprefix("eval_").startswith("rewards/") for r in self.rows for k in r
        )

    def points(self, key: str, factor: float = 1.0) -> list[tuple[float, float]]:
        """(step, value) of the rows that have it; what is not finite stays in."""
        found = []
        for row in self.rows:
            value = row.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.append((float(row["step"]), float(value) * factor))
        return found

    def first(self, key: str) -> float | None:
        return next((y for _, y in self.points(key)), None)

    def last(self, key: str) -> float | None:
        points = self.points(key)
        return points[-1][1] if points else None


@dataclass
class IterationRun:
    """A folder of `iterate`: what each round's manifest says."""

    path: Path
    name: str
    zero: Row
    rounds: list[Row]  # manifests from round 1 on
    summary: Row
    config: Row
    trained: list[TrainingRun]  # the rounds' own runs
    notes: list[str] = field(default_factory=list)

    @property
    def promoted(self) -> int:
        return max((r["round"] for r in self.rounds if r.get("promoted")), default=0)


def is_iteration(path: Path) -> bool:
    return (path / "rounds").is_dir()


def is_training(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)


def runs_in(path: Path) -> list[Path]:
    """The runs that a path names: itself, or those of the folder (`runs/`, a sweep's).

    Raises `NoRun` and says what was looked for and what is there.
    """
    if not path.exists():
        raise NoRun(f"{path} does not exist; expected the folder of a run")
    if not path.is_dir():
        raise NoRun(f"{path} is a file; expected the folder of a run")
    if is_iteration(path) or is_training(path):
        return [path]
    found = [p for p in sorted(path.iterdir()) if p.is_dir() and is_training(p)]
    if found:
        return found
    there = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    shown = ", ".join(there[:6]) + (f" and {len(there) - 6} more" if len(there) > 6 else "")
    raise NoRun(
        f"{path} is no run: expected metrics.jsonl (`dpo-kernels train`, `sft`), rounds/ "
        f"(`dpo-kernels iterate`) or folders of runs; it holds {shown or 'nothing'}"
    )


def names_of(paths: Sequence[Path]) -> list[str]:
    """Names that tell runs apart: the last part of each path, more where two are alike."""
    whole = [p.absolute().resolve() for p in paths]
    for depth in range(1, max((len(p.parts) for p in whole), default=1) + 1):
        names = ["/".join(p.parts[-depth:]) for p in whole]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p.parts[-1:])} ({i})" for i, p in enumerate(whole, start=1)]


def read_training(path: Path, name: str) -> TrainingRun:
    run = TrainingRun(path, name)
    notes = run.notes
    run.rows = _steps(path / "metrics.jsonl", notes)
    run.sft_rows = _steps(path / "sft_metrics.jsonl", notes)
    run.summary = _object(path / "summary.json", notes)
    run.left_out = read_lines(path / "left_out.jsonl", notes)
    run.surprising = read_lines(path / "surprising_pairs.jsonl", notes)
    file = path / "config.yaml"
    if file.is_file():
        run.config_text = file.read_text(encoding="utf-8", errors="replace")
        run.config = _yaml(run.config_text)
    return run


def read_iteration(path: Path, name: str) -> IterationRun:
    notes: list[str] = []
    manifests = []
    for folder in sorted(p for p in (path / "rounds").iterdir() if p.is_dir()):
        found = _object(folder / "manifest.json", notes)
        if isinstance(found.get("round"), int):
            manifests.append({**found, "folder": folder})
    zero = next((m for m in manifests if m["round"] == 0), {})
    rounds = [m for m in manifests if m["round"] > 0]
    trained = [
        read_training(m["folder"] / "train", f"round {m['round']}")
        for m in rounds
        if is_training(m["folder"] / "train")
    ]
    return IterationRun(
        path,
        name,
        zero,
        rounds,
        _object(path / "summary.json", notes),
        _object(path / "config.json", notes),
        trained,
        notes,
    )


def read_lines(path: Path, notes: list[str]) -> list[Row]:
    """The objects of a JSONL file; none where there is no file."""
    if not path.is_file():
        return []
    rows, bad = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            rows.append(found)
        else:
            bad.append(number)
    if bad == [len(lines)]:
        notes.append(f"{path.name}: the last line is half, as a run that is cut off leaves it")
    elif bad:
        some = ", ".join(map(str, bad[:5])) + ("…" if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad):,} lines are no JSON object (line {some})")
    return rows


def _steps(path: Path, notes: list[str]) -> list[Row]:
    """The rows that have a step, in its order."""
    rows = read_lines(path, notes)
    kept = [r for r in rows if _is_step(r.get("step"))]
    if len(kept) < len(rows):
        notes.append(f"{path.name}: {len(rows) - len(kept):,} lines have no step")
    return sorted(kept, key=lambda r: r["step"])


def _is_step(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _object(path: Path, notes: list[str]) -> Row:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes().decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        notes.append(f"{path.name} is no JSON, or half of it")
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(content: str) -> Row:
    try:
        import yaml

        found = yaml.safe_load(content)
    except Exception:  # not installed, or no YAML: the page shows the text as it is
        return {}
    return found if isinstance(found, dict) else {}
