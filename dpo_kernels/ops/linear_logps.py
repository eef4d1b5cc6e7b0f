"""`linear_logps`: log-probs of scored rows from hidden states and the lm_head weight.

    logp[r, t] = token_logps(hidden[r, t] @ weight.T + (hidden[r, t] @ down.T) @ up.T + bias)

Only scored rows are projected, a chunk of rows at a time: no [R, T, V] tensor exists. What the
backward needs is had in one of three ways, by strategy:

    score      no gradient: one product (logits)
    frozen     hidden (or down) wants a gradient, weight, bias and up do not: the forward turns the
               chunk's logits into softmax - onehot and multiplies them by the weight while they
               are there; the backward scales each row of the result. Two products
    recompute  the backward projects again what the budget could not keep, turns logits into their
               gradient and accumulates. Three products for what was kept, four for the rest

The fourth way, pair streaming, needs the loss: `loss/stream_pairs.py`. Letters: `R` rows, `T`
positions, `N` scored rows, `H` hidden size, `V` vocabulary, `r` rank, `C` rows a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import List  # noqa: UP035  (torch 2.6 makes no schema of list[...])

import torch
from torch import Tensor

from .. import backends
from ..backends import torch as reference
from ..inputs import checks
from ..inputs.transform import LogitTransform
from .autocast import no_autocast
from .derivatives import check_mode, once, refuse_second
from .direct import Op
from .linear_head import Head, InputGradients, LinearInputs, count_scored, rows_of, scored_rows
from .plan import DEFAULT, Plan, plan_of
from .products import ceil
from .token_logps import TokenLogps, _names, check_stats

STRATEGIES = ("score", "frozen", "recompute")


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    ignore_index: int = -100,
    transform: LogitTransform | None = None,
    stats: tuple[str, ...] = (),
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    strategy: str | None = None,
    chunks_of: str | None = None,
    count: int | None = None,
    backend: str | None = None,
) -> TokenLogps:
    """Log-prob, log-sum-exp and statistics of each scored row, [R, T] and 0 where ignored.

    `hidden` [R, T, H], `weight` [V, H], `bias` [V] of one floating dtype (see `check_head`);
    `down` [r, H] fp32 and `up` [V, r] of a LoRA head; `targets` [R, T] int64. `memory_budget` bytes
    bound what is held beside inputs and gradients. `strategy` one of `STRATEGIES` or None: the
    cheapest that gives the gradients wanted; `chunks_of` another strategy whose chunks of rows are
    used, so that a reference goes through the very products of its policy. `count` is the number of
    scored rows where it is known: else the host waits for it. Raises `ValueError` or
    `TypeError`.
    """
    transform = transform or LogitTransform()
    check_head("hidden", hidden, weight, bias, targets)
    stats = check_stats(stats)
    name = backends.choose(backend, hidden.device, hidden.dtype)
    inputs = LinearInputs(hidden, weight, bias, down, up)
    if name != "torch":
        strategy = choose_strategy(strategy, *inputs)
    return rows_scored(
        inputs,
        targets,
        ignore_index,
        transform,
        stats,
        budget_of(memory_budget),
        batch_invariant,
        strategy or "",
        chunks_of,
        count,
        name,
    )


def rows_scored(
    inputs: LinearInputs,
    targets: Tensor,
    ignore_index: int,
    transform: LogitTransform,
    stats: tuple[str, ...],
    budget: int,
    invariant: bool,
    strategy: str,
    chunks_of: str | None,
    count: int | None,
    backend: str,
) -> TokenLogps:
    """`linear_logps` of arguments that are checked, by a strategy that is chosen."""
    if backend == "torch":
        return _plain(inputs, targets, ignore_index, transform, stats)
    check_mode(*inputs)
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
    )
    logps, lse, table = result[:3]
    return TokenLogps(logps, lse, dict(zip(stats, table.unbind(0), strict=True)))


def _plain(inputs, targets, ignore_index, transform, stats):
    """The meaning, in plain torch."""
    x = plain_logits(inputs, targets != ignore_index)
    logps, lse, table = reference.token_logps(x, targets, ignore_index, transform, stats)
    return TokenLogps(logps, lse, dict(zip(stats, table.unbind(0), strict=True)))


def plain_logits(inputs: LinearInputs, scored: Tensor) -> Tensor:
    """All rows at once [R, T, V], fp32 (fp64 of fp64), also under autocast; `scored` [R, T]."""
    wide = reference.accumulate_dtype(inputs.hidden.dtype)
    # Widened once: the gradients of both products are added before they are rounded.
    hidden, weight, bias, down, up = (None if x is None else x.to(wide) for x in inputs)
    assert hidden is not None and weight is not None
    hidden = reference.scored_only(hidden, scored)
    with no_autocast(hidden.device):
        x = torch.nn.functional.linear(hidden, weight, bias)
        return x if down is None or up is None else x + (hidden @ down.T) @ up.T


def check_head(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> None:
    """Shapes, one dtype and one device of hidden states and head; `name` is that of hidden."""
    weight_name, bias_name = name.replace("hidden", "weight"), name.replace("hidden", "bias")
    checks.floating(name, hidden)
    checks.floating(weight_name, weight)
    if hidden.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions [R, T, H], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"{weight_name} must have shape [V, H={hidden.shape[2]}] (H as {name} has), got "
            f"{list(weight.shape)}"
        )
    checks.shape("targets", targets, tuple(hidden.shape[:2]), f"that of {name} without H")
    checks.same_device(weight_name, weight, name, hidden)
    if bias is not None:
        checks.floating(bias_name, bias)
        checks.shape(bias_name, bias, (weight.shape[0],), f"one value a row of {weight_name}")
        checks.same_device(bias_name, bias, name, hidden)
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        got = f"{hidden.dtype}, {weight.dtype}" + (f", {bias.dtype}" if bias is not None else "")
        raise ValueError(f"{name}, {weight_name} and {bias_name} must have one dtype, got {got}")


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    impl = backends.load(backend)
    transform, names = LogitTransform(scale, softcap, inv_temperature), _names(stats)
    labels = targets.reshape(-1)
    rows = labels.shape[0]
    plan = plan_of(chunks_of, memory_budget, count, weight, down, up, invariant)
    head = Head(plan, weight, bias, down, up)
    logps = hidden.new_zeros(rows, dtype=torch.float32)
    lse = hidden.new_zeros(rows, dtype=torch.float64)
    table = hidden.new_zeros((len(names), rows), dtype=torch.float32)
    kept, d_hidden, d_low = _new_saved(strategy, plan, count, hidden, down)
    keep = plan.keep if strategy == "recompute" else 0
    index = scored_rows(targets, ignore_index, count)
    ones = hidden.new_ones(plan.chunk if strategy == "frozen" else 0, dtype=torch.float32)
    scratch: Tensor | None = None
    done = 0
    for part in _chunks(index, plan):
        n = part.shape[0]
        # A chunk is kept whole or not at all, and the kept ones come first.
        if done < keep:
            z = kept[done : done + ceil(n, plan.block), : head.V]
        else:
            if scratch is None:
                scratch = head.logits_buffer(min(plan.chunk, index.shape[0] - done))
            z = scratch[: ceil(n, plan.block)]
        h = head.rows(hidden, part)
        z = head.project(h, head.low(h), z)[:n]
        y = labels.index_select(0, part).unsqueeze(0)
        result = impl.token_logps(z[None], y, ignore_index, transform, names)
        logps.index_copy_(0, part, result[0][0])
        lse.index_copy_(0, part, result[1][0])
        if names:
            table.index_copy_(1, part, result[2][:, 0])
        done += n
        if strategy != "frozen":
            continue
        d = head.gradient(z, impl)
        impl.token_logps_backward(
            ones[None, :n], z[None], y, result[1], ignore_index, transform, d[None]
        )
        dz = head.operand(d)
        of_low = head.d_low(dz)
        d_hidden[done - n : done] = head.d_hidden(dz, of_low)
        if of_low is not None:
            d_low[done - n : done] = of_low
    shape = targets.shape
    table = table.view(len(names), *shape)
    return logps.view(shape), lse.view(shape), table, kept, d_hidden, d_low


def _chunks(index: Tensor, plan: Plan) -> list[Tensor]:
    """The rows in order: those that are kept, then the others, a chunk at a time."""
    kept, others = index[: plan.keep], index[plan.keep :]
    return [c for rows in (kept, others) for c in rows.split(plan.chunk) if c.shape[0]]


def _new_saved(strategy, plan, count, hidden, down):
    """What a strategy saves for the backward: kept logits, and unscaled gradients [N, ...]."""

    def stash(columns):
        wanted = strategy == "frozen" and columns is not None
        return hidden.new_empty((abs(count), columns) if wanted else 0, dtype=torch.float32)

    rows = ceil(plan.keep, plan.block) if strategy == "recompute" else 0
    kept = hidden.new_empty((rows, plan.pitch) if rows else 0, dtype=torch.float32)
    return kept, stash(hidden.shape[-1]), stash(None if down is None else down.shape[0])


@_linear_logps.register_fake
def _(
    hidden,
    weight,
    bias,
    down,
    up,
    targets,
    ignore_index,
    scale,
    softcap,
    inv_t,
    stats,
    strategy,
    chunks_of,
    count,
    budget,
    invariant,
    backend,
):
    logps = hidden.new_empty(targets.shape, dtype=torch.float32)
    lse = hidden.new_empty(targets.shape, dtype=torch.float64)
    table = hidden.new_empty((len(_names(stats)), *targets.shape), dtype=torch.float32)
    plan = plan_of(chunks_of, budget, count, weight, down, up, invariant)
    return logps, lse, table, *_new_saved(strategy, plan, count, hidden, down)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, down, up, targets, ctx.ignore_index, *transform, _ = inputs[:11]
    ctx.transform, ctx.strategy, ctx.tail = tuple(transform), inputs[11], inputs[12:]
    _, lse, table, kept, d_hidden, d_low = output
    ctx.mark_non_differentiable(lse, table, kept, d_hidden, d_low)
    # Else a gradient of zeros as large as the kept logits would be made for them.
    ctx.set_materialize_grads(False)
    if ctx.strategy == "frozen":
        # The rows of hidden are the other factor of a gradient of down.
        ctx.save_for_backward(d_hidden, d_low, targets, None if down is None else hidden)
        ctx.dtype = hidden.dtype
    else:
        ctx.save_for_backward(hidden, weight, bias, down, up, targets, lse, kept)


def _backward(ctx, grad, *_):
    wanted = ctx.needs_input_grad[:5]
    if grad is None:
        return (None,) * 17
    if ctx.strategy == "frozen":
        d_hidden, d_low, targets, hidden = ctx.saved_tensors
        given = targets, ctx.ignore_index, ctx.tail[1]
        dh = scaled_rows_op([grad], [d_hidden], *given, ctx.dtype) if wanted[0] else None
        d_down = scaled_product_op([grad], [d_low], hidden, *given) if wanted[3] else None
        return dh, None, None, d_down, *[None] * 13
    hidden, weight, bias, down, up, targets, lse, kept = ctx.saved_tensors
    grads = _backward_op(
        grad,
        hidden,
        weight,
        bias,
        down,
        up,
        targets,
        lse,
        kept,
        ctx.ignore_index,
        *ctx.transform,
        list(wanted),
        *ctx.tail,
    )
    return *(g if need else None for g, need in zip(grads, wanted, strict=True)), *[None] * 12


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
_op = Op(_linear_logps, _setup_context, _backward)


@torch.library.custom_op("dpo_kernels::scaled_rows", mutates_args=())
def scaled_rows(
    grads: List[Tensor],  # noqa: UP006  [R, T] each
    stashes: List[Tensor],  # noqa: UP006  [N, H] fp32 each
    targets: Tensor,  # [R, T]
    ignore_index: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """[R, T, H] of `dtype`: the sum of the stashed rows times their gradients, 0 where ignored."""
    H = stashes[0].shape[1]
    out = stashes[0].new_zeros((*targets.shape, H), dtype=dtype)
    flat = out.view(-1, H)
    for part, rows in _scaled(grads, stashes, targets, ignore_index, count):
        flat[part] = rows.to(dtype)
    return out


def _scaled(grads, stashes, targets, ignore_index, count) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices and values of rows, some at a time: products of all at once would be stashes too."""
    index = scored_rows(targets, ignore_index, count)
    for first in range(0, index.shape[0], 1024):
        part = index[first : first + 1024]
        rows = stashes[0].new_zeros((part.shape[0], stashes[0].shape[1]))
        for grad, stash in zip(grads, stashes, strict=True):
            g = grad.reshape(-1)[part].unsqueeze(1)
            # A row of gradient 0 gives 0 however bad its logits.
            rows += torch.where(g == 0, 0.0, stash[first : first + part.shape[0]] * g)
        yield part, rows


scaled_rows_op = Op(scaled_rows)


@scaled_rows.register_fake
def _(grads, stashes, targets, ignore_index, count, dtype):
    return stashes[0].new_empty((*targets.shape, stashes[0].shape[1]), dtype=dtype)


@torch.library.custom_op("dpo_kernels::scaled_product", mutates_args=())
def scaled_product(
    grads: List[Tensor],  # noqa: UP006  [R, T] each
    stashes: List[Tensor],  # noqa: UP006  [N, r] fp32 each
    hidden: Tensor,  # [R, T, H]
    targets: Tensor,  # [R, T]
    ignore_index: int,
    count: int,
) -> Tensor:
    """[r, H] fp32: the rows that `scaled_rows` gives, times those of hidden."""
    out = stashes[0].new_zeros((stashes[0].shape[1], hidden.shape[-1]))
    for part, rows in _scaled(grads, stashes, targets, ignore_index, count):
        out.addmm_(rows.T, rows_of(hidden, part).float())
    return out


scaled_product_op = Op(scaled_product)


@scaled_product.register_fake
def _(grads, stashes, hidden, targets, ignore_index, count):
    return stashes[0].new_empty((stashes[0].shape[1], hidden.shape[-1]))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    impl = backends.load(backend)
    transform = LogitTransform(scale, softcap, inv_temperature)
    labels, grad, lse = targets.reshape(-1), grad.reshape(-1), lse.reshape(-1)
    plan = plan_of(chunks_of, memory_budget, count, weight, down, up, invariant)
    head = Head(plan, weight, bias, down, up)
    gradients = InputGradients(head, LinearInputs(hidden, weight, bias, down, up), wanted)
    index = scored_rows(targets, ignore_index, count)
    scratch = head.logits_buffer(min(plan.chunk, index.shape[0]))
    done = 0
    for part in _chunks(index, plan):
        n = part.shape[0]
        h = head.rows(hidden, part)
        x = head.low(h)
        z = out = scratch[: ceil(n, plan.block)]
        if done < plan.keep:  # written beside: a second backward finds the logits as they were
            z = kept[done : done + ceil(n, plan.block), : head.V]
        else:
            head.project(h, x, z)
        done += n
        z, out = z[:n], head.gradient(out[:n], impl)
        impl.token_logps_backward(
            grad[part][None],
            z[None],
            labels[part][None],
            lse[part][None],
            ignore_index,
            transform,
            out[None],
        )
        gradients.add(out, h[:n], None if x is None else x[:n], part)
    return gradients.finish()


@_linear_logps_backward.register_fake
def _(
    grad,
    hidden,
    weight,
    bias,
    down,
    up,
    targets,
    lse,
    kept,
    ignore_index,
    scale,
    softcap,
    inv_t,
    wanted,
    chunks_of,
    count,
    budget,
    invariant,
    backend,
):
    return fake_gradients(LinearInputs(hidden, weight, bias, down, up), wanted)


refuse_second(_linear_logps_backward)
_backward_op = Op(_linear_logps_backward)


def fake_gradients(inputs: LinearInputs, wanted: list[bool]) -> tuple[Tensor, ...]:
    """What `InputGradients.finish` returns, unwritten."""
    return tuple(
        inputs.hidden.new_empty(
            0 if x is None or not want else x.shape, dtype=None if x is None else x.dtype
        )
        for x, want in zip(inputs, wanted, strict=True)
    )
