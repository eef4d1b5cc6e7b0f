"""Options of the benchmarks, and the tables after them.

pytest benchmarks/ [--full] [--results FILE] [--loop_results FILE]
"""

import json
from pathlib import Path

import torch

from dpo_kernels.bench import results

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS: list[dict] = []
META: dict = {}
LOOP: dict = {}  # figures of the loop, by name


def pytest_addoption(parser):
    group = parser.getgroup("dpo-kernels")
    group.addoption("--full", action="store_true", help="all models and scored fractions")
    group.addoption("--results", metavar="FILE", help="write the results file of this run")
    group.addoption("--loop_results", metavar="FILE", help="write the loop's figures as JSON")


def pytest_sessionstart(session):
    META.update(results.describe())


def pytest_terminal_summary(terminalreporter, config):
    if LOOP and (file := config.getoption("--loop_results")):
        meta = {k: META[k] for k in ("date", "device", "threads", "load", "versions", "commit")}
        Path(file).write_text(json.dumps({**meta, "loop": LOOP}, indent=1) + "\n")
        terminalreporter.write_line(f"wrote {file}")
    if not ROWS:
        return
    terminalreporter.section("dpo-kernels beside its peers")
    terminalreporter.write_line(results.text(META, ROWS))
    if file := config.getoption("--results"):
        results.write(Path(file), META, ROWS)
        terminalreporter.write_line(f"wrote {file}")
