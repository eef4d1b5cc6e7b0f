"""Ordinary losses: loss and slopes of the pairs in closed form, without a graph of small ops.

Most rows of the table, taken alone, are a function of u - v, or of u and v, where u and v are
log-ratios, or log-ratios per scored token. `pair_loss_forward` of a backend gives their value and
slopes in one call, so that all between the log-probs and the loss is one autograd function
(`at_once.py`). What else a loss may have (a list of losses, an SFT term, weights, sorting, a KL, a
learned beta) is composed of ops in `from_pairs.py`, which says what both mean.

Letters: `B` pairs, `S` = 2B sequences, chosen then rejected, `R` rows, `T` positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.terms import flatten
from ..inputs import checks
from ..losses import Loss, LossOptions, Terms
from .from_pairs import length_offset


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
