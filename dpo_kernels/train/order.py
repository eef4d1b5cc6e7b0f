"""Which pairs each step of a run sees: a function of the seed, so that a resumed run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from .config import DPOTrainConfig


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of `n` pairs in an epoch: a function of (seed, epoch) alone."""
    if not shuffle:
        return list(range(n))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def total_steps(n: int, per_step: int, config: DPOTrainConfig) -> int:
    """Optimizer steps of the run: `max_steps`, or epochs of ceil(n / per_step) steps."""
    if config.max_steps >= 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(n / per_step))


def step_indices(n: int, config: DPOTrainConfig, steps: int) -> Iterator[tuple[list[int], float]]:
    """(indices of the step's pairs, epochs done after it), a function of the seed alone."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    shuffle = config.train_sampling_strategy == "random"
    done = epoch = 0
    while True:
        order = epoch_order(n, config.seed, epoch, shuffle)
        for start in range(0, n, per_step):
            if done == steps:
                return
            chunk = order[start : start + per_step]
            done += 1
            yield chunk, epoch + (start + len(chunk)) / n
        epoch += 1


def visited(n: int, config: DPOTrainConfig) -> list[int]:
    """The pairs out of `n` that the run's steps visit."""
    steps = steps_of(n, config)
    return sorted({i for indices, _ in step_indices(n, config, steps) for i in indices})


def steps_of(n: int, config: DPOTrainConfig) -> int:
    """Optimizer steps of a run over `n` pairs."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return total_steps(n, per_step, config)
