"""How the figures of a GPU run are timed and judged; on a host without one, rehearsed."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from dpo_kernels.bench import measure  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
IGNORE = -100
Row = dict[str, object]
Figures = Iterator[tuple[str, Row]]


def timed(call: Callable[[], object], repeats: int = 15) -> float:
    """Median milliseconds of `call` on the device, behind a flushed cache."""
    for _ in range(3 if GPU else 1):
        call()
    return statistics.median(
        1e3 * measure.clock(call, lambda: None, DEVICE, host_bound=False)
        for _ in range(repeats if GPU else 2)
    )


def device_time(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds between events around `call`, enqueued behind a busy device."""
    values = []
    for _ in range(repeats + 2):
        if not GPU:
            began = time.perf_counter()
            call()
            values.append(1e3 * (time.perf_counter() - began))
            continue
        wait()
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms, for the host to run ahead
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        wait()
        values.append(start.elapsed_time(end))
    return statistics.median(values[2:])


def host_time(call: Callable[[], object], repeats: int) -> float:
    """Median microseconds until `call` has been enqueued, on an idle device."""
    values = []
    for _ in range(repeats + 20):
        wait()
        began = time.perf_counter()
        call()
        values.append(1e6 * (time.perf_counter() - began))
    return statistics.median(values[20:])


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def copy_bandwidth(size: float) -> float:
    """GB/s of a device-to-device copy that moves `size` bytes, read plus written."""
    source = torch.empty(max(1, int(size) // 8), dtype=torch.float32, device=DEVICE).normal_()
    target = torch.empty_like(source)
    return size / timed(lambda: target.copy_(source)) / 1e6


def judged(value: float, target: float, *, least: bool) -> Row:
    return {"target": target, "met": value >= target if least else value <= target}


def reset_peak() -> None:
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if GPU else 0.0
