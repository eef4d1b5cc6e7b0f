"""An offset and a temperature of each data group, trained with the model.

    loss = -log s(t_g h - sign c_g),   t_g = softplus(tau_g), first 1;  c_g first 0

`h` is beta times the log-ratio difference of a pair, and g its `group`: an annotator, a source, a
bucket of lengths. They reach the loss as `beta=` and `offset=` tensors, have a learning rate of
their own, and are drawn to (1, 0) by an L2 penalty.

What the labels can tell. Rows put the chosen completion first, so an offset of one sign alone has
no counter-example: it would fall for as long as the penalty lets it, and the loss with it. A bias
shows where some rows of a group speak against it. A row says so by a minus before its group: "-a"
is group a where the bias (towards what was shown first, is longer, ...) speaks for the rejected
one, and "a" where it speaks for the chosen one. c_g is then what the bias takes from the chosen
one's margin, negative where it favours it. Uncertain labels (label_smoothing) bound it as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..data import DataError, TokenPair
from .config import DPOTrainConfig

_TAU_ONE = math.log(math.e - 1)  # softplus of it is 1


class Groups(nn.Module):
    """Temperatures and offsets, by name; a pair of no group, or of a new one, has (1, 0)."""

    def __init__(self, names: Iterable[str], l2: float) -> None:
        super().__init__()
        self.names = sorted(set(names))
        self.l2 = l2
        self.places = {name: i for i, name in enumerate(self.names)}
        self.tau = nn.Parameter(torch.full((len(self.names),), _TAU_ONE))
        self.offset = nn.Parameter(torch.zeros(len(self.names)))

    @staticmethod
    def of(pairs: Sequence[TokenPair], l2: float) -> Groups:
        return Groups((name for name, _ in map(_signed, pairs) if name), l2)

    @property
    def temperature(self) -> Tensor:
        return softplus(self.tau)

    def options(self, pairs: Sequence[TokenPair], beta: Tensor) -> dict[str, Tensor]:
        """`beta` and `offset` [B] of these pairs, differentiable; `beta` [B] is theirs without."""
        signed = [_signed(p) for p in pairs]
        device = self.tau.device
        at = torch.tensor([self.places.get(name, -1) for name, _ in signed], device=device)
        sign = torch.tensor([s for _, s in signed], device=device)
        known = at >= 0
        at = at.clamp_min(0)
        return {
            "beta": beta.to(device) * torch.where(known, self.temperature[at], 1.0),
            "offset": sign * torch.where(known, self.offset[at], 0.0),
        }

    def penalty(self, pairs: Sequence[TokenPair]) -> Tensor:
        """The L2 of the parameters, each weighed by its share of these pairs."""
        counts = Counter(name for name, _ in map(_signed, pairs))
        share = torch.tensor([counts[n] / len(pairs) for n in self.names], device=self.tau.device)
        return self.l2 * (share * ((self.temperature - 1) ** 2 + self.offset**2)).sum()

    def values(self) -> dict[str, tuple[float, float]]:
        """(temperature, offset) by name."""
        pairs = zip(self.temperature.tolist(), self.offset.tolist(), strict=True)
        return dict(zip(self.names, pairs, strict=True))

    def metrics(self) -> dict[str, float]:
        found = {}
        for name, (temperature, offset) in self.values().items():
            found[f"groups/{name}/temperature"] = temperature
            found[f"groups/{name}/offset"] = offset
        return found


def learned_groups(
    config: DPOTrainConfig,
    device: torch.device,
    pairs: Sequence[TokenPair],
    say: Callable[[str], None],
) -> Groups | None:
    """What is learned of the pairs' groups beside the model, where `learn_groups` asks for it."""
    if not config.learn_groups:
        return None
    groups = Groups.of(pairs, config.group_l2).to(device)
    if not groups.names:
        raise DataError("learn_groups: no row has a `group`")
    loose = one_sided(pairs, config.label_smoothing > 0)
    if loose:
        say(
            f"warning: learn_groups: all rows of {', '.join(loose[:8])} point one way, so only "
            "group_l2 bounds the offset and the loss says little; write -GROUP where the bias "
            "speaks for the rejected one, or give uncertain labels (label_smoothing)"
        )
    return groups


def group_summary(groups: Groups, pairs: Sequence[TokenPair]) -> dict[str, dict[str, float]]:
    """What summary.json says of each group."""
    counts = Counter(name for name, _ in map(_signed, pairs))
    return {
        name: {"temperature": temperature, "offset": offset, "pairs": counts[name]}
        for name, (temperature, offset) in groups.values().items()
    }


def one_sided(pairs: Sequence[TokenPair], smoothed: bool) -> list[str]:
    """The groups whose labels do not bound their offset."""
    signs: dict[str, set[float]] = {}
    for pair in pairs:
        name, sign = _signed(pair)
        soft = smoothed or bool(getattr(pair, "label_smoothing", None))
        signs.setdefault(name, set()).update((1.0, -1.0) if soft else (sign,))
    return sorted(name for name, found in signs.items() if name and len(found) == 1)


def _signed(pair: TokenPair) -> tuple[str, float]:
    """(group, sign of its bias in this pair)."""
    name = pair.group or ""
    return (name[1:], -1.0) if name.startswith("-") and len(name) > 1 else (name, 1.0)
