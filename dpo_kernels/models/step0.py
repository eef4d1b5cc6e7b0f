"""The step-0 check: before the first step the policy must equal its reference.

Then every log-ratio is zero, rewards are 0 and the loss has its own value there (log 2 for
`sigmoid`). Anything else is another reference, a merged or re-initialised adapter, stale
precomputed log-probs, or kernels that disagree: an error, unless it was asked not to look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attached import HeadOutput
from .forward import Reference, noiseless
from .options import FusedOptions

# Allowed log-ratio of a completion: nats, plus a share of its log-prob.
_TOLERANCE = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-2, 1e-4)}
_HALF_TOLERANCE = (0.1, 2e-2)


# A margin is a tie when the log-ratios behind it are within this share of the log-probs: fp32
# rounding of two sums taken in another order.
TIE = 2e-6


def tied(rewards: Tensor, pair_logps: Tensor, beta: float | Tensor | None) -> Tensor:
    """[B] the pairs whose margin is rounding, as all are before training, not a preference.

    `rewards`, `pair_logps` [2, B]; `beta` of the log-ratios, None where there is no reference.
    """
    scale = rewards.abs().sum(0)
    if beta is not None:
        scale = torch.as_tensor(beta).to(pair_logps) * pair_logps.abs().sum(0)
    return (rewards[0] - rewards[1]).abs() <= TIE * scale


class WrongReference(ValueError):
    """Policy and reference differ before the first step."""


def check_first_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    out: HeadOutput,
    reference: Reference | None,
    loss_options: dict[str, Any],
    fused: FusedOptions,
    dtype: torch.dtype,
    opt_out: str,
) -> HeadOutput:
    """`out`, of the first step, as it is without the model's noise; `WrongReference` if that shows
    a policy unlike its reference."""
    seen = noiseless(model, inputs, labels, out, reference, loss_options, fused)
    assert seen.rewards is not None and seen.pair_logps is not None
    dtype = seen.rewards.dtype if seen.rewards.dtype == torch.float64 else dtype
    check_step0(
        seen.rewards, seen.pair_logps, loss_options, dtype, opt_out, seen.loss, seen.zero_loss
    )
    return seen


def check_step0(
    rewards: Tensor,
    pair_logps: Tensor,
    loss_options: dict[str, Any],
    dtype: torch.dtype,
    opt_out: str = "",
    loss: Tensor | None = None,
    zero_loss: Tensor | None = None,
) -> None:
    """`WrongReference` if rewards [2, B] are not 0 within rounding or the loss is another.

    `pair_logps` [2, B]; `dtype` in which the model computes; `opt_out` what to write to go without
    the check; `loss` and `zero_loss`, which it is at zero log-ratios, scalars.
    """
    absolute, share = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    beta = torch.as_tensor(loss_options.get("beta", 0.1)).to(rewards)
    ratios = (rewards / beta).abs()
    allowed = absolute + share * pair_logps.abs()
    wrong = not bool((ratios <= allowed).all())
    got = ""
    if loss is not None and zero_loss is not None:
        got = f" (loss {float(loss):.6f}, {float(zero_loss):.6f} at zero log-ratios)"
        # How far the loss may move within the allowed log-ratios: 1 + beta + 1 / beta bounds the
        # slope of every loss of the table but DPOP's, which has a factor of its own.
        steep = (1 + beta + 1 / beta).max() * (1 + loss_options.get("dpop_lambda", 50.0))
        steep = steep * sum(loss_options.get("loss_weights") or (1.0,))
        wrong |= not bool((loss.detach() - zero_loss).abs() <= steep * 2 * allowed.max())
    if wrong:
        instead = f". If they differ on purpose: {opt_out}" if opt_out else ""
        raise WrongReference(
            "before the first step the policy must equal the reference, but log-probs of a "
            f"completion differ by up to {float(ratios.max()):.4g} nats{got}: another reference "
            "model, stale reference log-probs (a cache), an adapter that is not a no-op when "
            f"training starts (merged, trained before, or of virtual tokens){instead}"
        )
