"""Metrics kept on the device and reduced over ranks once a logging step or an evaluation.

Every batch leaves one row of sums. Quotients are taken at the end, after the rows of all batches
and ranks were added, so no batch's size matters. (While training under TRL each batch has its
quotient, and TRL takes their mean, as it always has.) In an evaluation the pairs that a distributed
sampler repeats to fill its last batches are left out of the sums.

Letters: `B` pairs, `T` positions, `S` steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.attached import HeadOutput
from ..models.step0 import tied

# metric -> (numerator, denominator) among the sums of a row
_QUOTIENTS = {
    "loss": ("loss", "pairs"),
    "nll": ("nll", "nll_tokens"),
    "rewards/chosen": ("chosen_rewards", "pairs"),
    "rewards/rejected": ("rejected_rewards", "pairs"),
    "rewards/accuracies": ("accuracy", "pairs"),
    "rewards/margins": ("margins", "pairs"),
    "logps/chosen": ("chosen_logps", "pairs"),
    "logps/rejected": ("rejected_logps", "pairs"),
    "entropy": ("entropy", "tokens"),
    "logits/chosen": ("chosen_logits", "chosen_tokens"),
    "logits/rejected": ("rejected_logits", "rejected_tokens"),
    "mean_token_accuracy": ("correct", "chosen_tokens"),
    "aux_loss": ("aux_loss", "batches"),
}


# What an evaluation asks of the loss: pairs one by one, and the SFT term to be divided at the end.
ONE_BY_ONE = {"reduction": "none", "num_pairs": None, "num_chosen_tokens": None}
LOSS_SUMS = ("loss", "pairs", "nll", "nll_tokens")  # what `loss_sums` may hold


def loss_sums(out: HeadOutput, labels: Tensor, real: int) -> dict[str, Tensor]:
    """Sums that an evaluation's loss [B] (`ONE_BY_ONE`) adds up in, of the first `real` pairs.

    The pairs' losses are divided by pairs and the SFT term by its tokens, as in one large batch.
    """
    assert out.loss is not None
    losses, sums = out.loss.detach(), {}
    if out.sft is not None:
        B = len(losses)
        tokens = (labels[:B, 1:] != -100).sum(1).to(losses.device)
        losses = losses - out.sft * (B / tokens.sum().clamp(min=1))
        sums = {"nll": out.sft[:real].sum(), "nll_tokens": tokens[:real].sum()}
    return {"pairs": losses.new_tensor(float(real)), "loss": losses[:real].sum(), **sums}


def mean_loss(sums: dict[str, Tensor]) -> Tensor:
    """The loss of all that was added up."""
    loss = sums["loss"] / sums["pairs"].clamp(min=1)
    return loss + sums["nll"] / sums["nll_tokens"].clamp(min=1) if "nll" in sums else loss


class PackedMetrics:
    """Rows of sums, one a batch."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []

    def add(
        self,
        out: HeadOutput,
        labels: Tensor,
        num_tokens: Tensor,
        real: int | None = None,
        beta: float | Tensor | None = None,
    ) -> None:
        """One batch: `labels` [2B, T], `num_tokens` the count of its tokens that are no padding.

        Only the first `real` pairs count (None: all). `beta` of the log-ratios, None where there is
        no reference. A loss [B] is one of the metrics.
        """
        assert out.rewards is not None and out.pair_logps is not None
        B = out.rewards.shape[1]
        real = B if real is None else real
        first, second = slice(0, real), slice(B, B + real)
        scored = labels[:, 1:] != -100
        chosen, rejected = out.rewards.detach()[:, :real]
        tie = tied(out.rewards.detach(), out.pair_logps.detach(), beta)[:real]
        sums = {
            "pairs": torch.tensor(float(real)),
            "batches": torch.tensor(float(real > 0)),
            "chosen_rewards": chosen.sum(),
            "rejected_rewards": rejected.sum(),
            "accuracy": ((chosen > rejected) & ~tie).sum(),
            "margins": (chosen - rejected).sum(),
            "chosen_logps": out.pair_logps[0, :real].detach().sum(),
            "rejected_logps": out.pair_logps[1, :real].detach().sum(),
            "num_tokens": num_tokens,
        }
        if out.loss is not None and out.loss.dim():
            sums |= loss_sums(out, labels, real)
        if out.entropy is not None:
            assert out.mean_logits is not None and out.is_top1 is not None
            # Where nothing is scored the statistics are 0.
            sums |= {
                "tokens": scored[first].sum() + scored[second].sum(),
                "chosen_tokens": scored[first].sum(),
                "rejected_tokens": scored[second].sum(),
                "entropy": out.entropy[first].sum() + out.entropy[second].sum(),
                "chosen_logits": out.mean_logits[first].sum(),
                "rejected_logits": out.mean_logits[second].sum(),
                "correct": out.is_top1[first].sum(),
            }
        if out.aux_loss is not None:
            sums["aux_loss"] = out.aux_loss.detach() * (real > 0)
        self._rows.append(sums)

    def take(
        self, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, float], int]:
        """(values of the metrics over all batches, tokens of all batches), and start anew.

        `reduce` adds a tensor over ranks; it is called once, with [S, sums] in fp64.
        """
        table = self._table(device, reduce)
        total = {name: [sum(column)] for name, column in table.items()}
        values = {metric: quotient[0] for metric, quotient in _quotients(total).items()}
        return values, round(sum(table.get("num_tokens", ())))

    def take_each(
        self, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, list[float]], int]:
        """As `take`, with the values of each batch (of all ranks) on its own."""
        table = self._table(device, reduce)
        return _quotients(table), round(sum(table.get("num_tokens", ())))

    def _table(
        self, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> dict[str, list[float]]:
        """Sums over ranks, by name, one a batch."""
        rows, self._rows = self._rows, []
        if not rows:
            return {}
        names = list(rows[0])
        packed = torch.stack([torch.stack([r[n].to(device).double() for n in names]) for r in rows])
        return dict(zip(names, reduce(packed).T.tolist(), strict=True))


def _quotients(table: dict[str, list[float]]) -> dict[str, list[float]]:
    found = {
        metric: [a / b if b else 0.0 for a, b in zip(table[top], table[below], strict=True)]
        for metric, (top, below) in _QUOTIENTS.items()
        if top in table
    }
    if "nll" in found:  # a part of the loss
        nll = found.pop("nll")
        found["loss"] = [a + b for a, b in zip(found["loss"], nll, strict=True)]
    return found


def real_pairs(trainer: Any, B: int) -> int:
    """How many of this rank's B pairs of an evaluation's batch are no repetition.

    accelerate fills the last batches of all ranks from the start of the data; in the order of ranks
    the first `remainder` rows are real (as `gather_for_metrics` has it).
    """
    state = trainer.accelerator.gradient_state
    if state.active_dataloader is not trainer.callback_handler.eval_dataloader:
        return B  # no dataloader of accelerate's
    if not state.end_of_dataloader or state.remainder <= 0:
        return B
    return min(max(state.remainder - trainer.accelerator.process_index * B, 0), B)


def evaluation_metrics(trainer: Any) -> dict[str, float]:
    """The metrics of the evaluation that has just run, over all ranks, without a prefix."""
    accelerator = trainer.accelerator
    values, _ = trainer._packed["eval"].take(
        accelerator.device, lambda x: accelerator.reduce(x, "sum")
    )
    return values
