"""Ordinary losses: loss and slopes of the pairs in closed form, without a graph of small ops.

Most rows of the table, taken alone, are a function of u - v, or of u and v, where u and v are
log-ratios, or log-ratios per scored token. `pair_loss_forward` of a backend gives their value and
slopes in one call, so that all between logits and loss is one autograd function (`at_once.py`). A
small batch costs what its calls cost: on the CPU it is one call of the compiled module forward and
one back; backend `cuda` makes the table of the pairs in one launch, loss and fields in another.
What else a loss may have (a list of losses, an SFT term, weights, sorting, a KL, a learned beta) is
composed of ops in `from_pairs.py`, which says what both mean.

Letters: `B` pairs, `S` = 2B sequences, chosen then rejected, `R` rows, `T` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.terms import OrdinaryPairs, flatten
from ..inputs import checks
from ..inputs.transform import LogitTransform
from ..losses import Loss, LossOptions, Terms
from .from_pairs import length_offset


@dataclass(frozen=True)
class Ordinary:
    """A loss in closed form: its row, and its terms as the backends take them.

    What it finds of pairs is one table [9, B] fp64: losses; the six fields of `DPOOutput` after the
    loss; slopes, d losses / d log-probs, of chosen and rejected. Tables of parts of a batch are
    joined along B. A backend may have functions of its own for all of it (`backends/cpu.py`).
    """

    row: Loss
    options: LossOptions
    terms: tuple[Any, ...]  # of `OrdinaryPairs`

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
        numbers = (tuple(t.phi for t in terms), tuple(flatten(terms)))
        return Ordinary(row, o, (*numbers, row.per_token, row.per_token and not row.reference))

    def of_rows(
        self,
        impl: Any,
        logits: Tensor,  # [R, T, V]
        place: tuple[Tensor, Tensor | None, int, float],  # targets, cu_seqlens, ignore_index, tail
        transform: LogitTransform,
        stats: tuple[str, ...],
        reference: Tensor | None,  # [S]
        pairs: slice | None = None,  # which of the batch these are; None: all
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Log-sum-exp and statistics a row, and the table of the pairs."""
        at_once = getattr(impl, "ordinary_rows", None)
        if at_once is not None and (self.row.per_token or not self.row.by_length):
            return at_once(logits, *place, transform, stats, self._given(None, reference, pairs))
        targets, _, ignore, _ = place
        logps, lse, table = impl.token_logps(logits, targets, ignore, transform, stats)
        sums, counts = impl.sequence_sum(logps, *place)
        return lse, table, self.of_sums(impl, sums, reference, counts, pairs)

    def of_sums(
        self,
        impl: Any,
        sums: Tensor,  # [S] fp64
        reference: Tensor | None,  # [S]
        lengths: Tensor | None,  # [S] scored tokens
        pairs: slice | None = None,
    ) -> Tensor:
        """The table of the pairs."""
        given = self._given(lengths, reference, pairs)
        at_once = getattr(impl, "ordinary", None)
        if at_once is not None:
            return at_once(sums, lengths if self.row.per_token else None, given)
        return _composed(impl, sums, lengths, given)

    def _given(
        self, lengths: Tensor | None, reference: Tensor | None, pairs: slice | None
    ) -> OrdinaryPairs:
        beta = self.options.beta
        if isinstance(beta, Tensor):
            beta = beta.detach().double()
            beta = beta if pairs is None or not beta.dim() else beta[pairs]
        offset = length_offset(self.row, lengths, self.options, pairs)
        offset = None if offset is None else offset.contiguous()
        return OrdinaryPairs(self.terms, beta, offset, reference)

    def streams(self, impl: Any) -> bool:
        """Whether `streamed` can be called."""
        at_once = getattr(impl, "ordinary_streamed", None) is not None
        number = not isinstance(self.options.num_pairs, Tensor)
        return at_once and number and (self.row.per_token or not self.row.by_length)

    def streamed(
        self,
        impl: Any,
        logits: Tensor,  # [N, V], of a whole batch
        place: tuple[Tensor, int, float],  # `packed`, ignore_index, tail
        transform: LogitTransform,
        reference: Tensor | None,
        B: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`finish` of `of_rows`, and over the logits `rows_backward`."""
        pairs = self._given(None, reference, None)
        return impl.ordinary_streamed(logits, *place, transform, pairs, B, self.divisor(B), dtype)

    def divisor(self, B: int) -> float | Tensor:
        """What the sum of the losses of B pairs is divided by."""
        return B if self.options.num_pairs is None else self.options.num_pairs

    def finish(
        self, impl: Any, found: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss of the table of a batch, and the fields of `DPOOutput` after it."""
        o, divisor = self.options, self.divisor(found.shape[1])
        at_once = getattr(impl, "ordinary_fields", None)
        if at_once is not None and o.reduction == "mean" and not isinstance(divisor, Tensor):
            return at_once(found, divisor, dtype)
        loss = found[0]
        if o.reduction == "mean":
            loss = loss.mean() if o.num_pairs is None else loss.sum() / divisor
        return loss.to(dtype), found[1:7].to(dtype).unbind(0)

    def rows_backward(
        self,
        impl: Any,
        logits: Tensor,
        place: tuple[Tensor, Tensor | None, int, float],
        transform: LogitTransform,
        lse: Tensor,
        found: Tensor,
        scale: float | Tensor,
        out: Tensor,  # may be `logits`
    ) -> None:
        """The gradient of logits that `of_rows` was given: `scale` of each pair's loss, or all."""
        targets, _, ignore, _ = place
        at_once = getattr(impl, "ordinary_rows_backward", None)
        if at_once is not None and isinstance(scale, float):
            at_once(found, scale, logits, *place, lse, transform, out)
            return
        sums_backward = getattr(impl, "ordinary_sums_backward", None)
        if sums_backward is not None:
            d = sums_backward(found, scale, *place)
        else:
            d = impl.sequence_sum_backward(_times(found, scale), *place, torch.float32)
        impl.token_logps_backward(d, logits, targets, lse, ignore, transform, out)

    def scaled(self, found: Tensor, g: Tensor) -> Tensor:
        """d loss / d sums [S]; `g` of the loss."""
        return _times(found, self.scale(g, found.shape[1]))

    def scale(self, g: Tensor, B: int) -> float | Tensor:
        """What the slopes of the pairs are multiplied by: a number, where it can be looked at."""
        if self.options.reduction == "none":
            return g.double()
        divisor = self.divisor(B)
        # On the CPU the scalar can be looked at; elsewhere that would wait for the device.
        if checks.readable(g) and not isinstance(divisor, Tensor) and not torch.is_grad_enabled():
            return g.item() / divisor
        return g.double() / divisor


def _times(found: Tensor, scale: float | Tensor) -> Tensor:
    """Slopes [S] times a scale of all or of each pair; one of 0 gives 0 whatever the slope."""
    slopes = found[7:]
    if not isinstance(scale, Tensor):
        return (slopes * scale if scale else torch.zeros_like(slopes)).view(-1)
    return torch.where(scale == 0, 0.0, scale * slopes).view(-1)


def _composed(impl: Any, sums: Tensor, lengths: Tensor | None, p: OrdinaryPairs) -> Tensor:
    """`of_sums` by a backend's `pair_loss_forward`."""
    B = sums.shape[0] // 2
    phis, numbers, per_token, mean_reward = p.terms
    ratios = scores = sums if p.reference is None else sums - p.reference
    count = None
    if per_token:
        assert lengths is not None
        count = lengths.clamp(min=1)
        scores = ratios / count
    beta = p.beta
    if isinstance(beta, Tensor):
        each = beta.expand(B).contiguous()
    else:
        each = torch.full((B,), beta, dtype=torch.float64, device=sums.device)
    losses, slopes = impl.pair_loss_forward(
        *scores.chunk(2), each, p.offset, list(phis), list(numbers)
    )
    slopes = slopes.as_strided((2 * B,), (1,))
    slopes = slopes if count is None else slopes / count
    rewards = ((scores if mean_reward else ratios).view(2, B) * each).view(-1)
    chosen, rejected = rewards.chunk(2)
    told = (sums, rewards, chosen - rejected, chosen > rejected)
    return torch.cat([losses, *told, slopes]).view(9, B)
