"""What a call settles at the door: its options, checked and resolved once for equal options.

The front functions are called with the same options step after step. What depends on them alone
(the loss's rows and terms, the logit transform, whether the loss has a closed form) is kept by
their values; a tensor among them, or an option that is wrong, is looked at each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import losses as _losses
from ..loss.ordinary import Ordinary
from ..ops import check_stats
from . import arguments
from .transform import LogitTransform

_SIMPLE = (bool, int, float, str, type(None))
_LARGEST = 256


@dataclass(frozen=True)
class Settled:
    """The arguments that are not tensors of the batch, checked."""

    options: _losses.LossOptions
    losses: list[tuple[_losses.Loss, float, _losses.Terms]]
    transform: LogitTransform
    stats: tuple[str, ...]
    ordinary: Ordinary | None  # the loss in closed form, if it has one


_kept: dict[tuple, Settled] = {}


def settle(given: dict[str, Any], loss_options: dict[str, Any]) -> Settled:
    """`given` are arguments of `arguments.CHECKS` and those of the logit transform.

    Raises `TypeError` or `ValueError` for a wrong one.
    """
    key = None if torch.compiler.is_compiling() else _key(given, loss_options)
    if key is not None and key in _kept:
        return _kept[key]
    transform: dict[str, Any] = {n: given.get(n, default) for n, default in _TRANSFORM.items()}
    arguments.check(**{name: x for name, x in given.items() if name not in transform})
    options, losses = _losses.resolve(loss_options)
    settled = Settled(
        options,
        losses,
        LogitTransform.of(**transform),
        check_stats(given.get("stats", ())),
        Ordinary.of(options, losses),
    )
    if key is not None:
        if len(_kept) >= _LARGEST:
            _kept.clear()
        _kept[key] = settled
    return settled


_TRANSFORM = {"temperature": 1.0, "logit_softcap": None, "logit_scale": 1.0}


def _key(*groups: dict[str, Any]) -> tuple | None:
    """Equal for arguments that are equal in value and type; None where they say nothing of it."""
    parts: list[Any] = []
    for group in groups:
        for name, x in group.items():
            kind = type(x)
            if kind is list or kind is tuple:
                if any(type(item) not in _SIMPLE for item in x):
                    return None
                parts += (name, kind, *(type(item) for item in x), *x)
            elif kind in _SIMPLE:
                parts += (name, kind, x)
            else:
                return None
        parts.append(None)
    return tuple(parts)
