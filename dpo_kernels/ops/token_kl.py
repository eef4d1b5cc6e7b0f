"""`token_kl`: log-probs of policy and reference, and the KL between them, in one pass over both.

    kl[r, t] = KL(q || p) = sum_v q[v] (log q[v] - log p[v]),   p = softmax(z), q = softmax(z_ref)
    dlogits[r, t] = [g_logp (onehot(y) - p) + g_kl (p - q)] dz/dx,   z = transform(logits[r, t])

What token-level losses (TDPO, arXiv 2404.11999) need of two models. Each tensor of logits is read
once forward and once backward; nothing of size V is kept, and the reference gets no gradient. A
class that both rule out (-inf) counts 0; one that only the policy rules out makes the KL infinite.
Rows whose target is `ignore_index` are neither read nor computed. Letters: `R` rows of a padded
batch (1 when packed), `T` positions, `V` vocabulary.
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
from .token_logps import TokenLogps, check_writable, token_logps


class TokenKL(NamedTuple):
    """Per-row results, each [R, T] and 0 where ignored; fp32 (fp64 for fp64 logits)."""

    policy: TokenLogps
    ref_logps: Tensor  # without gradient
    kl: Tensor  # KL(reference || policy), differentiable


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    transform: LogitTransform | None = None,
    stats: tuple[str, ...] = (),
    inplace: bool = False,
    backend: str | None = None,
) -> TokenKL:
    """Log-prob of the target under both models, and KL(reference || policy), of each scored row.

    `logits`, `ref_logits` [R, T, V] with unit stride in V, of dtypes of their own; `targets`
    [R, T] int64. With `inplace` the backward writes the gradient over `logits`, as `token_logps`
    does. A target outside [0, V) gives NaN. `stats` of the policy are had by a read of their own.
    Raises `ValueError` or `TypeError`.
    """
    transform = transform or LogitTransform()
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        checks.floating(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must have 3 dimensions [R, T, V], got {list(x.shape)}")
    checks.integer("targets", targets)
    checks.shape("ref_logits", ref_logits, tuple(logits.shape), "that of logits")
    checks.shape("targets", targets, tuple(logits.shape[:2]), "that of logits without V")
    for name, x in (("ref_logits", ref_logits), ("targets", targets)):
        checks.same_device(name, x, "logits", logits)
    wide = torch.float64 in (logits.dtype, ref_logits.dtype)
    dtype = torch.float64 if wide else logits.dtype
    name = backends.choose(backend, logits.device, dtype, "token_kl", logits.numel())
    write = inplace and logits.requires_grad and torch.is_grad_enabled()
    write = write and not torch.compiler.is_compiling()
    if write:
        check_writable(logits)
        _check_apart(logits, ref_logits)
    if name == "torch" and not write:
        result = reference.token_kl(logits, ref_logits, targets, ignore_index, transform)
    else:
        for which, x in (("logits", logits), ("ref_logits", ref_logits)):
            if x.shape[-1] > 1 and x.stride(-1) != 1:
                raise ValueError(f"{which} must have unit stride in V, got strides {x.stride()}")
        check_mode(logits, ref_logits)
        result = _op(
            logits,
            ref_logits.detach(),
            targets,
            ignore_index,
            transform.scale,
            transform.softcap,
            transform.inv_temperature,
            write,
            name,
        )
    logps, lse, ref_logps, _, kl = result
    table = {}
    if stats:
        table = token_logps(
            logits.detach(),
            targets,
            ignore_index=ignore_index,
            transform=transform,
            stats=stats,
            backend=name,
        ).stats
    return TokenKL(TokenLogps(logps, lse, table), ref_logps, kl)


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


@torch.library.custom_op("dpo_kernels::token_kl", mutates_args=())
def _token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    transform = LogitTransform(scale, softcap, inv_temperature)
    impl = backends.load(backend)
    return impl.token_kl(logits.detach(), ref_logits, targets, ignore_index, transform)


@_token_kl.register_fake
def _(logits, ref_logits, targets, ignore_index, scale, softcap, inv_t, inplace, backend):
    dtype = torch.promote_types(
        *(reference.accumulate_dtype(x.dtype) for x in (logits, ref_logits))
    )
    kinds = (dtype, torch.float64, dtype, torch.float64, dtype)
    return tuple(logits.new_empty(targets.shape, dtype=kind) for kind in kinds)


def _setup_context(ctx, inputs, output):
    logits, ref_logits, targets, ctx.ignore_index, *transform, ctx.inplace, ctx.backend = inputs
    ctx.transform = tuple(transform)
    _, lse, ref_logps, ref_lse, _ = output
    ctx.mark_non_differentiable(lse, ref_logps, ref_lse)
    ctx.save_for_backward(logits, ref_logits, targets, lse, ref_lse)


def _backward(ctx, grad_logps, _lse, _ref_logps, _ref_lse, grad_kl):
    # Reading saved_tensors compares versions: after an in-place backward a second one raises here.
    logits, ref_logits, targets, lse, ref_lse = ctx.saved_tensors
    arguments = (ref_logits, targets, lse, ref_lse, ctx.ignore_index, *ctx.transform, ctx.backend)
    if ctx.inplace:
        refuse_inplace()
        target = logits.detach()
        _backward_in_place(grad_logps, grad_kl, target, *arguments)
        return target, *[None] * 8
    return _backward_op(grad_logps, grad_kl, logits, *arguments), *[None] * 8


_token_kl.register_autograd(_backward, setup_context=_setup_context)
_op = Op(_token_kl, _setup_context, _backward)


@torch.library.custom_op("dpo_kernels::token_kl_backward", mutates_args=())
def _token_kl_backward(
    grad_logps: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    backend: str,
) -> Tensor:
    # Contiguous whatever the strides of the logits: an expanded view has a full-sized gradient.
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backends.load(backend).token_kl_backward(
        grad_logps,
        grad_kl,
        logits,
        ref_logits,
        targets,
        lse,
        ref_lse,
        ignore_index,
        LogitTransform(scale, softcap, inv_temperature),
        out,
    )
    return out


@_token_kl_backward.register_fake
def _(
    grad_logps,
    grad_kl,
    logits,
    ref_logits,
    targets,
    lse,
    ref_lse,
    ignore_index,
    scale,
    softcap,
    inv_t,
    backend,
):
    return logits.new_empty(logits.shape)


refuse_second(_token_kl_backward)
_backward_op = Op(_token_kl_backward)


@torch.library.custom_op("dpo_kernels::token_kl_backward_", mutates_args=("logits",))
def _token_kl_backward_(
    grad_logps: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    backend: str,
) -> None:
    backends.load(backend).token_kl_backward(
        grad_logps,
        grad_kl,
        logits,
        ref_logits,
        targets,
        lse,
        ref_lse,
        ignore_index,
        LogitTransform(scale, softcap, inv_temperature),
        logits,
    )


_backward_in_place = Op(_token_kl_backward_, writes=2)
