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
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..inputs.layout import Layout
from ..inputs.linear_call import LinearCall
from ..inputs.transfer import to_device
from ..losses import PER_PAIR
from ..ops import TokenLogps, no_autocast
from ..ops.derivatives import check_mode, refuse
from ..ops.linear_head import Head, HeadGradient, LinearInputs, placed, scored_rows
from ..ops.plan import chunks_of_pairs
from ..ops.products import ceil
from ..ops.token_logps import RowSlopes, backward, forward
from .from_pairs import DPOOutput
from .from_tokens import finish, share_of, shown
from .ordinary import Evaluated


def stream(call: LinearCall, policy: LinearInputs) -> DPOOutput:
    """Loss and rewards; the gradients of `policy` are formed on the way."""
    options = [getattr(call.settled.options, name) for name in PER_PAIR]
    inputs = (*policy, *(x if isinstance(x, Tensor) else None for x in options))
    check_mode(*inputs, *(call.ref_inputs or ()))
    kept: list[Streamed] = []
    loss = _Stream.apply(call, kept, *inputs)
    stats = dict(zip(call.settled.asked, kept[0].stats, strict=True))
    return DPOOutput(loss, *kept[0].fields).told("streaming", shown(call, stats))


class Streamed(NamedTuple):
    """What one pass over the pairs found."""

    loss: Tensor
    fields: Sequence[Tensor]  # of `DPOOutput`, after the loss
    stats: Sequence[Tensor]  # [R, T] each, those asked for
    grads: dict[str, Tensor | None]
    places: Tensor  # the rows that the gradient of hidden is of


_NAMES = (*LinearInputs._fields, *PER_PAIR)


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: LinearCall, kept, *inputs):
        wanted = dict(zip(_NAMES, ctx.needs_input_grad[2:], strict=True))
        policy = LinearInputs(*inputs[:5])
        with no_autocast(policy.hidden.device):
            found = _run(call, policy, wanted)
        ctx.grads, ctx.places = [found.grads.get(name) for name in _NAMES], found.places
        ctx.like = [None if x is None else (x.shape, x.dtype) for x in inputs]
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
                    if not unit:
                        d = _scaled(d, g, like[1])
                    elif d.dtype != like[1]:
                        d = d.to(like[1])
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
    padded: Tensor  # [C] the places, in whole blocks if the host knows them


def _chunks(call: LinearCall) -> list[_Chunk]:
    plan, layout, lengths = call.plan, call.layout, call.lengths
    assert plan is not None and lengths is not None
    B, starts = len(lengths) // 2, [0, *itertools.accumulate(lengths)]
    N, numbers, ignore = starts[-1], layout.numbers, layout.ignore_index
    whole = plan.chunk >= N
    if whole and numbers is not None and N:
        # Few rows: one tensor of what the host knows takes less time than ops to find it.
        flat = list(itertools.chain.from_iterable(numbers))
        places = [i for i, y in enumerate(flat) if y != ignore]
        places += places[:1] * (ceil(N, plan.block) - N)
        known = torch.tensor([*places, *starts, *(y for y in flat if y != ignore)], device="cpu")
        padded, cu, y = known.split([len(places), len(starts), N])
        return [_Chunk(0, B, N, padded[:N], y[None], cu, padded)]
    labels = layout.targets.reshape(-1)
    scored = scored_rows(layout.targets, ignore, N)
    pairs = [(0, B)] if whole else chunks_of_pairs(lengths, plan.chunk, plan.least)
    found = []
    for (i, j), cu in zip(pairs, _boundaries(lengths, pairs, labels.device), strict=True):
        index = scored  # of all pairs in one chunk: those that are scored, in order
        if not whole:
            index = torch.cat([scored[starts[k + i] : starts[k + j]] for k in (0, B)])
        n = starts[j] - starts[i] + starts[B + j] - starts[B + i]
        y = labels.index_select(0, index).unsqueeze(0)
        found.append(_Chunk(i, j, n, index, y, cu, index))
    return found


def _run(call: LinearCall, policy: LinearInputs, wanted: dict[str, bool]) -> Streamed:
    impl, chunks = backends.load(call.rows_backend), _chunks(call)
    pass_ = _Pass(call, policy, impl, chunks)
    head, rows = pass_.head, sum(chunk.rows for chunk in chunks)
    total = HeadGradient(head, *(wanted[name] for name in LinearInputs._fields[1:]))
    packed = None
    if wanted["hidden"] and (len(chunks) > 1 or not rows):
        packed = torch.empty((rows, head.H), device=policy.hidden.device, dtype=torch.float32)
    pairs = (_Ordinary if call.settled.ordinary is not None else _Composed)(call, impl)
    columns: list[list[Tensor]] = [[] for _ in call.settled.asked]
    done = 0
    for chunk in chunks:
        n = chunk.rows
        scores = pass_.score(chunk)
        for column, stat in zip(columns, call.settled.asked, strict=True):
            column.append(scores.logps.stats[stat][0])
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
    index = chunks[0].places if len(chunks) == 1 else torch.cat([c.places for c in chunks])
    shape = torch.Size((*call.layout.targets.shape, 1))
    stats = [placed(torch.cat(c)[:, None], index, shape)[..., 0] for c in columns]
    loss, *fields = pairs.finish()
    grads = {name: getattr(total, name) for name in LinearInputs._fields[1:]}
    return Streamed(loss, fields, stats, {"hidden": packed, **grads, **pairs.d_options}, index)


class _Scores(NamedTuple):
    """A chunk's rows, its logits, and what the kernels say of them."""

    h: Tensor  # [C, H]
    low: Tensor | None  # [C, r]
    z: Tensor  # [n, V]
    logps: TokenLogps  # [1, n] each, a reference's too
    r: Tensor | None = None  # [1, n, V] and [1, n], of the reference, where the KL is needed
    ref_lse: Tensor | None = None


class _Pass:
    """Both heads over the chunks, and the buffers that their logits fill."""

    def __init__(
        self, call: LinearCall, policy: LinearInputs, impl: ModuleType, chunks: list[_Chunk]
    ) -> None:
        assert call.plan is not None
        self.call, self.policy, self.impl = call, policy, impl
        self.head = Head(call.plan, *policy[1:])
        self.ref_head = None
        if call.ref_inputs is not None:
            self.ref_head = Head(call.plan, *call.ref_inputs[1:])
        largest = max(chunk.rows for chunk in chunks)
        self.joint = call.settled.needs_kl
        self.buffer = self.head.logits_buffer(largest)
        self.ref_buffer = self.head.logits_buffer(largest) if self.joint else self.buffer

    def score(self, chunk: _Chunk) -> _Scores:
        call, s, head, n = self.call, self.call.settled, self.head, chunk.rows
        size = ceil(n, head.plan.block)
        args = (chunk.targets, call.layout.ignore_index, s.transform)
        r = ref_logps = None
        if self.ref_head is not None:
            assert call.ref_inputs is not None
            rows = self.ref_head.rows(call.ref_inputs.hidden, chunk.padded)
            r = self.ref_head.project(rows, None, self.ref_buffer[:size])[None, :n]
            if not self.joint:
                ref_logps, r = self.impl.token_logps(r, *args, ())[0], None
        h = head.rows(self.policy.hidden, chunk.padded)
        low = head.low(h)
        z = head.project(h, low, self.buffer[:size])[:n]
        found = forward(self.impl, z[None], *args, s.stats, r)
        logps = TokenLogps.of(found, s.stats, r is not None)
        if ref_logps is not None:
            logps = logps._replace(ref_logps=ref_logps)
        return _Scores(h, low, z, logps, r, found[4])

    def gradient(self, chunk: _Chunk, x: _Scores, slopes: list[Tensor]) -> Tensor:
        """The gradient of the chunk's logits, over them or rounded."""
        ignore, transform = self.call.layout.ignore_index, self.call.settled.transform
        d, z = self.head.gradient(x.z, self.impl), x.z.unsqueeze(0)
        out = z if d is x.z else d.unsqueeze(0)
        rows = RowSlopes(slopes[0], chunk.targets, x.logps.lse)
        if x.r is not None:
            rows = rows._replace(grad_kl=slopes[1], ref_lse=x.ref_lse)
        backward(self.impl, rows, z, x.r, ignore, transform, out)
        return d


def _reference(call: LinearCall, chunk: _Chunk) -> Tensor | None:
    """The chunk's share of log-probs that were given: sums [2 (j - i)], or values a row [1, n]."""
    given = call.reference
    if given is None:
        return None
    if given.dim() == 2:
        return given.reshape(-1)[chunk.places][None]
    B = given.shape[0] // 2
    i, j = chunk.i, chunk.j
    return given if j - i == B else torch.cat([given[i:j], given[B + i : B + j]])


class _Ordinary:
    """The pairs of each chunk, of a loss in closed form."""

    def __init__(self, call: LinearCall, impl: ModuleType) -> None:
        assert call.settled.ordinary is not None
        self.call, self.impl, self.loss = call, impl, call.settled.ordinary
        self.d_options: dict[str, Tensor] = {}
        self.found: list[Evaluated] = []
        num_pairs = call.settled.options.num_pairs
        self.share = 1.0 / (call.layout.sequences // 2 if num_pairs is None else num_pairs)

    def _sums(self, values: Tensor, place: tuple) -> tuple[Tensor, Tensor]:
        impl = self.impl if values.dtype == torch.float32 else backends.load("torch")
        return impl.sequence_sum(values, *place)

    def slopes(self, chunk: _Chunk, x: _Scores) -> list[Tensor]:
        """[1, n] d loss / d log-prob of each row."""
        s, ignore = self.call.settled, self.call.layout.ignore_index
        place = (chunk.targets, chunk.cu_seqlens, ignore, s.tail)
        sums, counts = self._sums(x.logps.logps, place)
        reference = x.logps.ref_logps
        if reference is None:
            reference = _reference(self.call, chunk)
        if reference is not None and reference.dim() == 2:
            reference = self._sums(reference, place)[0]
        found = self.loss.evaluate(self.impl, sums, reference, counts, slice(chunk.i, chunk.j))
        self.found.append(found)
        return [self.impl.sequence_sum_backward(found.slopes * self.share, *place, torch.float32)]

    def finish(self) -> list[Tensor]:
        """Loss and the other fields, of the batch."""
        dtype, found = self.call.dtype, self.found[0]
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

    def __init__(self, call: LinearCall, impl: ModuleType) -> None:
        assert call.lengths is not None
        self.call = call
        self.d_options: dict[str, Tensor] = {}
        self.fields: list[list[Tensor]] = []
        self.chosen_tokens = sum(call.lengths[: len(call.lengths) // 2])

    def slopes(self, chunk: _Chunk, x: _Scores) -> list[Tensor]:
        """[1, n] d loss / d log-prob of each row, and d loss / d KL where there is one."""
        call, i, j = self.call, chunk.i, chunk.j
        ignore = call.layout.ignore_index
        layout = Layout(chunk.targets, chunk.cu_seqlens, 2 * (j - i), ignore, False)
        place = {"layout": layout, "reference": _reference(call, chunk)}
        share, leaves = share_of(call, i, j, self.chosen_tokens, **place)
        names = ["logps"] if x.logps.kl is None else ["logps", "kl"]
        with torch.enable_grad():
            scored = [getattr(x.logps, name).detach().requires_grad_() for name in names]
            out = finish(share, x.logps._replace(**dict(zip(names, scored, strict=True))))
            options = share.settled.options
            slopes = _slopes(out.loss, [*scored, *(getattr(options, name) for name in leaves)])
        self.fields.append([field.detach() for field in out])
        for name, slope in zip(leaves, slopes[len(scored) :], strict=True):
            given = getattr(call.settled.options, name)
            whole = self.d_options.setdefault(name, _zeros_like(given))
            part = whole if whole.dim() == 0 else whole[i:j]
            part += slope
        return slopes[: len(scored)]

    def finish(self) -> list[Tensor]:
        """Loss and the other fields, of the batch."""
        loss = torch.stack([part[0] for part in self.fields]).sum()
        parts = zip(*(part[1:] for part in self.fields), strict=True)
        return [x.to(self.call.dtype) for x in (loss, *(torch.cat(part) for part in parts))]


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
