"""Every Triton kernel compiles for real targets at its launch configuration, within its budget."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_launches

PROGRAM = Path(__file__).with_name("triton_aot.py")
BUDGET = json.loads(Path(__file__).with_name("triton_budget.json").read_text())


def family(kernel: str) -> str:
    """The row of the budget: dtypes, tails, directions and phis share one."""
    parts = r"_(fp32|bf16|fp16|tail|phi\d)" + ("|_backward" if "sum" in kernel else "")
    return re.sub(parts, "", kernel)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_within_budget(target):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), target], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {family(kernel["kernel"]) for kernel in kernels} == set(BUDGET) - {"what"}
    shared = test_launches.shared_memory(kernels)
    recorded = json.loads(test_launches.RECORDED.read_text())[test_launches.SHARED]
    if target == "sm_90" and shared["triton"] == recorded["triton"]:
        test_launches.check(test_launches.SHARED, shared)
    for kernel in kernels:
        print(kernel)
        if target.startswith("sm_"):
            registers, shared = BUDGET[family(kernel["kernel"])]
            assert kernel["spills"] == 0, kernel
            assert kernel["registers"] <= registers, f"{kernel}, of {registers} registers"
            assert kernel["shared"] <= shared, f"{kernel}, of {shared} bytes of shared memory"
            if kernel["kernel"].startswith(("forward", "backward", "kl_")):
                assert kernel["wide_loads"] > 0, kernel
