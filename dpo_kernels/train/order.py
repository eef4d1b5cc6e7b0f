"""Which pairs each step of a run sees: a function of the seed, so that a resumed run goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from ..data import StreamedPairs
from .config import DPOTrainConfig

# Rows of a stream that are shuffled together, and of them those that follow one another in the
# file: the disk reads runs of rows, and a file that is sorted comes mixed all the same.
WINDOW, RUN = 10_000, 100


def window_of(pairs: Sequence[Any]) -> int | None:
    """In which windows `pairs` are shuffled; None: over all of them."""
    return WINDOW if isinstance(pairs, StreamedPairs) else None


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """The order of `n` pairs in an epoch: a function of (seed, epoch) alone."""
    if not shuffle:
        return list(range(n))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def windowed_order(
    n: int, seed: int, epoch: int, window: int = WINDOW, run: int = RUN
) -> Iterator[int]:
    """An order of `n` rows that holds `window` of them: a function of (seed, epoch) alone.

    Runs of rows are drawn from all over the file, and the rows of a window of runs are shuffled.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    runs = torch.randperm(math.ceil(n / run), generator=generator)
    for some in runs.split(max(window // run, 1)):
        rows = (some[:, None] * run + torch.arange(run)).flatten()
        rows = rows[rows < n]
        yield from rows[torch.randperm(len(rows), generator=generator)].tolist()


def total_steps(n: int, per_step: int, config: DPOTrainConfig) -> int:
    """Optimizer steps of the run: `max_steps`, or epochs of ceil(n / per_step) steps."""
    if config.max_steps >= 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(n / per_step))


def step_indices(
    n: int, config: DPOTrainConfig, steps: int, window: int | None = None
) -> Iterator[tuple[list[int], float]]:
    """(indices of the step's pairs, epochs done after it), a function of the seed alone.

    `window`: as `window_of` the pairs; rows of a stream are not numbered all at once.
    """
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    shuffle = config.train_sampling_strategy == "random"
    done = epoch = 0
    while True:
        order: Iterable[int]
        if window is not None and shuffle and n > window:
            order = windowed_order(n, config.seed, epoch, window)
        else:
            order = epoch_order(n, config.seed, epoch, shuffle)
        rows, seen = iter(order), 0
        while chunk := list(islice(rows, per_step)):
            if done == steps:
                return
            done += 1
            seen += len(chunk)
            yield chunk, epoch + seen / n
        epoch += 1


def visited(n: int, config: DPOTrainConfig, window: int | None = None) -> list[int]:
    """The pairs out of `n` that the run's steps visit."""
    steps = steps_of(n, config)
    return sorted({i for indices, _ in step_indices(n, config, steps, window) for i in indices})


def steps_of(n: int, config: DPOTrainConfig) -> int:
    """Optimizer steps of a run over `n` pairs."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return total_steps(n, per_step, config)
