"""out = g x, rounded once, in Triton: an fp32 gradient as autograd hands it over in a narrow dtype.

torch.mul(x, g, out=narrow) converts element by element, without whole vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import VARYING, on

CONFIG = {"TILE": 2048, "num_warps": 4}


@triton.jit(do_not_specialize=VARYING)
def _kernel(x, g, out, N, TILE: tl.constexpr):  # [N] fp32, scalar on the device, [N]
    first = tl.program_id(0).to(tl.int64) * TILE
    i = first + tl.arange(0, TILE)
    factor = tl.load(g).to(tl.float32)
    if first + TILE <= N:
        tl.store(out + i, (tl.load(x + i) * factor).to(out.dtype.element_ty))
    else:
        inside = i < N
        value = tl.load(x + i, mask=inside, other=0.0) * factor
        tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


def scaled_copy(x: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """`out` = x * g: x fp32 and out of one shape, both contiguous; g a scalar on their device."""
    N = x.numel()
    if N:
        with on(x):
            _kernel[(triton.cdiv(N, CONFIG["TILE"]),)](x, g, out, N, **CONFIG)
    return out
