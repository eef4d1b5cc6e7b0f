"""The longer checks of the kernels: their last result, and whether it is of the present sources."""

import importlib.util
import json
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "check_full.py"


def tool():
    spec = importlib.util.spec_from_file_location("check_full", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_last_result_passed():
    full = tool()
    record = json.loads(full.RECORD.read_text())
    print(full.last_result())
    assert record["passed"]
    assert all(outcome in ("right", "noticed") for outcome in record["checks"].values())


def test_a_changed_source_makes_it_stale(tmp_path, monkeypatch):
    full = tool()
    monkeypatch.setattr(full, "RECORD", tmp_path / "record.json")
    assert full.last_result() == "never run"
    record = {"passed": True, "checks": {"a": "right"}, "date": "then"}
    full.RECORD.write_text(json.dumps(record | {"sources": full.sources()}))
    assert full.changed() == [] and full.last_result() == "all good, 1 checks on then"
    edited = full.sources() | {"csrc/cuda/device.h": "other"}
    del edited["csrc/phi.h"]
    full.RECORD.write_text(json.dumps(record | {"sources": edited}))
    assert full.changed() == ["csrc/cuda/device.h", "csrc/phi.h"]
    assert "STALE, changed since: csrc/cuda/device.h, csrc/phi.h" in full.last_result()


def test_what_passed_with_the_same_sources_is_not_run_again(tmp_path, monkeypatch):
    full = tool()
    monkeypatch.setattr(full, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(full, "UNFINISHED", tmp_path / "unfinished.json")
    now = {"csrc/cuda/device.h": "1", "dpo_kernels/backends/triton/launch.py": "2"}
    checks = {"30 cases": "right", "cuda/a": "NOT NOTICED", "triton/b": "noticed"}
    full.RECORD.write_text(json.dumps({"checks": checks, "sources": now}))
    assert full.passed_before(now) == {"30 cases": "right", "triton/b": "noticed"}
    edited = now | {"dpo_kernels/backends/triton/launch.py": "3"}
    assert full.passed_before(edited) == {"30 cases": "right"}
    newer = {"checks": {"triton/b": "noticed"}, "sources": edited}
    full.UNFINISHED.write_text(json.dumps(newer))
    assert full.passed_before(edited) == {"30 cases": "right", "triton/b": "noticed"}
