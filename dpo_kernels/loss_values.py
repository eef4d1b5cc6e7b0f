"""The checks of loss options: their values, and whether a loss that was chosen takes them."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from .inputs import checks
from .loss_options import F_DIVERGENCES, OWN, PER_PAIR, LossOptions
from .loss_row import Loss

_TINY = 2.2250738585072014e-308  # the smallest fp64 with a finite inverse


def check_values(o: LossOptions) -> None:
    """Types and values of the options."""

    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {checks.shown(getattr(o, name))}")

    for name in [*OWN, "label_smoothing", "sft_weight", "f_alpha_divergence_coef"]:
        value = getattr(o, name)
        if name != "label_smoothing" or not isinstance(value, Tensor):  # which may be [B]
            checks.number(name, value)
    if not isinstance(o.beta, Tensor):
        x = checks.positive("beta", o.beta, "a positive finite number, or a tensor of such")
        require(x >= _TINY, "beta", "a positive number with a finite inverse")
    for name in ("use_weighting", "reference_free"):
        checks.flag(name, getattr(o, name))
    for name in ("num_pairs", "num_chosen_tokens"):
        check_count(name, getattr(o, name))
    _check_tensors(o)
    require(o.discopop_tau >= _TINY, "discopop_tau", "positive")
    checks.choice("f_divergence_type", o.f_divergence_type, F_DIVERGENCES)
    checks.choice("reduction", o.reduction, ("mean", "none"))
    require(0 < o.beta_dpo_keep <= 1, "beta_dpo_keep", "in (0, 1]")
    require(0 <= o.beta_dpo_momentum <= 1, "beta_dpo_momentum", "in [0, 1]")
    require(o.alphapo_alpha != 0, "alphapo_alpha", "other than 0 (at 0 it is simpo)")
    if o.ld_alpha is not None:
        checks.number("ld_alpha", o.ld_alpha, "None or a finite number")


def check_count(name: str, value: object) -> None:
    """A normaliser: None, a positive number, or a tensor of one without dimensions."""
    if value is None:
        return
    expected = "a positive finite number, or a tensor [] of one"
    if not isinstance(value, Tensor):
        checks.positive(name, value, expected)
        return
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(f"{name} must be {expected}, got {value.dtype}")
    checks.shape(name, checks.is_tensor(name, value), (), "one number")
    checks.values(name, value, lambda x: (x > 0) & x.isfinite(), expected)


def _check_tensors(o: LossOptions) -> None:
    """Types and values of what may come a pair; shapes and devices are known with the batch."""
    for name in PER_PAIR:
        value = getattr(o, name)
        alone = name in ("beta", "label_smoothing")  # also one number for all
        if value is None or (alone and not isinstance(value, Tensor)):
            continue
        checks.floating(name, value)
        checks.values(name, value, torch.isfinite, "finite")
        if name == "beta":
            checks.values(name, value, lambda x: x.double() >= _TINY, "positive")
        if name == "label_smoothing":
            if value.requires_grad:
                raise ValueError("label_smoothing takes no gradient: detach it")
            checks.values(name, value, lambda x: (x >= 0) & (x <= 0.5), "in [0, 0.5]")
    if o.beta_dpo_state is not None:
        checks.floating("beta_dpo_state", o.beta_dpo_state)
        checks.shape("beta_dpo_state", o.beta_dpo_state, (2,), "mean and deviation")


def check_applies(o: LossOptions, losses: list[Loss], given: Container[str]) -> None:
    """An option that no chosen loss can use is an error, not silence.

    `given`: names of the options that were; a loss's own counts by that, whatever its value.
    """
    names = ", ".join(row.name for row in losses)
    e = o.label_smoothing
    smoothed = [row for row in losses if row.smoothing is not None]
    if isinstance(e, Tensor):
        hard = [row.name for row in smoothed if row.soft is None]
        if hard or not smoothed:
            what = hard[0] if hard else names
            raise ValueError(f"label_smoothing of each pair ([B]) has no meaning for {what}")
        smoothed = []
    elif e and not smoothed:
        raise ValueError(f"label_smoothing={e} has no meaning for loss_type {names}")
    for row in smoothed:
        if not 0 <= e < 0.5 or (row.smoothing is False and e == 0):
            bracket = "[" if row.smoothing else "("
            raise ValueError(
                f"label_smoothing must be in {bracket}0, 0.5) for {row.name!r}, got {e!r}"
            )
    if o.f_divergence_type != "reverse_kl":
        for row in losses:
            if not row.f_divergence:
                raise ValueError(
                    f"f_divergence_type={o.f_divergence_type!r} has no meaning for {row.name!r}"
                )
    if o.use_weighting:
        for row in losses:
            if row.score in ("sort", "sort_margin"):
                raise ValueError(f"use_weighting (WPO) cannot be combined with {row.name!r}")
    for row in losses:
        if row.needs_kl and o.reference_free:
            raise ValueError(
                f"{row.name!r} compares with a reference; reference_free=True has none"
            )
        if row.needs_kl and o.ld_alpha is not None:
            raise ValueError(f"ld_alpha weighs log-probs; it has no meaning for {row.name!r}")
    for option in OWN:
        used = any(option in row.options for row in losses)
        if not used and option in given:
            raise ValueError(f"{option}={getattr(o, option)!r} has no meaning for {names}")
