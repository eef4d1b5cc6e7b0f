"""The first-batch check: up to four pairs also run padded, before a layout is trusted.

Loss, log-probs and the gradient at the embeddings of the layout are compared with those of padded
rows. The tolerance is what the same rows differ by between two padded shapes: rounding that comes
with other shapes, in this dtype, on this device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..data import ScoredBatch, Sharing, TokenRow, make_batch
from .layouts import known, trunk_states
from .segment_attention import SegmentError, number_of_layers
from .structure import deterministic, trunk_of

# [N] log-probs of a batch's scored tokens from [N, H] states
Score = Callable[[Tensor, ScoredBatch], Tensor]

OPT_OUT = "check_layout=False leaves this check out"
# Times the difference of two padded shapes.
_ROOM = 8.0
# What is never called a difference: (nats a token, root mean square; relative, of the gradient).
# transformers computes norms and softmax in fp32, whatever the dtype.
_FLOOR = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 1e-3)}
_HALF_FLOOR = (0.03, 0.1)


class LayoutDiffers(ValueError):
    """A layout gives other numbers than padded rows do."""


@dataclass
class _Run:
    logps: Tensor  # [N]
    loss: Tensor  # []
    gradient: Tensor | None  # [ids, H], by token id: the same in every layout
    seconds: float
    dtype: torch.dtype  # the narrowest that the trunk computes in


def check_first_batch(
    model: Any, pairs: Sequence[TokenRow], mode: str, score: Score, asked: str
) -> None:
    """Compare the layout `mode` with padded rows on `pairs`, once a model.

    `asked`: the layout that was asked for. "auto" goes back to padded rows and says why; for
    another `LayoutDiffers` names the layout and the first layer that differs.
    """
    state = known(model)
    if state.checked:
        return
    state.checked = True
    try:
        report = _compare(model, pairs, mode, score)
    except (LayoutDiffers, SegmentError) as error:
        if asked != "auto":
            raise LayoutDiffers(
                f"layout={asked}: {error}. Use layout='padded'; {OPT_OUT}"
            ) from None
        state.unusable = f"on the first batch {error}"
        return
    state.report = report


def _compare(model: Any, pairs: Sequence[TokenRow], mode: str, score: Score) -> str:
    device = model.get_input_embeddings().weight.device
    # Padded with a token of theirs, so that each layout has the same ids; its gradient is 0 there.
    pad = pairs[0].sequences[0].ids[0]
    padded = make_batch(pairs, Sharing("padded", call_tokens=None), pad).to(device)
    halves = _in_two_calls(padded)
    laid = make_batch(pairs, Sharing(mode), pad).to(device)
    gradients = _differentiable(model)
    with deterministic(model), _checkpointing_on(model), _frozen(model):
        first = _run(model, padded, score, gradients, None)
        second = _run(model, halves, score, gradients, first.logps)
        try:
            ours = _run(model, laid, score, gradients, first.logps)
        except RuntimeError as error:  # checkpointing's own, if the backward runs something else
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LayoutDiffers(f"the step fails: {str(error).splitlines()[0]}") from error
        problem = _problem(first, second, ours)
        if problem:
            raise LayoutDiffers(f"{problem} ({_first_layer(model, padded, laid)})")
    tokens = padded.trunk_tokens, laid.trunk_tokens
    return (
        f"layout {mode}: {tokens[1]} tokens in place of {tokens[0]} padded on the first "
        f"{len(pairs)} pairs, {tokens[0] / tokens[1]:.2f}x fewer expected, "
        f"{second.seconds / max(ours.seconds, 1e-9):.2f}x faster measured"
    )


def _in_two_calls(batch: ScoredBatch) -> ScoredBatch:
    """The rows of a padded batch of one call in two calls, the second as long as its own rows."""
    call = batch.calls[0]
    R, S = call.input_ids.shape
    n = R // 2
    short = max(call.lengths[n:])
    calls = [
        replace(call, input_ids=call.input_ids[:n], lengths=call.lengths[:n]),
        replace(call, input_ids=call.input_ids[n:, :short], lengths=call.lengths[n:]),
    ]
    r, t = batch.rows // S, batch.rows % S
    rows = torch.where(r < n, batch.rows, n * S + (r - n) * short + t)
    return replace(batch, calls=calls, rows=rows)


def _problem(first: _Run, second: _Run, ours: _Run) -> str:
    """What differs by more than rounding; empty if nothing does."""
    floor = _FLOOR.get(first.dtype, _HALF_FLOOR)
    if first.loss.is_cuda and torch.get_float32_matmul_precision() != "highest":
        floor = _HALF_FLOOR

    def nats(a: Tensor, b: Tensor) -> float:
        return float((a - b).double().square().mean().sqrt()) if a.numel() else 0.0

    allowed = max(floor[0], _ROOM * nats(first.logps, second.logps))
    found = nats(first.logps, ours.logps)
    if not found <= allowed:
        return f"log-probs differ from padded rows by {found:.3g} nats a token, not {allowed:.2g}"
    moved = float((ours.loss - first.loss).abs())
    within = max(allowed * first.logps.numel(), _ROOM * float((second.loss - first.loss).abs()))
    if not moved <= within:
        return f"the loss differs from padded rows by {moved:.3g}, not {within:.2g}"
    if first.gradient is None or second.gradient is None or ours.gradient is None:
        return ""
    norm = first.gradient.norm()
    noise = float((first.gradient - second.gradient).norm() / norm)
    share = max(floor[1], _ROOM * noise)
    off = float((ours.gradient - first.gradient).norm() / norm)
    if norm and not off <= share:
        return f"the gradient differs from padded rows by {off:.3g} of its norm, not {share:.2g}"
    return ""


def _run(
    model: Any, batch: ScoredBatch, score: Score, gradients: bool, reference: Tensor | None
) -> _Run:
    leaves: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        leaves.append((args[0], leaf))
        return leaf.clone()  # CTRL scales its embeddings in place

    _wait(batch.rows)
    began = time.perf_counter()
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(keep) if gradients else None
    try:
        with torch.enable_grad() if gradients else torch.no_grad():
            states = trunk_states(model, trunk_of(model), batch)
            logps = score(states, batch)
            sums = torch.stack([part.sum() for part in logps.split(batch.scored_lengths)])
            own = (logps if reference is None else reference).detach()
            against = torch.stack([part.sum() for part in own.split(batch.scored_lengths)])
            if len(sums) % 2:  # of rows that are no pairs: each beside a constant
                sums, against = (torch.cat([x, torch.zeros_like(x)]) for x in (sums, against))
            chosen, rejected = sums.chunk(2)
            # Its own reference: at log-ratios of 0 no pair's gradient is near 0.
            loss = dk.preference_loss(chosen, rejected, *against.chunk(2)).loss
    finally:
        if hook is not None:
            hook.remove()
    gradient = None
    if gradients and leaves and loss.requires_grad:  # a detached head is the first step's to tell
        loss.backward()  # not autograd.grad: reentrant checkpoints refuse it
        gradient = _by_id(leaves)
    _wait(batch.rows)
    seconds = time.perf_counter() - began
    # Log-probs are fp32 whatever the trunk's dtype, and the last norm's may be under autocast.
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
    return _Run(logps.detach(), loss.detach(), gradient, seconds, dtype)


def _by_id(leaves: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[ids, H] the gradient summed over the places of each token id, in fp32 at least."""
    ids = torch.cat([ids.flatten() for ids, _ in leaves])
    grads = torch.cat([leaf.grad.flatten(0, -2) for _, leaf in leaves if leaf.grad is not None])
    kinds, inverse = ids.unique(return_inverse=True)
    wide = grads.to(torch.promote_types(grads.dtype, torch.float32))
    return wide.new_zeros(len(kinds), wide.shape[-1]).index_add(0, inverse, wide)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _differentiable(model: nn.Module) -> bool:
    """Whether a backward is wanted, and can be run on the side: weights are whole and trained."""
    parameters = list(model.parameters())
    sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in parameters)
    flat = any("_fsdp_wrapped_module" in m._modules for m in model.modules())
    if sharded or flat or torch.is_inference_mode_enabled():
        return False
    return any(p.requires_grad for p in parameters)


@contextmanager
def _checkpointing_on(model: nn.Module) -> Iterator[None]:
    """In eval mode layers that checkpoint would not: what they run again must be seen too."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The backward ends at the embeddings: no weight gets a gradient, no hook of DDP runs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = _differentiable(model)
    for p in trained if whole else ():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained if whole else ():
            p.requires_grad_(True)


@torch.no_grad()
def _first_layer(model: Any, padded: ScoredBatch, laid: ScoredBatch) -> str:
    """The first layer whose states differ between two batches of the same tokens."""
    layers = number_of_layers(model)
    stack = next(
        (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), None
    )
    if stack is None:
        return "the layer is not known: the model has no list of its layers"
    found: list[list[Tensor]] = []
    for batch in (padded, laid):
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any, into: list[Tensor] = outputs) -> None:
            state = output[0] if isinstance(output, tuple) else output
            into.append(state.reshape(-1, state.shape[-1]))

        hooks = [layer.register_forward_hook(keep) for layer in stack]
        try:
            trunk_states(model, trunk_of(model), batch)
        finally:
            for hook in hooks:
                hook.remove()
        found.append([state.index_select(0, batch.rows) for state in outputs])
    half = found[0][0].dtype not in _FLOOR
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        if float((a - b).abs().max()) > (0.1 if half else 1e-3) * float(a.abs().max()):
            return f"first in layer {i}"
    return "no layer differs in the forward alone"
