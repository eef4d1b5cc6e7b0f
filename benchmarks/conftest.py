"""Options of the benchmarks, and the tables after them.

pytest benchmarks/ [--full] [--results FILE]
"""

from pathlib import Path

import torch

from dpo_kernels.bench import results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS: list[dict] = []
META: dict = {}


def pytest_addoption(parser):
    group = parser.getgroup("dpo-kernels")
    group.addoption("--full", action="store_true", help="all models and scored fractions")
    group.addoption("--results", metavar="FILE", help="write the results file of this run")


def pytest_sessionstart(session):
    META.update(results.describe())


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    terminalreporter.section("dpo-kernels beside its peers")
    terminalreporter.write_line(results.text(META, ROWS))
    if file := config.getoption("--results"):
        results.write(Path(file), META, ROWS)
        terminalreporter.write_line(f"wrote {file}")
