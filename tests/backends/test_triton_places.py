"""Logits that start anywhere in memory: every Triton launch is given aligned pointers."""

import importlib

import numpy as np
import pytest
import torch

from dpo_kernels.backends import torch as plain
from dpo_kernels.inputs.transform import LogitTransform

pytest.importorskip("triton")
launch, kl, rows = (
    importlib.import_module(f"dpo_kernels.backends.triton.{name}")
    for name in ("launch", "token_kl", "token_logps")
)

R, T, V = 2, 3, 1043
PLAIN = LogitTransform()


@pytest.fixture
def pointers(monkeypatch):
    """Addresses of the logits and gradients [R, T, V] that the row kernels are launched with."""
    seen = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def call(*args, **options):
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                seen.extend(x.data_ptr() for x in tensors if x.dim() == 3 and x.numel())
                return self.kernel[grid](*args, **options)

            return call

    for module in (kl, rows):
        for name in ("_forward", "_backward"):
            monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    return seen


def at(skip, dtype, scale=1.0):
    """Random logits [R, T, V] from element `skip` of their memory on."""
    memory = (torch.randn(skip + R * T * V) * scale).to(dtype)
    return memory[skip:].view(R, T, V)


def close(ours, theirs, dtype):
    torch.testing.assert_close(ours, theirs, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip, out_skip", [(0, 0), (1, 1), (3, 9), (5, 0), (15, 31)])
def test_log_probs_of_misaligned_logits(skip, out_skip, dtype, backend, pointers):
    logits, out = at(skip, dtype, 3.0), at(out_skip, dtype)
    targets = torch.randint(V, (R, T))
    targets[0, 0] = -100
    args = (logits, targets, -100, PLAIN)
    ours, theirs = rows.token_logps(*args, ()), plain.token_logps(*args, ())
    close(ours[0], theirs[0], torch.float32)
    grad, expected = torch.randn(R, T), torch.empty_like(logits)
    plain.token_logps_backward(grad, logits, targets, theirs[1], -100, PLAIN, expected)
    for target in (out, logits):  # the second is in place, and the last that reads the logits
        rows.token_logps_backward(grad, logits, targets, theirs[1], -100, PLAIN, target)
        close(target, expected, dtype)
    assert pointers and not [address for address in pointers if address % 16]


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("skip, ref_skip", [(0, 7), (1, 1), (5, 0), (15, 2)])
def test_kl_of_misaligned_logits(skip, ref_skip, backend, pointers):
    dtype = torch.bfloat16
    logits, reference = at(skip, dtype, 2.0), at(ref_skip, dtype, 2.0)
    targets = torch.randint(V, (R, T))
    args = (logits, reference, targets, -100, PLAIN)
    ours, theirs = kl.token_kl(*args), plain.token_kl(*args)
    for mine, other in zip(ours, theirs, strict=True):
        close(mine, other.to(mine.dtype), torch.float32)
    grads = torch.randn(2, R, T)
    kept = (*args[:3], theirs[1], theirs[3], -100, PLAIN)
    expected, out = torch.empty_like(logits), at(3, dtype)
    plain.token_kl_backward(*grads, *kept, expected)
    kl.token_kl_backward(*grads, *kept, out)
    close(out, expected, dtype)
    assert pointers and not [address for address in pointers if address % 16]


def test_memory_begins_at_the_boundary_before():
    x = torch.zeros(200)
    base, shift = launch.aligned(x[37:].view(163, 1, 1))
    assert base.data_ptr() == x.data_ptr() + 4 * 32 and shift == 5
    assert launch.aligned(x[32:].view(168, 1, 1))[1] == 0
    assert kl._same_phase((5, 1, 1), (21, 17, 33)) and not kl._same_phase((5, 1, 1), (4, 1, 1))


def test_memory_that_begins_with_the_logits_stays():
    """Nothing before it is ours: another library's buffer."""
    memory = np.zeros(80, dtype=np.float32)
    first = 1 + (-memory.ctypes.data // 4) % 16
    foreign = torch.from_numpy(memory[first : first + 16]).view(1, 1, 16)
    base, shift = launch.aligned(foreign)
    assert base is foreign and shift == 0
