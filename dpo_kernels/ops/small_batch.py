"""`small_batch`: from logits to the loss of a batch of pairs in one launch, for small batches.

The composition token_logps -> sequence_sum -> pair_loss costs several launches, which is what a
batch of few rows waits for. Here the kernel that scores the last row of a pair also sums its two
sequences, evaluates the loss and its slopes, and the last pair finishes the mean; the backward is
one launch too: a row's gradient is upstream * slope of its sequence / divisor. It holds for losses
of the log-ratios themselves (no length normalisation, no coupling of pairs, scalar reduction);
`dpo.py` decides. Letters: `R` rows of a padded batch (1 when packed), `T` positions, `B` pairs.
"""

from __future__ import annotations

from typing import List  # noqa: UP035  (torch 2.6 makes no schema of list[...])

import torch
from torch import Tensor

from .. import backends
from ..losses import Term
from ..transform import LogitTransform
from .derivatives import check_mode, refuse_inplace, refuse_second
from .pair_loss import flatten
from .token_logps import check_writable

COLUMNS = ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "margins",
           "accuracy")  # fmt: skip


def small_batch(
    logits: Tensor,  # [R, T, V]
    targets: Tensor,  # [R, T]
    cu_seqlens: Tensor | None,  # [2B + 1] when packed
    reference: Tensor | None,  # [2B] log-probs, fp64 or fp32; None: reference-free
    terms: tuple[Term, ...],
    *,
    beta: Tensor | float,  # [B] or a number
    offset: Tensor | None,  # [B]
    divisor: float,
    ignore_index: int,
    transform: LogitTransform,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The sum of the pairs' losses over `divisor` (scalar fp32), and `COLUMNS` [6, B] fp32.

    Arguments are checked by the caller; only the loss is differentiable, in `logits`.
    """
    write = inplace and logits.requires_grad and torch.is_grad_enabled()
    if write:
        check_writable(logits)
    check_mode(logits, offset, beta if isinstance(beta, Tensor) else None)
    per_pair = isinstance(beta, Tensor) and beta.dim() > 0
    loss, table, _, _ = _small_batch(
        logits,
        targets,
        cu_seqlens,
        reference,
        beta.double().contiguous() if isinstance(beta, Tensor) and per_pair else None,
        0.0 if per_pair else float(beta),
        None if offset is None else offset.double().contiguous(),
        [t.phi for t in terms],
        flatten(terms),
        divisor,
        ignore_index,
        transform.scale,
        transform.softcap,
        transform.inv_temperature,
        write,
        backend,
    )
    return loss, table


@torch.library.custom_op("dpo_kernels::small_batch", mutates_args=())
def _small_batch(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    reference: Tensor | None,
    beta: Tensor | None,
    beta_value: float,
    offset: Tensor | None,
    phis: List[int],  # noqa: UP006
    numbers: List[float],  # noqa: UP006
    divisor: float,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backends.load(backend).small_batch(
        logits.detach(), targets, cu_seqlens, reference, beta_value if beta is None else beta,
        offset, ignore_index, LogitTransform(scale, softcap, inv_temperature), phis, numbers,
        divisor,
    )  # fmt: skip


@_small_batch.register_fake
def _(logits, targets, cu_seqlens, *_):
    B = (targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1) // 2
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((len(COLUMNS), B), dtype=torch.float32),
        logits.new_empty((4, B), dtype=torch.float64),
        logits.new_empty(targets.shape, dtype=torch.float64),
    )


def _setup_context(ctx, inputs, output):
    logits, targets, cu_seqlens, *_, divisor, ignore_index, scale, softcap, inv_t, inplace, name = (
        inputs
    )
    ctx.options = (divisor, ignore_index, scale, softcap, inv_t, name)
    ctx.inplace = inplace
    _, table, slopes, lse = output
    ctx.mark_non_differentiable(table, slopes, lse)
    ctx.save_for_backward(logits, targets, cu_seqlens, lse, slopes)


def _backward(ctx, grad, *_):
    logits, targets, cu_seqlens, lse, slopes = ctx.saved_tensors
    arguments = (targets, cu_seqlens, lse, slopes, *ctx.options)
    if ctx.inplace:
        refuse_inplace()
        target = logits.detach()
        _small_batch_backward_(grad, target, *arguments)
        return target, *[None] * 15
    return _small_batch_backward(grad, logits, *arguments), *[None] * 15


_small_batch.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("dpo_kernels::small_batch_backward", mutates_args=())
def _small_batch_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    slopes: Tensor,
    divisor: float,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    backend: str,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _small_batch_backward_into(
        out, grad, logits, targets, cu_seqlens, lse, slopes, divisor, ignore_index,
        (scale, softcap, inv_temperature), backend,
    )  # fmt: skip
    return out


@_small_batch_backward.register_fake
def _(grad, logits, *_):
    return logits.new_empty(logits.shape)


refuse_second(_small_batch_backward)


@torch.library.custom_op("dpo_kernels::small_batch_backward_", mutates_args=("logits",))
def _small_batch_backward_(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    lse: Tensor,
    slopes: Tensor,
    divisor: float,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    backend: str,
) -> None:
    _small_batch_backward_into(
        logits, grad, logits, targets, cu_seqlens, lse, slopes, divisor, ignore_index,
        (scale, softcap, inv_temperature), backend,
    )  # fmt: skip


def _small_batch_backward_into(
    out, grad, logits, targets, cu_seqlens, lse, slopes, divisor, ignore_index, transform, backend
) -> None:
    backends.load(backend).small_batch_backward(
        grad, logits, targets, cu_seqlens, lse, slopes, ignore_index, LogitTransform(*transform),
        divisor, out,
    )  # fmt: skip
