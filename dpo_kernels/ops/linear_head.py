"""The matrix products of an lm_head over chunks of rows: what every strategy is made of.

    logits = h @ weight.T + low @ up.T + bias,    dh = dz @ weight,    dweight += dz.T @ h

`low @ up.T` is the low-rank part of a LoRA head (`low = scaling * h @ A.T`, `up = B`): the sum
`weight + scaling * B @ A` is never formed. Logits and accumulators are fp32 whatever the input.
Narrow weights are widened a tile of the vocabulary at a time, which is exact; on a CUDA device
with torch >= 2.8 bf16 operands go to the product as they are, which writes fp32, and the gradient
of the logits is rounded to bf16 once (not yet run on a GPU).

How many rows and how large a tile a memory budget allows is decided here too (`Plan`), so that
what is allocated and what `dpo_kernels.memory` predicts are the same numbers. Letters: `N` scored
rows, `C` rows of a chunk, `H` hidden size, `V` vocabulary, `r` rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_BUDGET = 256 << 20
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

    @staticmethod
    def of(
        budget: int,
        rows: int,
        V: int,
        H: int,
        dtype: torch.dtype,
        *,
        widen: bool = True,
        low_rank: int = 0,
        keep: bool = False,
        stash: int = 0,
        ref_H: int = 0,
        joint: bool = False,
        invariant: bool = False,
    ) -> Plan:
        """Within `budget` bytes for `rows` scored rows at most.

        `keep`: logits may be kept for the backward. `stash`: so many fp32 gradients of the hidden
        states live until the backward. `ref_H`: hidden size of a reference scored in the same pass,
        `joint` if its logits are needed beside the policy's. At least one block of rows is
        projected however small the budget.
        """
        block = INVARIANT if invariant else BLOCK
        pitch = max(1, ceil(V, 64) if V > 64 else V)
        widest = max(H, ref_H)
        tile = V
        fixed = 4 * stash * rows * (H + low_rank)
        if widen and dtype != torch.float32:
            tile = min(V, TILE, max(BLOCK, budget // (32 * max(widest, 1))))
            fixed += 4 * tile * (H + ref_H)
        row = row_bytes(pitch, H, dtype, low_rank, ref_H, joint)
        total = max(0, budget - fixed) // row // block * block
        need = ceil(rows, block)
        kept = 0
        if keep:
            # All kept if a quarter is left to work in, else half and half: the more is kept the
            # less is projected again, but the larger the chunks the fewer passes over dweight.
            kept = min(need if need <= total * 3 // 4 else total // 2 // block * block, rows)
        chunk = max(block, min(total - ceil(kept, block), need))
        return Plan(chunk, kept, tile, pitch, block)


def row_bytes(
    pitch: int, H: int, dtype: torch.dtype, low_rank: int, ref_H: int, joint: bool
) -> int:
    """Bytes a row of a chunk takes: its logits, its hidden state in fp32, its gradient."""
    gathered = dtype.itemsize * max(H, ref_H)
    return 4 * pitch * (2 if joint else 1) + 8 * (H + low_rank) + 4 * ref_H + gathered


def ceil(n: int, block: int) -> int:
    return (n + block - 1) // block * block


def narrow_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bf16 operands go to a product that writes fp32.

    fp16 is widened instead: the gradient of a logit is often below its smallest number.
    """
    return device.type == "cuda" and dtype == torch.bfloat16 and _version() >= (2, 8)


@functools.cache
def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def count_scored(targets: Tensor, ignore_index: int) -> int:
    """Number of scored rows, or all rows while being traced: a bound that the plans are made for.

    On a CUDA device this is where the host waits.
    """
    if torch.compiler.is_compiling() or type(targets) is not Tensor:
        return targets.numel()
    return int((targets != ignore_index).sum())


def scored_rows(targets: Tensor, ignore_index: int, count: int) -> Tensor:
    """Flat indices [N] of the scored rows, of which there are `count` at most."""
    ignored = targets.reshape(-1) == ignore_index
    if targets.device.type != "cpu" and count < targets.numel():
        # The count is exact (`count_scored`): no second wait for the device.
        return ignored.to(torch.uint8).argsort(stable=True)[:count]
    return (~ignored).nonzero().squeeze(1)


def chunks_of_pairs(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """First and last + 1 pair of each chunk of whole pairs, of `limit` rows at most.

    `lengths` [2B] scored rows of each sequence. A pair of more rows has a chunk to itself.
    """
    B = len(lengths) // 2
    chunks, first, rows = [], 0, 0
    for i in range(B):
        pair = lengths[i] + lengths[B + i]
        if i > first and rows + pair > limit:
            chunks.append((first, i))
            first, rows = i, 0
        rows += pair
    return [*chunks, (first, B)]


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows [n, H] of x [R, T, H] by flat index, whatever the strides of x."""
    T = x.shape[1]
    return x[index // T, index % T] if T else x.new_empty((0, x.shape[2]))


class LinearInputs(NamedTuple):
    """What logits are made of: h @ weight.T + low @ up.T + bias."""

    hidden: Tensor  # [R, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    low: Tensor | None = None  # [R, T, r]
    up: Tensor | None = None  # [V, r]

    def detached(self) -> LinearInputs:
        return LinearInputs(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]


class Head:
    """One lm_head: weight [V, H], bias [V], up [V, r], and the buffers its products go through."""

    def __init__(
        self, plan: Plan, weight: Tensor, bias: Tensor | None = None, up: Tensor | None = None
    ) -> None:
        self.plan, self.weight, self.bias, self.up = plan, weight, bias, up
        self.V, self.H = weight.shape
        self.narrow = narrow_products(weight.device, weight.dtype)
        self.dtype = torch.bfloat16 if self.narrow else torch.float32
        self._tile: Tensor | None = None

    def logits_buffer(self, rows: int) -> Tensor:
        """[rows (whole blocks), V] fp32, unwritten, rows `pitch` apart."""
        whole = ceil(rows, self.plan.block)
        buffer = torch.empty(whole, self.plan.pitch, device=self.weight.device, dtype=torch.float32)
        return buffer[:, : self.V]

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of hidden states (or of `low`) as the products take them: whole blocks."""
        n = index.shape[0]
        taken = x.new_zeros((ceil(n, self.plan.block), x.shape[-1]), dtype=self.dtype)
        taken[:n] = rows_of(x, index)
        return taken

    def project(self, h: Tensor, low: Tensor | None, z: Tensor) -> Tensor:
        """Logits of rows h [C, H], low [C, r] into z [C, V]; C whole blocks."""
        C = h.shape[0]
        step = INVARIANT if self.plan.block == INVARIANT else max(C, 1)
        for part, w in self._tiles():
            for i in range(0, C, step):
                multiply(h[i : i + step], w.T, z[i : i + step, part])
        if low is not None:
            assert self.up is not None
            up = self.up.to(self.dtype)
            for i in range(0, C, step):
                multiply(low[i : i + step], up.T, z[i : i + step], add=True)
        if self.bias is not None:
            z += self.bias
        return z

    def operand(self, dz: Tensor) -> Tensor:
        """The gradient of logits dz [n, V] as the products below take it: rounded once, or not."""
        return dz.to(self.dtype)

    def d_hidden(self, dz: Tensor) -> Tensor:
        """dz @ weight, fp32 [n, H]."""
        out = dz.new_empty((dz.shape[0], self.H), dtype=torch.float32)
        for part, w in self._tiles():
            multiply(dz[:, part], w, out, add=part.start > 0)
        return out if self.V else out.zero_()

    def d_low(self, dz: Tensor) -> Tensor:
        """dz @ up, fp32 [n, r]."""
        assert self.up is not None
        out = dz.new_empty((dz.shape[0], self.up.shape[1]), dtype=torch.float32)
        return multiply(dz, self.up.to(self.dtype), out)

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as the products take it: whole, or widened a tile at a time."""
        if self.weight.dtype == self.dtype:
            yield slice(0, self.V), self.weight
            return
        if self._tile is None:
            self._tile = self.weight.new_empty((self.plan.tile, self.H), dtype=self.dtype)
        for start in range(0, self.V, max(self.plan.tile, 1)):
            part = slice(start, min(start + self.plan.tile, self.V))
            tile = self._tile[: part.stop - part.start]
            tile.copy_(self.weight[part])
            yield part, tile


class HeadGradient:
    """fp32 gradients of a head's parameters, one addition a chunk in the order of the chunks."""

    def __init__(self, head: Head, weight: bool, bias: bool, up: bool) -> None:
        device, V = head.weight.device, head.V
        self.weight = torch.empty(V, head.H, device=device, dtype=torch.float32) if weight else None
        self.bias = torch.zeros(V, device=device) if bias else None
        self.up = None
        if up:
            assert head.up is not None
            self.up = torch.empty(V, head.up.shape[1], device=device, dtype=torch.float32)
        self._first = True

    def add(self, dz: Tensor, h: Tensor, low: Tensor | None) -> None:
        """The share of rows h [n, H], low [n, r] whose logits have the gradient dz [n, V]."""
        for total, rows in ((self.weight, h), (self.up, low)):
            if total is not None:
                assert rows is not None
                multiply(dz.T, rows, total, add=not self._first)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=torch.float32)
        self._first = False

    def finish(self) -> HeadGradient:
        """Zeros where there was no row at all."""
        if self._first:
            for total in (self.weight, self.up):
                if total is not None:
                    total.zero_()
        return self


class InputGradients:
    """Gradients of a head's inputs in their own dtypes, a chunk of rows at a time."""

    def __init__(self, head: Head, inputs: LinearInputs, wanted: list[bool]) -> None:
        self.head, self.inputs = head, inputs
        want_hidden, want_weight, want_bias, want_low, want_up = wanted
        self._hidden = inputs.hidden.new_zeros(inputs.hidden.shape) if want_hidden else None
        self._low = None
        if want_low:
            assert inputs.low is not None
            self._low = torch.zeros_like(inputs.low, memory_format=torch.contiguous_format)
        self._total = HeadGradient(head, want_weight, want_bias, want_up)

    def add(self, d: Tensor, h: Tensor, low: Tensor | None, index: Tensor) -> None:
        """The share of the rows at `index`: h [n, H], low [n, r], gradient of logits d [n, V]."""
        dz = self.head.operand(d)
        for out, product in ((self._hidden, self.head.d_hidden), (self._low, self.head.d_low)):
            if out is not None:
                out.view(-1, out.shape[-1])[index] = product(dz).to(out.dtype)
        self._total.add(dz, h, low)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of `LinearInputs`; empty where not wanted."""
        total, x = self._total.finish(), self.inputs
        grads = (self._hidden, total.weight, total.bias, self._low, total.up)
        return tuple(  # type: ignore[return-value]
            x.hidden.new_empty(0) if d is None or like is None else d.to(like.dtype)
            for d, like in zip(grads, x, strict=True)
        )


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b; `out` is fp32 whatever the operands."""
    if a.dtype != out.dtype:
        if add:
            return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
        return torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
    if add:
        return out.addmm_(a, b)
    return torch.mm(a, b, out=out)
