"""`make gpu-check`, rehearsed without a GPU: every step runs, and the results file holds it all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host import build

from dpo_kernels.verification import KERNELS

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "gpu_check.py"


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is absent")
def test_rehearsal(tmp_path):
    command = [sys.executable, str(TOOL), "--rehearse", "--out", str(tmp_path), "--commit", "abc",
               "--select", "2_to_31 and not test_gpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "gpu-host-abc.json").read_text())
    assert run["rehearsal"] and not run["complete"]
    assert run["commit"] == "abc" and run["versions"]["torch"] and run["date"]
    steps = {name: step["outcome"] for name, step in run["steps"].items()}
    print(steps)
    assert steps["tests"] == steps["sanitizer-none"] == steps["figures"] == "passed"
    assert steps["build"].startswith("not run") and steps["sanitizer-racecheck"]
    assert run["tests"]["counts"] == {"passed": 2} and not run["tests"]["failures"]
    assert set(run["kernels"]) == set(KERNELS)
    assert run["kernels"]["triton/token_logps"]["passed"] == 1
    assert run["kernels"]["triton/token_logps"]["sources"]
    assert run["kernels"]["cuda/pair_loss"]["passed"] == 0
    assert {"copy", "from logits"} < set(run["figures"])
    linear = run["figures"]["linear trained tiny bf16 16 tokens in 2 pairs, 60% scored"]
    assert linear["dpo-kernels cpu"]["seconds"] > 0
    for case in run["figures"]["from logits"].values():
        assert case["triton forward"]["percent of copy"] > 0


def test_failures_count_against_what_was_launched(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    lines = tmp_path / "tests.jsonl"
    tests = (
        {"test": "a[cuda]", "outcome": "passed", "kernels": ["cuda/pair_loss"], "why": ""},
        {"test": "b[cuda]", "outcome": "failed", "kernels": ["cuda/pair_loss"], "why": "wrong"},
        {"test": "c[triton]", "outcome": "failed", "kernels": [], "why": "did not compile"},
        {"test": "d[cuda]", "outcome": "skipped", "kernels": ["cuda/token_logps"], "why": "no"},
    )
    lines.write_text("".join(json.dumps(test) + "\n" for test in tests))
    kernels, outcomes = tool.of_kernels(lines, {"PYTHONPATH": str(ROOT)})
    count = {k: (v["passed"], v["failed"]) for k, v in kernels.items() if v["passed"] + v["failed"]}
    triton = {k: (0, 1) for k in KERNELS if k.startswith("triton/")}
    assert count == {"cuda/pair_loss": (1, 1), **triton}
    assert outcomes["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [failure["test"] for failure in outcomes["failures"]] == ["b[cuda]", "c[triton]"]


def test_a_gpu_is_needed():
    command = [sys.executable, str(TOOL)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})  # fmt: skip
    assert done.returncode == 2 and "--rehearse" in done.stdout
