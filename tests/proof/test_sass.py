"""The model of the kernels' speed (`speed_model.py`) on every kernel, and that it notices."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sass
import speed_model
from cuda_on_host import build

from dpo_kernels import _C

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import triton_releases

ARCHITECTURES = [a for a in _C.cuda_architectures.split(",") if a]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="cuobjdump comes with triton"
)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")

# Counted by hand: the loop at 0x10 to 0x100. Around it 2 vectors and 4 exponentials; 0x60 to 0x70
# is rare, and so is the way that loads nothing.
BY_HAND = """
		Function : _Zkernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, R3, PT ;
        /*0020*/               @P0 BRA 0xf0 ;
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.NA.128 R8, desc[UR4][R2.64+0x10] ;
        /*0050*/               @P1 BRA 0x80 ;
        /*0060*/                   MUFU.RCP R12, R12 ;
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/                   FADD R6, R4, R5 ;
        /*00b0*/                   MUFU.EX2 R8, R8 ;
        /*00c0*/                   MUFU.EX2 R9, R9 ;
        /*00d0*/              @!P2 BRA 0x110 ;
        /*00e0*/                   FADD R6, R6, R8 ;
        /*00f0*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0100*/               @P3 BRA 0x10 ;
        /*0110*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0120*/                   EXIT ;
        /*0130*/                   BRA 0x130;
        /*0140*/                   NOP;
"""


def test_counts_are_those_found_by_hand():
    (function,) = sass.functions(BY_HAND)
    assert function.name == "_Zkernel" and len(function.instructions) == 19
    loop = function.hot
    assert loop is not None
    assert [i.address for i in loop.instructions] == list(range(0x10, 0x110, 0x10))
    assert loop.vectors == 2
    path = loop.path(4)
    skipped = {0x60, 0x70}
    assert [i.address for i in path] == [a for a in range(0x10, 0x110, 0x10) if a not in skipped]
    assert sass.counts(path) == {"MUFU": 4, "BRA": 4, "LDG": 2, "FADD": 2, "ISETP": 1, "IADD3": 1}
    assert sum(i.is_a("BAR") for i in loop.instructions) == 1  # though not on the path
    with pytest.raises(AssertionError, match="takes 5 exponentials"):
        loop.path(5)
    through = function.through.path(4)
    assert through[0].address == 0 and through[-1].op == "EXIT"
    # Past 0xd0 it may leave the loop at once.
    assert len(through) == 1 + 11 + 2 + 1 - 1


def test_the_prediction_is_arithmetic():
    found = speed_model.Found(12.0, 1.0, 1.0, 16, 0, 0, 0, 1 << 16, 2)
    copy, issue = 2 / 18.5, 12 / 128 / speed_model.SUSTAINED
    assert found.percent("H200") == pytest.approx(100 * copy / issue)
    assert found.percent("H100") == 100
    assert found.issue(16.0) == pytest.approx(12 / 128 / (2 / 16))
    slow = speed_model.Found(1.0, 4.0, 4.0, 16, 0, 0, 0, 1 << 16, 2)
    assert slow.percent("H200") == pytest.approx(100 * copy / (4 / 16))


@functools.cache
def built(architecture: str) -> list[speed_model.Kernel]:
    """The CUDA row kernels of this build."""
    dumped = subprocess.run(
        [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", _C.__file__],
        capture_output=True,
        text=True,
        check=True,
    )
    return speed_model.cuda_kernels(dumped.stdout)


def cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")


@functools.cache
def aot(code: str = "") -> list[dict]:
    """What `triton_aot.py` prints for sm_90 after `code` has edited it."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = (str(Path(__file__).parent), str(triton_releases.ROOT), env.get("PYTHONPATH", ""))
    env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    program = f"import triton_aot as aot\n{code}\naot.main(['sm_90'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_triton() -> dict[str, dict[str, float]]:
    """The model's rows of the Triton kernels."""
    rows: dict[str, dict[str, float]] = {}
    for kernel in aot():
        rows |= kernel.get("speed", {})
    return rows


@needs_triton
@pytest.mark.parametrize(
    "architecture", ARCHITECTURES or [pytest.param("", marks=pytest.mark.skip)]
)
def test_cuda_kernels(architecture):
    kernels = built(architecture)
    assert len(kernels) == 12 + 10
    said = [s for k in kernels for s in speed_model.complaints(k, architecture == "90")]
    for kernel in kernels:
        found = speed_model.measure(kernel)
        share = found.issue(speed_model.B200 if architecture == "100" else 13.0)
        print(architecture, kernel.name, kernel.dtypes, found, f"issue / copy {share:.2f}")
    assert not said, "\n".join(said)


@needs_triton
@pytest.mark.skipif("90" not in ARCHITECTURES, reason="this build has no code for sm_90")
def test_the_record_is_of_these_cuda_kernels():
    then = json.loads(speed_model.RECORDED.read_text())["kernels"]
    assert speed_model.record(built("90")) == {k: v for k, v in then.items() if k[:4] == "cuda"}, (
        "write it anew: python tests/proof/speed_model.py; then python tools/readme_tables.py"
    )


@pytest.mark.parametrize("V", speed_model.VOCABULARIES)
@pytest.mark.parametrize("dtype", speed_model.ITEM)
def test_few_elements_are_loaded_one_by_one(V, dtype):
    assert speed_model.scalar_share(V, dtype) <= 0.01


# ---- kernels edited on purpose ------------------------------------------------------------------


def edited(tmp_path: Path, file: str, old: str, new: str) -> list[str]:
    """The model's complaints of the CUDA kernels with one edit."""
    assert NVCC is not None
    csrc = tmp_path / "csrc"
    shutil.copytree(build.CSRC, csrc)
    source = csrc / "cuda" / file
    assert source.read_text().count(old) == 1
    source.write_text(source.read_text().replace(old, new))
    kernels = speed_model.compile_cuda(csrc, NVCC, cuobjdump())
    return [s for k in kernels for s in speed_model.complaints(k, True)]


@needs_nvcc
@needs_triton
def test_a_barrier_in_the_loop_is_noticed(tmp_path):
    old = "        async_wait<0>();\n"
    said = edited(tmp_path, "token_logps.cu", old, old + "      block_barrier();\n")
    assert len(said) >= 12 and all("1 barriers in the loop" in s for s in said[:12]), said


@needs_nvcc
@needs_triton
def test_a_scalar_load_in_the_loop_is_noticed(tmp_path):
    old = "loaded[j][l] = load_once((const Vec*)(from + v * N) + l);"
    new = "loaded[j][l] = gather(from + v * N + l * Elements<T>::N);"
    said = edited(tmp_path, "token_logps_backward.cu", old, new)
    assert len({s.partition(":")[0] for s in said if s.startswith("cuda backward")}) == 10, said


@needs_triton
@pytest.mark.skipif("90" not in ARCHITECTURES, reason="this build has no code for sm_90")
def test_more_instructions_than_a_copy_leaves_time_for_are_noticed(monkeypatch):
    """Of the issue's time alone: the goals are lifted."""
    free = {name: (99, 99) for name in speed_model.GOALS["cuda"]}
    monkeypatch.setitem(speed_model.GOALS, "cuda", free)
    stats = [k for k in built("90") if k.name == "forward stats" and k.dtypes == ("bf16",)]
    assert speed_model.complaints(stats[0], True) == []
    monkeypatch.setattr(speed_model, "ISSUE", 0.5)
    assert "of the copy's time, 0.5 allowed" in speed_model.complaints(stats[0], True)[0]


@needs_triton
def test_a_reduction_over_the_wrong_axis_is_noticed():
    code = (
        "lanes, every = aot.launch.lanes, list\n"
        "aot.launch.lanes = lambda *a: {**lanes(*a), 'LANES': 256}\n"
        "found = [k for k in aot.kernels() if k[0] == 'forward_bf16_stats']\n"
        "aot.kernels = lambda: found"
    )
    (kernel,) = aot(code)
    assert kernel["complaints"], kernel
