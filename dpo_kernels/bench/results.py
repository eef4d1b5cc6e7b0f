"""A run's measurements as JSON, and as tables for people."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import dpo_kernels as dk
from dpo_kernels import verification

from .cases import SUITES
from .measure import Measurement

FORMAT = "dpo-kernels benchmark 1"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
)


def describe(commit: str | None = None) -> dict[str, Any]:
    """Where and of what a run is: device, versions, commit, kernels."""
    gpu = torch.cuda.is_available()
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else _cpu(),
        "kind": "cuda" if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # before the run: other work on the machine
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "dpo-kernels": dk.__version__,
        "commit": commit or _commit(),
        "kernels": {
            name: verification.digest(verification.sources(name))
            for name in verification.KERNELS
            if verification.sources(name)
        },
    }


def as_row(m: Measurement) -> dict[str, Any]:
    row: dict[str, Any] = {"case": m.case.name, **asdict(m.case), "provider": m.provider}
    if m.case.model in ("-",):
        row["shape"] = None
    else:
        row["shape"] = asdict(m.case.shape)
    row |= {
        "ours": m.ours,
        "note": m.note,
        "error": m.error,
        "gradient error": m.gradient_error,
        "peak bytes": m.peak_bytes,
    }
    if m.seconds:
        row |= {
            "seconds": m.median,
            "p20": m.percentile(20),
            "p80": m.percentile(80),
            "rounds": len(m.seconds),
            "floor": m.floor,
        }
    return row


def write(path: Path, meta: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(meta | {"rows": list(rows)}, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A results file; `ValueError` if it is none."""
    try:
        run = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a results file: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT:
        found = run.get("format") if isinstance(run, dict) else type(run).__name__
        raise ValueError(f"{path} is not a results file: expected {FORMAT!r}, got {found!r}")
    return run


def by_case(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that were measured together. A case stands in several series, in each anew."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series = f"{row['series']}: " if row.get("series") else ""
        cases.setdefault(series + row["case"], []).append(row)
    return cases


def shown(case: str) -> str:
    """A case's name for people: without the parts that say nothing where there are no tokens."""
    return re.sub(r" - (.*) 0 tokens in (\d+ pairs).*", r" \1 \2", case)


def best_of_ours(rows: Iterable[dict[str, Any]], by: str = "seconds") -> dict[str, Any] | None:
    """Our least, by `by`, that does not overwrite its input: what others are compared with."""
    mine = [r for r in rows if r["ours"] and r.get(by) and "in place" not in r["provider"]]
    return min(mine, key=lambda r: r[by], default=None)


def text(meta: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Tables by case: median, spread, time against ours, percent of the floor, memory, error."""
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items())
    lines = [
        f"{meta['device']}, {meta['threads']} threads, load {meta['load']} before; {versions}",
        "time: median of rounds taken in turns (20th to 80th percentile); x ours: time over ours",
        "floor: percent of a copy's bandwidth or of the bare matrix products; error: "
        "against float64",
    ]
    for case, group in by_case(rows).items():
        ours = best_of_ours(group)
        lines += ["", f"{shown(case)}  [{SUITES.get(group[0]['suite'], group[0]['suite'])}]"]
        for row in group:
            lines.append(f"  {row['provider']:<36}{_figures(row, ours)}")
    return "\n".join(lines)


def _figures(row: dict[str, Any], ours: dict[str, Any] | None) -> str:
    memory = row["peak bytes"]
    if not row.get("seconds"):
        if memory is not None and not row["note"]:
            return f"{memory / 2**20:10.0f} MiB above its inputs"
        return row["note"]
    spread = f"({row['p20'] * 1e3:.4g} to {row['p80'] * 1e3:.4g})"
    line = f"{row['seconds'] * 1e3:10.4g} ms {spread:<22}"
    line += f"{row['seconds'] / ours['seconds']:7.2f} x ours" if ours else " " * 14
    line += f"{100 * row['floor'] / row['seconds']:6.0f} %" if row["floor"] else " " * 8
    line += f"{memory / 2**20:8.0f} MiB" if memory is not None else ""
    return line + (f"  error {row['error']:.0e}" if row["error"] is not None else "")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text(errors="replace").splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()
