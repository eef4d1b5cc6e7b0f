"""What the test suite has no time for: the CUDA kernels under the sanitizers at length, and kernels
edited on purpose (tests/mutants.py), every one of which must be noticed: `make check-full`.

Leaves its result in `tests/check_full.json` with the sha256 of every source it depends on; the test
suite says which of them have changed since. Takes an hour on two cores.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "check_full.json"
# Cases by sanitizer, for each seed; the test suite runs a few of the first.
CASES = {"": 300, "address": 60, "thread": 12}
SEEDS = (1, 2)


def sources() -> dict[str, str]:
    """sha256 by file of what the result depends on."""
    files = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").iterdir(),
             *(ROOT / "tests/cuda_on_host").glob("*.[chp]*"), ROOT / "tests/mutants.py",
             *(ROOT / "dpo_kernels/backends/triton").glob("*.py")]  # fmt: skip
    return {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in sorted(files)}  # fmt: skip


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
    since = f"; STALE, changed since: {', '.join(stale)}" if stale else ""
    return f"{outcome}, {len(record['checks'])} checks on {record['date']}{since}"


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import mutants
    from cuda_on_host import build

    began, before = time.monotonic(), sources()
    checks: dict[str, str] = {}

    def note(name: str, outcome: str) -> None:
        checks[name] = outcome
        print(f"{time.monotonic() - began:6.0f} s  {name}: {outcome}", flush=True)

    for sanitizer, cases in CASES.items():
        for seed in SEEDS:
            done = build.execute(build.program(sanitizer), cases, seed, timeout=3600)
            name = f"{cases} cases, {sanitizer or 'no'} sanitizer, seed {seed}"
            note(name, "right" if done.returncode == 0 else (done.stdout + done.stderr)[-800:])
    for mutant in [*mutants.cuda_ordering(), *mutants.CUDA_CONSTANTS]:
        note(str(mutant), "noticed" if mutants.cuda_caught(mutant) else "NOT NOTICED")
    for mutant in mutants.TRITON_CONSTANTS:
        note(f"triton/{mutant}", "noticed" if mutants.triton_caught(mutant) else "NOT NOTICED")
    good = all(outcome in ("right", "noticed") for outcome in checks.values())
    if sources() != before:
        print("a source changed meanwhile: nothing is recorded")
        return 1
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "minutes": round((time.monotonic() - began) / 60, 1), "passed": good, "checks": checks,
        "sources": before,
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{'all good' if good else 'FAILED'}; wrote {RECORD}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
