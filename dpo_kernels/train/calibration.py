"""How well the implicit reward's probabilities hold on pairs that were held out.

The policy says that the chosen completion of a pair is the better one with probability s(h), where
h is the margin of the rewards. One temperature T, which minimises the negative log-likelihood of
s(h / T), makes it say so as often as it is right (Guo et al., 1706.04599). The expected calibration
error (ECE) is the mean distance, over bins of confidence, between confidence and accuracy.

NLL and ECE with the temperature are those of halves: each half takes the temperature of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

BINS = 10
_LEAST, _MOST = 1e-3, 1e3  # of the temperature: all pairs right (or wrong) have no best one


def fit_temperature(margins: Tensor) -> float:
    """The T that minimises the mean of -log s(h / T); `margins` h [N] of chosen over rejected."""
    h = margins.double()
    low, high = 1 / _MOST, 1 / _LEAST
    for _ in range(80):  # the likelihood is convex in 1 / T: its slope changes sign once
        middle = (low * high) ** 0.5
        slope = -(h * torch.sigmoid(-middle * h)).mean()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def nll(margins: Tensor) -> float:
    return float(softplus(-margins.double()).mean())


def reliability(margins: Tensor) -> list[dict[str, float]]:
    """Bins of confidence that hold a pair: bounds, pairs, mean confidence, accuracy (ties half)."""
    h = margins.double()
    confidence = torch.sigmoid(h.abs())
    right = torch.where(h == 0, 0.5, (h > 0).double())
    at = ((confidence - 0.5) * 2 * BINS).long().clamp(0, BINS - 1)
    found = []
    for i in range(BINS):
        inside = at == i
        if bool(inside.any()):
            found.append(
                {
                    "low": 0.5 + i / (2 * BINS),
                    "high": 0.5 + (i + 1) / (2 * BINS),
                    "pairs": int(inside.sum()),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(right[inside].mean()),
                }
            )
    return found


def ece(bins: Sequence[dict[str, float]]) -> float:
    """Expected calibration error of the bins of `reliability`."""
    total = sum(b["pairs"] for b in bins)
    return sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / total


def calibration(margins: Sequence[float]) -> dict[str, Any] | None:
    """What summary.json says of held-out margins; None for fewer than two."""
    h = torch.tensor(list(margins), dtype=torch.float64)
    h = h[h.isfinite()]
    if len(h) < 2:
        return None
    halves = h[::2], h[1::2]
    scaled = torch.cat(
        [half / fit_temperature(other) for half, other in zip(halves, halves[::-1], strict=True)]
    )
    before, after = reliability(h), reliability(scaled)
    return {
        "pairs": len(h),
        "temperature": fit_temperature(h),
        "nll_before": nll(h),
        "nll_after": nll(scaled),
        "ece_before": ece(before),
        "ece_after": ece(after),
        "bins_before": before,
        "bins_after": after,
    }
