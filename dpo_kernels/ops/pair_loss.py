"""`pair_loss`: sum_k w_k phi_k(z_k) of each pair, and its derivatives, in fp64.

The op that knows the loss: it takes the terms of a row of `losses.TABLE` as data. The derivatives
with respect to u, v, beta and the offset are computed with the loss, in the same launch, so the
backward is one product. Second derivatives, where they are wanted, come from the specification in
plain torch: B numbers are no work. Letters: `B` pairs, `u` and `v` the chosen and rejected scores.
"""

from __future__ import annotations

from typing import List  # noqa: UP035  (torch 2.6 makes no schema of list[...])

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference
from ..backends.terms import flatten, unflatten
from ..losses import Term
from .derivatives import check_mode
from .direct import Op


def pair_loss(
    u: Tensor,
    v: Tensor,
    terms: tuple[Term, ...],
    *,
    beta: float | Tensor,
    offset: Tensor | None = None,
    backend: str,
) -> Tensor:
    """Loss of each pair [B] fp64 from scores `u`, `v` [B]; `beta` a number or [B], `offset` [B].

    Differentiable in u, v, and in beta and offset where they are tensors; by a backend that is
    chosen.
    """
    u, v = u.double(), v.double()
    # One beta for all pairs may be a tensor without dimensions; the kernels read [B].
    beta_tensor = (
        beta.double().expand_as(u) if isinstance(beta, Tensor) else torch.full_like(u, beta)
    )
    offset = offset.double() if offset is not None else None
    if backend == "torch":
        return reference.pair_loss(u, v, beta_tensor, offset, terms)
    check_mode(u, v, beta_tensor, offset)
    loss, _ = _op(
        u.contiguous(),
        v.contiguous(),
        beta_tensor.contiguous(),
        None if offset is None else offset.contiguous(),
        [t.phi for t in terms],
        flatten(terms),
        backend,
    )
    return loss


@torch.library.custom_op("dpo_kernels::pair_loss", mutates_args=())
def _pair_loss(
    u: Tensor,
    v: Tensor,
    beta: Tensor,
    offset: Tensor | None,
    phis: List[int],  # noqa: UP006
    numbers: List[float],  # noqa: UP006
    backend: str,
) -> tuple[Tensor, Tensor]:
    impl = backends.load(backend)
    return impl.pair_loss_forward(u, v, beta, offset, phis, numbers)


@_pair_loss.register_fake
def _(u, v, beta, offset, phis, numbers, backend):
    return u.new_empty(u.shape), u.new_empty((4, *u.shape))


def _setup_context(ctx, inputs, output):
    a, (_, slopes) = _op.named(inputs), output
    ctx.terms = unflatten(a.phis, a.numbers)
    ctx.mark_non_differentiable(slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a.u, a.v, a.beta, a.offset, slopes)


def _backward(ctx, grad, _):
    if grad is None:
        return _op.gradients()
    *inputs, slopes = ctx.saved_tensors  # [4, B]: d/du, d/dv, d/dbeta, d/doffset
    if torch.is_grad_enabled():  # create_graph=True: slopes that can be differentiated
        slopes = _slopes(inputs, ctx.terms)
    # A pair of weight 0 gives 0 whatever its slope, an infinite one included.
    d = grad * torch.where((grad == 0) & ~slopes.isfinite(), 0.0, slopes)
    offset = d[3] if inputs[3] is not None else None
    return _op.gradients(u=d[0], v=d[1], beta=d[2], offset=offset)


def _slopes(inputs: list[Tensor | None], terms: tuple[Term, ...]) -> Tensor:
    """[4, B] the derivatives of the specification, themselves differentiable."""
    # What wants no gradient would have no place in the graph.
    leaves = [
        x if x.requires_grad else x.detach().requires_grad_() for x in inputs if x is not None
    ]
    u, v, beta, *offset = leaves
    loss = reference.pair_loss(u, v, beta, offset[0] if offset else None, terms)
    found = torch.autograd.grad(loss.sum(), leaves, create_graph=True, allow_unused=True)
    rows = [torch.zeros_like(u) if d is None else d for d in found]
    return torch.stack(rows if offset else [*rows, torch.zeros_like(u)])


_pair_loss.register_autograd(_backward, setup_context=_setup_context)
_op = Op(_pair_loss, _setup_context, _backward)
