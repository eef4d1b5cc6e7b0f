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
`tdpo2`) have it projected beside the policy (`ops/linear_logps.py`), and are streamed with a frozen
head too: there that is the cheapest.

Letters: `B` pairs, `T` positions, `N` rows of packed input, `V` vocabulary, `H` hidden size, `r`
rank of a LoRA adapter.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import listwise, ops
from .inputs.linear_call import LinearCall, of_hidden, of_scored_hidden
from .inputs.shards import GivenHead
from .loss.from_pairs import DPOOutput
from .loss.from_tokens import check_one_reference, finish, given_sums, reduce
from .loss.stream_pairs import stream
from .losses import is_listwise
from .ops import LinearInputs, TokenLogps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .parallel import VocabShards

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
    vocab_group: ProcessGroup | VocabShards | None = None,
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
        vocab_group: the process group, or `dk.parallel.vocab_parallel(...)` of it, over whose ranks
            the vocabulary is sharded: weight, bias, B of lora, ref_weight and ref_bias are this
            rank's rows [rows, ...], all else is the same on every rank (`dk.parallel`). A weight
            that is a DTensor placed as Shard(0) says so itself.

    Raises:
        ValueError, TypeError: a wrong argument, named, before any kernel runs.
        RuntimeError: a second backward through a result of "streaming"; a sharded head in a graph
            of torch.compile (where it may break the graph it does).
    """
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
    head = GivenHead(hidden, weight, bias, lora)
    ref = GivenHead(ref_hidden, ref_weight, ref_bias)
    batch: dict[str, Any]
    batch = {"cu_seqlens": cu_seqlens, "scored_lengths": scored_lengths, "vocab_group": vocab_group}
    if is_listwise(loss_options):
        scored = both_scored(head, ref, labels, ref_logps, **batch, **listwise.scoring(given))
        return listwise.from_scored(*scored, stats, loss_options)
    call, policy = of_hidden(given, loss_options, head, ref, labels, ref_logps, **batch)
    out = stream(call, policy) if call.plan is not None else _scored(call, policy)
    if not torch.compiler.is_compiling():
        logger.debug(
            "fused_linear_dpo_loss: strategy %s, backend %s, %d sequences",
            call.strategy,
            call.backend,
            call.layout.sequences,
        )
    return out.told(call.strategy, out.stats)


def both_scored(
    policy: GivenHead,
    reference: GivenHead,
    labels: Tensor,
    ref_logps: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    scored_lengths: Tensor | list[int] | None = None,
    vocab_group: ProcessGroup | VocabShards | None = None,
    ref_logps_per_token: bool | None = None,
    stats: tuple[str, ...] = (),
    batch_invariant: bool = False,
    **how: Any,
) -> tuple[Any, Tensor | None]:
    """As `dpo.both_scored`; a reference without a head of its own takes the policy's, without an
    adapter."""
    check_one_reference(ref_logps, reference.hidden is not None, "ref_hidden")
    how["batch_invariant"] = batch_invariant
    given = {"reduction": "sum", "stats": stats, **how}
    place = (labels, cu_seqlens, scored_lengths)
    call, inputs = of_scored_hidden(given, None, policy, *place, vocab_group)
    sums = given_sums(call, ref_logps, ref_logps_per_token)
    found = reduce(call, _rows(call, inputs, call.settled.stats, call.strategy), "sum")
    if reference.hidden is not None:
        own = reference.weight is not None
        weight, bias = reference[1:3] if own else policy[1:3]
        score: Any = linear_sequence_logps
        how |= {"cu_seqlens": cu_seqlens, "scored_lengths": scored_lengths}
        with torch.no_grad():
            sums = score(
                reference.hidden, weight, labels, bias=bias, vocab_group=vocab_group, **how
            )
    return found, sums


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
    vocab_group: ProcessGroup | VocabShards | None = None,
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
    head = GivenHead(hidden, weight, bias, lora)
    place = (labels, cu_seqlens, scored_lengths)
    call, inputs = of_scored_hidden(given, strategy, head, *place, vocab_group)
    return reduce(call, _rows(call, inputs, call.settled.stats, call.strategy), reduction)


def _scored(call: LinearCall, policy: LinearInputs) -> DPOOutput:
    """Loss and rewards from log-probs of policy and reference, row for row through products of the
    same shapes."""
    s, ref = call.settled, call.ref_inputs
    if s.needs_kl:
        return finish(call, _rows(call, policy, s.stats, call.strategy, ref))
    tokens, reference = _rows(call, policy, s.stats, call.strategy), None
    if ref is not None:
        with torch.no_grad():
            reference = _rows(call, ref, (), "score").logps
    return finish(call, tokens, reference)


def _rows(
    call: LinearCall,
    x: LinearInputs,
    stats: tuple[str, ...],
    strategy: str,
    reference: LinearInputs | None = None,
) -> TokenLogps:
    targets, _, ignore_index = call.place
    return ops.rows_scored(
        x,
        targets,
        ignore_index,
        call.settled.transform,
        stats,
        call.settled.budget,
        call.invariant,
        strategy,
        call.rows_backend,
        reference=reference,
        chunks_of=call.strategy,
        count=call.layout.count,
    )
