"""Every Triton kernel compiled ahead of time on each Triton release: registers and spills.

    python tools/triton_releases.py            compile (minutes), write docs/triton.json and table
    python tools/triton_releases.py --table    print the table of docs/kernels.md from that file

Releases but the one at hand are installed by pip, without their dependencies, into build/triton
(half a gigabyte each) and stand before the environment's own on the path. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "triton.json", ROOT / "docs" / "kernels.md"
START, END = "<!-- generated from docs/triton.json -->\n", "\n<!-- /triton -->"
PROGRAM = ROOT / "tests/proof/triton_aot.py"
# The first is the oldest that pyproject.toml allows, the last the one that constraints.txt pins.
RELEASES = ("3.2.0", "3.3.1", "3.4.0", "3.6.0", "3.9.0")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class Unreachable(Exception):
    """A release could not be had; the text is pip's own word."""


def family(kernel: str) -> str:
    """The row of tables and budgets: dtypes, tails, directions and phis share one."""
    parts = r"_(fp32|bf16|fp16|tail|phi\d)" + ("|_backward" if "sum" in kernel else "")
    return re.sub(parts, "", kernel)


def targets_of(release: str) -> tuple[str, ...]:
    """Triton 3.2 brings a ptxas that does not know sm_100."""
    return tuple(t for t in TARGETS if t != "sm_100") if release.startswith("3.2.") else TARGETS


def folder_of(release: str, timeout: int | None = None) -> Path | None:
    """Where the release lies, installed there at the first call; None for the one at hand."""
    if version("triton") == release:
        return None
    folder = ROOT / "build" / "triton" / release
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-q",
            "--retries",
            "1",
            "--no-deps",
            "--target",
            f"{fresh}/it",
            f"triton=={release}",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as late:
            raise Unreachable(f"triton {release}: pip took over {timeout} s") from late
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it says nothing"]
            raise Unreachable(f"triton {release}: pip: {said[-1]}")
        shutil.move(f"{fresh}/it", folder)
    return folder


def compiled(release: str, targets: tuple[str, ...], timeout: int | None = None) -> list[dict]:
    """What `tests/proof/triton_aot.py` prints there, of every kernel."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    before = folder_of(release, timeout)
    path = [str(p) for p in (before, ROOT) if p] + [env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *targets], capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise RuntimeError(f"triton {release}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def most(kernels: list[dict], target: str) -> dict[str, list[int]]:
    """family -> the most registers a thread and bytes of local memory of its kernels there."""
    rows: dict[str, list[int]] = {}
    for kernel in kernels:
        if kernel["target"] == target and "registers" in kernel:
            row = rows.setdefault(family(kernel["kernel"]), [0, 0])
            row[:] = [max(row[0], kernel["registers"]), max(row[1], kernel["spills"])]
    return rows


def table() -> str:
    """Markdown for docs/kernels.md from the recorded results."""
    recorded = json.loads(RESULTS.read_text())
    lines = [
        "| | " + " | ".join(f"Triton {r}" for r in recorded) + " |",
        "|---" * (1 + len(recorded)) + "|",
    ]
    for name in next(iter(recorded.values()))["sm_80"]:
        cells = []
        for by_target in recorded.values():
            figures = [by_target[t][name] for t in TARGETS if t in by_target]
            spilt = max(spills for _, spills in figures)
            registers = " / ".join(str(r) for r, _ in figures)
            cells.append(registers + f", {spilt} bytes spilt" * (spilt > 0))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of docs/kernels.md")
    if parser.parse_args().table:
        print(table())
        return
    recorded = {}
    for release in RELEASES:
        print(f"triton {release}: {', '.join(targets_of(release))}", flush=True)
        kernels = compiled(release, targets_of(release))
        recorded[release] = {t: rows for t in TARGETS if (rows := most(kernels, t))}
    text = json.dumps(recorded, indent=1)
    RESULTS.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n")
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(before + START + table() + END + rest.partition(END)[2])
    print(table())


if __name__ == "__main__":
    main()
