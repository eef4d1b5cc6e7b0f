"""Pair streaming: loss and gradients of a linear head in one pass over the pairs.

Where the loss is a sum over pairs, a pair's gradient needs that pair alone. So whole pairs fill a
chunk, and while their logits are there everything is done with them:

    logits -> log-probs -> loss of these pairs -> d loss / d logp of each token (a tiny graph)
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

import torch
from torch import Tensor

from . import backends
from .layout import Layout
from .ops import TokenLogps, no_autocast
from .ops.derivatives import check_mode, once
from .ops.linear_head import Head, HeadGradient, LinearInputs, scored_rows
from .ops.plan import Plan, chunks_of_pairs
from .ops.products import ceil
from .pairs import DPOOutput
from .tokens import TokenLoss
from .transform import LogitTransform


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
    out = _Stream.apply(batch, *once(*inputs))
    fields = len(DPOOutput._fields)
    stats = dict(zip(batch.run.asked, out[fields:], strict=True))
    return DPOOutput(*out[:fields]).told("streaming", batch.run.shown(stats))


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, batch: Streaming, hidden, weight, bias, down, up, *options):
        wanted = dict(zip(LinearInputs._fields, ctx.needs_input_grad[1:6], strict=True))
        inputs = LinearInputs(hidden, weight, bias, down, up).detached()
        with no_autocast(hidden.device):
            out, grads, ctx.index = _run(batch, inputs, wanted)
        d_options = [grads.get(name) for name in ("beta", "offset", "weights")]
        ctx.grads = [*(grads.get(name) for name in LinearInputs._fields), *d_options]
        ctx.like = [(x.shape, x.dtype) if isinstance(x, Tensor) else None
                    for x in (hidden, weight, bias, down, up, *options)]  # fmt: skip
        fields = len(DPOOutput._fields)
        out = [*(x.to(batch.run.dtype) for x in out[:fields]), *out[fields:]]
        ctx.save_for_backward()
        return _freeze(ctx, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "strategy 'streaming' forms its gradients in the forward and hands them out once: "
                "for a second backward give strategy='recompute'"
            )
        grads, ctx.grads = ctx.grads, None
        # On the CPU the scalar can be looked at; elsewhere that would wait for the device.
        unit = g.device.type == "cpu" and g.item() == 1.0
        out: list[Tensor | None] = []
        while grads:
            d, like = grads.pop(0), ctx.like[len(out)]
            if d is not None:
                d = d.to(like[1]) if unit else _scaled(d, g, like[1])
                if not out:  # hidden: rows back in their places
                    full = d.new_zeros(like[0])
                    full.view(-1, full.shape[-1])[ctx.index] = d
                    d = full
            out.append(d)
        return None, *out


def _scaled(d: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """d * g in `dtype`; d is given up."""
    if d.dtype == dtype or d.device.type == "cpu":  # where one pass would take a copy of d besides
        return d.mul_(g).to(dtype)
    return torch.mul(d, g, out=torch.empty(d.shape, dtype=dtype, device=d.device))


def _freeze(ctx, out):
    ctx.mark_non_differentiable(*out[1:])
    ctx.set_materialize_grads(False)
    return tuple(out)


def _run(
    batch: Streaming, policy: LinearInputs, wanted: dict[str, bool]
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """The output's fields (fp64) and the statistics asked for [R, T], gradients by name, and the
    rows that packed gradients are of."""
    run, plan, layout = batch.run, batch.plan, batch.run.layout
    impl = backends.load(run.backend)
    B, device = layout.sequences // 2, policy.hidden.device
    starts = [0]
    for n in batch.lengths:
        starts.append(starts[-1] + n)
    labels = layout.targets.reshape(-1)
    scored = scored_rows(layout.targets, layout.ignore_index, starts[-1])
    head = Head(plan, policy.weight, policy.bias, policy.down, policy.up)
    ref_head = None
    if batch.reference is not None:
        ref_head = Head(plan, batch.reference.weight, batch.reference.bias)
    total = HeadGradient(head, *(wanted[name] for name in LinearInputs._fields[1:]))
    packed = None
    if wanted["hidden"]:
        packed = torch.empty((starts[-1], head.H), device=device, dtype=torch.float32)
    joint = run.needs_kl
    chunks = chunks_of_pairs(batch.lengths, plan.chunk, plan.least)
    counts = [starts[j] - starts[i] + starts[B + j] - starts[B + i] for i, j in chunks]
    boundaries = _boundaries(batch.lengths, chunks, device)
    buffer = head.logits_buffer(max(counts))
    ref_buffer = head.logits_buffer(max(counts)) if joint else buffer
    fields: list[list[Tensor]] = []
    columns: list[list[Tensor]] = [[] for _ in run.asked]
    d_options: dict[str, Tensor] = {}
    order = []
    done = 0
    for (i, j), n, cu in zip(chunks, counts, boundaries, strict=True):
        index = torch.cat([scored[starts[i] : starts[j]], scored[starts[B + i] : starts[B + j]]])
        order.append(index)
        y = labels[index][None]
        local = Layout(y, cu, 2 * (j - i), layout.ignore_index, False)
        share, leaves = run.of_pairs(i, j, local, starts[B])

        ref_tokens = ref_sums = r = ref_lse = kl = None
        size = ceil(n, plan.block)
        args = (y, layout.ignore_index, batch.transform)
        if ref_head is not None:
            assert batch.reference is not None
            h = ref_head.rows(batch.reference.hidden, index)
            r = ref_head.project(h, None, ref_buffer[:size])[:n]
            if not joint:
                ref_tokens = impl.token_logps(r[None], *args, ())[0]
        elif batch.ref_logps is not None and batch.ref_logps.dim() == 2:
            ref_tokens = batch.ref_logps.reshape(-1)[index][None]
        elif batch.ref_logps is not None:
            ref_sums = torch.cat([batch.ref_logps[i:j], batch.ref_logps[B + i : B + j]])

        h = head.rows(policy.hidden, index)
        low = head.low(h)
        z = head.project(h, low, buffer[:size])[:n]
        stats: dict[str, Tensor] = {}
        if joint:
            assert r is not None
            logps, lse, ref_tokens, ref_lse, kl = impl.token_kl(z[None], r[None], *args)
        if not joint or run.stats:
            logps, lse, table = impl.token_logps(z[None], *args, run.stats)
            stats = dict(zip(run.stats, table.unbind(0), strict=True))
        for column, stat in zip(columns, run.asked, strict=True):
            column.append(stats[stat][0])
        tokens = [logps] if kl is None else [logps, kl]  # what the gradient of logits depends on
        with torch.enable_grad():
            tokens = [x.detach().requires_grad_() for x in tokens]
            out = share.finish(TokenLogps(tokens[0], lse, stats), ref_tokens, ref_sums, *tokens[1:])
            wrt = [*tokens, *(getattr(share.options, name) for name in leaves)]
            slopes = _slopes(out.loss, wrt)
        fields.append([x.detach() for x in out])
        for name, slope in zip(leaves, slopes[len(tokens) :], strict=True):
            whole = d_options.setdefault(name, _zeros_like(getattr(run.options, name)))
            part = whole if whole.dim() == 0 else whole[i:j]
            part += slope
        if n and any(wanted.values()):
            d = head.gradient(z, impl)
            if r is not None and joint:
                impl.token_kl_backward(
                    *slopes[:2], z[None], r[None], y, lse, ref_lse, *args[1:], d[None]
                )
            else:
                impl.token_logps_backward(slopes[0], z[None], y, lse, *args[1:], d[None])
            dz = head.operand(d)
            d_low = head.d_low(dz)
            if packed is not None:
                packed[done : done + n] = head.d_hidden(dz, d_low)
            total.add(dz, d_low, h[:n], None if low is None else low[:n])
        done += n
    total.finish()
    grads = {"hidden": packed, **{name: getattr(total, name) for name in LinearInputs._fields[1:]},
             **d_options}  # fmt: skip
    loss = torch.stack([part[0] for part in fields]).sum()
    rest = [torch.cat(parts) for parts in zip(*(part[1:] for part in fields), strict=True)]
    found = {name: d for name, d in grads.items() if d is not None}
    index = torch.cat(order)
    shown = [_placed(torch.cat(column), index, layout.targets) for column in columns]
    return [loss, *rest, *shown], found, index


def _placed(values: Tensor, index: Tensor, targets: Tensor) -> Tensor:
    """[R, T] the values at their rows, 0 elsewhere."""
    out = values.new_zeros(targets.numel())
    out[index] = values
    return out.view(targets.shape)


def _boundaries(
    lengths: list[int], chunks: list[tuple[int, int]], device: torch.device
) -> tuple[Tensor, ...]:
    """Where the sequences of each chunk begin and end: one copy to the device, not one a chunk."""
    B = len(lengths) // 2
    cus = []
    for i, j in chunks:
        cus.append([0, *itertools.accumulate([*lengths[i:j], *lengths[B + i : B + j]])])
    # From pinned memory: the host does not wait for the device. One number more a chunk, so that
    # each begins at 16 bytes: a kernel is compiled for pointers that do.
    flat = torch.tensor([n for cu in cus for n in (*cu, 0)], device="cpu")
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    return tuple(cu[:-1] for cu in flat.split([len(cu) + 1 for cu in cus]))


def _slopes(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """d loss / d leaf, 0 where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, slopes, strict=True)]


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.float64, device=x.device)
