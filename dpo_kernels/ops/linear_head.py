"""The matrix products of an lm_head over chunks of rows: what every strategy is made of.

    logits = h @ weight.T + low @ up.T + bias,    low = h @ down.T
    dh = dz @ weight + dlow @ down,    dlow = dz @ up,    dweight += dz.T @ h

`low @ up.T` is the low-rank part of a LoRA head (`down = scaling * A`, `up = B`): the sum
`weight + scaling * B @ A` is never formed, and dh is rounded once, with both its parts. Logits and
accumulators are fp32 whatever the input. Narrow weights are widened a tile of the vocabulary at a
time, which is exact; where the device has products that write fp32 (`products.py`) narrow operands
go there as they are, the gradient of the logits is rounded to their dtype once, and what is fp32 in
a low-rank part is split, not rounded.

How many rows a memory budget allows: `plan.py`. Letters: `N` scored rows, `C` rows of a chunk, `H`
hidden size, `V` vocabulary, `r` rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import INVARIANT, Plan
from .products import (
    Slopes,
    ceil,
    low_rank_operand,
    multiply,
    products_of,
    scaled_pieces,
    side_by_side,
    tell,
)


def count_scored(targets: Tensor, ignore_index: int) -> int:
    """Number of scored rows; while being traced minus a bound, that of all rows.

    On a CUDA device this is where the host waits.
    """
    if torch.compiler.is_compiling() or type(targets) is not Tensor:
        return -targets.numel()
    return int((targets != ignore_index).sum())


def scored_rows(targets: Tensor, ignore_index: int, count: int) -> Tensor:
    """Flat indices [N] of the scored rows: `count`, or -count at most (`count_scored`)."""
    if count == targets.numel():
        return torch.arange(count, device=targets.device)
    flat = targets.reshape(-1)
    if targets.device.type != "cpu" and count >= 0:  # no wait for the device
        return (flat == ignore_index).to(torch.uint8).argsort(stable=True)[:count]
    return (flat != ignore_index).nonzero().view(-1)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Rows [n, H] of x [R, T, H] by flat index, whatever the strides of x."""
    if x.is_contiguous():
        return x.view(-1, x.shape[2]).index_select(0, index)
    T = x.shape[1]
    return x[index // T, index % T] if T else x.new_empty((0, x.shape[2]))


def first(x: Tensor, n: int) -> Tensor:
    """The first n rows of x: a view only where x has more."""
    return x if x.shape[0] == n else x[:n]


def placed(rows: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    """Rows [n, H] at their places in zeros of `shape` [..., H]."""
    out = rows.new_zeros(shape)
    out.view(-1, shape[-1]).index_copy_(0, index, rows)
    return out


def buffer(plan: Plan, weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[rows, V], unwritten, rows `pitch` apart."""
    V = weight.shape[0]
    found = torch.empty(rows, plan.pitch, device=weight.device, dtype=dtype)
    return found if plan.pitch == V else found[:, :V]


class LinearInputs(NamedTuple):
    """What logits are made of: h @ weight.T + (h @ down.T) @ up.T + bias."""

    hidden: Tensor  # [R, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    down: Tensor | None = None  # [r, H] fp32
    up: Tensor | None = None  # [V, r]

    def detached(self) -> LinearInputs:
        return LinearInputs(*(None if x is None else x.detach() for x in self))  # type: ignore[arg-type]


_ALL = slice(None)  # of the vocabulary


class Head:
    """One lm_head: weight [V, H], bias [V], down [r, H], up [V, r], and what its products need."""

    def __init__(
        self,
        plan: Plan,
        weight: Tensor,
        bias: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
    ) -> None:
        self.plan, self.weight, self.bias, self.up = plan, weight, bias, up
        self.down = None if down is None else down.float()
        self.V, self.H = weight.shape
        products = products_of(weight.device, weight.dtype)
        tell(weight, products)
        self.narrow = products.narrow
        self.dtype = weight.dtype if self.narrow else torch.float32
        self._rows = 0
        self._tile: Tensor | None = None
        self._slopes: Tensor | None = None
        self._up: Tensor | None = None
        self._down: tuple[list[Tensor], Tensor | None] | None = None

    def logits_buffer(self, rows: int) -> Tensor:
        """[rows (whole blocks), V] fp32, unwritten, rows `pitch` apart."""
        self._rows = max(self._rows, ceil(rows, self.plan.block))
        return self._buffer(ceil(rows, self.plan.block), torch.float32)

    def _buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        return buffer(self.plan, self.weight, rows, dtype)

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of hidden states as the products take them: whole blocks."""
        n = index.shape[0]
        whole = ceil(n, self.plan.block)
        found = rows_of(x, index).to(self.dtype)
        return found if whole == n else torch.constant_pad_nd(found, (0, 0, 0, whole - n))

    def low(self, h: Tensor) -> Tensor | None:
        """h @ down.T in fp32 [C, r] of rows h [C, H]; small beside anything of the vocabulary."""
        if self.down is None:
            return None
        out = torch.empty((h.shape[0], self.down.shape[0]), device=h.device, dtype=torch.float32)
        step = self._height(h.shape[0])
        if self.narrow and self._down is None:
            self._down = scaled_pieces(self.down.T, self.dtype)
        for i in range(0, h.shape[0], step):
            rows = out[i : i + step]
            if self._down is not None:
                rows.copy_(_summed(h[i : i + step], *self._down))
            else:
                torch.mm(h[i : i + step].float(), self.down.T, out=rows)
        return out

    def _height(self, rows: int) -> int:
        return INVARIANT if self.plan.block == INVARIANT else max(rows, 1)

    def project(self, h: Tensor, low: Tensor | None, z: Tensor) -> Tensor:
        """Logits of rows h [C, H], low [C, r] into z [C, V]; C whole blocks."""
        C = h.shape[0]
        step = self._height(C)
        for part, w in self._tiles():
            if step >= C and part is _ALL:
                multiply(h, w.T, z)
                continue
            for i in range(0, C, step):
                multiply(h[i : i + step], w.T, z[i : i + step, part])
        if low is not None:
            low, up = self._low_rank(low)
            for i in range(0, C, step):
                multiply(
                    low[i : i + step], up.T, z[i : i + step], add=True, scratch=self.plan.scratch
                )
        if self.bias is not None:
            z += self.bias
        return z

    def _low_rank(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `low` and `up` whose product is exact to fp32."""
        assert self.up is not None
        if not self.narrow:
            return low.float(), self.up.float()
        if self._up is None:
            self._up = low_rank_operand(self.up, self.up.dtype, up=True)
        return low_rank_operand(low, self.up.dtype, up=False), self._up

    def gradient(self, z: Tensor, impl: ModuleType) -> Tensor:
        """Where backend `impl` writes the gradient of logits z [n, V]: over them, or rounded."""
        direct = self.dtype == torch.bfloat16 and impl.ROUNDS
        return self._narrow(z) if direct else z

    def _narrow(self, z: Tensor) -> Tensor:
        n = z.shape[0]
        if self._slopes is None or self._slopes.shape[0] < n:
            self._slopes = self._buffer(max(self._rows, n), self.dtype)
        return self._slopes[:n]

    def operand(self, dz: Tensor) -> Slopes:
        """The gradient of logits dz [n, V] as the products below take it: rounded once, or not."""
        return Slopes.of(dz, dz if dz.dtype == self.dtype else self._narrow(dz))

    def d_hidden(self, dz: Slopes, d_low: Tensor | None) -> Tensor:
        """dz @ weight + d_low @ down, fp32 [n, H]."""
        n = dz.rows.shape[0]
        out = torch.empty((n, self.H), device=self.weight.device, dtype=torch.float32)
        for part, w in self._tiles():
            rows = dz.rows if part is _ALL else dz.rows[:, part]
            multiply(rows, w, out, add=bool(part.start))
        out = dz.finish(out) if self.V else out.zero_()
        if d_low is not None:
            assert self.down is not None
            out.addmm_(d_low, self.down)
        return out

    def d_low(self, dz: Slopes) -> Tensor | None:
        """dz @ up, fp32 [n, r]."""
        if self.up is None:
            return None
        if not self.narrow:
            n, r = dz.rows.shape[0], self.up.shape[1]
            return multiply(
                dz.rows, self.up.float(), self.up.new_empty((n, r), dtype=dz.rows.dtype)
            )
        parts, unit = scaled_pieces(self.up, self.dtype)
        return dz.finish(_summed(dz.rows, parts, unit))

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as the products take it: whole, or widened a tile at a time."""
        if self.weight.dtype == self.dtype:
            yield _ALL, self.weight
            return
        if self._tile is None:
            self._tile = self.weight.new_empty((self.plan.tile, self.H), dtype=self.dtype)
        for start in range(0, self.V, max(self.plan.tile, 1)):
            part = slice(start, min(start + self.plan.tile, self.V))
            tile = self._tile[: part.stop - part.start]
            tile.copy_(self.weight[part])
            yield part, tile


def _summed(a: Tensor, parts: list[Tensor], unit: Tensor | None) -> Tensor:
    """a @ (sum of parts [k, r]), times unit: one product, its columns added up; fp32."""
    wide = torch.empty((a.shape[0], ceil(parts[0].shape[1] * len(parts), 8)), device=a.device)
    multiply(a, side_by_side(parts), wide)
    r = parts[0].shape[1]
    out = sum((wide[:, i * r : (i + 1) * r] for i in range(1, len(parts))), wide[:, :r].clone())
    return out if unit is None else out.mul_(unit)


class HeadGradient:
    """fp32 gradients of a head's parameters, one addition a chunk in the order of the chunks."""

    def __init__(self, head: Head, weight: bool, bias: bool, down: bool, up: bool) -> None:
        device, V = head.weight.device, head.V
        self.weight = torch.empty(V, head.H, device=device, dtype=torch.float32) if weight else None
        self.bias = torch.zeros(V, device=device) if bias else None
        self.down = self.up = None
        if down:
            assert head.down is not None
            self.down = torch.zeros(head.down.shape, device=device)
        if up:
            assert head.up is not None
            self.up = torch.empty(V, head.up.shape[1], device=device, dtype=torch.float32)
        self._first, self._scratch = True, head.plan.scratch

    def add(self, dz: Slopes, d_low: Tensor | None, h: Tensor, low: Tensor | None) -> None:
        """The share of rows h [n, H], low [n, r], whose gradients are dz [n, V] (of the logits) and
        d_low [n, r]."""
        if self.weight is not None:
            (rows,), unit = dz.meet(h)
            multiply(
                dz.rows.T, rows, self.weight, add=not self._first, unit=unit, scratch=self._scratch
            )
        if self.up is not None:
            assert low is not None
            if dz.rows.dtype == torch.float32:
                multiply(dz.rows.T, low, self.up, add=not self._first)
            else:
                share = _summed(dz.rows.T, *dz.meet(low, 2))
                self.up.copy_(share) if self._first else self.up.add_(share)
        if self.down is not None:
            assert d_low is not None
            self.down.addmm_(d_low.T, h.float())
        if self.bias is not None:
            self.bias += dz.wide.sum(0, dtype=torch.float32)
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
        self._hidden = inputs.hidden.new_zeros(inputs.hidden.shape) if wanted[0] else None
        self._total = HeadGradient(head, *wanted[1:])

    def add(self, d: Tensor, h: Tensor, low: Tensor | None, index: Tensor) -> None:
        """The share of the rows at `index`: h [n, H], low [n, r], gradient of logits d [n, V].

        `d` as the products take it, or in fp32.
        """
        dz = self.head.operand(d)
        d_low = self.head.d_low(dz)
        if self._hidden is not None:
            rows = self.head.d_hidden(dz, d_low)
            self._hidden.view(-1, rows.shape[1])[index] = rows.to(self._hidden.dtype)
        self._total.add(dz, d_low, h, low)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order of `LinearInputs`; empty where not wanted."""
        total, x = self._total.finish(), self.inputs
        grads = (self._hidden, total.weight, total.bias, total.down, total.up)
        return tuple(  # type: ignore[return-value]
            x.hidden.new_empty(0) if d is None or like is None else d.to(like.dtype)
            for d, like in zip(grads, x, strict=True)
        )
