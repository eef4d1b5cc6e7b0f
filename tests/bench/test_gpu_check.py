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

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_check.py"


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is absent")
def test_rehearsal(tmp_path):
    command = [
        sys.executable,
        str(TOOL),
        "--rehearse",
        "--out",
        str(tmp_path),
        "--commit",
        "abc",
        "--select",
        "2_to_31 and not test_gpu",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "gpu-host-abc.json").read_text())
    assert run["rehearsal"] and not run["complete"]
    assert run["commit"] == "abc" and run["versions"]["torch"] and run["date"]
    assert any("GPU" in line for line in run["lacks"])
    steps = {name: step["outcome"] for name, step in run["steps"].items()}
    for name in ("smoke cuda", "smoke triton", *(f"figures {s}" for s in load_tool().SECTIONS)):
        assert steps[name] == "passed", (name, run["steps"][name])
    assert steps["tests triton token_logps"] == "passed"
    assert "tests cuda pair_loss" not in steps  # a rehearsal runs one group of each backend
    assert steps["build"].startswith("not run") and steps["racecheck cuda"] == "not run: no GPU"
    assert run["tests"]["counts"] == {"passed": 2} and not run["tests"]["failures"]
    assert set(run["kernels"]) == set(KERNELS)
    assert run["kernels"]["triton/token_logps"]["passed"] == 1
    assert run["kernels"]["triton/token_logps"]["sources"]
    assert run["kernels"]["cuda/pair_loss"]["passed"] == 0
    kernels = run["figures"]["kernels"]
    for what in ("forward", "statistics", "softcap", "backward, fp32 to bf16", "KL"):
        assert kernels[f"Llama-2 3 x 500 triton {what}"]["percent of copy"] > 0
    judged = [
        row["met"] for rows in run["figures"].values() for row in rows.values() if "met" in row
    ]
    assert len(judged) > 20 and set(judged) <= {True, False}
    assert run["figures"]["step"]["linear"]["tokens/s"] > 0


def load_tool():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = tool  # dataclasses look their module up
    spec.loader.exec_module(tool)
    return tool


def test_every_gpu_test_is_in_a_group():
    """One that is in none would verify nothing and be missed by nobody."""
    files = {file for group in load_tool().groups() for file in group.files}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = {
        line.split("::")[0].removeprefix("tests/")
        for line in done.stdout.splitlines()
        if "::" in line and not line.startswith("SKIPPED")
    }
    assert found and found <= files


def test_what_dies_costs_its_group_and_what_is_slow_is_cut(tmp_path):
    tool = load_tool()
    result = {"figures": {}}
    run = tool.Run(tmp_path, tmp_path / "run.json", result)
    die = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert not run.step("dies", 60, [sys.executable, "-c", die])
    assert not run.step("hangs", 6, [sys.executable, "-c", "import time; time.sleep(60)"])
    run.began -= run.total
    assert not run.step("late", 60, [sys.executable, "-c", ""])
    kept = json.loads((tmp_path / "run.json").read_text())["steps"]
    assert kept["dies"]["outcome"] == "died of signal 11"
    assert kept["hangs"]["outcome"] == "timed out after 6 s"
    assert kept["late"]["outcome"] == "not run: no time was left"
    group = tool.Group("cuda pair_loss", ("test_losses.py",), "cuda", ("cuda/pair_loss",))
    kernels, outcomes = tool.of_kernels([], [group], run.env)
    assert kernels["cuda/pair_loss"]["failed"] == 1
    assert sum(k["failed"] for k in kernels.values()) == 1
    assert outcomes["failures"][0]["test"] == "cuda pair_loss"


def test_a_failed_build_is_one_line_and_leaves_triton(tmp_path, capsys, monkeypatch):
    tool = load_tool()
    run = tool.Run(tmp_path, tmp_path / "run.json", {})
    broken = [sys.executable, "-c", "print('x.cu(3): error: no such name'); raise SystemExit(1)"]
    step = run.step
    monkeypatch.setattr(run, "step", lambda name, limit, command, **env: step(name, limit, broken))
    assert not tool.build(run, {"capability": "9.0"}, rehearse=False)
    assert "backend cuda is left out: x.cu(3): error: no such name" in capsys.readouterr().out


def test_failures_count_against_what_was_launched(tmp_path):
    tool = load_tool()
    lines = tmp_path / "tests.jsonl"
    tests = (
        {"test": "a[cuda]", "outcome": "passed", "kernels": ["cuda/pair_loss"], "why": ""},
        {"test": "b[cuda]", "outcome": "failed", "kernels": ["cuda/pair_loss"], "why": "wrong"},
        {"test": "c[triton]", "outcome": "failed", "kernels": [], "why": "did not compile"},
        {"test": "d[cuda]", "outcome": "skipped", "kernels": ["cuda/token_logps"], "why": "no"},
    )
    lines.write_text("".join(json.dumps(test) + "\n" for test in tests))
    kernels, outcomes = tool.of_kernels([lines], [], {"PYTHONPATH": str(ROOT)})
    count = {k: (v["passed"], v["failed"]) for k, v in kernels.items() if v["passed"] + v["failed"]}
    triton = {k: (0, 1) for k in KERNELS if k.startswith("triton/")}
    assert count == {"cuda/pair_loss": (1, 1), **triton}
    assert outcomes["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert [failure["test"] for failure in outcomes["failures"]] == ["b[cuda]", "c[triton]"]


def test_a_gpu_is_needed():
    command = [sys.executable, str(TOOL)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 2 and "this machine lacks" in done.stdout
    assert "--rehearse" in done.stdout
