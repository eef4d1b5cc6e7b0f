"""sum_k w_k phi_k(z_k) of each pair and its slopes, in fp64: one small launch."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...inputs.transfer import to_device
from ...losses import DISCOPOP, EXO, IDENTITY, RELU, SIGMOID, SOFTPLUS, SQUARE
from .launch import VARYING, on

_SOFTPLUS, _SIGMOID, _SQUARE, _RELU, _EXO, _DISCOPOP, _IDENTITY = (
    tl.constexpr(x) for x in (SOFTPLUS, SIGMOID, SQUARE, RELU, EXO, DISCOPOP, IDENTITY)
)
BLOCK = 128


@triton.jit
def _log1p(x):
    """log(1 + x), 0 <= x <= 1, with what 1 + x lost given back."""
    u = 1.0 + x
    return tl.log(u) - ((u - 1.0) - x) / u


@triton.jit
def _softplus(z):
    positive = tl.where(z > 0, z, 0.0)
    value = positive + _log1p(tl.exp(-tl.abs(z)))
    return tl.where(z != z, z, value)


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z != z, z, tl.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e)))


@triton.jit
def _phi(z, p, KIND: tl.constexpr):
    """phi(z) and phi'(z); the same forms as csrc/phi.h."""
    if KIND == _SOFTPLUS:
        value = _softplus(z)
        slope = _sigmoid(z)
    elif KIND == _SIGMOID:
        value = _sigmoid(z)
        slope = _sigmoid(z) * _sigmoid(-z)
    elif KIND == _SQUARE:
        value = z * z
        slope = 2.0 * z
    elif KIND == _RELU:
        value = tl.where(z <= 0, 0.0, z)
        slope = tl.where(z > 0, 1.0, 0.0)
    elif KIND == _EXO:
        s = _sigmoid(z)
        r = _sigmoid(-z)
        log_s = -_softplus(-z)
        log_r = -_softplus(z)
        log_not_e = tl.log(1.0 - p)
        log_e = tl.log(p)
        value = s * (log_s - log_not_e) + r * (log_r - log_e)
        slope = tl.where(s * r == 0.0, 0.0, s * r * (z - (log_not_e - log_e)))
    elif KIND == _DISCOPOP:
        m_exp = tl.exp(-_softplus(-z / p) - z)
        m = _sigmoid(z / p)
        r = _sigmoid(-z / p)
        blend = _softplus(-z)
        value = r * blend + m_exp
        slope = -r * _sigmoid(-z) - m_exp + r / p * (m_exp - m * blend)
    else:
        value = z
        slope = z * 0.0 + 1.0
    return value, slope


@triton.jit
def _term(u, v, beta, offset, numbers, KIND: tl.constexpr):
    """One term and its slopes in u, v, beta, offset."""
    w0 = tl.load(numbers)
    a = tl.load(numbers + 1)
    b = tl.load(numbers + 2)
    c = tl.load(numbers + 3)
    c_beta = tl.load(numbers + 4)
    c_inv = tl.load(numbers + 5)
    c_off = tl.load(numbers + 6)
    p = tl.load(numbers + 7)
    scaled = tl.load(numbers + 8) != 0.0
    w_beta = tl.load(numbers + 9) != 0.0
    # A score that a term does not use must not reach it: 0 * inf is NaN.
    linear = tl.where(a != 0.0, a * u, 0.0) + tl.where(b != 0.0, b * v, 0.0)
    s = tl.where(scaled, beta, 1.0)
    w = tl.where(w_beta, w0 * beta, w0)
    off = tl.where(scaled, c_off + 0.0 * beta, c_off / beta)
    z = s * linear + c + c_beta * beta + c_inv / beta + off * offset
    value, d = _phi(z, p, KIND)
    slope = w * d
    d_beta = slope * (tl.where(scaled, linear, 0.0) + c_beta - c_inv / (beta * beta))
    d_beta -= tl.where(scaled, 0.0, slope * off * offset / beta)
    d_beta += tl.where(w_beta, w0 * value, 0.0)
    du = tl.where(a != 0.0, slope * s * a, 0.0)
    dv = tl.where(b != 0.0, slope * s * b, 0.0)
    return w * value, du, dv, d_beta, slope * off


@triton.jit(do_not_specialize=VARYING)
def _kernel(
    u,
    v,
    beta,
    offset,
    numbers,
    loss,
    slopes,  # [B] fp64 each, numbers [K, 10], slopes [4, B]
    B,
    PHI0: tl.constexpr,
    PHI1: tl.constexpr,
    PHI2: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < B
    ui = tl.load(u + i, mask=inside, other=0.0)
    vi = tl.load(v + i, mask=inside, other=0.0)
    bi = tl.load(beta + i, mask=inside, other=1.0)
    oi = tl.zeros([BLOCK], tl.float64)
    if HAS_OFFSET:
        oi = tl.load(offset + i, mask=inside, other=0.0)
    total, du, dv, d_beta, d_offset = _term(ui, vi, bi, oi, numbers, PHI0)
    if PHI1 >= 0:
        t1, u1, v1, b1, o1 = _term(ui, vi, bi, oi, numbers + 10, PHI1)
        total += t1
        du += u1
        dv += v1
        d_beta += b1
        d_offset += o1
    if PHI2 >= 0:
        t2, u2, v2, b2, o2 = _term(ui, vi, bi, oi, numbers + 20, PHI2)
        total += t2
        du += u2
        dv += v2
        d_beta += b2
        d_offset += o2
    tl.store(loss + i, total, mask=inside)
    tl.store(slopes + i, du, mask=inside)
    tl.store(slopes + B + i, dv, mask=inside)
    tl.store(slopes + 2 * B + i, d_beta, mask=inside)
    tl.store(slopes + 3 * B + i, d_offset, mask=inside)


@functools.lru_cache(maxsize=256)
def _on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """The terms as fp64 on the device, copied once: a launch's scalars are fp32."""
    return to_device(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device)


def pair_loss_forward(
    u: Tensor,
    v: Tensor,
    beta: Tensor,
    offset: Tensor | None,
    phis: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """As `backends.torch.pair_loss_forward`; all tensors fp64 and contiguous, at most 3 terms."""
    B = u.numel()
    loss, slopes = torch.empty_like(u), u.new_empty((4, B))
    kinds = [*phis, -1, -1][:3]
    with on(u):
        _kernel[(triton.cdiv(B, BLOCK),)](
            u,
            v,
            beta,
            offset,
            _on_device(tuple(numbers), u.device),
            loss,
            slopes,
            B,
            PHI0=kinds[0],
            PHI1=kinds[1],
            PHI2=kinds[2],
            HAS_OFFSET=offset is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return loss, slopes
