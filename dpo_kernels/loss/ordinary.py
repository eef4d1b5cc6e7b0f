"""Ordinary losses: loss and slopes of the pairs in closed form, without a graph of small ops.

Most rows of the table, taken alone, are a function of u - v, or of u and v, where u and v are
log-ratios, or log-ratios per scored token. `pair_loss_forward` of a backend gives their value and
slopes in one call, so that all between the log-probs and the loss is one autograd function. What
else a loss may have (a list of losses, an SFT term, weights, sorting, a KL, a learned beta) is
composed of ops in `from_pairs.py`, which says what both mean.

Letters: `B` pairs, `S` = 2B sequences, chosen then rejected, `R` rows, `T` positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.terms import flatten
from ..inputs import checks
from ..inputs.layout import Layout
from ..inputs.transform import LogitTransform
from ..losses import Loss, LossOptions, Terms
from ..ops.derivatives import refuse_inplace
from ..ops.direct import eager
from ..ops.sequence_sum import backward_op as sums_backward
from ..ops.token_logps import backward_in_place, backward_op
from .from_pairs import DPOOutput, Pairs, length_offset, loss_of


class Evaluated(NamedTuple):
    """The pairs' losses and what the gradient and the metrics need."""

    losses: Tensor  # [B] fp64
    slopes: Tensor  # [S] fp64, d losses / d sums
    sums: Tensor  # [S] fp64 log-probs of the policy
    ratios: Tensor  # [S] fp64, what beta times is the reward


@dataclass(frozen=True)
class Ordinary:
    """A loss in closed form: its row, and its terms as the backends take them."""

    row: Loss
    options: LossOptions
    phis: list[int]
    numbers: list[float]

    @staticmethod
    def of(options: LossOptions, losses: list[tuple[Loss, float, Terms]]) -> Ordinary | None:
        """None where the loss is not an ordinary one."""
        row, weight, terms = losses[0]
        o = options
        if len(losses) > 1 or weight != 1 or not terms or not row.closed:
            return None
        if row.f_divergence and o.f_divergence_type != "reverse_kl":
            return None
        if o.use_weighting or o.weights is not None or o.sft_weight != 0:
            return None
        if isinstance(o.label_smoothing, Tensor):
            return None
        if any(isinstance(x, Tensor) and x.requires_grad for x in (o.beta, o.offset)):
            return None
        return Ordinary(row, o, [t.phi for t in terms], flatten(terms))

    def evaluate(
        self,
        impl: ModuleType,
        sums: Tensor,  # [S] fp64
        reference: Tensor | None,  # [S]
        lengths: Tensor | None,  # [S] scored tokens
        pairs: slice | None = None,  # which of the batch these are; None: all
    ) -> Evaluated:
        B = sums.shape[0] // 2
        ratios = sums if reference is None else sums - reference
        scores, count = ratios, None
        if self.row.per_token:
            assert lengths is not None
            count = lengths.clamp(min=1)
            scores = ratios / count
        u, v = scores.chunk(2)
        offset = length_offset(self.row, lengths, self.options, pairs)
        if offset is not None:
            offset = offset.contiguous()
        beta = self._beta(B, sums.device, pairs)
        losses, slopes = impl.pair_loss_forward(u, v, beta, offset, self.phis, self.numbers)
        slopes = slopes.as_strided((2 * B,), (1,))
        if count is not None:
            slopes = slopes / count
        rewarded = scores if count is not None and not self.row.reference else ratios
        return Evaluated(losses, slopes, sums, rewarded)

    def _beta(self, B: int, device: torch.device, pairs: slice | None) -> Tensor:
        beta = self.options.beta
        if not isinstance(beta, Tensor):
            return _full(B, float(beta), device)
        beta = beta.detach().double()
        if beta.dim() == 0:
            return beta.expand(B).contiguous()
        return (beta if pairs is None else beta[pairs]).contiguous()

    def loss(self, losses: Tensor, dtype: torch.dtype) -> Tensor:
        if self.options.reduction == "none":
            return losses.to(dtype)
        num_pairs = self.options.num_pairs
        return (losses.mean() if num_pairs is None else losses.sum() / num_pairs).to(dtype)

    def metrics(self, found: Evaluated, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The fields of `DPOOutput` after the loss."""
        sums, ratios, beta = found.sums, found.ratios, self.options.beta
        B = sums.shape[0] // 2
        if isinstance(beta, Tensor) and beta.dim():
            rewards = (ratios.view(2, B) * beta.detach()).view(-1)
        else:
            rewards = ratios * (beta.detach() if isinstance(beta, Tensor) else beta)
        chosen, rejected = rewards.chunk(2)
        table = torch.cat([sums, rewards, chosen - rejected, chosen > rejected])
        return table.to(dtype).chunk(6)

    def scaled(self, slopes: Tensor, g: Tensor) -> Tensor:
        """d loss / d sums [S] of the slopes of the pairs' losses; `g` of the loss."""
        B = slopes.shape[0] // 2
        if self.options.reduction == "none":
            g = g.double()
            return torch.where(g == 0, 0.0, g * slopes.view(2, B)).view(-1)
        divisor = B if self.options.num_pairs is None else self.options.num_pairs
        # On the CPU the scalar can be looked at; elsewhere that would wait for the device.
        if checks.readable(g) and not isinstance(divisor, Tensor) and not torch.is_grad_enabled():
            scale = g.item() / divisor
            return slopes * scale if scale else torch.zeros_like(slopes)
        g = g.double() / divisor
        # A loss that does not count gives 0 whatever its slopes.
        return torch.where(g == 0, 0.0, g * slopes)


def _full(B: int, value: float, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _kept(B, value)
    return torch.full((B,), value, dtype=torch.float64, device=device)


@functools.lru_cache(maxsize=64)
def _kept(B: int, value: float) -> Tensor:
    return torch.full((B,), value, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class LogitsCall:
    """A call from logits, settled: everything but the logits."""

    loss: Ordinary
    layout: Layout
    dtype: torch.dtype
    transform: LogitTransform
    stats: tuple[str, ...]
    tail: float
    inplace: bool
    ref_logits: Tensor | None  # [R, T, V]
    reference: Tensor | None  # [S] log-probs
    backend: str
    impl: ModuleType


def from_logits(call: LogitsCall, logits: Tensor) -> tuple[DPOOutput, dict[str, Tensor]]:
    """The output, and statistics a row [R, T]."""
    kept: list[Any] = []
    loss = _FromLogits.apply(logits, call, kept)
    fields, table = kept
    return DPOOutput(loss, *fields), dict(zip(call.stats, table, strict=True))


class _FromLogits(torch.autograd.Function):
    """Token log-probs -> sums of sequences -> loss of pairs, and back."""

    @staticmethod
    def forward(ctx, logits, call: LogitsCall, kept: list[Any]):
        impl, y, cu, ignore = call.impl, *_place(call.layout)
        logps, lse, table = impl.token_logps(logits, y, ignore, call.transform, call.stats)
        sums, counts = impl.sequence_sum(logps, y, cu, ignore, call.tail)
        reference = call.reference
        if call.ref_logits is not None:
            logps = impl.token_logps(call.ref_logits, y, ignore, call.transform, ())[0]
            reference, _ = impl.sequence_sum(logps, y, cu, ignore, call.tail)
        found = call.loss.evaluate(impl, sums, reference, counts)
        kept += [call.loss.metrics(found, call.dtype), table.unbind(0) if call.stats else ()]
        ctx.call = call
        ctx.save_for_backward(logits, lse, found.slopes)
        return call.loss.loss(found.losses, call.dtype)

    @staticmethod
    def backward(ctx, g):
        # Reading saved_tensors compares versions: after an in-place backward this raises.
        logits, lse, slopes = ctx.saved_tensors
        call, t = ctx.call, ctx.call.transform
        if call.inplace:
            refuse_inplace()
        y, cu, ignore = _place(call.layout)
        d = call.loss.scaled(slopes, g)
        if not call.inplace and not torch.is_grad_enabled() and eager(d):
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
            d = call.impl.sequence_sum_backward(d, y, cu, ignore, call.tail, torch.float32)
            call.impl.token_logps_backward(d, logits, y, lse, ignore, t, out)
            return out, None, None
        d = sums_backward(d, y, cu, ignore, call.tail, call.backend)
        rest = (y, lse, ignore, t.scale, t.softcap, t.inv_temperature, call.backend)
        if call.inplace:
            target = logits.detach()
            backward_in_place(d, target, *rest)
            return target, None, None
        return backward_op(d, logits, *rest), None, None


def _place(layout: Layout) -> tuple[Tensor, Tensor | None, int]:
    return layout.targets, layout.cu_seqlens, layout.ignore_index


@dataclass(frozen=True)
class SumsCall:
    """A call from sums, settled: everything but the sums."""

    loss: Ordinary
    losses: list[tuple[Loss, float, Terms]]
    dtype: torch.dtype
    reference: Tensor | None  # [S]
    lengths: Tensor | None  # [S]
    backend: str
    impl: ModuleType


def from_sums(call: SumsCall, sums: Tensor) -> DPOOutput:
    """The output from sums [S] fp64 of the policy's log-probs."""
    kept: list[Any] = []
    loss = _FromSums.apply(sums, call, kept)
    return DPOOutput(loss, *kept)


class _FromSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, call: SumsCall, kept: list[Any]):
        found = call.loss.evaluate(call.impl, sums, call.reference, call.lengths)
        kept += call.loss.metrics(found, call.dtype)
        ctx.call = call
        ctx.save_for_backward(sums, found.slopes)
        return call.loss.loss(found.losses, call.dtype)

    @staticmethod
    def backward(ctx, g):
        sums, slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: a gradient that can be differentiated
            loss = _composed(ctx.call, sums)
            return *torch.autograd.grad(loss, sums, g, create_graph=True), None, None
        return ctx.call.loss.scaled(slopes, g), None, None


def _composed(call: SumsCall, sums: Tensor) -> Tensor:
    B = sums.shape[0] // 2

    def halves(x: Tensor | None) -> tuple[Any, Any]:
        return (None, None) if x is None else (x[:B], x[B:])

    reference = None if call.reference is None else call.reference.double()
    chosen, rejected = halves(sums)
    pairs = Pairs(chosen, rejected, *halves(reference), *halves(call.lengths), -chosen, None)
    return loss_of(pairs, call.loss.options, call.losses, call.dtype, call.backend).loss
