"""The options of all losses: names, defaults, what each is, and the checks of their values.

Which loss takes which stands in its row (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .inputs import checks

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# Options that may be tensors [B], and take gradients.
PER_PAIR = ("beta", "offset", "weights")
_TINY = 2.2250738585072014e-308  # the smallest fp64 with a finite inverse


@dataclass(frozen=True)
class LossOptions:
    """Every option a loss may take (`**loss_options` of the public functions), with its default.

    Names are those of TRL's `DPOConfig` wherever it has one. `losses.OPTIONS` says what each is.
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    beta: float | Tensor = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    use_weighting: bool = False
    offset: Tensor | None = None
    weights: Tensor | None = None
    sft_weight: float = 0.0
    reference_free: bool = False
    reduction: str = "mean"
    num_pairs: float | Tensor | None = None
    num_chosen_tokens: float | Tensor | None = None
    dpop_lambda: float = 50.0
    rdpo_alpha: float = 0.01
    beta_dpo_alpha: float = 0.6
    beta_dpo_momentum: float = 0.9
    beta_dpo_keep: float = 0.8
    beta_dpo_state: Tensor | None = None
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    cpo_alpha: float = 1.0
    slic_lambda: float = 0.1
    rpo_alpha: float = 1.0
    tdpo_alpha: float = 0.5

    def but(self, **changes: Any) -> LossOptions:
        """These options with some changed. Not `replace`: dynamo of torch 2.6 cannot trace it."""
        return LossOptions(**{name: getattr(self, name) for name in DEFAULTS} | changes)


DEFAULTS = {f.name: f.default for f in fields(LossOptions)}
# What each option is, in a line; its default stands in `LossOptions`.
OPTIONS: dict[str, str] = {
    "loss_type": "a name or a list of names of losses",
    "loss_weights": "one weight for each loss_type",
    "beta": "how strongly the policy is held to the reference; a tensor [B]: of each pair",
    "label_smoothing": "assumed share of flipped preferences (cDPO)",
    "f_divergence_type": "f-divergence of the scores",
    "f_alpha_divergence_coef": "alpha of alpha_divergence",
    "discopop_tau": "temperature of discopop",
    "ld_alpha": "weight of the longer one's tail (LD-DPO)",
    "use_weighting": "weigh pairs by policy probability (WPO)",
    "offset": "[B] margin that beta times the difference must exceed (ODPO)",
    "weights": "[B] weights of the pairs",
    "sft_weight": "adds the NLL of the chosen, mean over its tokens",
    "reference_free": "leave the reference out of the loss",
    "reduction": "mean, or none: one loss a pair",
    "num_pairs": "what the sum of the pairs' losses is divided by, in place of their number",
    "num_chosen_tokens": "what the NLL of the chosen is divided by, in place of their tokens",
    "dpop_lambda": "penalty of dpop",
    "rdpo_alpha": "length penalty of rdpo",
    "beta_dpo_alpha": "slope of beta_dpo",
    "beta_dpo_momentum": "momentum of beta_dpo",
    "beta_dpo_keep": "share of pairs beta_dpo keeps",
    "beta_dpo_state": "[2] running mean and deviation of the margin, updated in place (beta_dpo)",
    "simpo_gamma": "margin of simpo and alphapo",
    "alphapo_alpha": "alpha of alphapo",
    "cpo_alpha": "NLL weight of cpo",
    "slic_lambda": "NLL weight of slic",
    "rpo_alpha": "NLL weight of rpo",
    "tdpo_alpha": "weight of the KL of tdpo2",
}


def check_values(o: LossOptions, own: Iterable[str]) -> None:
    """Types and values of the options; `own` are the numbers that are some loss's own."""

    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {checks.shown(getattr(o, name))}")

    for name in [*own, "label_smoothing", "sft_weight", "f_alpha_divergence_coef"]:
        checks.number(name, getattr(o, name))
    if not isinstance(o.beta, Tensor):
        x = checks.positive("beta", o.beta, "a positive finite number, or a tensor of such")
        require(x >= _TINY, "beta", "a positive number with a finite inverse")
    for name in ("use_weighting", "reference_free"):
        checks.flag(name, getattr(o, name))
    for name in ("num_pairs", "num_chosen_tokens"):
        if getattr(o, name) is not None:
            _check_count(name, getattr(o, name))
    _check_tensors(o)
    require(o.discopop_tau >= _TINY, "discopop_tau", "positive")
    checks.choice("f_divergence_type", o.f_divergence_type, F_DIVERGENCES)
    checks.choice("reduction", o.reduction, ("mean", "none"))
    require(0 < o.beta_dpo_keep <= 1, "beta_dpo_keep", "in (0, 1]")
    require(0 <= o.beta_dpo_momentum <= 1, "beta_dpo_momentum", "in [0, 1]")
    require(o.alphapo_alpha != 0, "alphapo_alpha", "other than 0 (at 0 it is simpo)")
    if o.ld_alpha is not None:
        checks.number("ld_alpha", o.ld_alpha, "None or a finite number")


def _check_count(name: str, value: object) -> None:
    """A normaliser: a positive number, or a tensor of one without dimensions."""
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
        if value is None or (name == "beta" and not isinstance(value, Tensor)):
            continue
        checks.floating(name, value)
        checks.values(name, value, torch.isfinite, "finite")
        if name == "beta":
            checks.values(name, value, lambda x: x.double() >= _TINY, "positive")
    if o.beta_dpo_state is not None:
        checks.floating("beta_dpo_state", o.beta_dpo_state)
        checks.shape("beta_dpo_state", o.beta_dpo_state, (2,), "mean and deviation")
