"""What the hardware's counters say of each kernel, read by Nsight Compute: why a kernel that stays
below the bandwidth of a copy does.

    python benchmarks/gpu_profile.py   # what is profiled: each kernel once, between start and stop
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_timing import DEVICE, GPU, IGNORE, Figures, Row

from dpo_kernels.backends import available, load
from dpo_kernels.inputs.transform import LogitTransform
from dpo_kernels.ops.token_logps import STATS

ROWS = 4096
VOCABULARIES = {"Llama-2": 32000, "Llama-3": 128256}
PERCENT = {
    "percent of DRAM's peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "percent of issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "percent of special functions": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "percent of warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
}
TIME, INSTRUCTIONS = "gpu__time_duration.sum", "smsp__inst_executed.sum"
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier",
    "branch_resolving",
    "dispatch_stall",
    "drain",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "membar",
    "mio_throttle",
    "no_instruction",
    "short_scoreboard",
    "wait",
)


def calls(rows: int, V: int) -> dict[str, Callable[[], object]]:
    """Each launches one kernel over bf16 logits."""
    x, r = (torch.randn(1, rows, V, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    work, g = x.clone(), torch.randn(1, rows, device=DEVICE)
    y = torch.randint(0, V, (1, rows), device=DEVICE)
    plain, softcap = LogitTransform(), LogitTransform(softcap=30.0)
    found: dict[str, Callable[[], object]] = {}
    for backend in (b for b in ("cuda", "triton") if b in available()):
        k = load(backend)
        score = partial(k.token_logps, x, y, IGNORE)
        for suffix, t in (("", plain), (", softcap", softcap)):
            lse = score(t, ())[1]
            back = (k.token_logps_backward, g, work, y, lse, IGNORE, t, work)
            found[f"{backend} forward{suffix}"] = partial(score, t, ())
            found[f"{backend} backward in place{suffix}"] = partial(*back)
        found[f"{backend} statistics"] = partial(score, plain, STATS)
        if backend == "triton":
            kl = partial(k.token_kl, x, r, y, IGNORE, plain)
            _, lse, _, ref_lse, *_ = kl()
            back = (k.token_kl_backward, g, g, work, r, y, lse, ref_lse, IGNORE, plain, work)
            found |= {"triton KL": kl, "triton KL backward": partial(*back)}
    return found


def names() -> list[tuple[str, int]]:
    """What is profiled, in order, and the elements each reads."""
    return [
        (f"{model} {ROWS} x {V} {what}", ROWS * V)
        for model, V in VOCABULARIES.items()
        for what in calls(3, 500)
    ]


def launch(tiny: bool) -> None:
    """Each call once to compile, then once while the profiler looks."""
    for V in VOCABULARIES.values():
        for call in calls(3 if tiny else ROWS, V // 64 if tiny else V).values():
            call()
            if not GPU:
                continue
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def profile(tiny: bool) -> Figures:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("ncu") or shutil.which("ncu", path=f"{home}/bin")
    if tool is None or not GPU:
        launch(tiny)
        yield "Nsight Compute", {"not run": "no GPU" if tool else "ncu was not found"}
        return
    metrics = [TIME, INSTRUCTIONS, *PERCENT.values(), *(STALL.format(s) for s in STALLS)]
    command = [tool, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--metrics", ",".join(metrics)]
    command += ["-k", "regex:forward|backward|token", sys.executable, str(Path(__file__))]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        yield "Nsight Compute", {"not run": (done.stderr or done.stdout)[-300:]}
        return
    header, _units, *rows = csv.reader(lines[start:])
    expected = names()
    if len(rows) != len(expected):
        why = f"{len(rows)} launches were seen, {len(expected)} made"
        yield "Nsight Compute", {"not run": why}
        return
    for (name, elements), row in zip(expected, rows, strict=True):
        yield name, _read(dict(zip(header, row, strict=True)), elements)


def _read(found: dict[str, str], elements: int) -> Row:
    def number(metric: str) -> float:
        text = found.get(metric, "").replace(",", "")
        return float(text) if text else float("nan")

    row: Row = {"us": number(TIME) / 1e3}
    row["instructions an element"] = 32 * number(INSTRUCTIONS) / elements
    row |= {name: number(metric) for name, metric in PERCENT.items()}
    stalls = sorted(((number(STALL.format(s)), s) for s in STALLS), reverse=True)
    row["warps wait for"] = ", ".join(f"{s} {ratio:.2f}" for ratio, s in stalls[:3])
    return row


if __name__ == "__main__":
    launch("--tiny" in sys.argv)
