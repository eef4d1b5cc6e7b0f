"""One TRL script, as it is and after `patch_trl()`: time a step, peak memory, the same losses.

    python benchmarks/compare_trl.py [--rounds 3] [--json FILE] [options of trl_script.py]

Runs alternate (TRL, patched with padded rows, patched, TRL, ...), each in a process of its own.
A run's first step warms up and is left out; the time is the median of the others over all rounds.
On a machine that others use the CPU time of all threads says more than the clock.
It needs TRL: `make test-integrations` leaves environments with it in build/integrations/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from dpo_kernels.bench.results import describe  # noqa: E402

SCRIPT = HERE / "trl_script.py"
PATCH = """
import runpy, sys
from dpo_kernels.integrations.trl import patch_trl
patch_trl({options})
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
VARIANTS = {"TRL": None, "patch_trl(layout='padded')": "layout='padded'", "patch_trl()": ""}


def run(patch: str | None, arguments: list[str], threads: int) -> dict[str, Any]:
    """The script's own measurement, from a fresh process."""
    argv = [str(SCRIPT), *arguments]
    code = None if patch is None else PATCH.format(options=patch, argv=argv)
    command = [sys.executable, *(argv if code is None else ["-c", code])]
    path = os.pathsep.join(p for p in (str(HERE.parent), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command[:2])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results there")
    options, rest = parser.parse_known_args()
    rest += ["--threads", str(options.threads)]
    about = describe() | {
        "format": "dpo-kernels TRL script 1",
        "rounds": options.rounds,
        "threads": options.threads,
        "script": rest,
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for done in range(options.rounds):
        for name, patch in VARIANTS.items():
            print(f"round {done + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            runs[name].append(run(patch, rest, options.threads))
    base = None
    results = {}
    print(f"| {'':28} | s/step | of TRL's speed | CPU s/step | peak MB | of it for training |")
    print("|---|---|---|---|---|---|")
    for name, each in runs.items():
        seconds = statistics.median(s for r in each for s in r["seconds"][1:])
        cpu = statistics.median(s for r in each for s in r["cpu_seconds"][1:])
        peak = statistics.median(r["peak_mb"] for r in each)
        own = statistics.median(r["peak_mb"] - r["peak_before_mb"] for r in each)
        base = base or seconds
        speed = f"{base / seconds:.2f}x"
        print(f"| {name:28} | {seconds:.3f} | {speed} | {cpu:.2f} | {peak:.0f} | {own:.0f} |")
        results[name] = {
            "seconds_per_step": seconds,
            "cpu_seconds_per_step": cpu,
            "speedup": base / seconds,
            "peak_mb": peak,
            "training_mb": own,
            "losses": each[0]["losses"],
        }
    worst = max(
        abs(a - b)
        for name in VARIANTS
        for a, b in zip(results["TRL"]["losses"], results[name]["losses"], strict=True)
    )
    print(
        f"\nlosses differ by at most {worst:.1e}; load average {os.getloadavg()[0]:.1f}, "
        f"{os.cpu_count()} CPUs"
    )
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
