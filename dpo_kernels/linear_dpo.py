"""The front functions over a linear head: log-probs and DPO losses from hidden states.

What is computed never depends on the strategy, only what it costs does:

    streaming  loss is a sum over pairs and the head is trained: gradients are formed while a
               pair's logits are there (`loss/stream_pairs.py`). Three products
    frozen     the head is not trained: two products, any loss (`ops/linear_logps.py`)
    recompute  the head is trained and the loss couples the batch, or is wanted a pair, or a pair
               is larger than the budget: three products for the rows whose logits the budget can
               keep, four for the others
    score      nothing wants a gradient: one product

A reference given as hidden states costs one product more. Losses of whole distributions (`tdpo1`,
`tdpo2`) have it projected beside the policy (`ops/linear_kl.py`), and are streamed with a frozen
head too: there that is the cheapest.

Letters: `B` pairs, `T` positions, `N` rows of packed input, `V` vocabulary, `H` hidden size, `r`
rank of a LoRA adapter.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from . import listwise, ops
from .backends import choose
from .inputs import checks
from .inputs.call import settle
from .inputs.layout import Layout, Scored
from .inputs.transform import LogitTransform
from .listwise import is_listwise
from .loss.from_pairs import DPOOutput
from .loss.from_tokens import TokenLoss, head_size, op_of, reduce, wide_dtype
from .loss.stream_pairs import Streaming, stream
from .ops import LinearInputs, TokenLogps

logger = logging.getLogger("dpo_kernels")

STRATEGIES = ("streaming", "frozen", "recompute", "score")


def fused_linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_logps_per_token: bool | None = None,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    strategy: str | None = None,
    stats: tuple[str, ...] = (),
    cu_seqlens: Tensor | None = None,
    scored_lengths: Tensor | list[int] | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    drop_common_prefix: bool = False,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    **loss_options: Any,
) -> DPOOutput:
    """DPO loss of a batch of pairs straight from hidden states and the lm_head weight.

    As `fused_dpo_loss` of `hidden @ weight.T + bias`, without the [2B, T, V] logits: only scored
    rows are projected, packed, a chunk at a time. Logits, log-probs and accumulators are fp32
    whatever the input; gradients are rounded to their input's dtype once.

    Args:
        hidden: [2B, T, H] or packed [N, H], the policy's last hidden states.
        weight: [V, H] lm_head weight; bias: [V].
        lora: (A [r, H], B [V, r], scaling), an adapter on the head: the weight is
            `weight + scaling * B @ A`, without forming it. Gradients go to A and B.
        labels, cu_seqlens, shift, ignore_index, drop_common_prefix: as `fused_dpo_loss`.
        scored_lengths: [2B] scored tokens of each sequence, a list or CPU tensor of integers. With
            hidden states on a GPU the host waits for the device once, to learn these, unless they
            are given or labels (and cu_seqlens) are on the CPU; labels are moved where hidden is.
            Checked against labels on the CPU; on a GPU they are trusted and must be right. With
            drop_common_prefix they say nothing of the tokens that are left.
        ref_hidden: [2B, T, H'] reference hidden states, scored without gradient with `ref_weight`
            [V, H'] and `ref_bias`, or with `weight` and `bias` detached (and without `lora`); or
        ref_logps, ref_logps_per_token: as `fused_dpo_loss`.
        memory_budget: bytes that may be held beside inputs and gradients (one fp32 [V, H]
            accumulator besides where a weight that is not fp32 wants a gradient). At least 16 rows
            of logits (of both models for `tdpo1` and `tdpo2`), and the fp32 gradient of the scored
            hidden states, are held however small it is. The default is for the logits of a chunk:
            on GPUs the whole pairs nearest to 2 GiB, and 1024 rows at least; on CPUs 256 MiB, up to
            1 GiB to hold the largest pair. It changes time and memory, the result by rounding
            alone.
        batch_invariant: project in blocks of one fixed height, so that a pair has bitwise the
            same log-probs whatever shares its batch and whatever the budget. Without it that
            holds wherever the BLAS sums a row alike in any product of 16 rows or more (MKL does).
        strategy: "streaming", "frozen", "recompute" or "score" instead of the cheapest that gives
            the gradients wanted (see `linear_dpo.py`); `DPOOutput.strategy` and the debug log of
            `logging.getLogger("dpo_kernels")` say which was taken. Under torch.compile
            "streaming" is not available.
        stats: as `fused_dpo_loss`, under every strategy.
        temperature, logit_softcap, logit_scale, backend, **loss_options: as `fused_dpo_loss`. The
            "torch" backend has no strategies: it forms all logits.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any kernel runs.
        RuntimeError: a second backward through a result of "streaming".
    """
    if is_listwise(loss_options):
        listwise.refuse_prefix(drop_common_prefix)
        if strategy is not None:
            raise ValueError(f"strategy={strategy!r} has no meaning for {listwise.NAME!r}")
        how: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "scored_lengths": scored_lengths,
            "shift": shift,
            "ignore_index": ignore_index,
            "memory_budget": memory_budget,
            "batch_invariant": batch_invariant,
            "temperature": temperature,
            "logit_softcap": logit_softcap,
            "logit_scale": logit_scale,
            "backend": backend,
        }
        sums = listwise.reference_sums(ref_logps, ref_hidden is not None, "ref_hidden")
        found = linear_sequence_logps(
            hidden, weight, labels, bias=bias, lora=lora, stats=stats, **how
        )
        if ref_hidden is not None:
            other = (ref_weight, ref_bias, None) if ref_weight is not None else (weight, bias, lora)
            with torch.no_grad():
                sums = linear_sequence_logps(
                    ref_hidden, other[0], labels, bias=other[1], lora=other[2], **how
                )
        return listwise.from_scored(found, stats, sums, loss_options)
    given = {
        "shift": shift,
        "ignore_index": ignore_index,
        "drop_common_prefix": drop_common_prefix,
        "ref_logps_per_token": ref_logps_per_token,
        "memory_budget": memory_budget,
        "batch_invariant": batch_invariant,
        "strategy": strategy,
        "stats": stats,
        "backend": backend,
        "temperature": temperature,
        "logit_softcap": logit_softcap,
        "logit_scale": logit_scale,
    }
    settled = settle(given, loss_options)
    transform = settled.transform
    V, of = head_size(hidden, weight), Scored("hidden", hidden, "H")
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V, scored=of)
    layout = layout.on(checks.floating("hidden", hidden).device, scored_lengths)
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden, got None")
    if ref_bias is not None and ref_weight is None:
        raise ValueError("ref_bias needs ref_weight, got None")
    name = choose(backend, hidden.device, hidden.dtype, op_of(settled.losses))
    run = TokenLoss.of(settled, layout, name, wide_dtype(hidden), ref_logps_per_token)
    run.check(ref_hidden is not None, "ref_hidden", ref_logps)
    if drop_common_prefix:
        run = run.without_common_prefix(ref_logps, layout.rows("hidden", hidden, "H"))
        layout = run.layout
    policy = _inputs("hidden", layout, hidden, weight, bias, lora)
    reference = None
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias
        rows_of_head = checks.floating("ref_weight", ref_weight).shape[:1]
        if tuple(rows_of_head) != (V,):
            raise ValueError(
                f"ref_weight must have shape [V={V}, H'] (the policy's vocabulary), got "
                f"{list(ref_weight.shape)}"
            )
        reference = _inputs("ref_hidden", layout, ref_hidden, ref_weight, ref_bias).detached()
        ops.check_head(
            "ref_hidden", reference.hidden, reference.weight, reference.bias, layout.targets
        )
    ops.check_head("hidden", policy.hidden, policy.weight, policy.bias, layout.targets)
    ops.budget_of(memory_budget)  # refused here, before any work
    if not run.uses_reference:
        reference = None
    if name == "torch":
        if strategy is not None:
            raise ValueError(f"strategy={strategy!r}: the torch backend has no strategies")
        strategy = "plain"
    else:
        found = None
        if strategy in (None, "streaming"):
            found = _streamable(run, policy, reference, memory_budget, batch_invariant, strategy)
        if found is not None:
            out = _streamed(run, policy, reference, ref_logps, found, transform)
            return _tell(out, "streaming", layout, name)
        strategy = ops.choose_strategy(strategy, *policy)
    if run.needs_kl:
        assert reference is not None
        joint = ops.linear_kl(
            policy,
            reference,
            layout.targets,
            ignore_index=ignore_index,
            transform=transform,
            stats=run.stats,
            memory_budget=memory_budget,
            batch_invariant=batch_invariant,
            strategy=None if strategy == "plain" else strategy,
            count=layout.count,
            backend=name,
        )
        out = run.finish(joint.policy, joint.ref_logps, None, joint.kl)
    else:
        tokens, ref_tokens = _score(
            run, policy, reference, transform, memory_budget, batch_invariant, strategy
        )
        out = run.finish(tokens, ref_tokens, ref_logps)
    return _tell(out, strategy, layout, name)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    reduction: str = "sum",
    stats: tuple[str, ...] = (),
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    strategy: str | None = None,
    cu_seqlens: Tensor | None = None,
    scored_lengths: Tensor | list[int] | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
) -> Any:
    """`sequence_logps` of `hidden @ weight.T + bias`, projecting only scored rows, in chunks.

    `hidden` [sequences, T, H] or packed [N, H], `weight` [V, H], `bias` [V]; the rest as
    `sequence_logps` and `fused_linear_dpo_loss` (without "streaming", which needs a loss).
    """
    given = {
        "shift": shift,
        "ignore_index": ignore_index,
        "reduction": reduction,
        "stats": stats,
        "memory_budget": memory_budget,
        "batch_invariant": batch_invariant,
        "backend": backend,
        "temperature": temperature,
        "logit_softcap": logit_softcap,
        "logit_scale": logit_scale,
    }
    settled = settle(given, {})
    V, of = head_size(hidden, weight), Scored("hidden", hidden, "H")
    layout = Layout.of(labels, cu_seqlens, shift=shift, ignore_index=ignore_index, V=V, scored=of)
    layout = layout.on(checks.floating("hidden", hidden).device, scored_lengths)
    inputs = _inputs("hidden", layout, hidden, weight, bias, lora)
    tokens = ops.linear_logps(
        inputs.hidden,
        inputs.weight,
        layout.targets,
        bias=inputs.bias,
        down=inputs.down,
        up=inputs.up,
        ignore_index=ignore_index,
        transform=settled.transform,
        stats=settled.stats,
        memory_budget=memory_budget,
        batch_invariant=batch_invariant,
        strategy=strategy,
        count=layout.count,
        backend=backend,
    )
    return reduce(layout, tokens, reduction, backend)


def _inputs(
    name: str,
    layout: Layout,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> LinearInputs:
    """The head's tensors as the ops take them, cast under autocast, the adapter's A scaled."""
    rows = layout.rows(name, hidden, "H")
    checks.floating(name.replace("hidden", "weight"), weight)
    if bias is not None:
        checks.floating(name.replace("hidden", "bias"), bias)
    up = down = None
    if lora is not None:
        down, up, scaling = _check_lora(lora, weight, hidden)
    dtype = ops.autocast_dtype(rows.device)
    if dtype is not None and rows.dtype != torch.float64:
        cast = [None if x is None else x.to(dtype) for x in (rows, weight, bias, down, up)]
        rows, weight, bias, down, up = cast  # type: ignore[assignment]
    if down is not None:
        # [r, H] in fp32: small, and the adapter stays exact.
        down = down.to(wide_dtype(rows)) * scaling
    return LinearInputs(rows, weight, bias, down, up)


def _check_lora(lora: object, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, float]:
    if not isinstance(lora, (list, tuple)) or len(lora) != 3:
        raise TypeError(f"lora must be (A [r, H], B [V, r], scaling), got {type(lora).__name__}")
    down, up = checks.floating("lora[0]", lora[0]), checks.floating("lora[1]", lora[1])
    V, H = weight.shape[0], hidden.shape[-1]
    r = down.shape[0] if down.dim() else 0
    checks.shape("lora[0]", down, (r, H), "A, [r, H]")
    checks.shape("lora[1]", up, (V, r), "B, [V, r]")
    for i in (0, 1):
        checks.same_device(f"lora[{i}]", lora[i], "hidden", hidden)
    return down, up, checks.number("lora[2] (scaling)", lora[2])


def _streamable(
    run: TokenLoss,
    policy: LinearInputs,
    reference: LinearInputs | None,
    budget: int | None,
    invariant: bool,
    wish: str | None,
) -> tuple[list[int], ops.Plan] | None:
    """Scored rows of each sequence and the plan if the batch is to be streamed; `ValueError` if it
    cannot be but was wished for."""
    wanted = [x is not None and x.requires_grad for x in policy]
    trained = wanted[1] or wanted[2] or wanted[4]
    reason = ""
    if not (torch.is_grad_enabled() and any(wanted)):
        reason = "nothing wants a gradient"
    elif not run.separable:
        reason = "the loss is not a scalar sum over pairs"
    elif not all(checks.plain(x) for x in policy if x is not None):
        reason = "it does not trace (torch.compile, functorch, tensor subclasses)"
    elif wish is None and not trained and not run.needs_kl:
        return None
    if not reason:
        lengths = run.layout.scored_lengths()
        plan = _stream_plan(run, lengths, policy, reference, budget, invariant)
        if _largest_pair(lengths) <= plan.chunk:
            return lengths, plan
        reason = f"a pair has more than the {plan.chunk} scored rows that memory_budget allows"
    if wish is not None:
        raise ValueError(f"strategy={wish!r} is not possible here: {reason}")
    if not torch.compiler.is_compiling():
        logger.debug("fused_linear_dpo_loss: not streamed: %s", reason)
    return None


def _largest_pair(lengths: list[int]) -> int:
    B = len(lengths) // 2
    return max((lengths[i] + lengths[B + i] for i in range(B)), default=0)


def _stream_plan(
    run: TokenLoss,
    lengths: list[int],
    policy: LinearInputs,
    reference: LinearInputs | None,
    budget: int | None,
    invariant: bool,
) -> ops.Plan:
    ref_H = 0 if reference is None else reference.weight.shape[1]
    return ops.plan_of(
        "streaming",
        ops.budget_of(budget),
        sum(lengths),
        policy.weight,
        policy.down,
        policy.up,
        invariant,
        ref_H,
        run.needs_kl,
        largest=_largest_pair(lengths),
    )


def _streamed(
    run: TokenLoss,
    policy: LinearInputs,
    reference: LinearInputs | None,
    ref_logps: Tensor | None,
    found: tuple[list[int], ops.Plan],
    transform: LogitTransform,
) -> DPOOutput:
    if ref_logps is not None:
        ref_logps = ref_logps.detach()
        if not run.uses_reference:
            ref_logps = None
        elif not run.is_sums(ref_logps):
            ref_logps = run.layout.from_per_token("ref_logps", ref_logps)
    return stream(Streaming(run, reference, ref_logps, *found, transform), policy)


def _score(
    run: TokenLoss,
    policy: LinearInputs,
    reference: LinearInputs | None,
    transform: LogitTransform,
    budget: int | None,
    invariant: bool,
    strategy: str,
) -> tuple[TokenLogps, Tensor | None]:
    """Log-probs of policy and reference, row for row through products of the same shapes."""
    layout, plain = run.layout, strategy == "plain"

    def score(x: LinearInputs, stats: tuple[str, ...], own: str) -> TokenLogps:
        return ops.rows_scored(
            x,
            layout.targets,
            layout.ignore_index,
            transform,
            stats,
            ops.budget_of(budget),
            invariant,
            own,
            None if plain else strategy,
            layout.count,
            run.backend,
        )

    tokens = score(policy, run.stats, strategy)
    if reference is None:
        return tokens, None
    with torch.no_grad():
        return tokens, score(reference, (), strategy if plain else "score").logps


def _tell(out: DPOOutput, strategy: str, layout: Layout, backend: str) -> DPOOutput:
    if not torch.compiler.is_compiling():
        logger.debug(
            "fused_linear_dpo_loss: strategy %s, backend %s, %d sequences",
            strategy,
            backend,
            layout.sequences,
        )
    return out.told(strategy, out.stats)
