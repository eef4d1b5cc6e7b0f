"""What the test suite has no time for: the CUDA kernels under the sanitizers at length, kernels
edited on purpose (tests/proof/mutants.py), every one of which must be noticed, the functions
against an oracle of their own (tests/proof/fuzz.py) for 30,000 calls, and training killed at every
kind of place and at twenty moments, and resumed (tests/train/killed_runs.py): `make check-full`.

Leaves its result in `tests/proof/check_full.json` with the sha256 of every source it depends on;
the test suite says which of them have changed since. Takes an hour on two cores; what has passed
with the sources as they are (Triton's, or those of the CUDA kernels) is not run again, unless with
--again.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests/proof/check_full.json"
UNFINISHED = ROOT / "build" / "check_full.json"
# Cases by sanitizer, for each seed; the test suite runs a few of the first.
CASES = {"": 300, "address": 30, "thread": 4}
SEEDS = (1,)
GOOD = ("right", "noticed")
CALLS, CALL_SEED = 30_000, 1
KILLS = 20


def sources() -> dict[str, str]:
    """sha256 by file of what the result depends on."""
    files = [
        *(ROOT / "csrc").glob("*.h"),
        *(ROOT / "csrc/cuda").iterdir(),
        *(ROOT / "tests/cuda_on_host").glob("*.[chp]*"),
        *(ROOT / "dpo_kernels/backends/triton").glob("*.py"),
        *functions(),
        *training(),
    ]
    return {
        str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files)
    }


def functions() -> list[Path]:
    """What the calls against the oracle depend on, besides the headers of the kernels."""
    package = ROOT / "dpo_kernels"
    rooms = ("", "inputs", "loss", "ops", "backends")
    ours = [file for room in rooms for file in (package / room).glob("*.py")]
    command_line = {"__main__", "cli", "doctor", "verification"}
    kept = [f for f in ours if f.stem not in command_line]
    return [
        *kept,
        ROOT / "csrc/bindings.cpp",
        *(ROOT / "csrc/cpu").iterdir(),
        ROOT / "tests/proof/fuzz.py",
        ROOT / "tests/oracle.py",
    ]


def training() -> list[Path]:
    """What a resumed run depends on, besides the functions."""
    scripts = ("killed_runs", "faulty_ranks", "rank_cases")
    return [
        *(ROOT / "dpo_kernels/train").glob("*.py"),
        *(ROOT / f"tests/train/{name}.py" for name in scripts),
    ]


def changed() -> list[str]:
    """Files whose contents are not those of the recorded run; raises if there is no record."""
    then, now = json.loads(RECORD.read_text())["sources"], sources()
    return sorted(f for f in {*then, *now} if then.get(f) != now.get(f))


def last_result() -> str:
    """The recorded result in a line, and which sources have changed since."""
    if not RECORD.exists():
        return "never run"
    record, stale = json.loads(RECORD.read_text()), changed()
    outcome = "all good" if record["passed"] else "FAILED"
    more = f" and {len(stale) - 9} more" if len(stale) > 9 else ""
    since = f"; STALE, changed since: {', '.join(stale[:9])}{more}" if stale else ""
    return f"{outcome}, {len(record['checks'])} checks on {record['date']}{since}"


def passed_before(now: dict[str, str]) -> dict[str, str]:
    """Checks that have passed with the sources as they are, by this run's record or a broken-off
    one's."""
    found = {}
    for file in (RECORD, UNFINISHED):
        if file.exists():
            then = json.loads(file.read_text())
            for name, outcome in then["checks"].items():
                if outcome in GOOD and _of(name, then["sources"]) == _of(name, now):
                    found[name] = outcome
    return found


def _of(check: str, files: dict[str, str]) -> dict[str, str]:
    """Those of the files that a check depends on."""
    if check.startswith("triton/"):
        return {f: h for f, h in files.items() if "backends/triton" in f}
    loop = {str(f.relative_to(ROOT)) for f in training()}
    if check.startswith("train/"):
        return {f: h for f, h in files.items() if f in loop}
    mine = {str(f.relative_to(ROOT)) for f in functions()}
    fuzz = check.startswith("fuzz/")
    return {
        f: h
        for f, h in files.items()
        if "backends/triton" not in f and f not in loop and (fuzz or f not in mine)
    }


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests/proof"), str(ROOT / "tests"), str(ROOT)]
    import mutants
    from cuda_on_host import build

    began, before = time.monotonic(), sources()
    checks: dict[str, str] = {}
    done = {} if "--again" in sys.argv else passed_before(before)

    def check(name: str, run: Callable[[], str]) -> None:
        checks[name] = done[name] if name in done else run()
        UNFINISHED.parent.mkdir(exist_ok=True)
        UNFINISHED.write_text(json.dumps({"sources": before, "checks": done | checks}))
        print(f"{time.monotonic() - began:6.0f} s  {name}: {checks[name]}", flush=True)

    def cases(sanitizer: str, count: int, seed: int) -> str:
        end = build.execute(build.program(sanitizer), count, seed, timeout=3600)
        return "right" if end.returncode == 0 else (end.stdout + end.stderr)[-800:]

    def calls() -> str:
        call = [sys.executable, "tests/proof/fuzz.py", f"--calls={CALLS}", f"--seed={CALL_SEED}"]
        end = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        return "right" if end.returncode == 0 else (end.stdout + end.stderr)[-800:]

    def kills() -> str:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, "tests/train/killed_runs.py", folder, f"--moments={KILLS}"]
            end = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        return "right" if end.returncode == 0 else (end.stdout + end.stderr)[-800:]

    def lost_ranks() -> str:
        with tempfile.TemporaryDirectory() as folder:
            call = [sys.executable, "tests/train/faulty_ranks.py", folder, f"--kills={KILLS}"]
            end = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        return "right" if end.returncode == 0 else (end.stdout + end.stderr)[-800:]

    def rank_cases() -> str:
        call = [sys.executable, "-m", "pytest", "-q", "tests/train/test_many_ranks.py"]
        every = {**os.environ, "EVERY_RANK_CASE": "1"}
        end = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=every)
        return "right" if end.returncode == 0 else (end.stdout + end.stderr)[-800:]

    def noticed(caught: bool) -> str:
        return "noticed" if caught else "NOT NOTICED"

    check(f"fuzz/{CALLS} calls, torch and cpu, seed {CALL_SEED}", calls)
    check(f"train/runs killed at {KILLS} moments and every place, and resumed", kills)
    check(f"train/one of two ranks killed {KILLS} times", lost_ranks)
    check("train/every case of many ranks, four processes too", rank_cases)
    for sanitizer, count in CASES.items():
        for seed in SEEDS:
            name = f"{count} cases, {sanitizer or 'no'} sanitizer, seed {seed}"
            check(name, functools.partial(cases, sanitizer, count, seed))
    for mutant in [*mutants.cuda_ordering(), *mutants.CUDA_CONSTANTS]:
        check(str(mutant), lambda m=mutant: noticed(mutants.cuda_caught(m)))
    for mutant in mutants.TRITON_CONSTANTS:
        check(f"triton/{mutant}", lambda m=mutant: noticed(mutants.triton_caught(m)))
    good = all(outcome in GOOD for outcome in checks.values())
    if sources() != before:
        print("a source changed meanwhile: nothing is recorded")
        return 1
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "passed": good,
        "checks": checks,
        "sources": before,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    UNFINISHED.unlink(missing_ok=True)
    print(f"{'all good' if good else 'FAILED'}; wrote {RECORD}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
