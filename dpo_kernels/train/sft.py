"""A small supervised fine-tuning: what gives the embedded model its language before DPO.

The loss is the negative log-likelihood of the last assistant message, mean over the tokens of the
step, through the same fused head as DPO.
"""

from __future__ import annotations

import time
from dataclasses import replace

from torch import Tensor

from ..data import TokenSequence, make_sequence_batch
from .config import DPOTrainConfig
from .console import Console
from .metrics import MetricsFile
from .model import Policy
from .optim import Stepper
from .order import step_indices, total_steps


def train_sft(
    policy: Policy,
    sequences: list[TokenSequence],
    config: DPOTrainConfig,
    metrics: MetricsFile,
    console: Console,
) -> float:
    """Train in place; returns the mean loss per token of the last tenth of the steps."""
    n, micro = len(sequences), config.per_device_train_batch_size
    steps = total_steps(n, micro * config.gradient_accumulation_steps, config)
    stepper = Stepper(policy.model, config, steps)
    sharing = replace(policy.sharing, mode="padded")
    losses: list[float] = []
    plan = console.progress(step_indices(n, config, steps), "SFT", steps, "steps")
    for step, (indices, epoch) in enumerate(plan, start=1):
        began = time.perf_counter()
        tokens = sum(sequences[i].num_scored for i in indices)
        total: Tensor | None = None
        for start in range(0, len(indices), micro):
            part = [sequences[i] for i in indices[start : start + micro]]
            batch = make_sequence_batch(part, sharing, policy.pad_id).to(policy.device)
            loss = -policy.logps(batch).sum() / tokens
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        extra = stepper.step(total, f"SFT step {step}", [sequences[i].source for i in indices])
        losses.append(float(total))
        if step % config.logging_steps == 0 or step == steps:
            row = {
                "step": step,
                "epoch": epoch,
                "loss": losses[-1],
                **extra,
                "step_time": time.perf_counter() - began,
            }
            metrics.write(row)
            console.postfix(loss=f"{losses[-1]:.3f}")
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)
