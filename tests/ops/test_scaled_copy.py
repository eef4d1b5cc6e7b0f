"""Triton's scaled copy: one rounding, every element, none besides."""

import importlib.util

import pytest
import torch

BACKENDS = ["triton"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is absent"
)


@pytest.mark.parametrize("n", [0, 1, 2047, 2048, 5003])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_copy(backend, dtype, n):
    from dpo_kernels.backends.triton import scaled_copy

    x, g = torch.randn(n), torch.tensor(0.3)
    memory = torch.full((n + 8,), 7.0, dtype=dtype)
    out = scaled_copy(x, g, memory[:n])
    wanted = (x.double() * g.double()).to(torch.float32)
    # Triton's interpreter narrows by cutting, a GPU by rounding.
    allowed = wanted.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    assert ((out.float() - wanted).abs() <= allowed).all()
    assert (memory[n:] == 7).all()
