"""`sequence_sum`: per-token values summed over the scored tokens of each sequence, in fp64.

A sequence of thousands of tokens has a log-prob of size 1e3, where fp32 resolves 1e-4: the sums and
everything after them up to the loss stay in fp64. A padded batch has one sequence a row; a packed
one says with `cu_seqlens` where each begins. Letters: `R` rows, `T` positions, `S` sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference
from .derivatives import check_mode
from .direct import Op


def sequence_sum(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    ignore_index: int = -100,
    tail_weight: float = 1.0,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Sums [S] fp64 and scored counts [S] int64 of `values` [R, T], by a backend that is chosen.

    Positions whose target is `ignore_index` do not count. With `tail_weight` != 1 (LD-DPO's alpha,
    arXiv 2409.06411) the scored tokens of a sequence past the shorter one of its pair (sequences i
    and i + S/2) weigh `tail_weight`.
    """
    if backend == "torch" or values.dtype == torch.float64:
        return reference.sequence_sum(values, targets, cu_seqlens, ignore_index, tail_weight)
    check_mode(values)
    return _op(values.float(), targets, cu_seqlens, ignore_index, tail_weight, backend)


@torch.library.custom_op("dpo_kernels::sequence_sum", mutates_args=())
def _sequence_sum(
    values: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    impl = backends.load(backend)
    return impl.sequence_sum(values.detach(), targets, cu_seqlens, ignore_index, tail_weight)


@_sequence_sum.register_fake
def _(values, targets, cu_seqlens, ignore_index, tail_weight, backend):
    S = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums = values.new_empty((S,), dtype=torch.float64)
    return sums, values.new_empty((S,), dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    a, ctx.options = _op.named(inputs), _op.options(inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.targets, a.cu_seqlens)


def _backward(ctx, grad, _):
    if grad is None:
        return _op.gradients()
    a = ctx.options
    d = backward_op(grad, *ctx.saved_tensors, a.ignore_index, a.tail_weight, a.backend)
    return _op.gradients(values=d)


_sequence_sum.register_autograd(_backward, setup_context=_setup_context)
_op = Op(_sequence_sum, _setup_context, _backward)


@torch.library.custom_op("dpo_kernels::sequence_sum_backward", mutates_args=())
def _sequence_sum_backward(
    grad: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    tail_weight: float,
    backend: str,
) -> Tensor:
    impl = backends.load(backend)
    return impl.sequence_sum_backward(
        grad, targets, cu_seqlens, ignore_index, tail_weight, torch.float32
    )


@_sequence_sum_backward.register_fake
def _(grad, targets, cu_seqlens, ignore_index, tail_weight, backend):
    return grad.new_empty(targets.shape, dtype=torch.float32)


def _setup_second(ctx, inputs, output):
    _, targets, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(targets, cu_seqlens)


def _second(ctx, grad):
    """The sums are linear: the backward's own backward is the forward again."""
    d = _op(grad, *ctx.saved_tensors, *ctx.options)[0]
    return backward_op.gradients(grad=d)


_sequence_sum_backward.register_autograd(_second, setup_context=_setup_second)
backward_op = Op(_sequence_sum_backward, _setup_second, _second)
