"""Every op in plain torch: the specification the other backends are held to.

Letters: `R` rows of a padded batch (1 when packed), `T` positions, `V` vocabulary, `S` sequences,
`B` pairs. Any floating dtype and any device. bf16 and fp16 logits are upcast to fp32, fp64 stays
fp64. The functions here are differentiable by torch's own autograd (twice, too), so the `torch`
backend needs no hand-written backward; `token_logps_backward` states the formula the fused
backends implement, and serves the in-place gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs.transform import LogitTransform
from ..losses import DISCOPOP, EXO, IDENTITY, RELU, SIGMOID, SOFTPLUS, SQUARE, Term
from .terms import unflatten

name = "torch"
ROUNDS = False  # whether a backward may write a gradient narrower than its logits


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_logps(
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T] int64
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """logps [R, T], log-sum-exp [R, T] fp64, statistics [len(stats), R, T]; 0 where ignored."""
    V = logits.shape[-1]
    scored = targets != ignore_index
    legal = (targets >= 0) & (targets < V)
    x = scored_only(logits, scored).to(accumulate_dtype(logits.dtype))
    if V == 0:
        zero = x.new_zeros(targets.shape)
        return zero, zero.double(), x.new_zeros((len(stats), *targets.shape))
    z, top = _below_top(x, transform)
    lse = _log_sum_exp(z.detach()) + top
    index = torch.where(legal, targets, 0).unsqueeze(-1)
    logp_all = torch.log_softmax(z, dim=-1)
    logps = logp_all.gather(-1, index).squeeze(-1)
    logps = torch.where(legal, logps, z.gather(-1, index).squeeze(-1) + float("nan"))
    logps = torch.where(scored, logps, 0.0)
    columns = [
        _statistic(stat, z.detach(), top, logp_all.detach(), targets, logps.detach())
        for stat in stats
    ]
    table = [torch.where(scored, column, 0.0) for column in columns]
    empty = logps.new_zeros((0, *targets.shape))
    lse = torch.where(scored, lse, 0.0)
    return logps, lse, torch.stack(table) if table else empty


def scored_only(rows: Tensor, scored: Tensor) -> Tensor:
    """Rows [R, T, ...], 0 where not scored [R, T].

    Those may hold anything, NaN included: cut off before anything is done with them, neither a
    value nor a gradient comes from them (0 * NaN is none).
    """
    return torch.where(scored.unsqueeze(-1), rows, 0.0)


def _below_top(x: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """z [..., V] of logits less a number of each row, and that number [...] in fp64.

    It is the largest z, so that fp32 keeps what z of size 1e5 differ by: rounded only after they
    were scaled, their differences lose digits. A cap keeps z small.
    """
    if transform.softcap:
        return transform(x), torch.zeros_like(x[..., 0], dtype=torch.float64)
    slope, fixed = transform.scale * transform.inv_temperature, x.detach()
    top = fixed.amin(-1, keepdim=True) if slope < 0 else fixed.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    z = x - top
    return (z if slope == 1.0 else z * slope), top.squeeze(-1).double() * slope


def _log_sum_exp(z: Tensor) -> Tensor:
    """[..., V] -> [...] fp64: of logits of size 1e4 fp32 keeps three digits of what it adds."""
    top = z.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    return (z - top).exp().sum(-1).double().log() + top.squeeze(-1).double()


def _statistic(
    stat: str, z: Tensor, top: Tensor, logp: Tensor, targets: Tensor, logps: Tensor
) -> Tensor:
    if stat == "entropy":
        p = logp.exp()
        value = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    elif stat == "mean_logits":
        value = (z.mean(-1).double() + top).to(z.dtype)
    elif stat == "is_top1":
        value = (z.argmax(-1) == targets).to(z.dtype)
    elif stat == "log_sum_sq_probs":
        value = torch.logsumexp(2 * logp, dim=-1)
    else:
        raise AssertionError(stat)
    # A row that has no log-prob has no statistics either.
    return torch.where(logps.isnan(), logps, value)


def token_logps_backward(
    grad: Tensor,  # [R, T]
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    lse: Tensor,  # [R, T] fp64
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,  # [R, T, V], may be `logits` itself
) -> None:
    """out = grad * (onehot(target) - softmax(z)) * dz/dx; 0 where ignored or grad is 0."""
    V = logits.shape[-1]
    if V == 0:
        return
    x = logits.to(accumulate_dtype(logits.dtype))
    z, top = _below_top(x, transform)
    p = (z - (lse - top).unsqueeze(-1)).exp().to(z.dtype)
    legal = (targets >= 0) & (targets < V)
    active = (targets != ignore_index) & (grad != 0)
    scale = torch.where(legal, grad.to(z.dtype), float("nan")).unsqueeze(-1)
    d = -p * scale
    d.scatter_add_(-1, torch.where(legal, targets, 0).unsqueeze(-1), scale)
    d = d * transform.derivative(x)
    out.copy_(torch.where(active.unsqueeze(-1), d, 0.0))


def token_kl(
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T] int64
    ignore_index: int,
    transform: LogitTransform,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, log-sum-exp (fp64), those of the reference, KL(reference || policy); all [R, T].

    KL = sum_v q (log q - log p) of q = softmax(reference), p = softmax(policy): where q is 0 the
    term is 0, where only p is (a logit of -inf) it is infinite. 0 where ignored.
    """
    wide = torch.promote_types(*(accumulate_dtype(x.dtype) for x in (logits, ref_logits)))
    logits, ref_logits = logits.to(wide), ref_logits.detach().to(wide)
    logps, lse, _ = token_logps(logits, targets, ignore_index, transform, ())
    ref_logps, ref_lse, _ = token_logps(ref_logits, targets, ignore_index, transform, ())
    scored = targets != ignore_index
    log_p, log_q = (
        _below_top(scored_only(x, scored), transform)[0].log_softmax(-1)
        for x in (logits, ref_logits)
    )
    never = log_q == -float("inf")
    # Masked before the product: 0 * inf has no gradient that is a number.
    terms = log_q.exp() * torch.where(never, 0.0, log_q - log_p)
    # A probability too small for its dtype is still one that the policy rules out.
    terms = torch.where((log_p == -float("inf")) & ~never, float("inf"), terms)
    # A row whose target is out of range is NaN throughout, as its log-prob is.
    kl = terms.sum(-1) + torch.where(logps.isnan(), logps.detach(), 0.0)
    return logps, lse, ref_logps, ref_lse, torch.where(scored, kl, 0.0)


def token_kl_backward(
    grad_logps: Tensor,  # [R, T]
    grad_kl: Tensor,  # [R, T]
    logits: Tensor,  # [R, T, V]
    ref_logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    lse: Tensor,  # [R, T] fp64
    ref_lse: Tensor,  # [R, T] fp64
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,  # [R, T, V], may be `logits` or `ref_logits`
) -> None:
    """out = [grad_logps (onehot - p) + grad_kl (p - q)] dz/dx; 0 where ignored or both are 0.

    Where `grad_kl` is 0 the reference does not count, whatever it holds.
    """
    V = logits.shape[-1]
    if V == 0:
        return
    x = logits.to(accumulate_dtype(logits.dtype))
    z, top = _below_top(x, transform)
    r, ref_top = _below_top(ref_logits.to(accumulate_dtype(ref_logits.dtype)), transform)
    p = (z - (lse - top).unsqueeze(-1)).exp().to(z.dtype)
    q = (r - (ref_lse - ref_top).unsqueeze(-1)).exp().to(z.dtype)
    legal = (targets >= 0) & (targets < V)
    active = (targets != ignore_index) & ((grad_logps != 0) | (grad_kl != 0))
    g_logp = torch.where(legal, grad_logps.to(z.dtype), float("nan")).unsqueeze(-1)
    g_kl = grad_kl.to(z.dtype).unsqueeze(-1)
    d = torch.where(g_kl == 0, 0.0, g_kl * (p - q)) - g_logp * p
    d.scatter_add_(-1, torch.where(legal, targets, 0).unsqueeze(-1), g_logp)
    d = d * transform.derivative(x)
    out.copy_(torch.where(active.unsqueeze(-1), d, 0.0))


def sequence_ids(targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[R, T] index of the sequence each position belongs to."""
    R, T = targets.shape
    if cu_seqlens is None:
        return torch.arange(R, device=targets.device).unsqueeze(1).expand(R, T)
    position = torch.arange(T, device=targets.device)
    ids = torch.searchsorted(cu_seqlens.to(torch.int64)[1:].contiguous(), position, right=True)
    # Rows past the last boundary (lengths that do not add up) belong to no sequence: the last one
    # takes them, and the caller's check of cu_seqlens is what refuses them.
    return ids.clamp(max=cu_seqlens.numel() - 2).unsqueeze(0)


def token_weights(
    targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int, tail_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [R, T] (0 where ignored), sequence ids [R, T], scored counts [S].

    With `tail_weight` != 1 (LD-DPO, arXiv 2409.06411, `ld_alpha`) a sequence's scored tokens past
    the shorter completion of its pair weigh `tail_weight`; sequences i and i + S/2 are a pair.
    """
    S = targets.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    scored = targets != ignore_index
    ids = sequence_ids(targets, cu_seqlens)
    counts = torch.zeros(S, dtype=torch.int64, device=targets.device)
    counts = counts.index_add(0, ids.reshape(-1), scored.reshape(-1).to(torch.int64))
    weights = scored.to(torch.float64)
    if tail_weight != 1.0:
        flat = scored.reshape(-1).to(torch.int64)
        before = counts.cumsum(0) - counts
        rank = (flat.cumsum(0) - flat).view_as(targets) - before[ids]
        shorter = torch.minimum(counts, counts.roll(S // 2))
        weights = torch.where(rank < shorter[ids], weights, weights * tail_weight)
    return weights, ids, counts


def sequence_sum(
    values: Tensor,  # [R, T]
    targets: Tensor,  # [R, T]
    cu_seqlens: Tensor | None,  # [S + 1] when packed, else S = R
    ignore_index: int,
    tail_weight: float,
) -> tuple[Tensor, Tensor]:
    """Weighted sums over the scored tokens of each sequence [S] fp64, and their counts [S]."""
    weights, ids, counts = token_weights(targets, cu_seqlens, ignore_index, tail_weight)
    scored = torch.where(weights != 0, values.double() * weights, 0.0)
    sums = torch.zeros(counts.shape, dtype=torch.float64, device=values.device)
    return sums.index_add(0, ids.reshape(-1), scored.reshape(-1)), counts


def sequence_sum_backward(
    grad: Tensor,  # [S] fp64
    targets: Tensor,  # [R, T]
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    dtype: torch.dtype,
) -> Tensor:
    """[R, T] of `dtype`, saturating: an overflowing gradient stays finite."""
    weights, ids, _ = token_weights(targets, cu_seqlens, ignore_index, tail_weight)
    limit = torch.finfo(dtype).max
    product = torch.where(weights != 0, grad[ids] * weights, 0.0)
    return product.clamp(-limit, limit).to(dtype)


def phi(kind: int, z: Tensor, p: float) -> Tensor:
    """The scalar functions of the table of losses, each finite wherever its value is."""
    from torch.nn.functional import logsigmoid

    if kind == SOFTPLUS:
        return -logsigmoid(-z)
    if kind == SIGMOID:
        return torch.sigmoid(z)
    if kind == SQUARE:
        return z * z
    if kind == RELU:
        return torch.relu(z)
    if kind == EXO:
        log1m_e, log_e = torch.log1p(z.new_tensor(-p)), torch.log(z.new_tensor(p))
        return torch.sigmoid(z) * (logsigmoid(z) - log1m_e) + torch.sigmoid(-z) * (
            logsigmoid(-z) - log_e
        )
    if kind == DISCOPOP:
        # m exp(-z) as one exponential: the product overflows (inf * 0) long before its value does.
        m_exp = torch.exp(logsigmoid(z / p) - z)
        return torch.sigmoid(-z / p) * -logsigmoid(z) + m_exp
    if kind == IDENTITY:
        return z
    raise AssertionError(kind)


def pair_loss(
    u: Tensor,  # [B] fp64
    v: Tensor,  # [B] fp64
    beta: Tensor,  # [B] fp64
    offset: Tensor | None,  # [B] fp64
    terms: tuple[Term, ...],
) -> Tensor:
    """sum_k w_k phi_k(z_k) [B] fp64, z_k = beta^s (a u + b v) + c, as `losses.Term` says."""
    total = torch.zeros_like(u)
    for t in terms:
        z = _times(t.a, u) + _times(t.b, v)
        if t.scaled:
            z = beta * z
        z = z + t.c
        if t.c_beta:
            z = z + t.c_beta * beta
        if t.c_inv_beta:
            z = z + t.c_inv_beta / beta
        if offset is not None and t.c_offset:
            shift = offset if t.scaled else offset / beta
            z = z + t.c_offset * shift
        weight = t.w * beta if t.w_beta else t.w
        total = total + weight * phi(t.phi, z, t.p)
    return total


def _times(coefficient: float, x: Tensor) -> Tensor:
    """coefficient * x, but exactly 0 (not NaN at x = inf) for a coefficient of 0."""
    return coefficient * x if coefficient else torch.zeros_like(x)


def pair_loss_forward(
    u: Tensor,
    v: Tensor,
    beta: Tensor,
    offset: Tensor | None,
    phis: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """Loss [B] and its slopes [4, B] in u, v, beta, offset: what the fused backends compute."""

    with torch.enable_grad():
        shift = torch.zeros_like(u) if offset is None else offset
        leaves = [x.detach().requires_grad_() for x in (u, v, beta, shift)]
        loss = pair_loss(leaves[0], leaves[1], leaves[2], leaves[3], unflatten(phis, numbers))
        slopes = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    rows = [torch.zeros_like(u) if s is None else s for s in slopes]
    return loss.detach(), torch.stack(rows)
