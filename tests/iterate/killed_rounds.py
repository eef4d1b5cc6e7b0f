"""A loop of rounds in a process of its own, which kills itself at a given point.

Processes come from a fork server that has imported torch and transformers: they start at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "transformers.models.llama", "dpo_kernels.iterate.rounds"]
)


def run(options: dict[str, Any], point: str = "", nth: int = 1) -> int | None:
    """Exit code of a loop that is killed at the `nth` passing of `point` ("": never)."""
    process = _CONTEXT.Process(target=_loop, args=(options, point, nth))
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
        raise AssertionError("the loop did not end")
    return process.exitcode


def _loop(options: dict[str, Any], point: str, nth: int) -> None:
    import torch

    from dpo_kernels.iterate.rounds import run_iteration

    torch.set_num_threads(1)
    if point:
        _arm(point, nth)
    run_iteration(options)


def _arm(point: str, nth: int) -> None:
    """Kill this process just before the n-th call of what `point` names."""
    from dpo_kernels.iterate import judges, manifest, one_round, records, rounds
    from dpo_kernels.train import optim

    passed: Counter[str] = Counter()

    def before(label: str) -> None:
        passed[label] += 1
        if label == point and passed[label] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str, label: Callable[..., str]) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before(label(*args, **kwargs))
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    wrap(records.Journal, "add", lambda self, rows: f"journal {_stem(self.path.name)}")
    wrap(optim.Stepper, "step", lambda self, *a: "step")
    wrap(manifest, "write_json", lambda path, value: f"manifest {_last_stage(value)}")
    for owner in (rounds, one_round):
        wrap(owner, "write_table", lambda path, rows: f"table {path.name}")
    wrap(judges.ScoreJudge, "compare", lambda self, items: "compare")


def _stem(name: str) -> str:
    return name.split(".")[0].split("-")[0]


def _last_stage(value: dict[str, Any]) -> str:
    return (list(value.get("stages", {"": 0})) or ["start"])[-1] + (
        " promoted" if value.get("promoted") else ""
    )
