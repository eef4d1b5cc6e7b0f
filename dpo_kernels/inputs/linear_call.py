"""A call from hidden states and a linear head: `call.py`, with the heads, the strategy, the plan.

Letters: `S` sequences, `N` scored rows, `V` vocabulary, `H` hidden size, `r` rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import choose, over_shards
from ..ops import LinearInputs
from ..parallel import VocabShards
from . import checks
from .call import (
    Settled,
    TokenCall,
    check_reference,
    reference_of,
    settle,
    wide_dtype,
    without_common_prefix,
)
from .layout import Layout, Scored
from .shards import GivenHead, own_rows

logger = logging.getLogger("dpo_kernels")


@dataclass(frozen=True, kw_only=True)
class LinearCall(TokenCall):
    """A call from hidden states."""

    strategy: str  # of `linear_dpo.STRATEGIES`, or "plain": all logits at once (torch)
    invariant: bool
    ref_inputs: LinearInputs | None = None
    lengths: list[int] | None = None  # [S] scored rows, of a batch that is streamed
    plan: ops.Plan | None = None  # likewise
    shards: VocabShards | None = None  # of the vocabulary, where the heads are this rank's rows

    @property
    def rows_backend(self) -> str:
        """The backend of the rows of logits; what comes after them is `backend`'s."""
        return self.backend if self.shards is None else over_shards(self.backend, self.shards)


def of_hidden(
    given: dict[str, Any],
    loss_options: dict[str, Any],
    policy: GivenHead,
    reference: GivenHead,
    labels: Tensor,
    ref_logps: Tensor | None,
    cu_seqlens: Tensor | None,
    scored_lengths: Tensor | list[int] | None,
    vocab_group: Any = None,
) -> tuple[LinearCall, LinearInputs]:
    """The call of `fused_linear_dpo_loss`, and the policy's inputs."""
    batch = {"labels": labels, "ref_logps": ref_logps, "cu_seqlens": cu_seqlens}
    options = (given, loss_options)
    shards, policy, reference = own_rows(vocab_group, policy, reference, options, batch)
    settled = settle(given, loss_options)
    layout, hidden = _layout(given, labels, cu_seqlens, scored_lengths, policy, shards)
    if reference.hidden is None and (reference.weight is not None or reference.bias is not None):
        raise ValueError("ref_weight and ref_bias need ref_hidden, got None")
    if reference.bias is not None and reference.weight is None:
        raise ValueError("ref_bias needs ref_weight, got None")
    backend = choose(given["backend"], hidden.device, hidden.dtype, settled.op)
    per_token = given["ref_logps_per_token"]
    has_states = reference.hidden is not None
    check_reference(settled, layout, has_states, "ref_hidden", ref_logps, per_token)
    if given["drop_common_prefix"]:
        states = layout.of_rows("hidden", hidden)
        layout = without_common_prefix(settled, layout, ref_logps, per_token, states)
    inputs = _inputs(_POLICY, layout.of_rows("hidden", hidden), policy)
    ref = _reference(layout, policy, reference) if has_states else None
    if not settled.uses_reference:
        ref = ref_logps = None
    call = planned(
        settled,
        layout,
        inputs,
        ref,
        backend,
        reference_of(layout, ref_logps, per_token),
        given["strategy"],
        given["batch_invariant"],
        shards,
    )
    return call, inputs


def of_scored_hidden(
    given: dict[str, Any],
    wish: str | None,
    policy: GivenHead,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    scored_lengths: Tensor | list[int] | None,
    vocab_group: Any = None,
) -> tuple[LinearCall, LinearInputs]:
    """The call of `linear_sequence_logps`, and the policy's inputs."""
    batch = {"labels": labels, "cu_seqlens": cu_seqlens}
    options = (given, {"strategy": wish})
    shards, policy, _ = own_rows(vocab_group, policy, GivenHead(None, None), options, batch)
    settled = settle(given, {})
    layout, hidden = _layout(given, labels, cu_seqlens, scored_lengths, policy, shards)
    inputs = _inputs(_POLICY, layout.of_rows("hidden", hidden), policy)
    backend = choose(given["backend"], hidden.device, inputs.hidden.dtype)
    strategy = "plain"
    if backend != "torch":
        strategy = ops.choose_strategy(wish, *inputs)
    call = LinearCall(
        settled,
        backend,
        wide_dtype(hidden),
        layout=layout,
        strategy=strategy,
        invariant=given["batch_invariant"],
        shards=shards,
    )
    return call, inputs


def _layout(
    given: dict[str, Any],
    labels: Tensor,
    cu_seqlens: Tensor | None,
    scored_lengths: Tensor | list[int] | None,
    policy: GivenHead,
    shards: VocabShards | None,
) -> tuple[Layout, Tensor]:
    """The layout beside the hidden states; before it, that the head fits them."""
    hidden = checks.floating("hidden", policy.hidden)
    head = checks.floating("weight", policy.weight)
    if head.dim() != 2:
        raise ValueError(f"weight must have shape [V, H], got {list(head.shape)}")
    if hidden.dim() and head.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, H={hidden.shape[-1]}] (H as hidden has), got "
            f"{list(head.shape)}"
        )
    layout = Layout.of(
        labels,
        cu_seqlens,
        shift=given["shift"],
        ignore_index=given["ignore_index"],
        V=head.shape[0] if shards is None else shards.vocab,
        scored=Scored("hidden", hidden, "H"),
    )
    return layout.on(hidden.device, scored_lengths), hidden


_POLICY, _REFERENCE = ("hidden", "weight", "bias"), ("ref_hidden", "ref_weight", "ref_bias")


def _inputs(names: tuple[str, str, str], rows: Tensor, head: GivenHead) -> LinearInputs:
    """Hidden states [R, T, H] and the head's tensors as the ops take them, cast under autocast, the
    adapter's A scaled; the shapes of states and weight are checked."""
    _, weight, bias, lora = head
    name, weight_name, bias_name = names
    assert weight is not None
    checks.same_device(weight_name, weight, name, rows)
    if bias is not None:
        checks.floating(bias_name, bias)
        checks.shape(bias_name, bias, (weight.shape[0],), f"one value a row of {weight_name}")
        checks.same_device(bias_name, bias, name, rows)
    up = down = None
    if lora is not None:
        down, up, scaling = _check_lora(lora, weight, rows)
    dtype = ops.autocast_dtype(rows.device)
    if dtype is not None and rows.dtype != torch.float64:
        cast = [None if x is None else x.to(dtype) for x in (rows, weight, bias, down, up)]
        rows, weight, bias, down, up = cast  # type: ignore[assignment]
    assert weight is not None
    if weight.dtype != rows.dtype or (bias is not None and bias.dtype != rows.dtype):
        got = f"{rows.dtype}, {weight.dtype}" + (f", {bias.dtype}" if bias is not None else "")
        raise ValueError(f"{name}, {weight_name} and {bias_name} must have one dtype, got {got}")
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


def _reference(layout: Layout, policy: GivenHead, given: GivenHead) -> LinearInputs:
    """The reference's inputs, detached; without a head of its own it takes the policy's."""
    assert policy.weight is not None
    V, head = policy.weight.shape[0], given
    if head.weight is None:
        head = GivenHead(given.hidden, policy.weight, policy.bias)
    weight = checks.floating("ref_weight", head.weight)
    if tuple(weight.shape[:1]) != (V,):
        raise ValueError(
            f"ref_weight must have shape [V={V}, H'] (the policy's vocabulary), got "
            f"{list(weight.shape)}"
        )
    rows = layout.rows("ref_hidden", head.hidden, "H")
    if weight.dim() != 2 or weight.shape[1] != rows.shape[2]:
        raise ValueError(
            f"ref_weight must have shape [V, H={rows.shape[2]}] (H as ref_hidden has), got "
            f"{list(weight.shape)}"
        )
    return _inputs(_REFERENCE, rows, head).detached()


def planned(
    settled: Settled,
    layout: Layout,
    inputs: LinearInputs,
    ref: LinearInputs | None,
    backend: str,
    reference: Tensor | None,
    wish: str | None,
    invariant: bool,
    shards: VocabShards | None = None,
) -> LinearCall:
    """The call with its strategy, and the plan of a batch that is streamed."""
    lengths = plan = None
    if backend == "torch":
        if wish is not None:
            raise ValueError(f"strategy={wish!r}: the torch backend has no strategies")
        strategy = "plain"
    else:
        if wish in (None, "streaming"):
            lengths, plan = streamable(settled, layout, inputs, ref, wish, invariant, shards)
        strategy = "streaming" if plan else ops.choose_strategy(wish, *inputs)
    return LinearCall(
        settled,
        backend,
        wide_dtype(inputs.hidden),
        layout=layout,
        reference=reference,
        ref_inputs=ref,
        strategy=strategy,
        invariant=invariant,
        lengths=lengths,
        plan=plan,
        shards=shards,
    )


def streamable(
    settled: Settled,
    layout: Layout,
    inputs: LinearInputs,
    ref: LinearInputs | None,
    wish: str | None,
    invariant: bool,
    shards: VocabShards | None = None,
) -> tuple[list[int], ops.Plan] | tuple[None, None]:
    """Scored rows of each sequence and the plan if the batch is to be streamed; `ValueError` if it
    cannot be but was wished for."""
    wanted = [x is not None and x.requires_grad for x in inputs]
    trained = wanted[1] or wanted[2] or wanted[4]
    reason = ""
    if True not in wanted or not torch.is_grad_enabled():
        reason = "nothing wants a gradient"
    elif not settled.separable:
        reason = "the loss is not a scalar sum over pairs"
    elif not checks.plain(*inputs):
        reason = "it does not trace (torch.compile, functorch, tensor subclasses)"
    elif wish is None and not trained and not settled.needs_kl:
        return None, None
    if not reason:
        lengths = layout.scored_lengths()
        B = len(lengths) // 2
        largest = max(map(int.__add__, lengths[:B], lengths[B:]), default=0)
        plan = ops.plan_of(
            "streaming",
            settled.budget,
            sum(lengths),
            inputs.weight,
            inputs.down,
            inputs.up,
            invariant,
            0 if ref is None else ref.weight.shape[1],
            settled.needs_kl,
            largest=largest,
            columns=None if shards is None else shards.widest,
        )
        if largest <= plan.chunk:
            return lengths, plan
        reason = f"a pair has more than the {plan.chunk} scored rows that memory_budget allows"
    if wish is not None:
        raise ValueError(f"strategy={wish!r} is not possible here: {reason}")
    if not torch.compiler.is_compiling():
        logger.debug("fused_linear_dpo_loss: not streamed: %s", reason)
    return None, None
