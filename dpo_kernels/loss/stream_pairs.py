"""Pair streaming: loss and gradients of a linear head in one pass over the pairs.

Where the loss is a sum over pairs, a pair's gradient needs that pair alone. So whole pairs fill a
chunk, and while their logits are there everything is done with them:

    logits -> log-probs -> loss of these pairs -> d loss / d logp of each token (in closed form,
              or by a tiny graph)
           -> gradient over the logits, in place -> dhidden, dweight

Three products in all, nothing is projected twice, and no logits outlive their chunk. The loss of a
chunk is normalised by the counts of the batch, so the chunks' losses and gradients add up. The
backward multiplies by the upstream scalar. A reference given as hidden states is scored in the
same chunk, by products of the same shapes; where the loss needs the KL of the two, its logits stay
beside the policy's.

Letters: `B` pairs, `R` rows, `T` positions, `N` scored rows, `C` rows of a chunk, `H` hidden size,
`V` vocabulary, `r` rank, `n` rows of these pairs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..inputs.layout import Layout
from ..inputs.transfer import to_device
from ..inputs.transform import LogitTransform
from ..ops import TokenLogps, no_autocast
from ..ops.derivatives import check_mode, refuse
from ..ops.linear_head import Head, HeadGradient, LinearInputs, placed, scored_rows
from ..ops.plan import Plan, chunks_of_pairs
from ..ops.products import ceil
from .from_pairs import DPOOutput
from .from_tokens import TokenLoss
from .ordinary import Evaluated


@dataclass(frozen=True)
class Streaming:
    """A batch to stream: everything but the tensors that want a gradient."""

    run: TokenLoss
    reference: LinearInputs | None
    ref_logps: Tensor | None  # [2B] sums, or [R, T] a row
    lengths: list[int]  # [2B] scored rows
    plan: Plan
    transform: LogitTransform


def stream(batch: Streaming, policy: LinearInputs) -> DPOOutput:
    """Loss and rewards; the gradients of `policy` are formed on the way."""
    o = batch.run.options
    tensors = (x if isinstance(x, Tensor) else None for x in (o.beta, o.offset, o.weights))
    inputs = (*policy, *tensors)
    check_mode(*inputs, *(batch.reference or ()))
    kept: list[Streamed] = []
    loss = _Stream.apply(batch, kept, *inputs)
    fields, stats = kept[0].fields, dict(zip(batch.run.asked, kept[0].stats, strict=True))
    return DPOOutput(loss, *fields).told("streaming", batch.run.shown(stats))


class Streamed(NamedTuple):
    """What one pass over the pairs found."""

    loss: Tensor
    fields: list[Tensor]  # of `DPOOutput`, after the loss
    stats: list[Tensor]  # [R, T] each, those asked for
    grads: dict[str, Tensor]
    places: Tensor  # the rows that the gradient of hidden is of


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch: Streaming, kept, hidden, weight, bias, down, up, *options):
        wanted = dict(zip(LinearInputs._fields, ctx.needs_input_grad[2:7], strict=True))
        inputs = LinearInputs(hidden, weight, bias, down, up)
        with no_autocast(hidden.device):
            found = _run(batch, inputs, wanted)
        names = (*LinearInputs._fields, "beta", "offset", "weights")
        ctx.grads, ctx.places = [found.grads.get(name) for name in names], found.places
        ctx.like = [
            (x.shape, x.dtype) if isinstance(x, Tensor) else None
            for x in (hidden, weight, bias, down, up, *options)
        ]
        kept.append(found._replace(grads={}))
        ctx.save_for_backward(found.loss)
        return found.loss

    @staticmethod
    def backward(ctx, g):
        if ctx.grads is None:
            raise RuntimeError(
                "strategy 'streaming' forms its gradients in the forward and hands them out once: "
                "for a second backward give strategy='recompute'"
            )
        (loss,) = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        with torch.no_grad():
            # On the CPU the scalar can be looked at; elsewhere that would wait for the device.
            unit = g.device.type == "cpu" and g.item() == 1.0
            out: list[Tensor | None] = []
            while grads:
                d, like = grads.pop(0), ctx.like[len(out)]
                if d is not None:
                    d = d.to(like[1]) if unit else _scaled(d, g, like[1])
                    if not out:  # hidden: rows back in their places
                        d = placed(d, ctx.places, like[0])
                out.append(d)
        if torch.is_grad_enabled():
            out = [refuse(d, loss) for d in out]
        return None, None, *out


def _scaled(d: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """d * g in `dtype`; d is given up."""
    if d.dtype == dtype or d.device.type == "cpu":  # where one pass would take a copy of d besides
        return d.mul_(g).to(dtype)
    out = torch.empty(d.shape, dtype=dtype, device=d.device)
    if backends.usable("triton"):
        return backends.load("triton").scaled_copy(d, g, out)
    return torch.mul(d, g, out=out)


class _Chunk(NamedTuple):
    """Whole pairs i .. j - 1, packed: chosen, then rejected."""

    i: int
    j: int
    rows: int
    places: Tensor  # [n] of their scored rows
    targets: Tensor  # [1, n]
    cu_seqlens: Tensor  # [2 (j - i) + 1]


def _chunks(batch: Streaming) -> list[_Chunk]:
    plan, layout = batch.plan, batch.run.layout
    B = layout.sequences // 2
    starts = [0, *itertools.accumulate(batch.lengths)]
    labels = layout.targets.reshape(-1)
    scored = scored_rows(layout.targets, layout.ignore_index, starts[-1])
    pairs = chunks_of_pairs(batch.lengths, plan.chunk, plan.least)
    found = []
    for (i, j), cu in zip(pairs, _boundaries(batch.lengths, pairs, labels.device), strict=True):
        chosen, rejected = slice(starts[i], starts[j]), slice(starts[B + i], starts[B + j])
        # All pairs in one chunk: their rows are those that are scored, in order.
        whole = len(pairs) == 1
        index = scored if whole else torch.cat([scored[chosen], scored[rejected]])
        n = starts[j] - starts[i] + starts[B + j] - starts[B + i]
        found.append(_Chunk(i, j, n, index, labels.index_select(0, index).unsqueeze(0), cu))
    return found


def _run(batch: Streaming, policy: LinearInputs, wanted: dict[str, bool]) -> Streamed:
    run, layout = batch.run, batch.run.layout
    impl = backends.load(run.backend)
    chunks = _chunks(batch)
    pass_ = _Pass(batch, policy, impl, chunks)
    head = pass_.head
    total = HeadGradient(head, *(wanted[name] for name in LinearInputs._fields[1:]))
    packed, rows = None, sum(batch.lengths)
    if wanted["hidden"] and (len(chunks) > 1 or not rows):
        packed = torch.empty((rows, head.H), device=policy.hidden.device, dtype=torch.float32)
    pairs = (_Ordinary if run.ordinary is not None else _Composed)(batch, impl)
    columns: list[list[Tensor]] = [[] for _ in run.asked]
    done = 0
    for chunk in chunks:
        n = chunk.rows
        scores = pass_.score(chunk)
        for column, stat in zip(columns, run.asked, strict=True):
            column.append(scores.stats[stat][0])
        slopes = pairs.slopes(chunk, scores)
        if n and any(wanted.values()):
            dz = head.operand(pass_.gradient(chunk, scores, slopes))
            d_low = head.d_low(dz)
            if packed is not None:
                packed[done : done + n] = head.d_hidden(dz, d_low)
            elif wanted["hidden"]:
                packed = head.d_hidden(dz, d_low)
            total.add(dz, d_low, scores.h[:n], None if scores.low is None else scores.low[:n])
        done += n
    total.finish()
    grads = {
        "hidden": packed,
        **{name: getattr(total, name) for name in LinearInputs._fields[1:]},
        **pairs.d_options,
    }
    index = chunks[0].places if len(chunks) == 1 else torch.cat([c.places for c in chunks])
    shown = [
        placed(torch.cat(c)[:, None], index, torch.Size((*layout.targets.shape, 1)))[..., 0]
        for c in columns
    ]
    loss, *fields = pairs.finish()
    found = {name: d for name, d in grads.items() if d is not None}
    return Streamed(loss, fields, shown, found, index)


class _Scores(NamedTuple):
    """A chunk's rows, its logits, and what the kernels say of them."""

    h: Tensor  # [C, H]
    low: Tensor | None  # [C, r]
    z: Tensor  # [n, V]
    lse: Tensor  # [1, n]
    stats: dict[str, Tensor]
    logps: Tensor  # [1, n]
    ref_logps: Tensor | None  # [1, n]
    kl: Tensor | None  # [1, n]
    r: Tensor | None = None  # [n, V] and [1, n], of the reference, where the KL is needed
    ref_lse: Tensor | None = None


class _Pass:
    """Both heads over the chunks, and the buffers that their logits fill."""

    def __init__(
        self, batch: Streaming, policy: LinearInputs, impl: ModuleType, chunks: list[_Chunk]
    ) -> None:
        self.batch, self.policy, self.impl = batch, policy, impl
        self.head = Head(batch.plan, policy.weight, policy.bias, policy.down, policy.up)
        self.ref_head = None
        if batch.reference is not None:
            self.ref_head = Head(batch.plan, batch.reference.weight, batch.reference.bias)
        largest = max(chunk.rows for chunk in chunks)
        self.joint = batch.run.needs_kl
        self.buffer = self.head.logits_buffer(largest)
        self.ref_buffer = self.head.logits_buffer(largest) if self.joint else self.buffer

    def score(self, chunk: _Chunk) -> _Scores:
        run, head, impl, n = self.batch.run, self.head, self.impl, chunk.rows
        size = ceil(n, self.batch.plan.block)
        args = (chunk.targets, run.layout.ignore_index, self.batch.transform)
        r = ref_logps = ref_lse = kl = None
        if self.ref_head is not None:
            assert self.batch.reference is not None
            rows = self.ref_head.rows(self.batch.reference.hidden, chunk.places)
            r = self.ref_head.project(rows, None, self.ref_buffer[:size])[:n]
            if not self.joint:
                ref_logps, r = impl.token_logps(r[None], *args, ())[0], None
        h = head.rows(self.policy.hidden, chunk.places)
        low = head.low(h)
        z = head.project(h, low, self.buffer[:size])[:n]
        stats: dict[str, Tensor] = {}
        if r is not None:
            logps, lse, ref_logps, ref_lse, kl = impl.token_kl(z[None], r[None], *args)
        if r is None or run.stats:
            logps, lse, table = impl.token_logps(z[None], *args, run.stats)
            if run.stats:
                stats = dict(zip(run.stats, table.unbind(0), strict=True))
        return _Scores(h, low, z, lse, stats, logps, ref_logps, kl, r, ref_lse)

    def gradient(self, chunk: _Chunk, x: _Scores, slopes: list[Tensor]) -> Tensor:
        """The gradient of the chunk's logits, over them or rounded."""
        ignore, transform = self.batch.run.layout.ignore_index, self.batch.transform
        d, z, y = self.head.gradient(x.z, self.impl), x.z.unsqueeze(0), chunk.targets
        out = z if d is x.z else d.unsqueeze(0)
        if x.r is not None:
            self.impl.token_kl_backward(
                slopes[0], slopes[1], z, x.r[None], y, x.lse, x.ref_lse, ignore, transform, out
            )
        else:
            self.impl.token_logps_backward(slopes[0], z, y, x.lse, ignore, transform, out)
        return d


def _ref_sums(ref_logps: Tensor | None, chunk: _Chunk) -> Tensor | None:
    """[2 (j - i)] of sums [2B], or of nothing."""
    if ref_logps is None or ref_logps.dim() == 2:
        return None
    B = ref_logps.shape[0] // 2
    i, j = chunk.i, chunk.j
    return ref_logps if j - i == B else torch.cat([ref_logps[i:j], ref_logps[B + i : B + j]])


def _ref_tokens(ref_logps: Tensor | None, chunk: _Chunk) -> Tensor | None:
    """[1, n] of values a row [R, T], or of nothing."""
    if ref_logps is None or ref_logps.dim() == 1:
        return None
    return ref_logps.reshape(-1)[chunk.places][None]


class _Ordinary:
    """The pairs of each chunk, of a loss in closed form."""

    def __init__(self, batch: Streaming, impl: ModuleType) -> None:
        assert batch.run.ordinary is not None
        self.batch, self.impl, self.loss = batch, impl, batch.run.ordinary
        self.d_options: dict[str, Tensor] = {}
        self.found: list[Evaluated] = []
        num_pairs = batch.run.options.num_pairs
        self.share = 1.0 / (batch.run.layout.sequences // 2 if num_pairs is None else num_pairs)

    def _sums(self, values: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        run = self.batch.run
        if values.dtype != torch.float32:
            return run.sums_of(values, chunk.targets, chunk.cu_seqlens)
        place = (chunk.targets, chunk.cu_seqlens, run.layout.ignore_index, run.tail)
        return self.impl.sequence_sum(values, *place)

    def slopes(self, chunk: _Chunk, x: _Scores) -> list[Tensor]:
        """[1, n] d loss / d log-prob of each row."""
        run = self.batch.run
        sums, counts = self._sums(x.logps, chunk)
        tokens, reference = x.ref_logps, None
        if tokens is None:
            reference = _ref_sums(self.batch.ref_logps, chunk)
            tokens = _ref_tokens(self.batch.ref_logps, chunk)
        if tokens is not None:
            reference = self._sums(tokens, chunk)[0]
        found = self.loss.evaluate(self.impl, sums, reference, counts, slice(chunk.i, chunk.j))
        self.found.append(found)
        return [
            self.impl.sequence_sum_backward(
                found.slopes * self.share,
                chunk.targets,
                chunk.cu_seqlens,
                run.layout.ignore_index,
                run.tail,
                torch.float32,
            )
        ]

    def finish(self) -> list[Tensor]:
        """Loss and the other fields, of the batch."""
        dtype, found = self.batch.run.dtype, self.found[0]
        if len(self.found) > 1:
            losses, *rest = zip(*self.found, strict=True)
            sums, ratios = (_joined(parts) for parts in rest[1:])
            found = Evaluated(torch.cat(losses), found.slopes, sums, ratios)
        return [self.loss.loss(found.losses, dtype), *self.loss.metrics(found, dtype)]


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """[2B] of the chunks' [2b]: all that is chosen, then all that is rejected."""
    halves = [x.chunk(2) for x in parts]
    return torch.cat([x for side in zip(*halves, strict=True) for x in side])


class _Composed:
    """The pairs of each chunk, of any loss that is a sum over pairs: by a tiny graph."""

    def __init__(self, batch: Streaming, impl: ModuleType) -> None:
        self.batch = batch
        self.d_options: dict[str, Tensor] = {}
        self.fields: list[list[Tensor]] = []
        B = batch.run.layout.sequences // 2
        self.chosen_tokens = sum(batch.lengths[:B])

    def slopes(self, chunk: _Chunk, x: _Scores) -> list[Tensor]:
        """[1, n] d loss / d log-prob of each row, and d loss / d KL where there is one."""
        run, i, j = self.batch.run, chunk.i, chunk.j
        local = Layout(chunk.targets, chunk.cu_seqlens, 2 * (j - i), run.layout.ignore_index, False)
        share, leaves = run.of_pairs(i, j, local, self.chosen_tokens)
        tokens, ref_sums = x.ref_logps, None
        if tokens is None:
            ref_sums = _ref_sums(self.batch.ref_logps, chunk)
            tokens = _ref_tokens(self.batch.ref_logps, chunk)
        scored = [x.logps] if x.kl is None else [x.logps, x.kl]
        with torch.enable_grad():
            scored = [s.detach().requires_grad_() for s in scored]
            policy = TokenLogps(scored[0], x.lse, x.stats)
            out = share.finish(policy, tokens, ref_sums, *scored[1:])
            wrt = [*scored, *(getattr(share.options, name) for name in leaves)]
            slopes = _slopes(out.loss, wrt)
        self.fields.append([field.detach() for field in out])
        for name, slope in zip(leaves, slopes[len(scored) :], strict=True):
            whole = self.d_options.setdefault(name, _zeros_like(getattr(run.options, name)))
            part = whole if whole.dim() == 0 else whole[i:j]
            part += slope
        return slopes

    def finish(self) -> list[Tensor]:
        """Loss and the other fields, of the batch."""
        loss = torch.stack([part[0] for part in self.fields]).sum()
        parts = zip(*(part[1:] for part in self.fields), strict=True)
        return [x.to(self.batch.run.dtype) for x in (loss, *(torch.cat(part) for part in parts))]


def _boundaries(
    lengths: list[int], chunks: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, ...]:
    """Where the sequences of each chunk begin and end: one copy to the device, not one a chunk."""
    B = len(lengths) // 2
    cus = []
    for i, j in chunks:
        cus.append([0, *itertools.accumulate([*lengths[i:j], *lengths[B + i : B + j]])])
    if device.type == "cpu":
        return tuple(torch.tensor(cu, device="cpu") for cu in cus)
    # From pinned memory: the host does not wait for the device. One number more a chunk, so that
    # each begins at 16 bytes: a kernel is compiled for pointers that do.
    flat = to_device(torch.tensor([n for cu in cus for n in (*cu, 0)], device="cpu"), device)
    return tuple(cu[:-1] for cu in flat.split([len(cu) + 1 for cu in cus]))


def _slopes(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """d loss / d leaf, 0 where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, slopes, strict=True)]


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
