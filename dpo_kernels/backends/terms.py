"""The terms of a loss as the numbers that a backend takes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..losses import Term

_FIELDS = ("w", "a", "b", "c", "c_beta", "c_inv_beta", "c_offset", "p")
STRIDE = len(_FIELDS) + 2  # numbers per term handed to a backend: the fields, scaled, w_beta


def flatten(terms: tuple[Term, ...]) -> list[float]:
    """STRIDE numbers a term: w, a, b, c, c_beta, c_inv_beta, c_offset, p, scaled, w_beta."""
    rows = [[*(float(getattr(t, f)) for f in _FIELDS), t.scaled, t.w_beta] for t in terms]
    return [float(x) for row in rows for x in row]


def unflatten(phis: list[int], numbers: list[float]) -> tuple[Term, ...]:
    """The terms back from `flatten`."""
    terms = []
    for k, kind in enumerate(phis):
        *values, scaled, w_beta = numbers[k * STRIDE : (k + 1) * STRIDE]
        named = dict(zip(_FIELDS, values, strict=True))
        terms.append(Term(kind, scaled=bool(scaled), w_beta=bool(w_beta), **named))
    return tuple(terms)


class OrdinaryPairs(NamedTuple):
    """What an ordinary loss of pairs (`loss/ordinary.py`) takes besides the policy's log-probs."""

    terms: tuple[Any, ...]  # phis, numbers of `flatten`, per_token, mean_reward
    beta: float | Tensor  # a number, or [B] or [] fp64
    offset: Tensor | None  # [B] fp64, contiguous
    reference: Tensor | None  # [2B] log-probs
