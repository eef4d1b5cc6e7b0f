"""4-bit weights on a CPU: the reference's pass must not take their gradients away."""

import pytest
import torch

from dpo_kernels.train.adapters import _keep_differentiable


def test_a_pass_without_gradients_leaves_them() -> None:
    """bitsandbytes repacks for inference at the first such forward, and has no backward of it."""
    bnb = pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = torch.randn(64, 64)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", module=layer
    ).to("cpu")
    model = torch.nn.Sequential(layer).eval()
    _keep_differentiable(model)
    x = torch.randn(4, 64)
    with torch.no_grad():
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
