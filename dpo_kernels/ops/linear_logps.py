"""`linear_logps`: log-probs of scored rows from hidden states and the lm_head weight.

    logp[r, t] = token_logps(hidden[r, t] @ weight.T + (hidden[r, t] @ down.T) @ up.T + bias)

Only scored rows are projected, a chunk of rows at a time: no [R, T, V] tensor exists. Beside a
reference's head, without an adapter, a chunk is projected through both: log-probs and KL come from
the same two chunks of logits. What the backward needs is had in one of three ways, by strategy:

    score      no gradient: one product (logits); two beside a reference
    frozen     hidden (or down) wants a gradient, weight, bias and up do not: the forward turns the
               chunk's logits into softmax - onehot and multiplies them by the weight while they
               are there; the backward scales each row of the result. Two products. The KL has a
               gradient of its own, softmax(policy) - softmax(reference): four products
    recompute  the backward projects again what the budget could not keep, turns logits into their
               gradient and accumulates. Three products for what was kept, four for the rest.
               Beside a reference nothing is kept, two tensors of logits would be: six products

The fourth way, pair streaming, needs the loss: `loss/stream_pairs.py`. Letters: `R` rows, `T`
positions, `N` scored rows, `H` hidden size, `V` vocabulary, `r` rank, `C` rows a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, List  # noqa: UP035  (torch 2.6 makes no schema of list[...])

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference_backend
from ..inputs import checks
from ..inputs.transform import LogitTransform
from .autocast import no_autocast
from .derivatives import check_mode, once, refuse_second
from .direct import Op
from .linear_head import Head, InputGradients, LinearInputs, count_scored, scored_rows
from .plan import DEFAULT, Plan, plan_of
from .products import ceil
from .scaled_rows import scaled_product_op, scaled_rows_op
from .token_logps import (
    RowSlopes,
    TokenLogps,
    _names,
    backward,
    fake_rows,
    forward,
    read_rows,
)

STRATEGIES = ("score", "frozen", "recompute")


def rows_scored(
    inputs: LinearInputs,
    targets: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
    budget: int,
    invariant: bool,
    strategy: str,
    backend: str,
    *,
    reference: LinearInputs | None = None,
    chunks_of: str = "",
    count: int | None = None,
) -> TokenLogps:
    """Log-prob, log-sum-exp and statistics of each scored row, [R, T] and 0 where ignored; of a
    `reference`, detached, its log-probs and the KL too. The arguments are checked.

    `budget` bytes bound what is held beside inputs and gradients. `strategy` one of `STRATEGIES`
    that gives the gradients wanted (`choose_strategy`); `chunks_of` another strategy whose chunks
    of rows are used, so that a reference goes through the very products of its policy. `count` is
    the number of scored rows where it is known: else the host waits for it.
    """
    if backends.base(backend) == "torch":
        scored = targets != ignore_index
        x = plain_logits(inputs, scored)
        r = None if reference is None else plain_logits(reference, scored)
        return read_rows(x, targets, ignore_index, transform, stats, False, backend, r)
    beside = (None, None, None) if reference is None else tuple(reference)[:3]
    check_mode(*inputs, *beside)
    hidden, weight, bias, down, up = inputs
    if strategy == "frozen":
        hidden, down = once(hidden, down)  # type: ignore[assignment]
    result = _op(
        hidden,
        weight,
        bias,
        down,
        up,
        targets,
        ignore_index,
        transform.scale,
        transform.softcap,
        transform.inv_temperature,
        ",".join(stats),
        strategy,
        chunks_of or strategy,
        count_scored(targets, ignore_index) if count is None else count,
        budget,
        invariant,
        backend,
        *beside,
    )
    return TokenLogps.of(result[:6], stats, reference is not None)


def plain_logits(inputs: LinearInputs, scored: Tensor) -> Tensor:
    """All rows at once [R, T, V], fp32 (fp64 of fp64), also under autocast; `scored` [R, T]."""
    wide = reference_backend.accumulate_dtype(inputs.hidden.dtype)
    # Widened once: the gradients of both products are added before they are rounded.
    hidden, weight, bias, down, up = (None if x is None else x.to(wide) for x in inputs)
    assert hidden is not None and weight is not None
    hidden = reference_backend.scored_only(hidden, scored)
    with no_autocast(hidden.device):
        x = torch.nn.functional.linear(hidden, weight, bias)
        return x if down is None or up is None else x + (hidden @ down.T) @ up.T


def budget_of(memory_budget: object) -> int:
    if memory_budget is None:
        return DEFAULT
    return checks.whole("memory_budget", memory_budget, 1)


def choose_strategy(
    wish: str | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> str:
    """The cheapest strategy that gives the gradients wanted; `ValueError` if `wish` cannot."""

    def wanted(*tensors: Tensor | None) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    able: tuple[str, ...]
    if wanted(weight, bias, up):
        able = ("recompute",)
    elif wanted(hidden, down):
        able = ("frozen", "recompute")
    else:
        able = ("score",)
    if wish is None:
        return able[0]
    checks.choice("strategy", wish, STRATEGIES, " or None")
    if wish not in able:
        raise ValueError(
            f"strategy={wish!r} does not give the gradients that are wanted here; "
            f"{' or '.join(able)} does"
        )
    return wish


class _Heads:
    """The head, that of a reference beside it, and the chunks of logits they fill."""

    def __init__(self, plan: Plan, policy: LinearInputs, reference: LinearInputs | None) -> None:
        self.policy, self.reference = policy, reference
        self.head = Head(plan, policy.weight, policy.bias, policy.down, policy.up)
        self.ref_head = None
        if reference is not None:
            self.ref_head = Head(plan, reference.weight, reference.bias)
        self._z: Tensor | None = None
        self._r: Tensor | None = None

    def rows(self, part: Tensor) -> tuple[Tensor, Tensor | None]:
        """The policy's rows at `part` as the products take them, [C, H] and [C, r]."""
        h = self.head.rows(self.policy.hidden, part)
        return h, self.head.low(h)

    def buffer(self, rows: int, most: int) -> Tensor:
        """[rows (whole blocks), V] for logits of the policy, of which `most` are still to come."""
        if self._z is None:
            self._z = self.head.logits_buffer(min(self.head.plan.chunk, most))
        return self._z[: ceil(rows, self.head.plan.block)]

    def reference_logits(self, part: Tensor) -> Tensor | None:
        """[1, n, V] of a reference at `part`; None without one."""
        if self.ref_head is None or self.reference is None:
            return None
        rows, n = self.ref_head.rows(self.reference.hidden, part), part.shape[0]
        if self._r is None:  # no chunk is larger than the first: nothing is kept beside a reference
            self._r = self.ref_head.logits_buffer(n)
        return self.ref_head.project(rows, None, self._r[: rows.shape[0]])[None, :n]


def _heads(a: SimpleNamespace) -> tuple[_Heads, LogitTransform, ModuleType]:
    """Of the arguments of the op or its backward: the heads, the transform, the backend."""
    policy = LinearInputs(a.hidden, a.weight, a.bias, a.down, a.up)
    reference = None
    if a.ref_hidden is not None:
        reference = LinearInputs(a.ref_hidden, a.ref_weight, a.ref_bias)
    transform = LogitTransform(a.scale, a.softcap, a.inv_temperature)
    return _Heads(_plan(a), policy, reference), transform, backends.load(a.backend)


def _plan(a: SimpleNamespace) -> Plan:
    joint = a.ref_hidden is not None
    ref_H = a.ref_weight.shape[1] if joint else 0
    head = (a.weight, a.down, a.up)
    given = (a.chunks_of, a.memory_budget, a.count, *head, a.invariant, ref_H, joint)
    return plan_of(*given, columns=backends.widest(a.backend))


@torch.library.custom_op("dpo_kernels::linear_logps", mutates_args=())
def _linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    stats: str,
    strategy: str,
    chunks_of: str,
    count: int,
    memory_budget: int,
    invariant: bool,
    backend: str,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a = SimpleNamespace(**locals())
    names, labels = _names(stats), targets.reshape(-1)
    heads, transform, impl = _heads(a)
    head, plan = heads.head, heads.head.plan
    results = [x.zero_() for x in fake_rows(hidden, targets, len(names), ref_hidden)]
    flat = [x.flatten(-2) for x in results if x.dim() > 1]
    kept, *stashes = _new_saved(a, plan)
    index = scored_rows(targets, ignore_index, count)
    ones = hidden.new_ones((1, plan.chunk if strategy == "frozen" else 0), dtype=torch.float32)
    # Over shards of the vocabulary the ranks meet once for all chunks, where they can.
    shards: Any = impl if strategy != "frozen" and hasattr(impl, "combined") else None
    parts: list[Any] = []
    done = 0
    for part in _chunks(index, plan):
        n = part.shape[0]
        # A chunk is kept whole or not at all, and the kept ones come first.
        if done < kept.shape[0]:
            z = kept[done : done + ceil(n, plan.block), : head.V]
        else:
            z = heads.buffer(n, index.shape[0] - done)
        r = heads.reference_logits(part)
        z = head.project(*heads.rows(part), z)[None, :n]
        y = labels.index_select(0, part).unsqueeze(0)
        done += n
        if shards is not None:
            parts.append(shards.local(z, r, y, ignore_index, transform, names))
            continue
        found = forward(impl, z, y, ignore_index, transform, names, r)
        _place_rows(flat, found, part)
        if strategy == "frozen":
            g, lse, ref_lse = ones[:, :n], found[1], found[4]
            # Over the reference's logits, then over the policy's: neither is needed any more.
            slopes: list[tuple[Tensor, RowSlopes, Tensor | None]]
            slopes = [(z, RowSlopes(g, y, lse), None)]
            if r is not None:
                slopes.append((r, RowSlopes(torch.zeros_like(g), y, lse, g, ref_lse), r))
            for i, (over, rows, ref) in reversed(list(enumerate(slopes))):
                d = head.gradient(over[0], impl)
                backward(impl, rows, z, ref, ignore_index, transform, d[None])
                dz = head.operand(d)
                of_low = head.d_low(dz)
                stashes[0][i, done - n : done] = head.d_hidden(dz, of_low)
                if of_low is not None:
                    stashes[1][i, done - n : done] = of_low
    if parts:
        y = labels.index_select(0, index).unsqueeze(0)
        _place_rows(flat, shards.combined(parts, y, ignore_index, names), index)
    return *results, kept, *stashes  # type: ignore[return-value]


def _place_rows(flat: list[Tensor], found: Sequence[Tensor | None], index: Tensor) -> None:
    """What was found of the rows at `index` into results of all rows."""
    for out, value in zip(flat, found, strict=False):
        if value is not None:
            out.index_copy_(-1, index, value.squeeze(-2))


def _chunks(index: Tensor, plan: Plan) -> list[Tensor]:
    """The rows in order: those that are kept, then the others, a chunk at a time."""
    kept, others = index[: plan.keep], index[plan.keep :]
    return [c for rows in (kept, others) for c in rows.split(plan.chunk) if c.shape[0]]


def _new_saved(a: SimpleNamespace, plan: Plan) -> list[Tensor]:
    """What a strategy saves for the backward: kept logits, and unscaled gradients [k, N, H] and
    [k, N, r], of the log-prob and, beside a reference, of the KL."""

    def stash(x: Tensor | None, columns: int) -> Tensor:
        wanted = a.strategy == "frozen" and x is not None
        k = 1 if a.ref_hidden is None else 2
        return a.hidden.new_empty((k, abs(a.count), columns) if wanted else 0, dtype=torch.float32)

    rows = ceil(plan.keep, plan.block) if a.strategy == "recompute" else 0
    kept = a.hidden.new_empty((rows, plan.pitch) if rows else 0, dtype=torch.float32)
    low = 0 if a.down is None else a.down.shape[0]
    return [kept, stash(a.hidden, a.hidden.shape[-1]), stash(a.down, low)]


@_linear_logps.register_fake
def _(*arguments):
    a = _op.named(arguments)
    results = fake_rows(a.hidden, a.targets, len(_names(a.stats)), a.ref_hidden)
    return *results, *_new_saved(a, _plan(a))


def _setup_context(ctx, inputs, output):
    a, ctx.options = _op.named(inputs), _op.options(inputs)
    _, lse, table, ref_logps, ref_lse, kl, kept, *stashes = output
    rest = [kl] if a.ref_hidden is None else []
    ctx.mark_non_differentiable(lse, table, ref_logps, ref_lse, kept, *stashes, *rest)
    # Else a gradient of zeros as large as the kept logits would be made for them.
    ctx.set_materialize_grads(False)
    if a.strategy == "frozen":
        # The rows of hidden are the other factor of a gradient of down.
        ctx.save_for_backward(a.targets, *stashes, None if a.down is None else a.hidden)
        ctx.dtype, ctx.joint = a.hidden.dtype, a.ref_hidden is not None
        return
    policy = (a.hidden, a.weight, a.bias, a.down, a.up)
    ref = (a.ref_hidden, a.ref_weight, a.ref_bias, None if rest else ref_lse)
    ctx.save_for_backward(*policy, a.targets, lse, kept, *ref)


def _backward(ctx, grad, _lse, _table, _ref_logps, _ref_lse, grad_kl, *_):
    if grad is None and grad_kl is None:
        return _op.gradients()
    wanted = dict(zip(LinearInputs._fields, ctx.needs_input_grad[:5], strict=True))
    a, saved = ctx.options, ctx.saved_tensors
    if a.strategy == "frozen":
        targets, d_hidden, d_low, hidden = saved
        slopes = [grad, grad_kl] if ctx.joint else [grad]
        slopes = [d_hidden.new_zeros(targets.shape) if g is None else g for g in slopes]
        given = (targets, a.ignore_index, a.count)
        found = {}
        if wanted["hidden"]:
            found["hidden"] = scaled_rows_op(slopes, list(d_hidden.unbind(0)), *given, ctx.dtype)
        if wanted["down"]:
            found["down"] = scaled_product_op(slopes, list(d_low.unbind(0)), hidden, *given)
        return _op.gradients(**found)
    *inputs, ref_hidden, ref_weight, ref_bias, ref_lse = saved
    if ref_hidden is not None:
        lse = inputs[6]
        grad, grad_kl = (torch.zeros_like(lse) if g is None else g for g in (grad, grad_kl))
    grads = _backward_op(
        grad,
        *inputs,
        a.ignore_index,
        a.scale,
        a.softcap,
        a.inv_temperature,
        list(wanted.values()),
        a.chunks_of,
        a.count,
        a.memory_budget,
        a.invariant,
        a.backend,
        grad_kl,
        ref_hidden,
        ref_weight,
        ref_bias,
        ref_lse,
    )
    return _op.gradients(**{n: g for n, g in zip(wanted, grads, strict=True) if wanted[n]})


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
_op = Op(_linear_logps, _setup_context, _backward)


@torch.library.custom_op("dpo_kernels::linear_logps_backward", mutates_args=())
def _linear_logps_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    kept: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    inv_temperature: float,
    wanted: List[bool],  # noqa: UP006
    chunks_of: str,
    count: int,
    memory_budget: int,
    invariant: bool,
    backend: str,
    grad_kl: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    heads, transform, impl = _heads(SimpleNamespace(**locals()))
    head, plan = heads.head, heads.head.plan
    flat = RowSlopes(
        *(None if x is None else x.reshape(-1) for x in (grad, targets, lse, grad_kl, ref_lse))  # type: ignore[arg-type]
    )
    gradients = InputGradients(head, heads.policy, wanted)
    index = scored_rows(targets, ignore_index, count)
    done = 0
    for part in _chunks(index, plan):
        n = part.shape[0]
        h, low = heads.rows(part)
        z = out = heads.buffer(n, index.shape[0])
        r = heads.reference_logits(part)
        if done < plan.keep:  # written beside: a second backward finds the logits as they were
            z = kept[done : done + ceil(n, plan.block), : head.V]
        else:
            head.project(h, low, z)
        done += n
        z, out = z[:n], head.gradient(out[:n], impl)
        rows = RowSlopes(*(None if x is None else x[part][None] for x in flat))  # type: ignore[arg-type]
        backward(impl, rows, z[None], r, ignore_index, transform, out[None])
        gradients.add(out, h[:n], None if low is None else low[:n], part)
    return gradients.finish()


@_linear_logps_backward.register_fake
def _(*arguments):
    """What `InputGradients.finish` returns, unwritten."""
    a = _backward_op.named(arguments)
    return tuple(
        a.hidden.new_empty(
            0 if x is None or not want else x.shape, dtype=None if x is None else x.dtype
        )
        for x, want in zip((a.hidden, a.weight, a.bias, a.down, a.up), a.wanted, strict=True)
    )


refuse_second(_linear_logps_backward)
_backward_op = Op(_linear_logps_backward)
