"""Metrics under TRL's names, kept as tensors until they are logged, and their JSONL file.

    loss, rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}, grad_norm,
    learning_rate, epoch, step, num_tokens; and here step_time (seconds), tokens_per_s, pairs_per_s

`rewards/accuracies` is TRL's: a tie, which here is any margin within rounding of zero, counts 0.
Before training the policy is the reference, every pair is a tie and that number is 0. So
evaluations add `eval_rewards/accuracies_ties_half`, where a tie counts one half: it starts at 0.5.
`eval_logps/accuracies` asks the policy alone: logp(chosen) > logp(rejected).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.attached import HeadOutput
from ..models.step0 import tied

_NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracies_ties_half",
    "logps/accuracies",
)
EVAL_ONLY = ("rewards/accuracies_ties_half", "logps/accuracies")


class PairMeter:
    """Means over pairs; the sums stay on the device."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._loss: Tensor | None = None
        self.pairs = 0

    def add(self, out: HeadOutput, beta: float | None) -> None:
        """Add one batch; `beta` is None where there is no reference.

        Its loss is a share of a whole (`num_pairs=`): shares are summed.
        """
        assert out.loss is not None and out.rewards is not None and out.pair_logps is not None
        rewards, logps = out.rewards, out.pair_logps  # [2, B]
        margins = rewards[0] - rewards[1]
        tie = tied(rewards, logps, beta)
        wins = (margins > 0) & ~tie
        values = [
            *rewards,
            wins,
            margins,
            *logps,
            torch.where(tie, 0.5, wins.to(margins.dtype)),
            logps[0] > logps[1],
        ]
        sums = torch.stack([x.to(margins.dtype).sum() for x in values]).double()
        loss = out.loss.detach().double()
        self._sums = sums if self._sums is None else self._sums + sums
        self._loss = loss if self._loss is None else self._loss + loss
        self.pairs += len(margins)

    def merge(self, other: PairMeter) -> None:
        """Add what another one has seen."""
        if other._sums is None or other._loss is None:
            return
        device = other._sums.device
        self._sums = other._sums if self._sums is None else self._sums.to(device) + other._sums
        self._loss = other._loss if self._loss is None else self._loss.to(device) + other._loss
        self.pairs += other.pairs

    def state(self) -> dict[str, Any]:
        """The sums as plain numbers, which JSON keeps to the last bit."""
        if self._sums is None or self._loss is None:
            return {}
        return {"sums": self._sums.tolist(), "loss": float(self._loss), "pairs": self.pairs}

    @classmethod
    def of(cls, state: dict[str, Any]) -> PairMeter:
        """The meter whose `state` this is."""
        meter = cls()
        if state:
            meter._sums = torch.tensor(state["sums"], dtype=torch.float64)
            meter._loss = torch.tensor(state["loss"], dtype=torch.float64)
            meter.pairs = state["pairs"]
        return meter

    def result(self, steps: int = 1) -> dict[str, float]:
        """Means since the start; the loss is the mean over `steps`."""
        assert self._sums is not None and self._loss is not None
        # All sums come from the device at once.
        loss, *sums = torch.cat([self._loss.reshape(1), self._sums]).tolist()
        values = [x / self.pairs for x in sums]
        return {"loss": loss / steps, **dict(zip(_NAMES, values, strict=True))}


class UnpairedMeter:
    """Means over single completions: rewards and log-probs of the good and of the bad ones.

    Names are TRL's: rewards/chosen is the mean reward of the good, rewards/rejected that of the
    bad, and `kl` the z of the steps.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # good: number, rewards, logps; bad: likewise; loss; kl
        self.pairs = 0  # rows

    def add(self, out: HeadOutput, beta: float | None) -> None:
        """Add one batch. Its loss is a share of its step's; its kl is the step's."""
        assert out.loss is not None and out.rewards is not None and out.logps is not None
        assert out.desirable is not None and out.kl is not None
        values = []
        for side in (out.desirable, ~out.desirable):
            values.append(side.sum())
            values += [torch.where(side, x.double(), 0.0).sum() for x in (out.rewards, out.logps)]
        n = len(out.rewards)
        values += [out.loss.detach(), n * out.kl]
        sums = torch.stack([x.double() for x in values])
        self._sums = sums if self._sums is None else self._sums + sums
        self.pairs += n

    def merge(self, other: UnpairedMeter) -> None:
        """Add what another one has seen."""
        if other._sums is None:
            return
        device = other._sums.device
        self._sums = other._sums if self._sums is None else self._sums.to(device) + other._sums
        self.pairs += other.pairs

    def state(self) -> dict[str, Any]:
        """The sums as plain numbers, which JSON keeps to the last bit."""
        sums = None if self._sums is None else self._sums.tolist()
        return {"unpaired": True, "sums": sums, "pairs": self.pairs}

    @classmethod
    def of(cls, state: dict[str, Any]) -> UnpairedMeter:
        meter = cls()
        if state["sums"] is not None:
            meter._sums = torch.tensor(state["sums"], dtype=torch.float64)
        meter.pairs = state["pairs"]
        return meter

    def result(self, steps: int = 1) -> dict[str, float]:
        """Means since the start; of a side that no row was on, nothing."""
        assert self._sums is not None
        *sides, loss, kl = self._sums.tolist()
        found = {"loss": loss / steps, "kl": kl / self.pairs}
        for name, (n, rewards, logps) in (("chosen", sides[:3]), ("rejected", sides[3:])):
            if n:
                found |= {f"rewards/{name}": rewards / n, f"logps/{name}": logps / n}
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def meter_of(state: dict[str, Any]) -> PairMeter | UnpairedMeter:
    """The meter whose `state` this is."""
    return UnpairedMeter.of(state) if state.get("unpaired") else PairMeter.of(state)


class MetricsFile:
    """One JSON object a line, flushed at once so that a run can be watched."""

    def __init__(
        self, path: Path, rows: list[dict[str, Any]] | None = None, written: bool = True
    ) -> None:
        """A new file, or one that starts with the rows of an earlier run.

        `written`: False where another process writes it, and the rows are kept alone.
        """
        self.path, self.written = path, written
        self.rows: list[dict[str, Any]] = rows or []
        self.beside: Callable[[dict[str, Any]], None] | None = None  # told of every new row
        if not written:
            return
        part = path.with_name(path.name + ".tmp")
        part.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        part.replace(path)

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self.written:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.beside is not None:
            self.beside(row)


def read_metrics(path: Path, first: int | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file, or the `first` of them.

    Only then may lines behind them be torn, as a run that was killed leaves them.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [json.loads(line) for line in lines[:first]]
