"""What only a GPU can show, in one run and one results file: `make gpu-check`.

    preflight   what the run needs and this machine lacks, named at once; nothing is downloaded
    build       the CUDA kernels for the GPU at hand
    smoke       a few small cases of every kernel against float64
    figures     `benchmarks/gpu_figures.py`, a section a process, each figure with its target
    tests       the tests marked `gpu`, a group a process: an illegal address costs one group
    sanitizers  compute-sanitizer over the small cases of each backend

writes `benchmarks/results/gpu-<device>-<commit>.json` (device, driver, versions, commit, sha256 of
each kernel source, passes and failures of each kernel, figures) after every step, and draws
`dpo_kernels/gpu_verified.json` from all results files. Every process has a time limit, ten minutes
in all; what was done before a limit stays. What could not run is recorded as not run, with the
reason.

    python tools/gpu_check.py [--commit SHA] [--out FOLDER]
    python tools/gpu_check.py --rehearse     # no GPU: the same steps on the host, nothing recorded
    python tools/gpu_check.py --draw-record  # only gpu_verified.json, from the results files
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TOTAL = 570  # seconds; the limit of a process is cut to what is left of it
BUILD, SMOKE, TESTS, SANITIZER = 200, 60, 120, 60  # seconds
SECTIONS = {
    "kernels": 60,
    "rows": 30,
    "host": 30,
    "head": 60,
    "step": 60,
    "layouts": 60,
    "profile": 60,
    "peers": 90,
}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
NO_TESTS = 5  # pytest's exit code where nothing was selected
NEEDED = ("pybind11", "cmake", "ninja", "pytest", "triton", "transformers")


@dataclass(frozen=True)
class Group:
    """Tests that run in one process, and the kernels that it counts against if it dies."""

    name: str
    files: tuple[str, ...]
    select: str  # pytest -k
    kernels: tuple[str, ...]


def groups() -> list[Group]:
    found = []
    parts = {
        "token_logps": (("ops/test_token_logps.py",), ("token_logps", "token_logps_backward")),
        "token_kl": (("ops/test_token_kl.py", "loss/test_tdpo.py"), ("token_kl",)),
        "pair_loss": (("loss/test_losses.py", "ops/test_scaled_copy.py"), ("pair_loss",)),
        "composed": (
            (
                "loss/test_dpo.py",
                "ops/test_derivatives.py",
                "ops/test_opcheck.py",
                "loss/test_eager.py",
                "backends/test_gpu.py",
                "loss/test_linear.py",
                "inputs/test_options.py",
                "loss/test_output.py",
                "backends/test_triton_places.py",
                "loss/test_unscored_rows.py",
            ),
            ("token_logps", "token_logps_backward", "sequence_sum", "pair_loss"),
        ),
    }
    for backend in ("cuda", "triton"):
        for name, (files, kernels) in parts.items():
            own = tuple(f"{backend}/{k}" for k in kernels)
            found.append(Group(f"{backend} {name}", files, backend, own))
    rest = (
        "ops/test_products.py",
        "backends/test_gpu.py",
        "integrations/test_two_processes.py",
        "train/test_many_gpus.py",
        "train/test_staging.py",
        "backends/test_triton_places.py",
    )
    return [*found, Group("the rest", rest, "not triton and not cuda", ())]


class Run:
    """Processes against one clock; each leaves its outcome in `steps`, and all in the file."""

    def __init__(self, folder: Path, path: Path, result: dict[str, Any], total: float = TOTAL):
        self.total = total
        self.began, self.logs, self.path, self.result = time.monotonic(), folder, path, result
        self.steps: dict[str, dict[str, Any]] = result.setdefault("steps", {})
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.env = {**os.environ, "PYTHONPATH": path}
        self.lock = threading.Lock()

    def step(self, name: str, limit: float, command: list[str], **env: str) -> bool:
        """Whether the command ended well in time; its output is in a file of the logs' folder."""
        left = min(limit, self.total - (time.monotonic() - self.began))
        if left < 5:
            return self.skip(name, "no time was left")
        began, log = time.monotonic(), self.logs / f"{name.replace(' ', '-')}.log"
        with log.open("w") as out:
            try:
                code: int | None = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=self.env | env,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=left,
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        if code == NO_TESTS and "pytest" in command:
            return self.skip(name, "no such test")
        seconds = round(time.monotonic() - began, 1)
        died = f"died of signal {-code}" if code is not None and code < 0 else f"failed ({code})"
        outcome = (
            "passed" if code == 0 else f"timed out after {left:.0f} s" if code is None else died
        )
        found = {"outcome": outcome, "seconds": seconds}
        if code != 0:
            found["output"] = told(log.read_text(errors="replace")[-2000:])
        self.keep(name, found)
        return code == 0

    def skip(self, name: str, why: str) -> bool:
        self.keep(name, {"outcome": f"not run: {why}"})
        return False

    def keep(self, name: str, found: dict[str, Any]) -> None:
        with self.lock:
            self.steps[name] = found
            self.save()
            last = found.get("output", "").rstrip().rpartition("\n")[2]
            print(f"== {name}: {found['outcome']}{f': {last[:200]}' if last else ''}", flush=True)

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.began, 1)
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")


def main() -> int:
    options = parse()
    if options.draw_record:
        draw_record()
        return 0
    lacks = missing(options.rehearse)
    if lacks and not options.rehearse:
        print("this machine lacks, for make gpu-check:")
        print("\n".join(f"  {line}" for line in lacks))
        return 2
    machine = describe(options)
    print(json.dumps(machine, indent=1), flush=True)
    folder = options.out
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", machine["device"]).strip("-").lower()
    path = folder / f"gpu-{name}-{machine['commit'][:12]}.json"
    result = {
        **machine,
        "rehearsal": options.rehearse,
        "complete": False,
        "lacks": lacks,
        "figures": {},
    }
    run = Run(logs, path, result, options.seconds)

    built = build(run, machine, options.rehearse)
    small = [sys.executable, str(ROOT / "tests/proof/gpu_small.py")]
    for backend in ("cuda", "triton"):
        if built or backend == "triton":
            run.step(f"smoke {backend}", SMOKE, [*small, "--backend", backend])
    *sections, peers = SECTIONS
    for section in sections:
        figures(run, section, options.rehearse)
    ended = tests(run, built, options.select or "", options.rehearse)
    result["complete"] = ended and not options.select
    sanitize(run, small, built, options.rehearse)
    figures(run, peers, options.rehearse)  # the longest, last
    run.save()
    print_summary(result)
    print(f"wrote {path}, {run.result['seconds']:.0f} s")
    if folder.resolve() == RESULTS and not options.rehearse:
        draw_record()
    good = result["complete"] and all(not k["failed"] for k in result["kernels"].values())
    return 0 if good or options.rehearse else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commit", help="of the sources, where this is no git checkout")
    parser.add_argument("--out", type=Path, default=None, help=f"folder (default {RESULTS})")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on the host")
    parser.add_argument("--draw-record", action="store_true", help="only draw gpu_verified.json")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all of it (%(default)s)")
    parser.add_argument(
        "--select", metavar="EXPRESSION", help="only these tests (pytest -k): verifies nothing"
    )
    options = parser.parse_args()
    if options.out is None:
        options.out = ROOT / "build" / "gpu-rehearsal" if options.rehearse else RESULTS
    return options


def missing(rehearse: bool) -> list[str]:
    """What the run needs and does not find here, a line each."""
    lacks = []
    if importlib.util.find_spec("torch") is None:
        return ["torch"]
    import torch

    if not torch.cuda.is_available():
        lacks.append("a GPU that torch sees (--rehearse runs the same steps on the host)")
    nvcc = _tool("nvcc")
    if nvcc is None:
        lacks.append("nvcc, on PATH or under CUDA_HOME")
    elif torch.version.cuda and not (nvcc.parent.parent / "include" / "cuda_runtime.h").exists():
        lacks.append(f"cuda_runtime.h beside {nvcc}")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        lacks.append("a C++ compiler (c++, g++ or clang++, or CXX)")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        lacks.append(f"{header} (python3-dev)")
    lacks += [f"the Python package {n}" for n in NEEDED if importlib.util.find_spec(n) is None]
    return lacks


def _tool(name: str) -> Path | None:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=f"{home}/bin")
    return Path(found).resolve() if found else None


def describe(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    def say(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return ""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    spec = importlib.util.find_spec("triton")
    gpu = torch.cuda.is_available()
    nvcc = re.search(r"release (\S+),", say(str(_tool("nvcc") or "nvcc"), "--version"))
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "device": torch.cuda.get_device_name() if gpu else "host",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if gpu else "",
        "driver": say("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": importlib.import_module("triton").__version__ if spec else "absent",
            "nvcc": nvcc[1] if nvcc else "absent",
        },
        "commit": options.commit or say("git", "rev-parse", "HEAD") or "unknown",
        # Where the commit had to be named, this is no checkout of it: the hashes tell.
        "changed files": None
        if options.commit
        else say("git", "status", "--porcelain").splitlines(),
        "date": now.isoformat(timespec="seconds"),
    }


def build(run: Run, machine: dict[str, Any], rehearse: bool) -> bool:
    """Whether there are CUDA kernels to run."""
    if rehearse:
        run.skip("build", "a rehearsal takes what is installed")
        return True
    arch = machine["capability"].replace(".", "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if run.step("build", BUILD, command, DPO_KERNELS_CUDA="1", DPO_KERNELS_ARCHS=arch):
        return True
    output = run.steps["build"].get("output", "")
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    print(f"the build failed, backend cuda is left out: {(errors or ['no error line'])[0][:300]}")
    return False


def figures(run: Run, section: str, rehearse: bool) -> None:
    """A section's figures; of one that was cut off, those it had by then."""
    path = run.logs / f"figures-{section}.json"
    path.unlink(missing_ok=True)
    command = [
        sys.executable,
        str(ROOT / "benchmarks/gpu_figures.py"),
        "--json",
        str(path),
        "--section",
        section,
    ]
    run.step(f"figures {section}", SECTIONS[section], command + ["--rehearse"] * rehearse)
    if path.exists():
        run.result["figures"] |= json.loads(path.read_text())
        run.save()


def tests(run: Run, built: bool, select: str, rehearse: bool) -> bool:
    """Runs all groups (in a rehearsal the first of each backend), several at once; whether every
    one ran to its end."""
    todo = [g for g in groups() if built or not g.name.startswith("cuda")]
    if rehearse:
        todo = [g for g in todo if g.name.endswith("token_logps")]
    lines = {g.name: run.logs / f"tests-{g.name.replace(' ', '-')}.jsonl" for g in groups()}
    for path in lines.values():
        path.unlink(missing_ok=True)

    def one(group: Group) -> None:
        expression = f"({group.select}) and ({select})" if select else group.select
        files = [str(ROOT / "tests" / file) for file in group.files]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--kernel-report={lines[group.name]}",
            "-k",
            expression,
            *files,
        ]
        run.step(f"tests {group.name}", TESTS, command)

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        list(pool.map(one, todo))
    ran = {g: run.steps[f"tests {g.name}"]["outcome"] for g in todo}
    # 1: tests failed, and all ran. Any other end leaves tests that did not.
    cut = [
        g
        for g, outcome in ran.items()
        if outcome not in ("passed", "failed (1)") and not outcome.startswith("not run: no such")
    ]
    run.result["kernels"], run.result["tests"] = of_kernels(lines.values(), cut, run.env)
    run.save()
    return built and not cut and not rehearse


def sanitize(run: Run, program: list[str], built: bool, rehearse: bool) -> None:
    tool = _tool("compute-sanitizer")

    def one(what: tuple[str, str]) -> None:
        name, backend = what
        step = f"{name} {backend}"
        if backend == "cuda" and not built:
            run.skip(step, "the build failed")
        elif rehearse or tool is None:
            run.skip(step, "no GPU" if rehearse else "compute-sanitizer was not found")
        else:
            # Every allocation apart, so that a read past one is seen.
            command = [str(tool), "--tool", name, "--error-exitcode", "9", *program]
            run.step(
                step,
                SANITIZER,
                [*command, "--few", "--backend", backend],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )

    todo = [(name, backend) for name in SANITIZERS for backend in ("cuda", "triton")]
    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as pool:
        list(pool.map(one, todo))


def told(text: str) -> str:
    """What a program said, without where this machine keeps its files."""
    return re.sub(r"/[^\s'\"]*/(?=site-packages/)", "", text.replace(f"{ROOT}/", ""))


def of_kernels(
    files: Iterable[Path], cut: Iterable[Group], env: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Passes and failures by kernel, with its sources; and the tests' outcomes.

    A group that was cut off counts as a failure of its kernels.
    """
    # In a process of its own: the build may have replaced the compiled module.
    code = (
        "import json; from dpo_kernels import verification as v;"
        "print(json.dumps({k: v.sources(k) for k in v.KERNELS}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    kernels: dict[str, Any] = {
        kernel: {"passed": 0, "failed": 0, "sources": hashes}
        for kernel, hashes in json.loads(done.stdout).items()
    }
    tests = [json.loads(line) for f in files if f.exists() for line in f.read_text().splitlines()]
    counts: dict[str, int] = {}
    failures = []
    for test in tests:
        outcome = test["outcome"]
        counts[outcome] = counts.get(outcome, 0) + 1
        launched = test["kernels"]
        if outcome == "failed":
            failures.append({"test": test["test"], "why": told(test["why"])})
            # What failed before it launched anything counts against its whole backend.
            launched = launched or [k for k in kernels if k.split("/")[0] in test["test"]]
        if outcome != "skipped":
            for kernel in launched:
                kernels[kernel][outcome] += 1
    for group in cut:
        failures.append({"test": group.name, "why": "the process did not end by itself"})
        for kernel in group.kernels:
            kernels[kernel]["failed"] += 1
    return kernels, {"counts": counts, "failures": failures}


def print_summary(result: dict[str, Any]) -> None:
    missed = [
        f"{section} {case}: {row}"
        for section, rows in result["figures"].items()
        for case, row in rows.items()
        if row.get("met") is False
    ]
    print("\n".join(["targets missed:", *missed] if missed else ["every target was met"]))
    for failure in result["tests"]["failures"][:20]:
        print(f"FAILED {failure['test']}: {failure['why'].strip().splitlines()[-1][:200]}")
    for kernel, state in result["kernels"].items():
        print(f"{kernel:<27} {state['passed']:>5} passed {state['failed']:>4} failed")


def draw_record() -> None:
    sys.path.insert(0, str(ROOT))
    from dpo_kernels import verification

    record = verification.draw_record(RESULTS)
    verification.RECORD.write_text(json.dumps(record, indent=1) + "\n" if record else "{}\n")
    print(f"wrote {verification.RECORD}: {len(record)} kernels")


if __name__ == "__main__":
    sys.exit(main())
