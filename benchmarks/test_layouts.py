"""A whole step of the training loop by layout: its tokens, time, and peak memory.

Reference pass left out; forward, loss, backward and AdamW of ragged random pairs in the shape of
SmolLM2-135M with six layers, activations recomputed. Each layout runs in a process of its own, in
turns, so that its peak is its own.

    pytest benchmarks/test_layouts.py -s [--full] [--loop_results FILE]
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LOOP

LAYOUTS = ("padded", "packed", "shared")
SCRIPT = Path(__file__).with_name("loop_script.py")
# Prompts of half the tokens, of one half to one and a half times the mean.
SIZES = ("--prompt", "192", "--completion", "192", "--pairs", "4", "--steps", "4")


def run(layout):
    threads = str(torch.get_num_threads())
    command = [sys.executable, str(SCRIPT), *SIZES, "--threads", threads, "--layout", layout]
    path = os.pathsep.join(p for p in (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_step_by_layout(request):
    pytest.importorskip("transformers")
    rounds = 3 if request.config.getoption("--full") else 1
    runs = {layout: [] for layout in LAYOUTS}
    for _ in range(rounds):
        for layout in LAYOUTS:
            runs[layout].append(run(layout))
    rows = {}
    for layout, each in runs.items():
        rows[layout] = {
            "tokens a step": each[0]["tokens"],
            "step seconds": statistics.median(s for r in each for s in r["seconds"][1:]),
            "step CPU seconds": statistics.median(s for r in each for s in r["cpu_seconds"][1:]),
            "peak MB of training": statistics.median(
                r["peak_mb"] - r["peak_before_mb"] for r in each
            ),
        }
        print(f"\n{layout}: {json.dumps(rows[layout])}", end="")
    print()
    LOOP["layouts"] = {"script": list(SIZES), "rounds": rounds, **rows}
    losses = {layout: each[0]["losses"] for layout, each in runs.items()}
    for layout in LAYOUTS[1:]:
        assert losses[layout] == pytest.approx(losses["padded"], abs=1e-5)
    assert rows["shared"]["tokens a step"] < rows["packed"]["tokens a step"]
