"""Which pairs a step has: a function of (seed, epoch); a stream is shuffled in windows."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from test_cli_faults import model, run, train  # noqa: F401
from test_train import config_of

from dpo_kernels.data import LeftOut, PairReader, StreamedPairs, row_file
from dpo_kernels.train import order
from dpo_kernels.train.order import step_indices, visited, window_of, windowed_order


def test_a_window_is_shuffled_whole_and_the_next_is_not_begun() -> None:
    """Each row once an epoch; what is held is one window of runs from all over the file."""
    rows = list(windowed_order(25_000, seed=3, epoch=1))
    assert sorted(rows) == list(range(25_000))
    assert sorted(windowed_order(25_037, seed=3, epoch=1)) == list(range(25_037))
    windows = [rows[:10_000], rows[10_000:20_000], rows[20_000:]]
    assert [len({row // 100 for row in window}) for window in windows] == [100, 100, 50]
    for window in windows:
        assert max(window) - min(window) > 20_000
        jumps = np.abs(np.diff(window))
        assert np.median(jumps) > 3_000  # no run stands as it was in the file


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return list(islice(windowed_order(30_000, seed, epoch), 500))

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1) != first(2, 1)
    config = config_of(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    plan = list(step_indices(25_000, config, 5_000, 10_000))
    assert plan == list(step_indices(25_000, config, 5_000, 10_000))
    # A resumed run goes on in the middle.
    assert list(islice(step_indices(25_000, config, 5_000, 10_000), 4_500, None)) == plan[4_500:]
    epoch = [i for chunk, done in plan if done <= 1 for i in chunk]
    assert sorted(epoch) == list(range(25_000)) and len(plan[4_166][0]) == 4
    assert [len(chunk) for chunk, _ in plan[:3]] == [6, 6, 6]


def test_a_long_stream_is_not_numbered_before_its_first_step() -> None:
    config = config_of(per_device_train_batch_size=4)
    chunk, _ = next(step_indices(10**8, config, 10, 10_000))
    assert len(set(chunk)) == 4 and max(chunk) > 10**6


def test_what_fits_a_window_and_what_is_not_shuffled_are_as_without() -> None:
    config = config_of(per_device_train_batch_size=4)
    assert list(step_indices(50, config, 9, 50)) == list(step_indices(50, config, 9))
    assert visited(50, config, 10) == visited(50, config) == list(range(50))
    config = config_of(per_device_train_batch_size=4, train_sampling_strategy="sequential")
    assert next(step_indices(50, config, 9, 10))[0] == [0, 1, 2, 3]


def test_streams_alone_have_windows() -> None:
    left_out = LeftOut()
    file = row_file([{"prompt": "a", "chosen": "b", "rejected": "c"}], left_out, None)
    stream = StreamedPairs(file, np.arange(1), PairReader(left_out), None)  # type: ignore[arg-type]
    assert window_of(stream) == 10_000 and window_of([1, 2]) is None
    file.close()


def test_the_run_of_a_stream_takes_them(
    train: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    original = windowed_order
    monkeypatch.setattr(order, "WINDOW", 3)
    monkeypatch.setattr(
        order, "windowed_order", lambda *args: seen.append(args) or original(*args, run=1)
    )
    assert run(*train) == 0 and not seen
    assert run(*train, "--dataset_streaming", "--overwrite_output_dir") == 0
    assert seen and seen[0][3] == 3
