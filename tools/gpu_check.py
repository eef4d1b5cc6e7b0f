"""What only a GPU can show, in one run and one results file: `make gpu-check`.

Builds the CUDA kernels for the GPU at hand, runs every test marked `gpu`, compute-sanitizer on a
few small cases of each kernel, and the figures of `benchmarks/gpu_figures.py`; then writes
`benchmarks/results/gpu-<device>-<commit>.json` (device, driver, versions, commit, sha256 of each
kernel source, passes and failures of each kernel, figures) and draws
`dpo_kernels/gpu_verified.json` from all results files. Needs no network; every step has a time
limit, ten minutes in all. A step that could not run is recorded as not run, with the reason.

    python tools/gpu_check.py [--commit SHA] [--out FOLDER]
    python tools/gpu_check.py --rehearse     # no GPU: the same steps on the host, nothing recorded
    python tools/gpu_check.py --draw-record  # only gpu_verified.json, from the results files
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOTAL = 570  # seconds; the limits of the steps, in order, are cut to what is left of it
LIMITS = {"build": 240, "tests": 300, "sanitizer": 40, "figures": 200}
SANITIZERS = ("memcheck", "racecheck", "initcheck")


class Run:
    """Steps against one clock; each leaves its outcome in `steps`."""

    def __init__(self, folder: Path):
        self.began, self.folder = time.monotonic(), folder
        self.steps: dict[str, dict[str, Any]] = {}

    def step(self, name: str, limit: str, command: list[str], env: dict[str, str]) -> bool:
        """Whether the command ran to its end in time; its output is under `folder`."""
        left = min(LIMITS[limit], TOTAL - (time.monotonic() - self.began))
        if left < 5:
            return self.skip(name, "no time was left")
        print(f"== {name}: at most {left:.0f} s", flush=True)
        began, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("w") as out:
            try:
                code: int | None = subprocess.run(
                    command, cwd=ROOT, env={**os.environ, **env}, stdout=out,
                    stderr=subprocess.STDOUT, timeout=left,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        seconds = round(time.monotonic() - began, 1)
        outcome = "passed" if code == 0 else "timed out" if code is None else f"failed ({code})"
        tail = log.read_text(errors="replace")[-2000:]
        self.steps[name] = {"outcome": outcome, "seconds": seconds}
        if code != 0:
            self.steps[name]["output"] = tail
            print(tail)
        print(f"== {name}: {outcome}, {seconds} s", flush=True)
        return code is not None

    def skip(self, name: str, why: str) -> bool:
        self.steps[name] = {"outcome": f"not run: {why}"}
        print(f"== {name}: not run: {why}", flush=True)
        return False


def main() -> int:
    options = parse()
    if options.draw_record:
        draw_record()
        return 0
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("no GPU is visible to torch; --rehearse runs the same steps on the host")
        return 2
    folder = options.out
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "logs"
    work.mkdir(exist_ok=True)
    run = Run(work)
    env = {"PYTHONPATH": str(ROOT)}
    machine = describe(options)
    print(json.dumps(machine, indent=1), flush=True)
    if options.rehearse:
        run.skip("build", "a rehearsal takes what is installed")
    else:
        arch = machine["capability"].replace(".", "")
        build = {"DPO_KERNELS_CUDA": "1", "DPO_KERNELS_ARCHS": arch}
        run.step(
            "build", "build", [sys.executable, "setup.py", "build_ext", "--inplace"], env | build
        )
    lines = work / "tests.jsonl"
    lines.unlink(missing_ok=True)
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider",
             f"--kernel-report={lines}", "-k", options.select or ""]  # fmt: skip
    ended = run.step("tests", "tests", tests, env)
    sanitize(run, options.rehearse, env)
    figures = work / "figures.json"
    figures.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks/gpu_figures.py"), "--json", str(figures)]
    run.step("figures", "figures", command + ["--rehearse"] * options.rehearse, env)
    kernels, outcomes = of_kernels(lines, env)
    result = {
        **machine, "rehearsal": options.rehearse,
        "complete": ended and not options.select, "steps": run.steps, "tests": outcomes,
        "kernels": kernels,
        "figures": json.loads(figures.read_text()) if figures.exists() else None,
        "seconds": round(time.monotonic() - run.began, 1),
    }  # fmt: skip
    name = re.sub(r"\W+", "-", machine["device"]).strip("-").lower()
    path = folder / f"gpu-{name}-{machine['commit'][:12]}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for kernel, state in kernels.items():
        print(f"{kernel:<27} {state['passed']:>5} passed {state['failed']:>4} failed")
    print(f"wrote {path}")
    if folder.resolve() == RESULTS and not options.rehearse:
        draw_record()
    good = all(not k["failed"] for k in kernels.values()) and result["complete"]
    return 0 if good or options.rehearse else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", help="of the sources, where this is no git checkout")
    parser.add_argument("--out", type=Path, default=None, help=f"folder (default {RESULTS})")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on the host")
    parser.add_argument("--draw-record", action="store_true", help="only draw gpu_verified.json")
    parser.add_argument(
        "--select", metavar="EXPRESSION", help="only these tests (pytest -k): verifies nothing"
    )
    options = parser.parse_args()
    if options.out is None:
        options.out = ROOT / "build" / "gpu-rehearsal" if options.rehearse else RESULTS
    return options


def describe(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    def say(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "absent"
    gpu = torch.cuda.is_available()
    nvcc = re.search(r"release (\S+),", say("nvcc", "--version"))
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": torch.cuda.get_device_name() if gpu else "host",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if gpu else "",
        "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "triton": triton_version,
            "nvcc": nvcc[1] if nvcc else "absent",
        },
        "commit": options.commit or say("git", "rev-parse", "HEAD") or "unknown",
        "changed files": say("git", "status", "--porcelain").splitlines(),
        "date": now.isoformat(timespec="seconds"),
    }  # fmt: skip


def sanitize(run: Run, rehearse: bool, env: dict[str, str]) -> None:
    program = [sys.executable, str(ROOT / "tests/gpu_small.py")]
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if rehearse:
        run.step("sanitizer-none", "sanitizer", program, env)
    # Every allocation apart, so that a read past one is seen.
    env = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in SANITIZERS:
        if tool is None:
            run.skip(f"sanitizer-{name}", "compute-sanitizer was not found")
        else:
            command = [tool, "--tool", name, "--error-exitcode", "9", *program]
            run.step(f"sanitizer-{name}", "sanitizer", command, env)


def of_kernels(lines: Path, env: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Passes and failures by kernel, with its sources; and the tests' outcomes."""
    # In a process of its own: the build may have replaced the compiled module.
    code = ("import json; from dpo_kernels import verification as v;"
            "print(json.dumps({k: v.sources(k) for k in v.KERNELS}))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, **env})  # fmt: skip
    kernels: dict[str, Any] = {
        kernel: {"passed": 0, "failed": 0, "sources": hashes}
        for kernel, hashes in json.loads(done.stdout).items()
    }
    tests = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    counts: dict[str, int] = {}
    failures = []
    for test in tests:
        outcome = test["outcome"]
        counts[outcome] = counts.get(outcome, 0) + 1
        launched = test["kernels"]
        if outcome == "failed":
            failures.append({"test": test["test"], "why": test["why"]})
            # What failed before it launched anything counts against its whole backend.
            launched = launched or [k for k in kernels if k.split("/")[0] in test["test"]]
        if outcome != "skipped":
            for kernel in launched:
                kernels[kernel][outcome] += 1
    return kernels, {"counts": counts, "failures": failures}


def draw_record() -> None:
    sys.path.insert(0, str(ROOT))
    from dpo_kernels import verification

    record = verification.draw_record(RESULTS)
    verification.RECORD.write_text(json.dumps(record, indent=1) + "\n" if record else "{}\n")
    print(f"wrote {verification.RECORD}: {len(record)} kernels")


if __name__ == "__main__":
    sys.exit(main())
