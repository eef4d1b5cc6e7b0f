"""An edited kernel fails a test that needs no GPU: one of each kind; `make check-full` has more."""

import importlib.util
import re

import mutants
import pytest
from cuda_on_host import build

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_a_cuda_barrier_taken_out():
    last = list(mutants.cuda_ordering())[-1]
    assert last.file == "cuda/token_logps_backward.cu"
    assert mutants.cuda_caught(last, cases=3)


@needs_compiler
def test_a_wrong_constant_in_a_cuda_kernel():
    assert mutants.cuda_caught(mutants.CUDA_CONSTANTS[0], cases=30)


@needs_compiler
def test_every_barrier_is_found():
    kinds = {re.match(r"\w+", m.old)[0] for m in mutants.cuda_ordering()}
    waits = {"__syncthreads", "__syncwarp", "block_barrier", "async_wait", "wait_for"}
    assert kinds == waits | {"arrive", "add_acq_rel"}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is absent")
def test_a_wrong_constant_in_a_triton_kernel():
    (mutant,) = (m for m in mutants.TRITON_CONSTANTS if "l - 1.001" in m.new)
    assert mutants.triton_caught(mutant, "triton and no_worse")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is absent")
def test_an_unchanged_kernel_passes():
    same = mutants.Mutant("token_logps.py", "size < 0.625", "size < 0.625")
    assert not mutants.triton_caught(same, "triton and 2_to_31")


@pytest.mark.parametrize("mutant", [*mutants.CUDA_CONSTANTS, *mutants.TRITON_CONSTANTS], ids=str)
def test_mutants_apply(mutant, tmp_path):
    root = build.CSRC if mutant in mutants.CUDA_CONSTANTS else mutants.PACKAGE / "backends/triton"
    copy = tmp_path / mutant.file
    copy.parent.mkdir(exist_ok=True)
    copy.write_text((root / mutant.file).read_text())
    mutant.apply(tmp_path)
    assert copy.read_text() != (root / mutant.file).read_text()
