"""Markdown of what the scripts of `benchmarks/` wrote that time whole steps beside TRL.

A step is tens of seconds, so that other work on a machine moves the clock more than it does a
kernel's: CPU time of all threads stands beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def script_tables(folder: Path) -> list[str]:
    """A table for each results file of these scripts in `folder`."""
    found = []
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        table = _TABLES.get(run.get("format") if isinstance(run, dict) else None)
        if table is not None:
            found.append(table(run, file))
    return found


def _place(run: dict[str, Any], file: Path) -> str:
    return (
        f"{run['device']}, {run['threads']} threads, {run['date'][:10]}, load {run['load']} before "
        f"the run ([{file.name}](../benchmarks/results/{file.name}))"
    )


def _one_script(run: dict[str, Any], file: Path) -> str:
    """`compare_trl.py`"""
    rows = [
        (
            name,
            f"{r['seconds_per_step']:.2f}",
            f"{r['speedup']:.2f}x",
            f"{r['cpu_seconds_per_step']:.2f}",
            f"{r['peak_mb']:.0f}",
            f"{r['training_mb']:.0f}",
        )
        for name, r in run["results"].items()
    ]
    head = ("", "s/step", "of TRL's speed", "CPU s/step", "peak MB", "of it for training")
    return (
        f"One DPO script written for TRL {run['versions']['trl']}, as it is and patched, "
        f"{_place(run, file)}:\n\n{_table(head, rows)}"
    )


def _real_pairs(run: dict[str, Any], file: Path) -> str:
    """`real_pairs.py`"""
    parts = [
        f"Steps of {run['pairs_a_step']} real pairs of at most {run['max_length']} tokens, "
        f"{run['model']} in fp32, {_place(run, file)}:"
    ]
    for group, base in (("layouts", "one padded call"), ("TRL", "TRL")):
        rows = [
            (
                name,
                f"{_mean(r['tokens']):.0f}",
                f"{_mean(r['seconds']):.2f}",
                f"{r['speed']:.2f}x",
                f"{_mean(r['cpu_seconds']):.2f}",
                f"{r['cpu_speed']:.2f}x",
                f"{r['loss_apart']:.0e}",
            )
            for name, r in run["results"].get(group, {}).items()
        ]
        head = (
            "",
            "tokens a step",
            "s/step",
            f"of {base}",
            "CPU s/step",
            f"of {base}",
            "loss apart",
        )
        if rows:
            parts.append(_table(head, rows))
    return "\n\n".join(parts)


def _steps(run: dict[str, Any], file: Path) -> str:
    """`test_step.py`"""
    rows, longest = [], []
    for case, found in run["results"].items():
        if "longest" in case:
            longest.append(f"{case}: {', '.join(f'{n} {t}' for n, t in found.items())}.")
            continue
        for name, r in found.items():
            rows.append(
                (
                    case,
                    name,
                    f"{r['tokens']:.0f}",
                    f"{r['seconds']:.2f}",
                    f"{r['of TRL']:.2f}x",
                    f"{r['cpu_seconds']:.2f}",
                    f"{r['CPU of TRL']:.2f}x",
                    f"{r['training_mb']:.0f}",
                )
            )
    head = (
        "shape",
        "",
        "tokens a step",
        "s/step",
        "of TRL",
        "CPU s/step",
        "of TRL",
        "MB of training",
    )
    text = f"A whole step of random models, {_place(run, file)}:\n\n{_table(head, rows)}"
    return "\n\n".join([text, *longest])


def _mean(values: float | list[float]) -> float:
    return sum(values) / len(values) if isinstance(values, list) else values


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


_TABLES: dict[str | None, Callable[[dict[str, Any], Path], str]] = {
    "dpo-kernels TRL script 1": _one_script,
    "dpo-kernels real pairs 1": _real_pairs,
    "dpo-kernels step 1": _steps,
}
