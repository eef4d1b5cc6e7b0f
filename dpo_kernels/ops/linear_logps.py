"""`linear_logps`: log-probs of scored rows from hidden states and the lm_head weight.

    logp[r, t] = token_logps(hidden[r, t] @ weight.T + bias)

Only scored rows are projected, a chunk of rows at a time: no [R, T, V] tensor exists. The backward
projects each chunk again, turns its logits into their gradient in place, and accumulates

    dhidden = dz @ weight,   dweight += dz.T @ hidden,   dbias += sum dz

in fp32. Narrow weights are widened one tile of the vocabulary at a time, so logits, log-probs and
the accumulators are fp32 whatever the input. Letters: `R` rows, `T` positions, `N` scored rows,
`H` hidden size, `V` vocabulary, `C` rows a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference
from ..transform import LogitTransform
from . import checks
from .token_logps import TokenLogps, _names, check_stats

DEFAULT_BUDGET = 256 << 20  # bytes of logits held at once
_TILE = 8192  # vocabulary rows widened at a time


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    transform: LogitTransform | None = None,
    stats: tuple[str, ...] = (),
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TokenLogps:
    """Log-prob, log-sum-exp and statistics of each scored row, [R, T] and 0 where ignored.

    `hidden` [R, T, H], `weight` [V, H], `bias` [V] of one floating dtype; `targets` [R, T] int64.
    `memory_budget` bytes bound the logits held at once. Under autocast hidden, weight and bias are
    cast to its dtype. Raises `ValueError` or `TypeError` for wrong arguments.
    """
    transform = transform or LogitTransform()
    for name, value in (("hidden", hidden), ("weight", weight)):
        checks.floating(name, value)
    if hidden.dim() != 3:
        raise ValueError(f"hidden must have 3 dimensions [R, T, H], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight must have shape [V, H={hidden.shape[2]}], got {list(weight.shape)}"
        )
    checks.shape("targets", targets, tuple(hidden.shape[:2]), "that of hidden without H")
    checks.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, (weight.shape[0],), "one value a vocabulary entry")
        checks.same_device("bias", bias, "hidden", hidden)
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget}")
    stats = check_stats(stats)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        got = f"{hidden.dtype}, {weight.dtype}" + (f", {bias.dtype}" if bias is not None else "")
        raise ValueError(f"hidden, weight and bias must have one dtype, got {got}")
    name = backends.choose(backend, hidden.device, hidden.dtype)
    if name == "torch":
        x = torch.nn.functional.linear(hidden, weight, bias)
        return TokenLogps(*_as_dict(stats, reference.token_logps(
            x, targets, ignore_index, transform, stats)))  # fmt: skip
    result = _linear_logps(
        hidden,
        weight,
        bias,
        targets,
        ignore_index,
        transform.scale,
        transform.softcap,
        transform.inv_temperature,
        ",".join(stats),
        memory_budget or DEFAULT_BUDGET,
        name,
    )
    return TokenLogps(*_as_dict(stats, result))


def _as_dict(stats, result):
    logps, lse, table = result
    return logps, lse, dict(zip(stats, table.unbind(0), strict=True))


def _chunks(targets: Tensor, ignore_index: int, V: int, budget: int) -> Iterator[Tensor]:
    """Indices of scored rows, as many at a time as fp32 logits of `budget` bytes allow."""
    index = (targets.reshape(-1) != ignore_index).nonzero().squeeze(1)
    yield from index.split(max(1, budget // (4 * max(V, 1))))


def _tiles(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in fp32: whole if it is, else a tile of the vocabulary at a time."""
    V = weight.shape[0]
    step = V if weight.dtype == torch.float32 else _TILE
    for start in range(0, V, max(step, 1)):
        part = slice(start, min(start + step, V))
        yield part, weight[part].float()


def _project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 logits [C, V] of fp32 rows h [C, H]."""
    z = h.new_empty(h.shape[0], weight.shape[0])
    for part, w in _tiles(weight):
        torch.mm(h, w.T, out=z[:, part])
    if bias is not None:
        z += bias
    return z


@torch.library.custom_op("dpo_kernels::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    stats: str,
    memory_budget: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = backends.load(backend)
    transform, names = LogitTransform(scale, softcap, inv_temperature), _names(stats)
    V = weight.shape[0]
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    rows = labels.shape[0]
    logps = hidden.new_zeros(rows, dtype=torch.float32)
    lse = hidden.new_zeros(rows, dtype=torch.float64)
    table = hidden.new_zeros((len(names), rows), dtype=torch.float32)
    for index in _chunks(targets, ignore_index, V, memory_budget):
        z = _project(flat[index].float(), weight, bias)
        part = impl.token_logps(z[None], labels[index][None], ignore_index, transform, names)
        logps[index], lse[index], table[:, index] = part[0][0], part[1][0], part[2][:, 0]
    shape = targets.shape
    return logps.view(shape), lse.view(shape), table.view(len(names), *shape)


@_linear_logps.register_fake
def _(hidden, weight, bias, targets, ignore_index, scale, softcap, inv_t, stats, budget, backend):
    logps = hidden.new_empty(targets.shape, dtype=torch.float32)
    lse = hidden.new_empty(targets.shape, dtype=torch.float64)
    return logps, lse, hidden.new_empty((len(_names(stats)), *targets.shape), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.ignore_index, *transform, _, budget, backend = inputs
    ctx.transform, ctx.tail = tuple(transform), (budget, backend)
    _, lse, table = output
    ctx.mark_non_differentiable(lse, table)
    ctx.save_for_backward(hidden, weight, bias, targets, lse)


def _backward(ctx, grad, *_):
    hidden, weight, bias, targets, lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = _linear_logps_backward(
        grad, hidden, weight, bias, targets, lse, ctx.ignore_index, *ctx.transform, *wanted,
        *ctx.tail,
    )  # fmt: skip
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), *[None] * 8


_linear_logps.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dpo_kernels::linear_logps_backward", mutates_args=())
def _linear_logps_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
    memory_budget: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    impl = backends.load(backend)
    transform = LogitTransform(scale, softcap, inv_temperature)
    V, H = weight.shape
    flat, labels = hidden.reshape(-1, H), targets.reshape(-1)
    grad, lse = grad.reshape(-1), lse.reshape(-1)
    d_hidden = torch.zeros_like(flat) if want_hidden else hidden.new_empty(0)
    d_weight = hidden.new_zeros((V, H) if want_weight else 0, dtype=torch.float32)
    d_bias = hidden.new_zeros(V if want_bias else 0, dtype=torch.float32)
    for index in _chunks(targets, ignore_index, V, memory_budget):
        h = flat[index].float()
        z = _project(h, weight, bias)
        impl.token_logps_backward(
            grad[index][None], z[None], labels[index][None], lse[index][None],
            ignore_index, transform, z[None],
        )  # fmt: skip
        if want_hidden:
            d_h = torch.zeros_like(h)
            for part, w in _tiles(weight):
                d_h.addmm_(z[:, part], w)
            d_hidden[index] = d_h.to(hidden.dtype)
        if want_weight:
            d_weight.addmm_(z.T, h)
        if want_bias:
            d_bias += z.sum(0)
    return (
        d_hidden.view_as(hidden) if want_hidden else d_hidden,
        d_weight.to(weight.dtype),
        (d_bias.to(weight.dtype)),
    )


@_linear_logps_backward.register_fake
def _(
    grad, hidden, weight, bias, targets, lse, ignore_index, scale, softcap, inv_t,
    want_hidden, want_weight, want_bias, budget, backend,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )
