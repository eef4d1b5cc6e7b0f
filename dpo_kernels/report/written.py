"""From paths to a page on disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .folders import NoRun, is_iteration, names_of, read_iteration, read_training, runs_in
from .iteration_page import iteration_page
from .training_page import training_page

NAME = "report.html"


def write_page(paths: Sequence[Path], out: Path | None = None) -> Path:
    """The page of these runs into `out`, or into the run's folder (of several: their common one).

    Raises `NoRun` where a path holds no run, or where runs are of kinds that share no axis.
    """
    runs = list(dict.fromkeys(run for path in paths for run in runs_in(path)))
    names = names_of(runs)
    several = [is_iteration(run) for run in runs]
    if any(several) and not all(several):
        one = runs[several.index(True)], runs[several.index(False)]
        raise NoRun(
            f"{one[0]} is an iteration and {one[1]} a training run: they have no curve in common, "
            "so each needs a page of its own"
        )
    if all(several):
        content = iteration_page([read_iteration(*r) for r in zip(runs, names, strict=True)])
    else:
        content = training_page([read_training(*r) for r in zip(runs, names, strict=True)])
    out = out or _common(runs) / NAME
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".tmp")
    part.write_text(content, encoding="utf-8")
    part.replace(out)
    return out


def _common(runs: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([str(r.absolute()) for r in runs])) if len(runs) > 1 else runs[0]
