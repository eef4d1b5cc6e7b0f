"""Products of narrow matrices that are summed and written in fp32.

A CUDA device multiplies bf16 and fp16 at more than ten times its speed in fp32, and cuBLAS sums
and writes in fp32 all the same; a CPU with AVX512-BF16 multiplies bf16 at three to four times its
speed in fp32, by products of our own (`csrc/cpu/products.cpp`), since torch's write bf16. What that
takes of torch and of a device is found out here, and what operands it takes is made here: rows of
fp16 scaled by powers of two, since the gradient of a logit is often below its smallest number, and
fp32 values as sums of narrow ones. Elsewhere the head widens its weight, which is exact
(`linear_head.py`).
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import backends

logger = logging.getLogger("dpo_kernels.products")

NARROW = (torch.bfloat16, torch.float16)
VECTOR = 8  # elements: 16 bytes of a narrow dtype
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def ceil(n: int, block: int) -> int:
    return (n + block - 1) // block * block


@dataclass(frozen=True)
class Products:
    """What a device does with narrow operands: nothing, `mm` into fp32, `addmm` into fp32."""

    narrow: bool
    adds: bool


WIDE, MM, ADDMM = Products(False, False), Products(True, False), Products(True, True)


_found: dict[tuple[int, torch.dtype], Products] = {}


def products_of(device: torch.device, dtype: torch.dtype) -> Products:
    """What `device` does with operands of `dtype`: one of `WIDE`, `MM`, `ADDMM`."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return _on_cpu()
    if device.type != "cuda" or dtype not in NARROW:
        return WIDE
    expected = _by_version(_version(), torch.version.hip is not None)
    if expected is WIDE or not torch.cuda.is_available():
        return expected
    index = torch.cuda.current_device() if device.index is None else device.index
    if (index, dtype) not in _found:
        if torch.cuda.is_current_stream_capturing():  # no place to find out
            return expected
        _found[index, dtype] = _probe(index, dtype, expected)
    return _found[index, dtype]


@functools.cache
def _on_cpu() -> Products:
    has = backends.usable("cpu") and backends.load("cpu").has_bf16_products()
    return ADDMM if has else WIDE


def _by_version(version: tuple[int, int], hip: bool) -> Products:
    """torch 2.8 has both products; its `addmm`, and that of 2.9, wants the sum in the operands'
    dtype. ROCm refuses to write fp32."""
    if hip or version < (2, 8):
        return WIDE
    return MM if version < (2, 10) else ADDMM


@functools.cache
def _version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _probe(index: int, dtype: torch.dtype, expected: Products) -> Products:
    """What of the `expected` the device does, tried on products of ones."""
    # Whoever asks may be tracing with fake tensors: the trial is real.
    with _disable_current_modes(), torch.no_grad():
        a = torch.ones(16, 16, dtype=dtype, device=f"cuda:{index}")
        out = torch.zeros(16, 16, device=a.device)
        try:
            _mm(a, a, out)
        except (RuntimeError, TypeError) as error:
            logger.debug("%s has no %s product that writes fp32: %s", a.device, dtype, error)
            return WIDE
        if expected.adds:
            try:
                _addmm(a, a, out)
                return ADDMM
            except (RuntimeError, TypeError) as error:
                logger.debug("%s adds no %s product to fp32: %s", a.device, dtype, error)
        return MM


def tell(weight: Tensor, products: Products) -> None:
    """In the debug log where products are ten times slower than the device's own."""
    if products is WIDE and weight.device.type == "cuda" and weight.dtype in NARROW:
        logger.debug(
            "slow: %s operands are widened to fp32 (torch %s%s has no product of them that writes "
            "fp32)",
            weight.dtype,
            torch.__version__,
            " on ROCm" if torch.version.hip else "",
        )


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    add: bool = False,
    unit: Tensor | None = None,
    scratch: int = 0,
) -> Tensor:
    """out = a @ b, or out += a @ b, `unit` (a scalar on the device) times; `out` is fp32.

    Narrow operands that cannot be added in place, or have a unit, go through `scratch` bytes.
    """
    if _wants_whole_vectors(out) and (parts := whole_vectors(a, b, out)):
        for a_, b_, out_, more in parts:
            if more and unit is None and not products_of(out.device, a.dtype).adds:
                # A few summands: wide at once.
                out_.addmm_(a_.float(), b_.float())
            else:
                multiply(a_, b_, out_, add=add or more, unit=unit, scratch=scratch)
        return out
    if a.dtype == out.dtype:
        assert unit is None
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    if unit is None and not add:
        return _mm(a, b, out)
    if unit is None and products_of(out.device, a.dtype).adds:
        return _addmm(a, b, out)
    M, N = out.shape
    step = max(scratch // (4 * max(N, 1)) // 16 * 16, 16)
    buffer = out.new_empty((min(step, M), N))
    for i in range(0, M, step):
        rows, part = out[i : i + step], buffer[: min(step, M - i)]
        _mm(a[i : i + step], b, part)
        if unit is None:
            rows.add_(part)
        elif add:
            rows.addcmul_(part, unit)
        else:
            torch.mul(part, unit, out=rows)
    return out


def _wants_whole_vectors(x: Tensor) -> bool:
    return x.is_cuda


Part = tuple[Tensor, Tensor, Tensor, bool]  # a, b, out, and whether it is added to another


def whole_vectors(a: Tensor, b: Tensor, out: Tensor) -> list[Part]:
    """The parts of out = a @ b without an odd length along memory; empty if there is none.

    cuBLAS leaves the tensor cores' fast kernels where a matrix has a row whose length is not a
    multiple of 8, also if the rows' pitch is one: a vocabulary of one token more costs eight times
    the product. So the last few rows, columns or summands are multiplied apart.
    """
    (M, K), N = a.shape, b.shape[1]
    m, k, n = M // VECTOR * VECTOR, K // VECTOR * VECTOR, N // VECTOR * VECTOR
    if n and n < N and out.stride(1) == 1:
        return [(a, b[:, :n], out[:, :n], False), (a, b[:, n:], out[:, n:], False)]
    if m and m < M and a.stride(0) == 1:
        return [(a[:m], b, out[:m], False), (a[m:], b, out[m:], False)]
    if k and k < K and a.stride(1) == 1:
        return [(a[:, :k], b[:k], out, False), (a[:, k:], b[k:], out, True)]
    return []


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if out.device.type == "cpu":
        return backends.load("cpu").bf16_product(a, b, out, add=False)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]


def _addmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    if out.device.type == "cpu":
        return backends.load("cpu").bf16_product(a, b, out, add=True)
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent, exact (a library's power need not be), for int32 from -126 to 127."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)


def exponent_of(x: Tensor) -> Tensor:
    """The least e with x < 2 ** e, int32, for fp32 x >= 0; -100 for less than 2 ** -100."""
    return torch.frexp(x).exponent.to(torch.int32).clamp(-100, 127)


def largest(x: Tensor) -> Tensor:
    """[n] max |x| of each row, fp32, without a copy of x; 0 where a row is empty."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], dtype=torch.float32)
    return torch.linalg.vector_norm(x, float("inf"), 1, dtype=torch.float32)


def split(x: Tensor, dtype: torch.dtype, count: int) -> list[Tensor]:
    """`x` as the sum of `count` tensors of `dtype`, each the rounding of what the others left."""
    parts, rest = [], x.float()
    for i in range(count):
        part = rest.to(dtype)
        parts.append(part)
        if i + 1 < count:
            rest = rest - part.float()
            rest = torch.where(rest.isfinite(), rest, 0.0)  # of an infinity nothing is left
    return parts


def _pieces(dtype: torch.dtype) -> int:
    """How many bf16 values make a value of `dtype`."""
    return ceil(BITS[dtype], 8) // 8


def _terms(up_dtype: torch.dtype) -> list[tuple[int, int]]:
    """Which pieces of fp32 `low` meet which pieces of `up`: those above fp32's rounding."""
    return [(i, j) for j in range(_pieces(up_dtype)) for i in range(3 - j)]


def low_rank_columns(low_rank: int, up_dtype: torch.dtype, products: Products) -> int:
    """Columns of the low-rank product in bf16: pieces side by side, whole vectors of them."""
    return 0 if products is WIDE or not low_rank else ceil(low_rank * len(_terms(up_dtype)), 8)


def side_by_side(parts: list[Tensor]) -> Tensor:
    """[n, K] of parts [n, r], with columns of 0 up to a multiple of 8: what cuBLAS is fast with."""
    n, r = parts[0].shape
    width = r * len(parts)
    out = parts[0].new_zeros((n, ceil(width, 8)))
    torch.cat(parts, 1, out=out[:, :width])
    return out


def low_rank_operand(x: Tensor, up_dtype: torch.dtype, *, up: bool) -> Tensor:
    """bf16 columns of fp32 low [n, r] or of up [V, r]: those of the two multiply to low @ up.T."""
    parts = split(x, torch.bfloat16, _pieces(up_dtype) if up else 3)
    return side_by_side([parts[pair[up]] for pair in _terms(up_dtype)])


def scaled_pieces(x: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """`x` [n, r] as narrow parts of a sum, exact to 22 bits or more, times a unit on the device."""
    if x.dtype == dtype:
        return [x], None
    if dtype != torch.float16:
        return split(x, dtype, 3), None
    tops = largest(x)
    exponent = exponent_of(tops.max() if tops.numel() else tops.sum())
    return split(x.float() * power_of_two(15 - exponent), dtype, 2), power_of_two(exponent - 15)


class Slopes:
    """The gradient of logits [n, V] as the products take it: rounded once, or as it is.

    fp16 rows are scaled by powers of two to lie just below its largest number; `unit` [n] times a
    row of `rows` is the gradient.
    """

    def __init__(self, wide: Tensor, rows: Tensor, unit: Tensor | None = None) -> None:
        self.wide, self.rows, self.unit = wide, rows, unit

    @staticmethod
    def of(wide: Tensor, into: Tensor) -> Slopes:
        """`wide` rounded into `into`; a backward may have written there already."""
        if wide.dtype == into.dtype:
            return Slopes(wide, wide)
        if into.dtype != torch.float16:
            return Slopes(wide, into.copy_(wide))
        exponent = exponent_of(largest(wide))
        torch.mul(wide, power_of_two(15 - exponent)[:, None], out=into)
        return Slopes(wide, into, power_of_two(exponent - 15))

    def finish(self, out: Tensor) -> Tensor:
        return out if self.unit is None else out.mul_(self.unit[:, None])

    def meet(self, x: Tensor, pieces: int = 1) -> tuple[list[Tensor], Tensor | None]:
        """`x` [n, k] for rows.T @ x: as `pieces` narrow parts of a sum, and the product's unit."""
        dtype = self.rows.dtype
        if self.unit is None:
            return ([x] if x.dtype == dtype else split(x, dtype, pieces)), None
        # A row's unit moves to x, and what all rows share of it to the product.
        x = x.float()
        tops = largest(x)
        exponent = exponent_of((tops * self.unit).max() if tops.numel() else tops.sum())
        scale = torch.where(tops > 0, self.unit * power_of_two(15 - exponent), 0.0)
        return split(x * scale[:, None], dtype, pieces), power_of_two(exponent - 15)
