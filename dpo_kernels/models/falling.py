"""Log-probs of chosen and rejected that fall together: the classic way in which DPO goes wrong.

The loss sees their difference alone, so a policy may lower both, the chosen less, and move its
probability to what nobody wrote (likelihood displacement). It is said when both have fallen by more
than `FALLEN` of the reference's log-prob on the mean of the steps since the last look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FALLEN = 0.1  # of the completion's log-prob under the reference
HELP = (
    "losses that hold the chosen up: loss_type dpop, rpo or cal_dpo, or sft_weight above 0; or a "
    "smaller learning_rate, or a larger beta"
)


class FallingLogps(RuntimeError):
    """Chosen and rejected fall together, and that was to end the run."""


@dataclass
class FallingWatch:
    """Collects log-ratios of pairs; `look` says what they show, once."""

    said: bool = False
    _ratios: list[Tensor] = field(default_factory=list)  # [2, B] log-ratios
    _logps: list[Tensor] = field(default_factory=list)  # [2, B] of the policy
    _names: list[str] = field(default_factory=list)

    def add(
        self, rewards: Tensor, pair_logps: Tensor, beta: float | Tensor, names: Sequence[str]
    ) -> None:
        """`rewards`, `pair_logps` [2, B], detached; `names` of the pairs. Nothing is waited for."""
        if self.said:
            return
        self._ratios.append(rewards.detach() / torch.as_tensor(beta).to(rewards))
        self._logps.append(pair_logps.detach())
        self._names += names

    def look(self) -> str:
        """What there is to say of the pairs since the last look; "" if nothing."""
        if self.said or not self._ratios:
            return ""
        ratios, logps = torch.cat(self._ratios, 1).cpu(), torch.cat(self._logps, 1).cpu()
        names, self._ratios, self._logps, self._names = self._names, [], [], []
        if not fallen(*ratios.mean(1).tolist(), *(logps - ratios).mean(1).tolist()):
            return ""
        self.said = True
        worst = ratios[0].argsort()[:3].tolist()
        rows = ", ".join(f"{names[i]} ({float(ratios[0, i]):.1f})" for i in worst)
        c, r = ratios.mean(1).tolist()
        return falling_text(c, r) + f". Fallen most, in nats of the chosen: {rows}"


def fallen(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float) -> bool:
    """Whether both log-ratios are below `-FALLEN` of the reference's log-probs."""
    return chosen < -FALLEN * abs(ref_chosen) and rejected < -FALLEN * abs(ref_rejected)


def falling_text(chosen: float, rejected: float) -> str:
    return (
        f"the log-probs of chosen and rejected fall together (by {-chosen:.1f} and {-rejected:.1f} "
        f"nats of the reference's): probability goes to what neither says. {HELP}"
    )
