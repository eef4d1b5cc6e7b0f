"""The step-0 check: before the first step the policy must equal its reference.

Then every log-ratio is zero, rewards are 0 and the loss has its own value there (log 2 for
`sigmoid`). Anything else is another reference, a merged or re-initialised adapter, stale
precomputed log-probs, or kernels that disagree: an error, unless it was asked not to look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dpo_kernels as dk

# Allowed log-ratio of a completion: nats, plus a share of its log-prob.
_TOLERANCE = {torch.float64: (1e-6, 1e-8), torch.float32: (1e-2, 1e-4)}
_HALF_TOLERANCE = (0.1, 2e-2)


class WrongReference(ValueError):
    """Policy and reference differ before the first step."""


def check_step0(
    rewards: Tensor,
    pair_logps: Tensor,
    lengths: Tensor,
    loss: Tensor | None,
    loss_options: dict[str, Any],
    dtype: torch.dtype,
    opt_out: str,
) -> None:
    """`WrongReference` if rewards [2, B] are not 0 within rounding or the loss is another.

    `pair_logps`, `lengths` [2, B]; `loss` a scalar, None not to look at it; `dtype` in which the
    model computes; `opt_out` what to write to go without the check.
    """
    absolute, share = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    beta = torch.as_tensor(loss_options.get("beta", 0.1)).to(rewards)
    ratios = (rewards / beta).abs()
    allowed = absolute + share * pair_logps.abs()
    wrong = not bool((ratios <= allowed).all())
    got = ""
    # The loss at zero log-ratios comes from log-probs alone; what needs tokens is not recomputed.
    by_token = loss_options.get("ld_alpha") is not None or loss_options.get("use_weighting", False)
    if loss is not None and not by_token:
        zero = pair_logps.detach().double()
        options = {**loss_options, "reduction": "mean", "beta_dpo_state": None}
        expected = dk.preference_loss(
            *zero, *zero, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options
        ).loss.detach()
        got = f" (loss {float(loss.detach()):.6f}, {float(expected):.6f} at zero log-ratios)"
        # How far the loss may move within the allowed log-ratios: 1 + beta + 1 / beta bounds the
        # slope of every loss of the table but DPOP's, which has a factor of its own.
        steep = (1 + beta + 1 / beta).max() * (1 + loss_options.get("dpop_lambda", 50.0))
        steep = steep * sum(loss_options.get("loss_weights") or (1.0,))
        wrong |= not bool((loss.detach() - expected).abs() <= steep * 2 * allowed.max())
    if wrong:
        raise WrongReference(
            "before the first step the policy must equal the reference, but log-probs of a "
            f"completion differ by up to {float(ratios.max()):.4g} nats{got}: another reference "
            "model, stale reference log-probs, an adapter that is not a no-op when training "
            f"starts. If they differ on purpose: {opt_out}"
        )
