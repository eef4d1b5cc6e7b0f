"""`scaled_rows` and `scaled_product`: the backward of the strategy `frozen` (`linear_logps.py`).

The forward left the gradient of each row's hidden state, for a log-prob of slope 1; the backward
scales the rows. Letters: `R` rows, `T` positions, `N` scored rows, `H` hidden size, `r` rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import List  # noqa: UP035  (torch 2.6 makes no schema of list[...])

import torch
from torch import Tensor

from .direct import Op
from .linear_head import rows_of, scored_rows


@torch.library.custom_op("dpo_kernels::scaled_rows", mutates_args=())
def scaled_rows(
    grads: List[Tensor],  # noqa: UP006  [R, T] each
    stashes: List[Tensor],  # noqa: UP006  [N, H] fp32 each
    targets: Tensor,  # [R, T]
    ignore_index: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """[R, T, H] of `dtype`: the sum of the stashed rows times their gradients, 0 where ignored."""
    H = stashes[0].shape[1]
    out = stashes[0].new_zeros((*targets.shape, H), dtype=dtype)
    flat = out.view(-1, H)
    for part, rows in _scaled(grads, stashes, targets, ignore_index, count):
        flat[part] = rows.to(dtype)
    return out


def _scaled(grads, stashes, targets, ignore_index, count) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and values of rows, some at a time: products of all at once would be stashes too."""
    index = scored_rows(targets, ignore_index, count)
    for first in range(0, index.shape[0], 1024):
        part = index[first : first + 1024]
        rows = stashes[0].new_zeros((part.shape[0], stashes[0].shape[1]))
        for grad, stash in zip(grads, stashes, strict=True):
            g = grad.reshape(-1)[part].unsqueeze(1)
            # A row of gradient 0 gives 0 however bad its logits.
            rows += torch.where(g == 0, 0.0, stash[first : first + part.shape[0]] * g)
        yield part, rows


scaled_rows_op = Op(scaled_rows)


@scaled_rows.register_fake
def _(grads, stashes, targets, ignore_index, count, dtype):
    return stashes[0].new_empty((*targets.shape, stashes[0].shape[1]), dtype=dtype)


@torch.library.custom_op("dpo_kernels::scaled_product", mutates_args=())
def scaled_product(
    grads: List[Tensor],  # noqa: UP006  [R, T] each
    stashes: List[Tensor],  # noqa: UP006  [N, r] fp32 each
    hidden: Tensor,  # [R, T, H]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    count: int,
) -> Tensor:
    """[r, H] fp32: the rows that `scaled_rows` gives, times those of hidden."""
    out = stashes[0].new_zeros((stashes[0].shape[1], hidden.shape[-1]))
    for part, rows in _scaled(grads, stashes, targets, ignore_index, count):
        out.addmm_(rows.T, rows_of(hidden, part).float())
    return out


scaled_product_op = Op(scaled_product)


@scaled_product.register_fake
def _(grads, stashes, hidden, targets, ignore_index, count):
    return stashes[0].new_empty((stashes[0].shape[1], hidden.shape[-1]))
