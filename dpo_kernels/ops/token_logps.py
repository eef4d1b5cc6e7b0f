"""`token_logps`: the log-prob of each scored row's target, straight from the logits.

    logp[r, t] = z[y] - log sum_v exp z[v],   z = transform(logits[r, t]),  y = targets[r, t]
    dlogits[r, t] = grad[r, t] (onehot(y) - softmax(z)) dz/dx

One read of the logits forward, one read and one write backward; nothing of size V is kept. Rows
whose target is `ignore_index` are neither read nor computed.

Beside the logits of a reference it gives, in one pass over both, what token-level losses (TDPO,
arXiv 2404.11999) need of two models:

    kl[r, t] = KL(q || p) = sum_v q[v] (log q[v] - log p[v]),   p = softmax(z), q = softmax(z_ref)
    dlogits[r, t] = [grad (onehot(y) - p) + grad_kl (p - q)] dz/dx

The reference gets no gradient. A class that both rule out (-inf) counts 0; one that only the policy
rules out makes the KL infinite. Letters: `R` rows of a padded batch (1 when packed), `T` positions,
`V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

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
    ref_logps: Tensor | None = None  # of a reference, without gradient
    kl: Tensor | None = None  # KL(reference || policy), differentiable

    @staticmethod
    def of(result: Sequence[Any], stats: tuple[str, ...], kl: bool) -> TokenLogps:
        """Of what `forward` or an op returns."""
        logps, lse, table, ref_logps, _, kls = result
        named = dict(zip(stats, table.unbind(0), strict=True)) if stats else {}
        return TokenLogps(logps, lse, named, *((ref_logps, kls) if kl else ()))


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logits: Tensor | None = None,
    ignore_index: int = -100,
    transform: LogitTransform | None = None,
    stats: tuple[str, ...] = (),
    inplace: bool = False,
    backend: str | None = None,
) -> TokenLogps:
    """Log-prob, log-sum-exp and statistics of each scored row; beside `ref_logits` the KL too.

    `logits` [R, T, V] with unit stride in V (other strides are free: views are not copied), and
    `ref_logits` like them, of a dtype of their own; `targets` [R, T] int64, aligned with the rows.
    With `inplace` the backward writes the gradient over `logits` (ignored under torch.compile,
    which owns the buffers). A target outside [0, V) gives NaN. Raises `ValueError` or `TypeError`
    for wrong shapes, dtypes, devices or names.
    """
    checks.floating("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must have 3 dimensions [R, T, V], got {list(logits.shape)}")
    checks.integer("targets", targets)
    dtype, op = logits.dtype, "token_logps"
    if ref_logits is not None:
        checks.floating("ref_logits", ref_logits)
        if ref_logits.dim() != 3:
            got = list(ref_logits.shape)
            raise ValueError(f"ref_logits must have 3 dimensions [R, T, V], got {got}")
        checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
        checks.same_device("ref_logits", ref_logits, "logits", logits)
        dtype, op = joint_dtype(logits, ref_logits), "token_kl"
    checks.shape("targets", targets, tuple(logits.shape[:2]), "that of logits without V")
    checks.same_device("targets", targets, "logits", logits)
    stats = check_stats(stats)
    name = backends.choose(backend, logits.device, dtype, op)
    write = check_rows(logits, name, inplace, ref_logits)
    transform = transform or LogitTransform()
    return read_rows(logits, targets, ignore_index, transform, stats, write, name, ref_logits)


def read_rows(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
    inplace: bool,
    backend: str,
    ref_logits: Tensor | None = None,
) -> TokenLogps:
    """`token_logps` of arguments that are checked."""
    if backend == "torch" and not inplace:
        result = forward(reference, logits, targets, ignore_index, transform, stats, ref_logits)
    else:
        check_mode(logits, ref_logits)
        result = token_logps_op(
            logits,
            targets,
            ignore_index,
            transform.scale,
            transform.softcap,
            transform.inv_temperature,
            ",".join(stats),
            inplace,
            backend,
            None if ref_logits is None else ref_logits.detach(),
        )
    return TokenLogps.of(result, stats, ref_logits is not None)


def forward(
    impl: ModuleType,
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
    ref_logits: Tensor | None,
) -> tuple[Any, ...]:
    """logps, lse, statistics, ref_logps, ref_lse, kl; None for what was not asked for."""
    place = (targets, ignore_index, transform)
    if ref_logits is None:
        return *impl.token_logps(logits, *place, stats), None, None, None
    logps, lse, *rest = impl.token_kl(logits, ref_logits, *place)
    # By a read of their own.
    table = impl.token_logps(logits.detach(), *place, stats)[2] if stats else None
    return logps, lse, table, *rest


def joint_dtype(logits: Tensor, ref_logits: Tensor) -> torch.dtype:
    """That of an op over both: its backend is chosen by it."""
    return torch.float64 if torch.float64 in (logits.dtype, ref_logits.dtype) else logits.dtype


def check_stats(stats: object) -> tuple[str, ...]:
    stats = (stats,) if isinstance(stats, str) else stats
    if not isinstance(stats, (list, tuple)):
        raise TypeError(f"stats must be names among {STATS}, got {type(stats).__name__}")
    return tuple(checks.choice("stats", stat, STATS) for stat in stats)


def check_rows(
    logits: Tensor, backend: str, inplace: bool = False, ref_logits: Tensor | None = None
) -> bool:
    """That a backend takes rows as they lie; whether the backward writes over them."""
    write = inplace and logits.requires_grad and torch.is_grad_enabled()
    write = write and not torch.compiler.is_compiling()
    if write:
        _check_writable(logits)
        if ref_logits is not None:
            _check_apart(logits, ref_logits)
    if backend != "torch" or write:
        for name, x in (("logits", logits), ("ref_logits", ref_logits)):
            if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
                raise ValueError(f"{name} must have unit stride in V, got strides {x.stride()}")
    return write


def _check_writable(logits: Tensor) -> None:
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


def _check_apart(logits: Tensor, ref_logits: Tensor) -> None:
    """In place: no logit of the reference is overwritten before it is read."""
    if logits.untyped_storage().data_ptr() != ref_logits.untyped_storage().data_ptr():
        return
    if logits.data_ptr() == ref_logits.data_ptr() and logits.stride() == ref_logits.stride():
        return  # the same tensor: each element is read where it is written
    (start, end), (ref_start, ref_end) = (
        (
            x.data_ptr(),
            x.data_ptr()
            + x.element_size()
            * (1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))),
        )
        for x in (logits, ref_logits)
    )
    if start < ref_end and ref_start < end:
        raise ValueError("inplace=True needs logits that do not share memory with ref_logits")


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
    ref_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    transform = LogitTransform(scale, softcap, inv_temperature)
    impl, x = backends.load(backend), logits.detach()
    found = forward(impl, x, targets, ignore_index, transform, _names(stats), ref_logits)
    # An output of the schema all the same.
    empty = ((0, *targets.shape), 0, 0, 0)
    rest = (
        found[0].new_empty(e) if y is None else y for e, y in zip(empty, found[2:], strict=True)
    )
    return *found[:2], *rest  # type: ignore[return-value]


@_token_logps.register_fake
def _(*arguments):
    a = token_logps_op.named(arguments)
    return fake_rows(a.logits, a.targets, len(_names(a.stats)), a.ref_logits)


def fake_rows(x: Tensor, targets: Tensor, stats: int, ref: Tensor | None) -> tuple[Tensor, ...]:
    """What `forward` returns of x, unwritten."""
    dtype = reference.accumulate_dtype(x.dtype)
    if ref is not None:
        dtype = torch.promote_types(dtype, reference.accumulate_dtype(ref.dtype))
    rows, other = targets.shape, targets.shape if ref is not None else 0
    return (
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows, dtype=torch.float64),
        x.new_empty((stats, *rows), dtype=dtype),
        x.new_empty(other, dtype=dtype),
        x.new_empty(other, dtype=torch.float64 if ref is not None else dtype),
        x.new_empty(other, dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    a, ctx.options = token_logps_op.named(inputs), token_logps_op.options(inputs)
    _, lse, table, ref_logps, ref_lse, kl = output
    alone = a.ref_logits is None
    ctx.mark_non_differentiable(lse, table, ref_logps, ref_lse, *([kl] if alone else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.logits, a.targets, lse, a.ref_logits, None if alone else ref_lse)


def _backward(ctx, grad, _lse, _table, _ref_logps, _ref_lse, grad_kl):
    if grad is None and grad_kl is None:
        return token_logps_op.gradients()
    # Reading saved_tensors compares versions: after an in-place backward a second one raises here.
    logits, targets, lse, ref_logits, ref_lse = ctx.saved_tensors
    a = ctx.options
    if ref_logits is not None:
        grad, grad_kl = (torch.zeros_like(lse) if g is None else g for g in (grad, grad_kl))
    target = logits.detach() if a.inplace else logits
    arguments = (
        grad,
        target,
        targets,
        lse,
        a.ignore_index,
        a.scale,
        a.softcap,
        a.inv_temperature,
        a.backend,
        grad_kl,
        ref_logits,
        ref_lse,
    )
    if a.inplace:
        refuse_inplace()
        backward_in_place(*arguments)
        return token_logps_op.gradients(logits=target)
    return token_logps_op.gradients(logits=backward_op(*arguments))


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
    grad_kl: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ref_lse: Tensor | None = None,
) -> Tensor:
    # Contiguous whatever the strides of the logits: an expanded view has a full-sized gradient.
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    transform = LogitTransform(scale, softcap, inv_temperature)
    rows = RowSlopes(grad, targets, lse, grad_kl, ref_lse)
    backward(backends.load(backend), rows, logits, ref_logits, ignore_index, transform, out)
    return out


@_token_logps_backward.register_fake
def _(grad, logits, *_):
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
    grad_kl: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ref_lse: Tensor | None = None,
) -> None:
    transform = LogitTransform(scale, softcap, inv_temperature)
    rows = RowSlopes(grad, targets, lse, grad_kl, ref_lse)
    backward(backends.load(backend), rows, logits, ref_logits, ignore_index, transform, logits)


backward_in_place = Op(_token_logps_backward_, writes=1)


class RowSlopes(NamedTuple):
    """What the gradient of a row's logits is made of beside them, [R, T] each."""

    grad: Tensor  # of the log-prob
    targets: Tensor
    lse: Tensor
    grad_kl: Tensor | None = None
    ref_lse: Tensor | None = None


def backward(
    impl: ModuleType,
    rows: RowSlopes,
    logits: Tensor,
    ref_logits: Tensor | None,
    ignore_index: int,
    transform: LogitTransform,
    out: Tensor,
) -> None:
    """Write the gradient of `logits` [R, T, V] to `out`, which may be `logits`."""
    grad, targets, lse, grad_kl, ref_lse = rows
    if ref_logits is None:
        impl.token_logps_backward(grad, logits, targets, lse, ignore_index, transform, out)
        return
    both = (lse, ref_lse, ignore_index, transform, out)
    impl.token_kl_backward(grad, grad_kl, logits, ref_logits, targets, *both)
