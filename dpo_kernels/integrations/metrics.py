"""Metrics kept on the device and reduced over ranks once a logging step.

Every step leaves one row of sums; a row's quotients are taken after the rows of all ranks were
added, so the result is what a reduction at every step would give.

Letters: `B` pairs, `T` positions, `S` steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .head import HeadOutput

# metric -> (numerator, denominator) among the sums of a row
_QUOTIENTS = {
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
    "aux_loss": ("aux_loss", "ranks"),
}


class PackedMetrics:
    """Rows of sums, one a step."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Tensor]] = []

    def add(self, out: HeadOutput, labels: Tensor, num_tokens: Tensor) -> None:
        """One batch: `labels` [2B, T], `num_tokens` the count of its tokens that are no padding."""
        assert out.rewards is not None and out.pair_logps is not None
        scored = labels[:, 1:] != -100
        B = out.rewards.shape[1]
        chosen, rejected = out.rewards.detach()
        sums = {
            "pairs": torch.tensor(float(B)),
            "ranks": torch.tensor(1.0),
            "chosen_rewards": chosen.sum(),
            "rejected_rewards": rejected.sum(),
            "accuracy": (chosen > rejected).sum(),
            "margins": (chosen - rejected).sum(),
            "chosen_logps": out.pair_logps[0].detach().sum(),
            "rejected_logps": out.pair_logps[1].detach().sum(),
            "num_tokens": num_tokens,
        }
        if out.entropy is not None:
            assert out.mean_logits is not None and out.is_top1 is not None
            # Where nothing is scored the statistics are 0.
            sums |= {
                "tokens": scored.sum(),
                "chosen_tokens": scored[:B].sum(),
                "rejected_tokens": scored[B:].sum(),
                "entropy": out.entropy.sum(),
                "chosen_logits": out.mean_logits[:B].sum(),
                "rejected_logits": out.mean_logits[B:].sum(),
                "correct": out.is_top1[:B].sum(),
            }
        if out.aux_loss is not None:
            sums["aux_loss"] = out.aux_loss.detach()
        self._rows.append(sums)

    def take(
        self, device: torch.device, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, list[float]], int]:
        """(values of each metric a step, tokens of all steps), and start anew.

        `reduce` adds a tensor over ranks; it is called once, with [S, sums] in fp64.
        """
        rows, self._rows = self._rows, []
        if not rows:
            return {}, 0
        names = list(rows[0])
        packed = torch.stack([torch.stack([r[n].to(device).double() for n in names]) for r in rows])
        table = dict(zip(names, reduce(packed).T.tolist(), strict=True))
        values = {
            metric: [a / b if b else 0.0 for a, b in zip(table[top], table[below], strict=True)]
            for metric, (top, below) in _QUOTIENTS.items()
            if top in table
        }
        return values, round(sum(table["num_tokens"]))
