"""Ratios against plain torch, printed after the benchmarks of a run."""

import platform
import statistics

import pytest
import torch

RATIOS: dict[str, dict[str, float]] = {}


@pytest.fixture
def record(request):
    """record(case, provider, seconds): what the summary compares."""

    def add(case: str, provider: str, seconds: list[float]) -> None:
        RATIOS.setdefault(case, {})[provider] = statistics.median(seconds)

    return add


def pytest_terminal_summary(terminalreporter):
    if not RATIOS:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    terminalreporter.section(
        f"medians, torch {torch.__version__}, {device or platform.machine()}, "
        f"{torch.get_num_threads()} threads"
    )
    for case, times in RATIOS.items():
        base = times.get("torch eager")
        floor = next((s for provider, s in times.items() if "bare product" in provider), None)
        for provider, seconds in times.items():
            ratio = f"{base / seconds:6.1f}x torch eager" if base else ""
            ratio += f"{seconds / floor:6.2f} of the floor" if floor else ""
            terminalreporter.write_line(f"{case:<44}{provider:<24}{seconds * 1e3:9.1f} ms {ratio}")
