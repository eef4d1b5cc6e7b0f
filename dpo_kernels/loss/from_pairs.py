"""From the log-probs of pairs to loss and rewards: score maps, terms, weights, reduction.

Everything here is [B] in fp64: O(pairs) work between the two heavy ops. `u`, `v` are the chosen
and rejected log-ratios (log-probs where there is no reference).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import ops
from ..inputs import checks
from ..losses import PER_PAIR, Loss, LossOptions, Terms

MAY_BE_TENSORS = (*PER_PAIR, "num_pairs", "num_chosen_tokens", "beta_dpo_state")
# Past this argument exp is continued by its tangent: still rising, never inf - inf.
_EXP_MAX = 600.0


class _Fields(NamedTuple):
    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracy: Tensor


class DPOOutput(_Fields):
    """What every front function returns; all on the device, all but `loss` detached.

    `loss` is a scalar (`[B]` with `reduction="none"`); the rest are `[B]`: policy log-probs of the
    completions, rewards `beta * log-ratio`, `margins` = chosen - rejected rewards, and `accuracy`
    (1 where the chosen reward is larger, ties 0). fp32, or fp64 for fp64 input.

    It is a tuple of these seven. Beside them, as attributes:
    `strategy`: how `fused_linear_dpo_loss` came to the gradients (see there); None elsewhere.
    `stats`: {name: tensor} of the statistics asked for with `stats=`, each of the shape that
    `sequence_logps(reduction="none")` gives; empty elsewhere.
    `sft`: with `reduction="none"` and an SFT term, [B] what the term is of each pair before it is
    divided by a number of tokens: its weight times the NLL of the chosen; None elsewhere.
    """

    strategy: str | None = None
    sft: Tensor | None = None
    stats: Mapping[str, Tensor] = MappingProxyType({})

    def told(self, strategy: str | None, stats: Mapping[str, Tensor]) -> DPOOutput:
        """This output, with these attributes."""
        self.strategy = strategy
        if stats:  # the empty mapping of the class cannot be pickled
            self.stats = stats
        return self

    def _replace(self, /, **changes: Any) -> DPOOutput:
        out = super()._replace(**changes).told(self.strategy, self.stats)
        out.sft = self.sft
        return out


@dataclass(frozen=True)
class Pairs:
    """Sequence log-probs of a batch of pairs, fp64, and what some losses need besides."""

    chosen: Tensor  # [B] policy, LD-weighted if ld_alpha
    rejected: Tensor  # [B]
    ref_chosen: Tensor | None  # [B]; None: no reference
    ref_rejected: Tensor | None  # [B]
    chosen_lengths: Tensor | None  # [B] scored tokens
    rejected_lengths: Tensor | None  # [B]
    chosen_nll: Tensor  # [B] -sum of the chosen's log-probs, without LD weights
    wpo: Tensor | None  # [B] W_w W_l of WPO, detached
    chosen_kl: Tensor | None = None  # [B] sum over tokens of KL(reference || policy)
    rejected_kl: Tensor | None = None  # [B]


def loss_of(
    p: Pairs,
    options: LossOptions,
    losses: list[tuple[Loss, float, Terms]],
    dtype: torch.dtype,
    backend: str,
) -> DPOOutput:
    """Loss, rewards and metrics of the pairs; floating results in `dtype`."""
    B = p.chosen.shape[0]
    options = _in_fp64(options)
    per_pair = torch.zeros_like(p.chosen)
    nll_weight: float | Tensor = options.sft_weight
    live = p if options.weights is None else _without(p, _dropped(p, options, losses))
    nothing = torch.ones_like(p.chosen, dtype=torch.bool)
    for row, weight, terms in losses:
        if row.sft is not None:
            scale = getattr(options, row.sft) if isinstance(row.sft, str) else row.sft
            # WPO weighs a loss that is the NLL alone.
            wpo = p.wpo.mean() if not terms and p.wpo is not None else 1.0
            nll_weight = nll_weight + weight * scale * wpo
        if not terms:
            continue
        scored = p if row.batch_coupled else live
        u, v = _scores(row, scored if weight else _without(scored, nothing), options)
        loss = _of_scores(row, terms, u, v, p, options, backend)
        per_pair = per_pair + (loss if weight == 1.0 else _weighted(weight, loss))
    if options.weights is not None:
        per_pair = _weighted(options.weights, per_pair)
    nll = _nll_per_pair(p, options, nll_weight)
    if options.reduction == "none":
        loss = per_pair if nll is None else per_pair + nll
    else:
        loss = per_pair.sum() / (B if options.num_pairs is None else options.num_pairs)
        loss = loss if nll is None else loss + nll.mean()
    loss = loss.to(dtype)
    with torch.no_grad():
        chosen_rewards, rejected_rewards = _rewards(losses, p, options)
        margins = chosen_rewards - rejected_rewards
        accuracy = chosen_rewards > rejected_rewards

        def out(x: Tensor) -> Tensor:
            return x.detach().to(dtype)

        made = DPOOutput(
            loss,
            out(p.chosen),
            out(p.rejected),
            out(chosen_rewards),
            out(rejected_rewards),
            out(margins),
            out(accuracy),
        )
        if nll is not None and options.reduction == "none" and not torch.compiler.is_compiling():
            made.sft = out(p.chosen_nll * nll_weight)
        return made


def _of_scores(
    row: Loss, terms: Terms, u: Tensor, v: Tensor, p: Pairs, o: LossOptions, backend: str
) -> Tensor:
    """[B] the loss of one row, weighed by what it adapts and by WPO."""
    beta, keep, shift = o.beta, None, _offset(row, p, o)
    if row.adapts is not None:
        beta, keep = row.adapts(u - v, o)
    loss = ops.pair_loss(u, v, terms, beta=beta, offset=shift, backend=backend)
    if isinstance(o.label_smoothing, Tensor) and row.soft == "mix":
        e, shift = o.label_smoothing, None if shift is None else -shift
        mirror = ops.pair_loss(v, u, terms, beta=beta, offset=shift, backend=backend)
        loss = _weighted(1 - e, loss) + _weighted(e, mirror)
    for factor in (keep, p.wpo):
        loss = loss if factor is None else _weighted(factor, loss)
    return loss


def _without(p: Pairs, dropped: Tensor) -> Pairs:
    """The pairs with log-probs and KL 0 where dropped: a NaN there reaches nothing."""

    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_kl", "rejected_kl")
    values = {name: getattr(p, name) for name in names}
    kept = {k: torch.where(dropped, 0.0, x) for k, x in values.items() if x is not None}
    return replace(p, **kept)


def _in_fp64(o: LossOptions) -> LossOptions:
    """The options of each pair in fp64, once: their gradients add up in fp64 too."""
    given = {name: getattr(o, name) for name in PER_PAIR}
    wide = {k: x.double() for k, x in given.items() if isinstance(x, Tensor)}
    return o.but(**wide) if wide else o


def _dropped(p: Pairs, o: LossOptions, losses: list[tuple[Loss, float, Terms]]) -> Tensor:
    """[B] the pairs that count nothing, not even for a gradient of their weight.

    That gradient is the pair's loss, at a weight of 0 as elsewhere, wherever it is a number.
    """
    assert o.weights is not None
    dropped = o.weights == 0
    if not (o.weights.requires_grad and torch.is_grad_enabled()):
        return dropped
    fine = torch.ones_like(dropped)
    with torch.no_grad():
        for row, _, terms in losses:
            if terms and not row.batch_coupled:
                u, v = _scores(row, p, o)
                offset = _offset(row, p, o)
                loss = ops.pair_loss(u, v, terms, beta=o.beta, offset=offset, backend="torch")
                fine &= loss.isfinite()
    return dropped & ~fine


def ignored(weights: Tensor, losses: Tensor) -> Tensor:
    """`_dropped` of losses of no pairs, which are at hand: [rows] weights and losses."""
    none = weights == 0
    if weights.requires_grad and torch.is_grad_enabled():
        return none & ~losses.detach().isfinite()
    return none


def check_row_weights(weights: Tensor, rows: int, why: str, like: Tensor) -> None:
    checks.floating("weights", weights)
    checks.shape("weights", weights, (rows,), why)
    checks.same_device("weights", weights, "the log-probs", like)
    checks.values("weights", weights, torch.isfinite, "finite")


def _weighted(weight: Tensor | float, loss: Tensor) -> Tensor:
    """weight * loss, and 0 for a weight of 0 however bad the pair."""
    none = torch.as_tensor(weight, device=loss.device) == 0
    return weight * torch.where(none & ~loss.isfinite(), 0.0, loss)


def _ratios(p: Pairs, row: Loss) -> tuple[Tensor, Tensor]:
    if not row.takes_reference or p.ref_chosen is None or p.ref_rejected is None:
        return p.chosen, p.rejected
    return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def _lengths(p: Pairs) -> tuple[Tensor, Tensor]:
    assert p.chosen_lengths is not None and p.rejected_lengths is not None
    return p.chosen_lengths.clamp(min=1).double(), p.rejected_lengths.clamp(min=1).double()


def _scores(row: Loss, p: Pairs, o: LossOptions) -> tuple[Tensor, Tensor]:
    """u, v of a row: the log-ratios after its score map."""
    u, v = _ratios(p, row)
    if row.score == "sort_margin":
        margin = (p.chosen - p.rejected).sort().values
        if p.ref_chosen is None or p.ref_rejected is None:
            return margin, torch.zeros_like(margin)
        return margin, (p.ref_chosen - p.ref_rejected).sort().values
    if row.score == "sort":
        return u.sort().values, v.sort().values
    if row.score == "penalised":
        return u - o.dpop_lambda * torch.relu(-u), v
    if row.f_divergence:
        u, v = _divergence(u, o), _divergence(v, o)
    if row.score == "ratio":
        return u, v
    if row.score == "kl":
        assert p.chosen_kl is not None and p.rejected_kl is not None
        al = getattr(o, row.kl_weight) if isinstance(row.kl_weight, str) else row.kl_weight
        K_w = p.chosen_kl.detach() if row.kl_stops_chosen else p.chosen_kl
        return u + al * K_w, v + al * p.rejected_kl
    n_w, n_l = _lengths(p)
    u, v = u / n_w, v / n_l
    if row.score == "odds":
        return _log_odds(u), _log_odds(v)
    if row.score == "power":
        return -_expm1(-o.alphapo_alpha * u) / o.alphapo_alpha, (
            -_expm1(-o.alphapo_alpha * v) / o.alphapo_alpha
        )
    return u, v


def _divergence(u: Tensor, o: LossOptions) -> Tensor:
    """f'(exp(u)), the score of f-DPO (arXiv 2309.16240)."""
    kind, al = o.f_divergence_type, o.f_alpha_divergence_coef
    if kind == "reverse_kl" or (kind == "alpha_divergence" and abs(al - 1) < 1e-6):
        return u
    if kind == "forward_kl":
        return -_expm1(-u)
    if kind == "js_divergence":
        return logsigmoid(u) + 0.6931471805599453
    return _expm1((al - 1) * u) / (al - 1)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued by its tangent past `_EXP_MAX`: differences of two never are NaN."""
    top = torch.expm1(torch.tensor(_EXP_MAX, dtype=x.dtype)).item()
    return torch.expm1(x.clamp(max=_EXP_MAX)) + top * torch.relu(x - _EXP_MAX)


def _log_odds(m: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(m), m <= 0; log(1 - p) as log(-expm1(m)) keeps p near 1 exact."""
    m = m.clamp(max=-1e-300)
    near_one = m > -0.6931471805599453
    # Each branch sees only arguments where it and its gradient are finite.
    low = torch.where(near_one, -1.0, m)
    high = torch.where(near_one, m, -0.5)
    return m - torch.where(near_one, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


def _offset(row: Loss, p: Pairs, o: LossOptions) -> Tensor | None:
    return o.offset if row.offset is None else row.offset(o, p.chosen_lengths, p.rejected_lengths)


def length_offset(
    row: Loss, lengths: Tensor | None, o: LossOptions, pairs: slice | None
) -> Tensor | None:
    """The offset [B] fp64 of the pairs whose sequences have `lengths` [2B]."""
    given = o.offset
    if given is not None:
        given = given.detach().double()
        o = o.but(offset=given if pairs is None else given[pairs])
    if row.offset is None or not row.by_length:
        return o.offset
    assert lengths is not None
    B = lengths.shape[0] // 2
    return row.offset(o, lengths[:B], lengths[B:])


def _nll_per_pair(p: Pairs, o: LossOptions, weight: float | Tensor) -> Tensor | None:
    """The SFT term spread over the pairs, so that its mean is the term; None where there is none.

    The term is the NLL of the chosen, mean over the chosen tokens of the batch.
    """
    if not isinstance(weight, Tensor) and weight == 0:
        return None
    B = p.chosen.shape[0]
    tokens = o.num_chosen_tokens
    if tokens is None:
        assert p.chosen_lengths is not None
        tokens = p.chosen_lengths.sum().clamp(min=1)
    if isinstance(tokens, Tensor):
        # As fp64: a number over a tensor is of the tensor's dtype, of integers fp32.
        tokens = tokens.double()
    return p.chosen_nll * (weight * B / tokens)


def _rewards(
    losses: list[tuple[Loss, float, Terms]], p: Pairs, o: LossOptions
) -> tuple[Tensor, Tensor]:
    """beta * log-ratio; per token for the reference-free losses on averages, as TRL logs them."""
    row = losses[0][0]
    u, v = _ratios(p, row)
    if not row.reference and row.score in ("mean", "odds", "power"):
        n_w, n_l = _lengths(p)
        u, v = u / n_w, v / n_l
        if row.score == "power":
            u, v = _scores(row, p, o)
    return o.beta * u, o.beta * v


def check_pair_options(o: LossOptions, B: int, like: Tensor) -> None:
    """Shapes and devices of the per-pair options."""
    if B == 0:
        raise ValueError("the batch has no pairs (B = 0); expected at least one")
    for name in PER_PAIR:
        value = getattr(o, name)
        if not isinstance(value, Tensor):
            continue
        if value.dim() or name != "beta":
            checks.shape(name, value, (B,), "one value a pair")
        checks.same_device(name, value, "the log-probs", like)
    for name in MAY_BE_TENSORS[len(PER_PAIR) :]:
        value = getattr(o, name)
        if isinstance(value, Tensor) and value.dim():
            checks.same_device(name, value, "the log-probs", like)
