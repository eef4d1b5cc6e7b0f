"""How many rows and how large a tile the linear head works on at once.

What is allocated and what `dpo_kernels.memory` predicts come from the same `Plan`, so that they
are the same numbers. Letters: `N` scored rows, `C` rows of a chunk, `H` hidden size, `V`
vocabulary, `r` rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .products import WIDE, Products, ceil, low_rank_columns, products_of

DEFAULT = 0  # the budget of who gave none: it depends on device, shape and the largest pair
CPU_BUDGET, CPU_LARGEST = 256 << 20, 1 << 30
# A constant: the free memory would make rounding vary by run and by rank.
GPU_BUDGET = 2 << 30
# Each chunk reads and writes dweight once, 355 / C of the time of its three products (H100).
GPU_ROWS = 1024
GPU_SCRATCH = 64 << 20
TILE = 2048  # rows of the vocabulary widened at once; larger tiles leave the cache
# A BLAS chooses its kernel by the shape of the product: the last rows of a product whose number of
# rows is not a multiple of the kernel's may be summed in another order. Whole blocks of 16 are not
# (MKL, measured), so the same row has the same logits whatever chunk it comes in. `INVARIANT` is
# the one height of all products where that must not rest on a measurement.
BLOCK = 16
INVARIANT = 64


@dataclass(frozen=True)
class Plan:
    """Sizes that keep the op within its budget."""

    chunk: int  # rows of logits projected at once
    keep: int  # rows whose logits are kept from the forward to the backward
    tile: int  # rows of the vocabulary widened at once; V where nothing is
    pitch: int  # elements from a row of logits to the next
    block: int  # rows of a product are a multiple of it
    least: int = 1  # rows below which a chunk of pairs takes another (`chunks_of_pairs`)
    scratch: int = 0  # bytes of a product that cannot be added where it belongs

    @staticmethod
    def of(
        budget: int,
        rows: int,
        V: int,
        H: int,
        dtype: torch.dtype,
        *,
        gpu: bool = False,
        products: Products = WIDE,
        gradient: bool = True,
        low_rank: int = 0,
        up_dtype: torch.dtype = torch.float32,
        keep: bool = False,
        stash: int = 0,
        ref_H: int = 0,
        joint: bool = False,
        invariant: bool = False,
        largest: int = 0,
    ) -> Plan:
        """Within `budget` bytes for `rows` scored rows at most.

        `gradient`: the gradient of the logits is multiplied. `keep`: logits may be kept for the
        backward. `stash`: so many fp32 gradients of the hidden states live until the backward.
        `ref_H`: hidden size of a reference scored in the same pass, `joint` if its logits are
        needed beside the policy's. At least one block of rows is projected however small the
        budget. `DEFAULT` is `GPU_BUDGET`, and `GPU_ROWS` at least, on a GPU; elsewhere what the
        `largest` pair takes, from `CPU_BUDGET` to `CPU_LARGEST`. The stash comes on top of it.
        """
        default = budget == DEFAULT
        block = INVARIANT if invariant else BLOCK
        pitch = max(1, ceil(V, 64 if V > 64 else 8))
        widest = max(H, ref_H)
        bound = (GPU_BUDGET if gpu else CPU_BUDGET) if default else budget
        fixed = 0 if default else 4 * stash * rows * (H + low_rank)
        tile, scratch = V, 0
        if products is WIDE and dtype != torch.float32:
            # Columns too are summed as the width of the product has it: one width whatever the
            # budget where that must not show.
            room = TILE if invariant else max(BLOCK, bound // (32 * max(widest, 1)))
            tile = min(V, TILE, room)
            fixed += 4 * tile * (H + ref_H)
        elif products is not WIDE:
            if gradient and not (products.adds and dtype == torch.bfloat16):
                scratch = min(GPU_SCRATCH, max(bound // 16, 4 * BLOCK * widest), 4 * V * widest)
            fixed += scratch + 2 * V * low_rank_columns(low_rank, up_dtype, products)
        row = row_bytes(pitch, H, dtype, products, gradient, low_rank, ref_H, joint)
        if default and not gpu:
            bound = min(max(bound, fixed + ceil(largest, block) * row), CPU_LARGEST)
        total = max(0, bound - fixed) // row // block * block
        least = ceil(GPU_ROWS, block) if default and gpu else 1
        need = ceil(rows, block)
        kept = 0
        if keep:
            # All kept if a quarter is left to work in, else half and half: the more is kept the
            # less is projected again, but the larger the chunks the fewer passes over dweight.
            kept = min(need if need <= total * 3 // 4 else total // 2 // block * block, rows)
            if kept < min(least, rows):
                kept = 0
        chunk = max(block, min(max(total - ceil(kept, block), least), need))
        return Plan(chunk, kept, tile, pitch, block, least, scratch)


def row_bytes(
    pitch: int,
    H: int,
    dtype: torch.dtype,
    products: Products,
    gradient: bool,
    low_rank: int,
    ref_H: int,
    joint: bool,
) -> int:
    """Bytes a row of a chunk takes: its logits, the copy of their gradient that is multiplied, its
    hidden state as it is and as it is multiplied, its gradient."""
    gathered = dtype.itemsize * max(H, ref_H)
    copied = 0
    if products is not WIDE and gradient:
        # Beside an adapter the hidden state in fp32 as well.
        copied = dtype.itemsize * pitch + (4 * H if low_rank else 0)
    return 4 * pitch * (2 if joint else 1) + copied + 8 * (H + low_rank) + 4 * ref_H + gathered


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def plan_of(
    strategy: str,
    budget: int,
    rows: int,
    weight: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    invariant: bool,
    ref_H: int = 0,
    joint: bool = False,
    *,
    largest: int = 0,
    device: torch.device | None = None,
    columns: int | None = None,
) -> Plan:
    """The plan of a strategy; `rows`, or -rows, bounds the scored rows (`count_scored`).

    `largest`: rows of the largest pair, where pairs are streamed. `device`: the weight's if None.
    `columns`: of the largest shard where the weight is one of several, so that all plan alike.
    """
    (V, H), device = weight.shape, weight.device if device is None else device
    V = V if columns is None else columns
    # Sizes are symbols while a graph is traced.
    made = _plan if all(type(n) is int for n in (rows, V, H)) else Plan.of
    return made(
        budget,
        abs(rows),
        V,
        H,
        weight.dtype,
        gpu=on_gpu(device),
        products=products_of(device, weight.dtype),
        gradient=strategy != "score",
        low_rank=0 if down is None else down.shape[0],
        up_dtype=torch.float32 if up is None else up.dtype,
        keep=strategy == "recompute" and not joint,
        stash={"streaming": 1, "frozen": 1 + joint}.get(strategy, 0),
        ref_H=ref_H,
        joint=joint,
        invariant=invariant,
        largest=largest,
    )


_plan = functools.lru_cache(maxsize=256)(Plan.of)


def chunks_of_pairs(lengths: list[int], limit: int, least: int = 1) -> list[tuple[int, int]]:
    """First and last + 1 pair of each chunk of whole pairs, of `limit` rows at most.

    `lengths` [2B] scored rows of each sequence. A pair of more rows has a chunk to itself. Where
    `least` rows are asked for, a chunk of fewer takes one pair more all the same, and one of more
    does if that brings it nearer to the limit: whole pairs would leave up to half of it empty.
    """
    B = len(lengths) // 2
    chunks, first, rows = [], 0, 0
    for i in range(B):
        pair = lengths[i] + lengths[B + i]
        over = rows + pair - limit
        nearer = least > 1 and (rows < least or over < limit - rows)
        if i > first and over > 0 and not nearer:
            chunks.append((first, i))
            first, rows = i, 0
        rows += pair
    return [*chunks, (first, B)]
