"""The options of all losses: names, defaults, and what each is.

Which loss takes which stands in its row (`losses.py`), the checks of their values in
`loss_values.py`. Nothing is imported here: `dpo-kernels train --help` is drawn from this table and
must not wait for torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# The texts that an option may be, where they are few.
CHOICES = {"f_divergence_type": F_DIVERGENCES}
# Options that may be tensors [B]; all but `label_smoothing` take gradients.
PER_PAIR = ("beta", "label_smoothing", "offset", "weights")


def _own(default: float) -> Any:
    """An option of single losses: their rows name it, for others it has no meaning."""
    return field(default=default, metadata={"own": True})


@dataclass(frozen=True)
class LossOptions:
    """Every option a loss may take (`**loss_options` of the public functions), with its default.

    Names are those of TRL's `DPOConfig` wherever it has one. `losses.OPTIONS` says what each is.
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    beta: float | Tensor = 0.1
    label_smoothing: float | Tensor = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = _own(0.05)
    ld_alpha: float | None = None
    use_weighting: bool = False
    offset: Tensor | None = None
    weights: Tensor | None = None
    sft_weight: float = 0.0
    reference_free: bool = False
    reduction: str = "mean"
    num_pairs: float | Tensor | None = None
    num_chosen_tokens: float | Tensor | None = None
    dpop_lambda: float = _own(50.0)
    rdpo_alpha: float = _own(0.01)
    beta_dpo_alpha: float = _own(0.6)
    beta_dpo_momentum: float = _own(0.9)
    beta_dpo_keep: float = _own(0.8)
    beta_dpo_state: Tensor | None = None
    simpo_gamma: float = _own(0.5)
    alphapo_alpha: float = _own(0.25)
    cpo_alpha: float = _own(1.0)
    slic_lambda: float = _own(0.1)
    rpo_alpha: float = _own(1.0)
    tdpo_alpha: float = _own(0.5)

    def but(self, **changes: Any) -> LossOptions:
        """These options with some changed. Not `replace`: dynamo of torch 2.6 cannot trace it."""
        return LossOptions(**{name: getattr(self, name) for name in DEFAULTS} | changes)


DEFAULTS = {f.name: f.default for f in fields(LossOptions)}
OWN = sorted(f.name for f in fields(LossOptions) if f.metadata.get("own"))
# What each option is, in a line; its default stands in `LossOptions`.
OPTIONS: dict[str, str] = {
    "loss_type": "a name or a list of names of losses",
    "loss_weights": "one weight for each loss_type",
    "beta": "how strongly the policy is held to the reference; a tensor [B]: of each pair",
    "label_smoothing": "assumed share of flipped preferences (cDPO); a tensor [B]: of each pair",
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
