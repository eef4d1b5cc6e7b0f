"""The terms of a loss as the numbers that a backend takes."""

from __future__ import annotations

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
