"""Every Triton kernel compiles for real targets at its launch configuration, within its budget."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import speed_model
import test_launches

ROOT = Path(__file__).parents[2]
BUDGET = json.loads(Path(__file__).with_name("triton_budget.json").read_text())
sys.path.insert(0, str(ROOT / "tools"))

import triton_releases  # noqa: E402
from triton_releases import family  # noqa: E402


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_within_budget(target):
    release = version("triton")
    pinned = release == triton_releases.RELEASES[-1]  # whose figures the budget has
    kernels = triton_releases.compiled(release, (target,))
    assert {family(kernel["kernel"]) for kernel in kernels} == set(BUDGET) - {"what"}
    shared = test_launches.shared_memory(kernels)
    recorded = json.loads(test_launches.RECORDED.read_text())[test_launches.SHARED]
    if target == "sm_90" and shared["triton"] == recorded["triton"]:
        test_launches.check(test_launches.SHARED, shared)
    for kernel in kernels:
        print(kernel)
        if target.startswith("sm_"):
            registers, shared = BUDGET[family(kernel["kernel"])] if pinned else (255, 228 << 10)
            assert kernel["spills"] == 0, kernel
            assert kernel["registers"] <= registers, f"{kernel}, of {registers} registers"
            assert kernel["shared"] <= shared, f"{kernel}, of {shared} bytes of shared memory"
            if kernel["kernel"].startswith(("forward", "backward", "kl_")):
                assert kernel["wide_loads"] > 0, kernel
            assert not pinned or not kernel.get("complaints"), kernel["complaints"]
    if pinned and target == "sm_90":
        speed = {name: row for k in kernels for name, row in k.get("speed", {}).items()}
        then = json.loads(speed_model.RECORDED.read_text())["kernels"]
        assert speed == {k: v for k, v in then.items() if k.startswith("triton")}, (
            "write it anew: python tests/proof/speed_model.py; then python tools/readme_tables.py"
        )
    if release in triton_releases.RELEASES:
        assert_as_recorded(release, kernels, target)


def assert_as_recorded(release: str, kernels: list[dict], target: str) -> None:
    recorded = json.loads(triton_releases.RESULTS.read_text())[release].get(target, {})
    assert triton_releases.most(kernels, target) == recorded, (
        "docs/triton.json is of other kernels: python tools/triton_releases.py"
    )


def test_the_oldest_release_compiles_every_kernel():
    """Without spills. Installed once into build/triton; a skip where the index is out of reach."""
    oldest = triton_releases.RELEASES[0]
    try:
        kernels = triton_releases.compiled(oldest, ("sm_90",), timeout=120)
    except triton_releases.Unreachable as why:
        pytest.skip(str(why))
    assert {family(kernel["kernel"]) for kernel in kernels} == set(BUDGET) - {"what"}
    assert not [kernel for kernel in kernels if kernel["spills"]]
    assert_as_recorded(oldest, kernels, "sm_90")


def test_the_table_of_releases_is_what_was_compiled():
    import compat

    releases = triton_releases.RELEASES
    assert releases[0] == compat.OLDEST.triton
    pins = (ROOT / "constraints.txt").read_text()
    assert releases[-1] == re.search(r"^triton==(\S+)", pins, re.MULTILINE)[1]
    recorded = json.loads(triton_releases.RESULTS.read_text())
    assert tuple(recorded) == releases
    for release, by_target in recorded.items():
        nvidia = [t for t in triton_releases.targets_of(release) if t.startswith("sm_")]
        assert list(by_target) == nvidia, release
        # 8 bytes: one register pair of a KL kernel, as some releases lay it out.
        assert all(spills <= 8 for rows in by_target.values() for _, spills in rows.values())
    page = triton_releases.PAGE.read_text().partition(triton_releases.START)[2]
    assert page.partition(triton_releases.END)[0] == triton_releases.table(), (
        "regenerate it: python tools/triton_releases.py"
    )


def test_a_release_out_of_reach_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_releases, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(triton_releases.Unreachable, match=r"triton 0\.0\.1: pip: .*0\.0\.1"):
        triton_releases.folder_of("0.0.1")
    assert not any((tmp_path / "build" / "triton").iterdir())
