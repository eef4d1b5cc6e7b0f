"""The compatibility matrix: the wheel with the oldest and the newest supported torch, tested.

    python tools/compat.py            run it (minutes and gigabytes), write docs/compatibility.json
    python tools/compat.py --table    print the table of docs/clusters.md from that file

Each cell is a fresh environment with one torch, its Triton and a transformers of its time, the
wheel of `make wheel`, the smoke test and the tests of what depends on them. Tests of the CUDA
kernels on the host are left out: they do not touch torch's versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import dist
from cells import NEWEST, OLDEST, Cell

RESULTS = dist.ROOT / "docs" / "compatibility.json"
TESTS = {
    "ops": [
        "ops/test_token_logps.py",
        "ops/test_token_kl.py",
        "loss/test_losses.py",
        "loss/test_dpo.py",
        "loss/test_linear.py",
        "loss/test_linear_autograd.py",
        "test_imports.py",
    ],
    "trainer": [
        "data/test_data.py",
        "data/test_default_data.py",
        "train/test_train.py",
        "train/test_cli.py",
    ],
}
COLUMNS = {"ops": "ops on CPU", "interpreter": "Triton, interpreted", "trainer": "trainer"}


ASK = """
import json, platform, torch, dpo_kernels, dpo_kernels._C
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "torch_cuda": torch.version.cuda,
                  "machine": platform.machine(),
                  "cuda_architectures_in_wheel": dpo_kernels._C.cuda_architectures,
                  **{p: version(p) for p in ("triton", "transformers", "numpy")}}))
"""


def test(cell: Cell, wheel: Path, python: Path) -> dict:
    """Smoke test and tests of one environment, with the versions that are really there."""
    env = {**dist.clean_environment(), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    versions = json.loads(dist.run(python, "-c", ASK, cwd=python.parent, env=env))
    result = {"cell": cell.name, **versions, "wheel": wheel.name, "date": str(date.today())}
    with tempfile.TemporaryDirectory() as folder:
        smoke = shutil.copy(dist.ROOT / "tools" / "smoke.py", folder)
        plain = {k: v for k, v in env.items() if k != "TRITON_INTERPRET"}
        print(dist.run(python, smoke, cwd=folder, env=plain), end="")
        files = [dist.ROOT / "tests" / n for group in TESTS.values() for n in group]
        report = Path(folder, "report.xml")
        # Not `python -m pytest`: it would put the sources before the wheel.
        command = [
            python.parent / "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not cuda",
            f"--junitxml={report}",
            *files,
        ]
        done = subprocess.run(
            list(map(str, command)), cwd=dist.ROOT, env=env, text=True, capture_output=True
        )
        print(done.stdout[-4000:] if done.returncode else done.stdout.splitlines()[-1])
        result["tests"] = counted(report)
    result["passed"] = done.returncode == 0
    return result


def counted(report: Path) -> dict[str, dict[str, int]]:
    """Outcomes by group; a test whose parameters name Triton counts as the interpreter's."""
    counts: dict[str, Counter] = {name: Counter() for name in COLUMNS}
    for case in ElementTree.parse(report).iter("testcase"):
        file = (case.get("classname") or "").split(".")[-1] + ".py"
        of_trainer = any(name.endswith(f"/{file}") for name in TESTS["trainer"])
        group = "trainer" if of_trainer else "ops"
        if "triton" in (case.get("name") or ""):
            group = "interpreter"
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        counts[group][outcomes.pop() if outcomes else "passed"] += 1
    return {name: dict(sorted(count.items())) for name, count in counts.items()}


def table() -> str:
    """Markdown for docs/clusters.md from the recorded results."""
    lines = [f"| | Python | torch | Triton | transformers | {' | '.join(COLUMNS.values())} |"]
    lines.append("|---" * (5 + len(COLUMNS)) + "|")
    for r in json.loads(RESULTS.read_text())["cells"]:
        torch = f"{r['torch'].split('+')[0]} (CUDA {r['torch_cuda']})"
        shown = [r["cell"], r["python"], torch, r["triton"], r["transformers"]]
        for name in COLUMNS:
            shown.append(", ".join(f"{n} {word}" for word, n in sorted(r["tests"][name].items())))
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the table of docs/clusters.md")
    parser.add_argument(
        "--environments",
        type=Path,
        metavar="FOLDER",
        help="keep the environments there, and use those that are",
    )
    parser.add_argument("--wheel", type=Path, help="default: the newest in dist/")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    wheel = args.wheel or dist.newest_wheel()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as pool:

        def run(cell: Cell) -> dict:
            print(f"{cell.name}: {wheel.name} with {', '.join(cell.requirements())}", flush=True)
            folder = (args.environments or Path(temporary)) / cell.name
            wanted = [*cell.requirements(), "pytest>=8", "pytest-benchmark>=4"]
            return test(cell, wheel, dist.fresh_environment(folder, wheel, wanted))

        results = list(pool.map(run, (OLDEST, NEWEST)))  # each has one thread
    RESULTS.write_text(json.dumps({"cells": results}, indent=2) + "\n")
    print(table())
    if not all(r["passed"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
