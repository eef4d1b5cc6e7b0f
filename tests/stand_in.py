"""A GPU of meta tensors: the linear head's real code on shapes of any size, every op recorded.

Nothing is computed and nothing is allocated. The head takes the device for a CUDA one whose narrow
products add in place; its kernels are stubs that note what they would read and write. What a run
would wait for (a value on the device, a blocking copy) is noted too, or raises: a meta tensor has
no values.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels import backends
from dpo_kernels.inputs.call import settle
from dpo_kernels.inputs.layout import Layout
from dpo_kernels.inputs.linear_call import planned
from dpo_kernels.loss.stream_pairs import stream
from dpo_kernels.ops import LinearInputs, plan, products
from dpo_kernels.ops import linear_head as head_module

# The package's attribute of this name is the function.
ops_of_logps = importlib.import_module("dpo_kernels.ops.linear_logps")
ops_of_rows = importlib.import_module("dpo_kernels.ops.scaled_rows")
META = torch.device("meta")
FLOPS, BANDWIDTH = 800e12, 3.0e12  # an H100's bf16 products and memory, as they are reached
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv")
# Values on the device that the host would look at.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


@dataclass(frozen=True)
class Product:
    a: Tensor
    b: Tensor
    out: Tensor
    add: bool

    @property
    def narrow(self) -> bool:
        return self.a.dtype in products.NARROW and self.b.dtype == self.a.dtype

    @property
    def pitches(self) -> list[int]:
        """Elements from a row (or column) of each operand to the next."""
        return [max(x.stride()) if min(x.shape) > 1 else max(x.shape) for x in self.operands]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a, self.b, self.out

    @property
    def flops(self) -> int:
        return 2 * self.a.shape[0] * self.a.shape[1] * self.b.shape[1]

    def seconds(self) -> float:
        reads = (size(self.a) + size(self.b)) / BANDWIDTH
        return max(self.flops / FLOPS, reads) + size(self.out) * (1 + self.add) / BANDWIDTH


@dataclass
class Record:
    """What a run did, in order; `chunks` holds the rows of each chunk of the policy's logits."""

    products: list[Product] = field(default_factory=list)
    waits: list[tuple[int, str]] = field(default_factory=list)  # chunks begun before, what
    uploads: list[tuple[int, str]] = field(default_factory=list)  # copies that nobody waits for
    chunks: list[int] = field(default_factory=list)
    other_bytes: int = 0

    def of_vocabulary(self, V: int) -> int:
        """Products over the whole vocabulary; one that is made in parts counts once."""
        count = rows = 0
        last = None
        for p in self.products:
            rows = rows + p.a.shape[0] if p.b is last else p.a.shape[0]
            last = p.b
            count += V in (p.a.shape[1], p.b.shape[1]) or rows == V
        return count

    def seconds(self) -> float:
        return sum(p.seconds() for p in self.products) + self.other_bytes / BANDWIDTH


def size(x: Tensor) -> int:
    return x.numel() * x.dtype.itemsize


def _bytes(name: str, tensors: list[Tensor], made: list[Tensor]) -> int:
    """What an op other than a product reads and writes, at least."""
    if name.startswith(("empty", "new_empty")):
        return 0
    if name.startswith("new_"):
        return sum(map(size, made))
    if name in ("index", "index_select"):  # the rows that are taken, not what they are taken from
        return 2 * size(made[0])
    if name in ("index_put_", "index_copy_"):
        return 2 * size(tensors[-1])
    written = 0 if name.endswith("_") and tensors else sum(map(size, made))
    return sum(map(size, tensors)) + written


class _Watch(TorchDispatchMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        tensors = [x for x in args if isinstance(x, Tensor)]
        before = len(self.record.chunks)
        if name in READS and "meta" in {x.device.type for x in tensors}:
            self.record.waits.append((before, name))
        out = func(*args, **kwargs)
        made = [
            x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, Tensor)
        ]
        devices = {x.device.type for x in (*tensors, *made)}
        if name in ("_to_copy", "copy_") and devices == {"cpu", "meta"}:
            free = kwargs.get("non_blocking") or True in args[2:]
            (self.record.uploads if free else self.record.waits).append((before, name))
        if name in PRODUCTS and "meta" in devices:
            a, b = tensors[-2:] if "add" in name else tensors[:2]
            target = kwargs.get("out", made[0])
            self.record.products.append(Product(a, b, target, "add" in name))
        elif "meta" in devices and not func.is_view and made:
            self.record.other_bytes += _bytes(name, tensors, made)
        return out


class _Factories(TorchFunctionMode):
    """`torch.tensor(values, device=...)` copies and waits, which no dispatch shows."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device")
        if made and torch.device(kwargs["device"]).type == "meta":
            self.record.waits.append((len(self.record.chunks), "torch.tensor"))
        return func(*args, **kwargs)


def kernels(record: Record) -> SimpleNamespace:
    """A backend that notes what its kernels read and write."""

    def token_logps(logits, targets, ignore_index, transform, stats):
        record.chunks.append(logits.shape[1])
        record.other_bytes += size(logits)
        rows = tuple(targets.shape)
        wide = logits.new_empty(rows, dtype=torch.float64)
        return logits.new_empty(rows), wide, logits.new_empty((len(stats), *rows))

    def token_logps_backward(grad, logits, targets, lse, ignore_index, transform, out):
        record.other_bytes += size(logits) + size(out)

    def token_kl(logits, ref_logits, targets, ignore_index, transform):
        record.chunks.append(logits.shape[1])
        record.other_bytes += size(logits) + size(ref_logits)
        narrow, wide = (
            [logits.new_empty(tuple(targets.shape), dtype=d) for _ in range(2)]
            for d in (torch.float32, torch.float64)
        )
        return narrow[0], wide[0], narrow[1], wide[1], torch.empty_like(narrow[0])

    def token_kl_backward(grad, grad_kl, logits, ref_logits, *rest):
        record.other_bytes += size(logits) + size(ref_logits) + size(rest[-1])

    def sequence_sum(values, targets, cu_seqlens, ignore_index, tail_weight):
        S = cu_seqlens.numel() - 1
        return values.new_empty(S, dtype=torch.float64), values.new_empty(S, dtype=torch.int64)

    def sequence_sum_backward(grad, targets, cu_seqlens, ignore_index, tail_weight, dtype):
        return grad.new_empty(tuple(targets.shape), dtype=dtype)

    def pair_loss_forward(u, v, beta, offset, phis, numbers):
        return torch.empty_like(u), u.new_empty((4, u.numel()))

    def scaled_copy(x, g, out):
        return out

    return SimpleNamespace(
        name="triton",
        ROUNDS=True,
        token_logps=token_logps,
        token_kl=token_kl,
        scaled_copy=scaled_copy,
        token_logps_backward=token_logps_backward,
        token_kl_backward=token_kl_backward,
        sequence_sum=sequence_sum,
        sequence_sum_backward=sequence_sum_backward,
        pair_loss_forward=pair_loss_forward,
    )


@contextlib.contextmanager
def gpu(kind: products.Products = products.ADDMM):
    """Meta tensors are a CUDA device's; yields the record of what is done to them."""
    record = Record()
    stub = kernels(record)

    def products_of(device, dtype):
        return kind if dtype in products.NARROW else products.WIDE

    def product(add):
        def call(a, b, out):
            record.products.append(Product(a, b, out, add))
            return out

        return call

    with contextlib.ExitStack() as stack:
        for module in (plan, products, head_module):
            stack.enter_context(mock.patch.object(module, "products_of", products_of))
        patches = (
            (plan, "on_gpu", lambda device: True),
            (products, "_mm", product(False)),
            (products, "_addmm", product(True)),
            (backends, "load", lambda name: stub),
            (torch, "autocast", lambda *a, **k: contextlib.nullcontext()),
        )
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(_Factories(record))
        stack.enter_context(_Watch(record))
        yield record


def lengths_of(N: int, pair: int) -> list[int]:
    """[2B] scored rows of pairs of `pair` rows or so, N in all."""
    B = max(1, N // pair)
    rows = [N // B + (1 if i < N % B else 0) for i in range(B)]
    # Not all alike: long pairs beside short ones.
    for i in range(0, B - 1, 2):
        rows[i], rows[i + 1] = rows[i] + rows[i] // 3, rows[i + 1] - rows[i] // 3
    return [*((n + 1) // 2 for n in rows), *(n // 2 for n in rows)]


def step(
    lengths: list[int],
    V: int,
    H: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    trained: bool = True,
    rank: int = 0,
    loss_type: str = "sigmoid",
    ref: bool = False,
    memory_budget: int | None = None,
    kind: products.Products = products.ADDMM,
) -> Record:
    """Forward and backward of `fused_linear_dpo_loss` of packed rows that are all scored."""
    N, S = sum(lengths), len(lengths)

    def leaf(*shape, of=dtype, grad=True):
        return torch.empty(shape, dtype=of, device=META).requires_grad_(grad)

    cu = torch.tensor([0, *lengths]).cumsum(0).to(META)
    layout = Layout(leaf(1, N, of=torch.int64, grad=False), cu, S, -100, False, tuple(lengths))
    settled = settle(
        {"memory_budget": memory_budget}, {"loss_type": loss_type, "reference_free": not ref}
    )
    weight = leaf(V, H, grad=trained)
    down = up = None
    if rank:
        down, up = leaf(rank, H, of=torch.float32), leaf(V, rank, of=torch.float32)
    policy = LinearInputs(leaf(1, N, H), weight, None, down, up)
    reference = LinearInputs(leaf(1, N, H), weight).detached() if ref else None
    with gpu(kind) as record:
        call = planned(settled, layout, policy, reference, "triton", None, None, False)
        assert (call.plan is not None) == (trained or rank > 0 or settled.needs_kl)
        if call.plan is not None:
            stream(call, policy).loss.backward()
        else:
            _frozen(policy, layout, memory_budget)
    return record


def score(lengths: list[int], V: int, H: int, dtype: torch.dtype = torch.bfloat16) -> Record:
    """Log-probs without gradients: a reference's pass."""
    hidden = torch.empty(1, sum(lengths), H, dtype=dtype, device=META)
    weight = torch.empty(V, H, dtype=dtype, device=META)
    targets = torch.empty(1, sum(lengths), dtype=torch.int64, device=META)
    with gpu() as record:
        _linear_logps(LinearInputs(hidden, weight), targets, "score", None)
    return record


def _linear_logps(x: LinearInputs, targets: Tensor, strategy: str, budget: int | None):
    # The op's own body: on meta tensors the dispatcher would take its shapes alone.
    return ops_of_logps._linear_logps._init_fn(
        *x,
        targets,
        -100,
        1.0,
        0.0,
        1.0,
        "",
        strategy,
        strategy,
        targets.numel(),
        budget or plan.DEFAULT,
        False,
        "triton",
    )


def _frozen(x: LinearInputs, layout: Layout, budget: int | None):
    with torch.no_grad():
        *_, d_hidden, _ = _linear_logps(x, layout.targets, "frozen", budget)
        grad = torch.empty(layout.targets.shape, device=META)
        ops_of_rows.scaled_rows._init_fn(
            [grad], list(d_hidden), layout.targets, -100, layout.targets.numel(), x.hidden.dtype
        )
