"""`linear_kl`: `token_kl` of two linear heads, projecting only scored rows, side by side.

    logits = hidden @ weight.T + (hidden @ down.T) @ up.T + bias

and ref_logits likewise, without an adapter.

A chunk of rows is projected through both heads; log-probs and KL come from the same two chunks of
logits, which are all that exists of them. Strategies as in `linear_logps.py`, each with one product
more for the reference's logits, and for a KL a gradient of its own:

    score      two products
    frozen     the forward turns the chunk into softmax(policy) - softmax(reference) and into
               onehot - softmax(policy), each times the weight; the backward scales and adds the
               rows of both. Four products
    recompute  the backward projects both again (nothing is kept: two tensors of logits would be)
               and accumulates. Six products

and streaming (`loss/stream_pairs.py`), which forms the gradient of a pair while both chunks are
there: four products, three with a frozen head. Letters as `linear_logps.py`.
"""

from __future__ import annotations

from typing import List  # noqa: UP035  (torch 2.6 makes no schema of list[...])

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference_backend
from ..inputs.transform import LogitTransform
from .derivatives import check_mode, once, refuse_second
from .direct import Op
from .linear_head import Head, InputGradients, LinearInputs, count_scored, scored_rows
from .linear_logps import (
    budget_of,
    choose_strategy,
    fake_gradients,
    plain_logits,
    scaled_product_op,
    scaled_rows_op,
)
from .plan import Plan, plan_of
from .products import ceil
from .token_kl import TokenKL
from .token_logps import TokenLogps, _names, check_stats


def linear_kl(
    policy: LinearInputs,
    reference: LinearInputs,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    transform: LogitTransform | None = None,
    stats: tuple[str, ...] = (),
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    strategy: str | None = None,
    count: int | None = None,
    backend: str | None = None,
) -> TokenKL:
    """As `token_kl` of the two heads' logits. Arguments are checked by the caller (`check_head`).

    `targets` [R, T]; `memory_budget`, `batch_invariant`, `strategy` as `linear_logps`; `count` the
    number of scored rows where it is known.
    """
    transform = transform or LogitTransform()
    reference, stats = reference.detached(), check_stats(stats)
    hidden = policy.hidden
    name = backends.choose(backend, hidden.device, hidden.dtype, "token_kl")
    if name == "torch":
        scored = targets != ignore_index
        logits, ref_logits = plain_logits(policy, scored), plain_logits(reference, scored)
        call = (ignore_index, transform)
        logps, lse, ref_logps, _, kl = reference_backend.token_kl(
            logits, ref_logits, targets, *call
        )
        table = reference_backend.token_logps(logits.detach(), targets, *call, stats)[2]
    else:
        strategy = choose_strategy(strategy, *policy)
        check_mode(*policy, *reference)
        if strategy == "frozen":
            policy = LinearInputs(*once(*policy))  # type: ignore[arg-type]
        logps, lse, table, ref_logps, _, kl = _op(
            *policy,
            reference.hidden,
            reference.weight,
            reference.bias,
            targets,
            ignore_index,
            transform.scale,
            transform.softcap,
            transform.inv_temperature,
            ",".join(stats),
            strategy,
            count_scored(targets, ignore_index) if count is None else count,
            budget_of(memory_budget),
            batch_invariant,
            name,
        )[:6]
    tokens = TokenLogps(logps, lse, dict(zip(stats, table.unbind(0), strict=True)))
    return TokenKL(tokens, ref_logps, kl)


def _plan(strategy, budget, count, weight, down, up, ref_weight, invariant) -> Plan:
    ref_H = ref_weight.shape[1]
    return plan_of(strategy, budget, count, weight, down, up, invariant, ref_H, joint=True)


class _Heads:
    """Both heads, and the two chunks of logits they fill."""

    def __init__(self, plan: Plan, policy: LinearInputs, reference: LinearInputs, rows: int):
        self.policy, self.reference = policy, reference
        self.head = Head(plan, policy.weight, policy.bias, policy.down, policy.up)
        self.ref_head = Head(plan, reference.weight, reference.bias)
        chunk = min(plan.chunk, rows)
        self.z, self.r = self.head.logits_buffer(chunk), self.ref_head.logits_buffer(chunk)

    def project(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits [n, V] of policy and reference, and the policy's rows [n, H] and [n, r]."""
        n, policy = index.shape[0], self.policy
        whole = ceil(n, self.head.plan.block)
        r = self.ref_head.project(
            self.ref_head.rows(self.reference.hidden, index), None, self.r[:whole]
        )
        h = self.head.rows(policy.hidden, index)
        low = self.head.low(h)
        z = self.head.project(h, low, self.z[:whole])
        return z[:n], r[:n], h[:n], None if low is None else low[:n]


@torch.library.custom_op("dpo_kernels::linear_kl", mutates_args=())
def _linear_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    stats: str,
    strategy: str,
    count: int,
    memory_budget: int,
    invariant: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    impl = backends.load(backend)
    transform, names = LogitTransform(scale, softcap, inv_temperature), _names(stats)
    labels = targets.reshape(-1)
    plan = _plan(strategy, memory_budget, count, weight, down, up, ref_weight, invariant)
    index = scored_rows(targets, ignore_index, count)
    heads = _Heads(
        plan,
        LinearInputs(hidden, weight, bias, down, up),
        LinearInputs(ref_hidden, ref_weight, ref_bias),
        index.shape[0],
    )
    results = [hidden.new_zeros(s, dtype=d) for s, d in _results(targets, len(names))]
    flat = [x.flatten(-2) for x in results]
    stashes = _stashes(strategy, count, hidden, down)
    ones = hidden.new_ones(plan.chunk, dtype=torch.float32)
    done = 0
    for part in index.split(plan.chunk):
        n = part.shape[0]
        z, r, _, _ = heads.project(part)
        y = labels[part][None]
        found = impl.token_kl(z[None], r[None], y, ignore_index, transform)
        table = None
        if names:
            table = impl.token_logps(z[None], y, ignore_index, transform, names)[2]
        logps, lse, ref_logps, ref_lse, kl = found
        for out, value in zip(flat, (logps, lse, table, ref_logps, ref_lse, kl), strict=True):
            if value is not None:
                out[..., part] = value.squeeze(-2)
        if strategy == "frozen":
            g = ones[None, :n]
            # Over the reference's logits, then over the policy's: neither is needed any more.
            for i in (1, 0):
                d = heads.head.gradient(r if i else z, impl)
                if i:
                    impl.token_kl_backward(
                        torch.zeros_like(g),
                        g,
                        z[None],
                        r[None],
                        y,
                        lse,
                        ref_lse,
                        ignore_index,
                        transform,
                        d[None],
                    )
                else:
                    impl.token_logps_backward(g, z[None], y, lse, ignore_index, transform, d[None])
                dz = heads.head.operand(d)
                of_low = heads.head.d_low(dz)
                stashes[0][i, done : done + n] = heads.head.d_hidden(dz, of_low)
                if of_low is not None:
                    stashes[1][i, done : done + n] = of_low
        done += n
    return *results, *stashes  # type: ignore[return-value]


def _results(targets: Tensor, stats: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of logps, lse, statistics, ref_logps, ref_lse, kl."""
    shape, narrow, wide = tuple(targets.shape), torch.float32, torch.float64
    return [
        (shape, narrow),
        (shape, wide),
        ((stats, *shape), narrow),
        (shape, narrow),
        (shape, wide),
        (shape, narrow),
    ]


def _stashes(strategy: str, count: int, hidden: Tensor, down: Tensor | None) -> list[Tensor]:
    """Unscaled gradients [2, N, H] and [2, N, r], of log-prob and KL, for a frozen head."""
    columns = hidden.shape[-1], None if down is None else down.shape[0]
    return [
        hidden.new_empty(
            (2, abs(count), n) if strategy == "frozen" and n is not None else 0, dtype=torch.float32
        )
        for n in columns
    ]


@_linear_kl.register_fake
def _(
    hidden,
    weight,
    bias,
    down,
    up,
    ref_hidden,
    ref_weight,
    ref_bias,
    targets,
    ignore_index,
    scale,
    softcap,
    inv_t,
    stats,
    strategy,
    count,
    budget,
    invariant,
    backend,
):
    results = [hidden.new_empty(s, dtype=d) for s, d in _results(targets, len(_names(stats)))]
    return *results, *_stashes(strategy, count, hidden, down)


def _setup_context(ctx, inputs, output):
    tensors, ctx.ignore_index, ctx.transform = inputs[:9], inputs[9], tuple(inputs[10:13])
    ctx.strategy, ctx.tail = inputs[14], inputs[15:]
    _, lse, table, ref_logps, ref_lse, _, *stashes = output
    ctx.mark_non_differentiable(lse, table, ref_logps, ref_lse, *stashes)
    if ctx.strategy == "frozen":
        # The rows of hidden are the other factor of a gradient of down.
        hidden, down = tensors[0], tensors[3]
        ctx.save_for_backward(tensors[8], *stashes, None if down is None else hidden)
        ctx.dtype = hidden.dtype
    else:
        ctx.save_for_backward(*tensors, lse, ref_lse)


def _backward(ctx, grad_logps, _lse, _table, _ref_logps, _ref_lse, grad_kl, *_):
    wanted = ctx.needs_input_grad[:5]
    if ctx.strategy == "frozen":
        targets, d_hidden, d_low, hidden = ctx.saved_tensors
        given, slopes = (targets, ctx.ignore_index, ctx.tail[0]), [grad_logps, grad_kl]
        dh = d_down = None
        if wanted[0]:
            dh = scaled_rows_op(slopes, list(d_hidden.unbind(0)), *given, ctx.dtype)
        if wanted[3]:
            d_down = scaled_product_op(slopes, list(d_low.unbind(0)), hidden, *given)
        return dh, None, None, d_down, *[None] * 15
    grads = _backward_op(
        grad_logps,
        grad_kl,
        *ctx.saved_tensors,
        ctx.ignore_index,
        *ctx.transform,
        list(wanted),
        *ctx.tail,
    )
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), *[None] * 14


_linear_kl.register_autograd(_backward, setup_context=_setup_context)
_op = Op(_linear_kl, _setup_context, _backward)


@torch.library.custom_op("dpo_kernels::linear_kl_backward", mutates_args=())
def _linear_kl_backward(
    grad_logps: Tensor,
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    wanted: List[bool],  # noqa: UP006
    count: int,
    memory_budget: int,
    invariant: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    impl = backends.load(backend)
    transform = LogitTransform(scale, softcap, inv_temperature)
    rows = [x.reshape(-1) for x in (grad_logps, grad_kl, targets, lse, ref_lse)]
    plan = _plan("recompute", memory_budget, count, weight, down, up, ref_weight, invariant)
    index = scored_rows(targets, ignore_index, count)
    policy = LinearInputs(hidden, weight, bias, down, up)
    heads = _Heads(plan, policy, LinearInputs(ref_hidden, ref_weight, ref_bias), index.shape[0])
    gradients = InputGradients(heads.head, policy, wanted)
    for part in index.split(plan.chunk):
        z, r, h, x = heads.project(part)
        g_logps, g_kl, y, row_lse, row_ref_lse = (v[part][None] for v in rows)
        d = heads.head.gradient(z, impl)
        impl.token_kl_backward(
            g_logps,
            g_kl,
            z[None],
            r[None],
            y,
            row_lse,
            row_ref_lse,
            ignore_index,
            transform,
            d[None],
        )
        gradients.add(d, h, x, part)
    return gradients.finish()


@_linear_kl_backward.register_fake
def _(
    grad_logps,
    grad_kl,
    hidden,
    weight,
    bias,
    down,
    up,
    ref_hidden,
    ref_weight,
    ref_bias,
    targets,
    lse,
    ref_lse,
    ignore_index,
    scale,
    softcap,
    inv_t,
    wanted,
    count,
    budget,
    invariant,
    backend,
):
    return fake_gradients(LinearInputs(hidden, weight, bias, down, up), wanted)


refuse_second(_linear_kl_backward)
_backward_op = Op(_linear_kl_backward)
