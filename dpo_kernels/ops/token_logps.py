"""`token_logps`: the log-prob of each scored row's target, straight from the logits.

    logp[r, t] = z[y] - log sum_v exp z[v],   z = transform(logits[r, t]),  y = targets[r, t]
    dlogits[r, t] = grad[r, t] (onehot(y) - softmax(z)) dz/dx

One read of the logits forward, one read and one write backward; nothing of size V is kept. Rows
whose target is `ignore_index` are neither read nor computed. Letters: `R` rows of a padded batch
(1 when packed), `T` positions, `V` vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference
from ..inputs import checks
from ..inputs.transform import LogitTransform
from .derivatives import check_mode, refuse_inplace, refuse_second
from .direct import Op

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class TokenLogps(NamedTuple):
    """Per-row results, each [R, T] and 0 where ignored."""

    logps: Tensor  # fp32 (fp64 for fp64 logits), differentiable
    lse: Tensor  # fp64 log-sum-exp of z
    stats: dict[str, Tensor]  # the statistics asked for, without gradient


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    transform: LogitTransform | None = None,
    stats: tuple[str, ...] = (),
    inplace: bool = False,
    backend: str | None = None,
) -> TokenLogps:
    """Log-prob, log-sum-exp and statistics of each scored row.

    `logits` [R, T, V] with unit stride in V (other strides are free: views are not copied);
    `targets` [R, T] int64, aligned with the rows. With `inplace` the backward writes the gradient
    over `logits` (ignored under torch.compile, which owns the buffers). A target outside [0, V)
    gives NaN. Raises `ValueError` or `TypeError` for wrong shapes, dtypes, devices or names.
    """
    transform = transform or LogitTransform()
    checks.floating("logits", logits)
    checks.integer("targets", targets)
    if logits.dim() != 3:
        raise ValueError(f"logits must have 3 dimensions [R, T, V], got {list(logits.shape)}")
    checks.shape("targets", targets, tuple(logits.shape[:2]), "that of logits without V")
    checks.same_device("targets", targets, "logits", logits)
    stats = check_stats(stats)
    name = backends.choose(backend, logits.device, logits.dtype, "token_logps", logits.numel())
    write = inplace and logits.requires_grad and torch.is_grad_enabled()
    write = write and not torch.compiler.is_compiling()
    if write:
        check_writable(logits)
    if name == "torch" and not write:
        result = reference.token_logps(logits, targets, ignore_index, transform, stats)
    else:
        if logits.dim() and logits.shape[-1] > 1 and logits.stride(-1) != 1:
            raise ValueError(f"logits must have unit stride in V, got strides {logits.stride()}")
        check_mode(logits)
        result = token_logps_op(
            logits,
            targets,
            ignore_index,
            transform.scale,
            transform.softcap,
            transform.inv_temperature,
            ",".join(stats),
            write,
            name,
        )
    logps, lse, table = result
    return TokenLogps(logps, lse, dict(zip(stats, table.unbind(0), strict=True)))


def check_stats(stats: object) -> tuple[str, ...]:
    stats = (stats,) if isinstance(stats, str) else stats
    if not isinstance(stats, (list, tuple)):
        raise TypeError(f"stats must be names among {STATS}, got {type(stats).__name__}")
    return tuple(checks.choice("stats", stat, STATS) for stat in stats)


def check_writable(logits: Tensor) -> None:
    """In place: every element its own memory, so that each gradient has its own place."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"inplace=True needs unit stride in V, got strides {logits.stride()}")
    axes = sorted((s, n) for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1)
    reach = 0
    for stride, size in axes:
        if stride <= reach:
            raise ValueError(
                "inplace=True needs logits whose elements do not overlap in memory, "
                f"got shape {list(logits.shape)} with strides {logits.stride()}"
            )
        reach += stride * (size - 1)


def _names(stats: str) -> tuple[str, ...]:
    return tuple(stats.split(",")) if stats else ()


@torch.library.custom_op("dpo_kernels::token_logps", mutates_args=())
def _token_logps(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    stats: str,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    transform = LogitTransform(scale, softcap, inv_temperature)
    impl = backends.load(backend)
    names = _names(stats)
    logps, lse, table = impl.token_logps(logits.detach(), targets, ignore_index, transform, names)
    if not names:  # an output of the schema all the same
        table = logps.new_empty((0, *logps.shape))
    return logps, lse, table


@_token_logps.register_fake
def _(logits, targets, ignore_index, scale, softcap, inv_temperature, stats, inplace, backend):
    dtype = reference.accumulate_dtype(logits.dtype)
    logps = logits.new_empty(targets.shape, dtype=dtype)
    lse = logits.new_empty(targets.shape, dtype=torch.float64)
    table = logits.new_empty((len(_names(stats)), *targets.shape), dtype=dtype)
    return logps, lse, table


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index, *transform, _, ctx.inplace, ctx.backend = inputs
    ctx.transform = tuple(transform)
    _, lse, table = output
    ctx.mark_non_differentiable(lse, table)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, lse)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    # Reading saved_tensors compares versions: after an in-place backward a second one raises here.
    logits, targets, lse = ctx.saved_tensors
    arguments = (targets, lse, ctx.ignore_index, *ctx.transform, ctx.backend)
    if ctx.inplace:
        refuse_inplace()
        target = logits.detach()
        backward_in_place(grad, target, *arguments)
        return target, *[None] * 8
    return backward_op(grad, logits, *arguments), *[None] * 8


_token_logps.register_autograd(_backward, setup_context=_setup_context)
token_logps_op = Op(_token_logps, _setup_context, _backward)


@torch.library.custom_op("dpo_kernels::token_logps_backward", mutates_args=())
def _token_logps_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    backend: str,
) -> Tensor:
    # Contiguous whatever the strides of the logits: an expanded view has a full-sized gradient.
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run_backward(
        grad, logits, targets, lse, ignore_index, (scale, softcap, inv_temperature), backend, out
    )
    return out


@_token_logps_backward.register_fake
def _(grad, logits, targets, lse, ignore_index, scale, softcap, inv_temperature, backend):
    return logits.new_empty(logits.shape)


refuse_second(_token_logps_backward)
backward_op = Op(_token_logps_backward)


@torch.library.custom_op("dpo_kernels::token_logps_backward_", mutates_args=("logits",))
def _token_logps_backward_(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    backend: str,
) -> None:
    _run_backward(
        grad, logits, targets, lse, ignore_index, (scale, softcap, inv_temperature), backend, logits
    )


backward_in_place = Op(_token_logps_backward_, writes=1)


def _run_backward(grad, logits, targets, lse, ignore_index, transform, backend, out) -> None:
    impl = backends.load(backend)
    impl.token_logps_backward(
        grad, logits, targets, lse, ignore_index, LogitTransform(*transform), out
    )
