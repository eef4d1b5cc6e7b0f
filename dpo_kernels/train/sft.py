"""Supervised fine-tuning: on its own, before preference pairs, or beside them.

The loss is the negative log-likelihood of the assistant's turns, mean over the tokens of the step,
through the same fused head as DPO.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import TokenSequence, make_sequence_batch
from ..models.structure import deterministic
from .config import DPOTrainConfig
from .console import Console
from .machine import compiled
from .metrics import MetricsFile
from .model import Policy
from .optim import Stepper
from .order import epoch_order, step_indices, total_steps
from .resume import Keeper
from .state import Progress, TrainingState
from .step_parts import Parts, agreed_signal, idle


def train_sft(
    policy: Policy,
    sequences: list[TokenSequence],
    config: DPOTrainConfig,
    metrics: MetricsFile,
    console: Console,
    evaluate: Callable[[], dict[str, float]] | None = None,
    keeper: Keeper | None = None,
) -> float:
    """Train in place; returns the mean loss per token of the last tenth of the steps.

    `evaluate` gives the numbers of held-out rows, every `eval_steps`. Checkpoints are written as
    `keeper` has it, and a resumed run goes on from its own.
    """
    n, micro = len(sequences), config.per_device_train_batch_size
    steps = total_steps(n, micro * config.gradient_accumulation_steps, config)
    keeper = keeper or Keeper(None, 0, {})
    stepper, progress = Stepper(policy.model, config, steps), Progress()
    state = TrainingState(policy.model, stepper, {}, progress)
    if keeper.resumed:
        keeper.resumed.restore(state)
        console.say(f"resumed at step {progress.step}: {keeper.resumed.path}")
    losses: list[float] = []
    between = True  # two steps: weights, optimizer and counters are of one step

    def one_step(indices: list[int], epoch: float) -> None:
        began = time.perf_counter()
        step = progress.step + 1
        chunk = [sequences[i] for i in indices]
        policy.ranks.at("SFT", step)
        total = nll_gradients(policy, chunk, micro)
        policy.sharded.meet()
        console.agreed = agreed_signal(policy, console.signal)
        extra = stepper.step(total, f"SFT step {step}", [s.source for s in chunk])
        if stepper.warning:
            console.say(stepper.warning)
            stepper.warning = ""
        losses.append(float(total))
        progress.step = step
        progress.tokens += sum(len(s.ids) for s in chunk)
        progress.times.append(time.perf_counter() - began)
        if step % config.logging_steps == 0 or step == steps:
            row = {
                "step": step,
                "epoch": epoch,
                "loss": losses[-1],
                **extra,
                "num_tokens": progress.tokens,
                "step_time": progress.times[-1],
            }
            metrics.write(row)
            console.postfix(loss=f"{losses[-1]:.3f}")
        if evaluate and config.eval_steps and step % config.eval_steps == 0 and step < steps:
            metrics.write({"step": step, "epoch": epoch, **evaluate()})
        if keeper.due(step) or (step == steps and keeper.every):
            keeper.save(state, len(metrics.rows))

    plan = itertools.islice(step_indices(n, config, steps), progress.step, None)
    try:
        with compiled(policy.model, config), console.sharing(policy.ranks.many):
            for indices, epoch in console.progress(plan, "SFT", steps - progress.step, "steps"):
                between = False
                one_step(indices, epoch)
                between = True
    except KeyboardInterrupt:
        if between:
            with console.held():
                keeper.save(state, len(metrics.rows), wait=True)
        raise
    keeper.finish()
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / max(len(tail), 1)


def fine_tune(
    policy: Policy,
    sequences: list[TokenSequence],
    config: DPOTrainConfig,
    folder: Path,
    console: Console,
) -> None:
    """Supervised steps on the rows of `sft_file`, before the pairs."""
    steps = config.sft_steps
    if not sequences or steps == 0 or (steps is None and config.sft_rows):
        return
    config = replace(
        config,
        learning_rate=config.sft_learning_rate,
        max_steps=-1 if steps is None else steps,
        num_train_epochs=1.0,
        early_stopping_patience=None,
        eval_steps=None,
    )
    taught(policy, sequences, config, folder, console)


def taught(
    policy: Policy,
    sequences: list[TokenSequence],
    config: DPOTrainConfig,
    folder: Path,
    console: Console,
) -> None:
    """Supervised steps whose metrics stand apart, and a line of what they came to."""
    metrics = MetricsFile(folder / "sft_metrics.jsonl", written=policy.ranks.first)
    loss = train_sft(policy, sequences, config, metrics, console)
    console.say(f"SFT on {len(sequences)} conversations: loss {loss:.3f} per token")


def nll_gradients(
    policy: Policy, sequences: Sequence[TokenSequence], micro: int, weight: float = 1.0
) -> Tensor:
    """NLL per token of these sequences, its gradient times `weight` added to the parameters'."""
    tokens, ranks = sum(s.num_scored for s in sequences), policy.ranks
    total = torch.zeros((), device=policy.device)
    parts = Parts.of(
        ranks,
        range(len(sequences)),
        lambda i: len(sequences[i].ids),
        lambda mine: [mine[start : start + micro] for start in range(0, len(mine), micro)],
    )
    for k, part in enumerate(parts):
        with policy.sharded.micro_batch(k == parts.rounds - 1):
            if part is None:
                idle(policy, lambda: _logps(policy, sequences[:1]))
                continue
            loss = -_logps(policy, [sequences[i] for i in part]).sum() / tokens
            (loss * (weight * policy.sharded.scale)).backward()
            total = total + loss.detach()
    return ranks.sum(total)


@torch.no_grad()
def evaluate_sft(policy: Policy, sequences: Sequence[TokenSequence], size: int) -> dict[str, float]:
    """`eval_loss` of held-out rows: NLL a token, mean over all their tokens."""
    began = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=policy.device)
    starts = range(0, len(sequences), size)
    batches = [range(start, min(start + size, len(sequences))) for start in starts]
    parts = Parts.whole_batches(policy.ranks, batches, lambda i: len(sequences[i].ids))
    with deterministic(policy.model):
        for part in parts:
            policy.ranks.at("evaluation")
            if part is None:
                idle(policy, lambda: _logps(policy, sequences[:1]))
                continue
            total -= _logps(policy, [sequences[i] for i in part]).double().sum()
    policy.sharded.rest()
    total = policy.ranks.sum(total)
    tokens = sum(s.num_scored for s in sequences)
    return {"eval_loss": float(total) / tokens, "eval_runtime": time.perf_counter() - began}


def _logps(policy: Policy, sequences: Sequence[TokenSequence]) -> Tensor:
    sharing = replace(policy.sharing, mode="padded")
    return policy.logps(make_sequence_batch(sequences, sharing, policy.pad_id).to(policy.device))


class SupervisedRows:
    """Rows of supervised data beside the pairs: `sft_rows` of them in every optimizer step.

    Which ones is a function of (seed, step), so that a resumed run goes on with the next.
    """

    def __init__(
        self, policy: Policy, sequences: Sequence[TokenSequence], config: DPOTrainConfig
    ) -> None:
        self.policy, self.sequences, self.config = policy, sequences, config

    def of_step(self, step: int) -> list[TokenSequence]:
        """The rows of optimizer step `step` (from 1)."""
        n, k = len(self.sequences), self.config.sft_rows
        at = range((step - 1) * k, step * k)
        # epoch -2 and below: orders that the pairs have not
        orders = {e: epoch_order(n, self.config.seed, -2 - e, True) for e in {i // n for i in at}}
        return [self.sequences[orders[i // n][i % n]] for i in at]

    def gradients(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        """(what the rows add to the loss, metrics); their gradients are added to the pairs'."""
        weight = self.config.sft_rows_weight
        micro = self.config.per_device_train_batch_size
        nll = nll_gradients(self.policy, self.of_step(step), micro, weight)
        return weight * nll, {"sft/loss": float(nll)}
