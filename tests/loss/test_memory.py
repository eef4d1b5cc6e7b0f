"""What a call takes, in a process of its own: as estimated, within the budget, the same values."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels import memory

PROBE = Path(__file__).with_name("memory_probe.py")
MB = 1 << 20
HEAD = {"lengths": [90] * 8, "T": 100, "V": 40000, "H": 192}
LOGITS = {"lengths": [30] * 8, "T": 40, "V": 100_001}
BUDGETS = (64 * MB, 256 * MB, 1024 * MB)
CASES = [
    {"strategy": "out_of_place", "dtype": "float32", "kl": True, **LOGITS},
    {"strategy": "frozen", "dtype": "bfloat16", "memory_budget": 128 * MB, **HEAD},
    {"strategy": "frozen", "dtype": "float32", "kl": True, "ref_H": 96, **HEAD},
    {"strategy": "recompute", "dtype": "float32", "kl": True, "ref_H": 96, **HEAD},
    {"strategy": "streaming", "dtype": "bfloat16", "ref_H": 96, **HEAD},
    {"strategy": "score", "dtype": "float32", "batch_invariant": True, **HEAD},
]
IN_PLACE = {"strategy": "in_place", "dtype": "float32", **LOGITS}
BUDGETED = [
    {"strategy": strategy, "dtype": dtype, "memory_budget": budget, **HEAD}
    for strategy, dtype in (("streaming", "float32"), ("recompute", "bfloat16"))
    for budget in BUDGETS
]


@functools.cache
def measurements() -> list[dict]:
    # Small blocks too go back to the system when they are freed: the peak is what is alive at once.
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(PROBE), json.dumps([*CASES, IN_PLACE, *BUDGETED])]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def both(case: dict) -> tuple[dict, memory.Estimate]:
    measured = measurements()[[*CASES, IN_PLACE, *BUDGETED].index(case)]
    return measured, memory.estimate(**{**case, "dtype": getattr(torch, case["dtype"])})


def check(measured, expected):
    # What came before the call did not hide its peak.
    assert measured["slack"] < 2 * MB, measured
    assert abs(measured["bytes"] - expected.peak) <= 0.1 * expected.peak, (measured, expected)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['strategy']}-{c['dtype']}{'-kl' * c.get('kl', False)}"
)
def test_estimate(case):
    check(*both(case))


@needs_proc
def test_in_place_takes_nothing_of_the_vocabulary():
    measured, expected = both(IN_PLACE)
    assert expected.peak < MB / 4 and measured["bytes"] < 2 * MB


@needs_proc
@pytest.mark.parametrize("cases", (BUDGETED[:3], BUDGETED[3:]), ids=("streaming", "recompute"))
def test_a_budget_is_kept_and_changes_no_value(cases):
    losses, size = [], getattr(torch, cases[0]["dtype"]).itemsize
    gradients = size * (HEAD["V"] + len(HEAD["lengths"]) * HEAD["T"]) * HEAD["H"]
    accumulator = 4 * HEAD["V"] * HEAD["H"] if size != 4 else 0
    for case, budget in zip(cases, BUDGETS, strict=True):
        measured, expected = both(case)
        check(measured, expected)
        # A few megabytes: one int64 or fp64 a row, and the BLAS's own packing buffers.
        assert measured["bytes"] <= budget + gradients + accumulator + 6 * MB, (budget, measured)
        losses.append(measured["loss"])
    assert max(losses) - min(losses) < 1e-6 * abs(losses[0]), losses


def test_terms_and_refusals():
    e = memory.estimate(
        "streaming", [5, 3, 4, 6], T=8, V=1000, H=64, dtype=torch.bfloat16, low_rank=4
    )
    assert e.peak == sum(e.terms.values())
    assert e.terms["accumulators"] == 4 * 1000 * (64 + 4)
    assert e.terms["packed"] == 4 * 18 * (64 + 4)
    larger = memory.estimate("streaming", [5, 3, 4, 6], T=8, V=1000, H=64, kl=True, ref_H=32)
    one = memory.estimate("streaming", [5, 3, 4, 6], T=8, V=1000, H=64)
    assert larger.terms["logits"] == 2 * one.terms["logits"] == 2 * 4 * 32 * 1024
    for change, words in (
        ({"strategy": "fastest"}, "strategy must be one of"),
        ({"lengths": [1]}, r"lengths must be \[2B\]"),
        ({"lengths": [1, 9]}, "counts from 0 to T=8"),
        ({"dtype": torch.float64}, "dtype must be fp32, bf16 or fp16"),
        ({"kl": True}, "kl=True needs ref_H"),
        ({"H": 0}, "H must be the hidden size"),
        ({"strategy": "score", "trained": True}, "has no gradient of the weight"),
        ({"memory_budget": 1, "lengths": [8, 8, 8, 8, 8, 9], "T": 9}, "takes whole pairs"),
    ):
        call = {"strategy": "streaming", "lengths": [5, 3], "T": 8, "V": 1000, "H": 64, **change}
        with pytest.raises(ValueError, match=words):
            memory.estimate(call.pop("strategy"), call.pop("lengths"), **call)
