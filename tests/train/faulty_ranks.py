"""Runs of two processes that lose one of them, under torchrun's own agent, which starts them again.

    python faulty_ranks.py FOLDER [FAULT ...] [--kills N] [--seed S] [--loop]

Each fault is one attempt: a rank dies, hangs, has no memory, or finds numbers that are not finite.
The agent starts both again, and they go on from the newest checkpoint. The last attempt has none.
Behind it the weights must be those of a run without faults, to the bit. Prints what differs.
With --loop a job is two rounds of `iterate`, in which a rank dies once in each stage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from rank_cases import loop_options, options_of, prepare
from transformers import LlamaForCausalLM  # noqa: F401

from dpo_kernels.cli import main
from dpo_kernels.train import checkpoints, step_loss, watch

WORLD = 2
OPTIONS: dict[str, Any] = {
    "max_steps": 12,
    "save_steps": 2,
    "save_total_limit": 3,
    "learning_rate": 1e-3,
    "ddp_timeout": 6,
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_step(step: int, action: Callable[[], None]) -> None:
    """Do it in the forward of that step or a later one, on this rank."""
    plain = step_loss.PairLoss.__call__

    done: list[bool] = []

    def call(self: Any, *args: Any) -> Any:
        found = plain(self, *args)
        place = self.policy.ranks.watch.step
        if place is not None and place >= step and not done:
            done.append(True)
            action()
        return found

    step_loss.PairLoss.__call__ = call  # type: ignore[method-assign]


def _no_memory() -> None:
    torch.empty(1 << 55)


def _hang() -> None:
    time.sleep(3600)


def _no_room() -> None:
    """The disk has no room for this rank's part of the checkpoint."""
    plain = checkpoints.write_tensors

    def small(folder: Path, *args: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        plain(folder, *args)

    checkpoints.write_tensors = small


def _torn() -> None:
    """Die where a checkpoint is written by all ranks."""

    def torn(folder: Path, *args: Any) -> None:
        _die()

    checkpoints.write_tensors = torn


def _not_finite() -> None:
    plain = step_loss.PairLoss.__call__

    def call(self: Any, *args: Any) -> Any:
        out, batch = plain(self, *args)
        if self.policy.ranks.watch.step is not None:
            out = type(out)(
                loss=out.loss * torch.nan,
                pair_logps=out.pair_logps * torch.nan,
                rewards=out.rewards,
            )
        return out, batch

    step_loss.PairLoss.__call__ = call  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "kill in a step": lambda: _at_step(3, _die),
    "kill in a checkpoint": _torn,
    "hang": lambda: _at_step(4, _hang),
    "out of memory": lambda: _at_step(4, _no_memory),
    "not finite": _not_finite,
    "disk": _no_room,
    "terminate": lambda: _at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)),
}
# What the one message says; {0} is the rank.
MESSAGES = {
    "kill in a step": "training stopped: rank {0}",
    "kill in a checkpoint": "died or was stopped without a word",
    "hang": "hangs in _hang (faulty_ranks.py",
    "out of memory": "out of memory",
    "not finite": "the loss is nan and the gradient norm is nan (log-probs of rank {0})",
    "disk": "rank {0}: the disk took a part of a file alone",
    "terminate": "interrupted",
}


def _kill_at(count: int, delay: float, marker: Path) -> None:
    """Die a moment behind the `count`-th place that this rank comes to."""
    plain, seen = watch.Watch.at, iter(range(10**6))

    def die() -> None:
        marker.touch()
        _die()

    def at(self: Any, *args: Any) -> None:
        plain(self, *args)
        if next(seen) == count:
            threading.Timer(delay, die).start()

    watch.Watch.at = at  # type: ignore[method-assign]


def _worker(folder: str, run: str, faults: list[str], seed: int) -> None:
    torch.set_num_threads(1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank = int(os.environ["RANK"])
    if attempt < len(faults):
        draw = random.Random(seed * 1000 + attempt)
        victim = 1 if faults[attempt] == "disk" else draw.randrange(WORLD)
        count, delay = draw.randrange(1, 40), draw.random() * 0.05
        print(f"attempt {attempt}: {faults[attempt]}, rank {victim}", file=sys.stderr, flush=True)
        if rank == victim:
            if faults[attempt] == "random":
                _kill_at(count, delay, Path(folder) / f"killed-{seed}-{attempt}")
            else:
                FAULTS[faults[attempt]]()
    options = options_of(Path(folder), run, WORLD, **OPTIONS)
    code = main(["train", *(f"--{name}={value}" for name, value in options.items())])
    sys.stderr.flush()
    if code:  # else the agent waits for the function to return
        os._exit(code)


# Where a rank dies in a loop: (part, the how manieth time it comes to it).
STAGES: dict[str, tuple[str, int]] = {
    "sampling": ("sampling", 1),
    "judging": ("judging", 2),
    "training": ("the optimizer", 2),
    "guards": ("guards", 1),
    "held-out": ("judging of held-out samples", 2),
}


def _die_at(part: str, nth: int) -> None:
    plain, seen = watch.Watch.at, iter(range(1, 10**6))

    def at(self: Any, where: str, *args: Any) -> None:
        plain(self, where, *args)
        if where == part and next(seen) == nth:
            _die()

    watch.Watch.at = at  # type: ignore[method-assign]


def _loop_worker(folder: str, run: str, faults: list[str], seed: int) -> None:
    torch.set_num_threads(1)
    attempt, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    if attempt < len(faults) and rank == attempt % WORLD:
        _die_at(*STAGES[faults[attempt]])
    options = loop_options(Path(folder), run, WORLD)
    given = ((k, " ".join(v) if isinstance(v, list) else v) for k, v in options.items())
    code = main(["iterate", *(f"--{name}={value}" for name, value in given)])
    sys.stderr.flush()
    if code:
        os._exit(code)


def check_loop(folder: Path, faults: list[str]) -> list[str]:
    """What a loop that loses a rank in each of these stages has otherwise than a whole one."""
    launch(folder, "whole", [], worker=_loop_worker)
    launch(folder, "cut", faults, worker=_loop_worker)
    whole, cut = (folder / f"{name}-{WORLD}" for name in ("whole", "cut"))
    names = ("samples", "verdicts", "pairs", "eval_samples", "wins_round0", "wins_previous")
    files = [f.relative_to(whole) for f in whole.rglob("*.jsonl") if f.stem in names]
    wrong = [f"other {f}" for f in files if (whole / f).read_bytes() != (cut / f).read_bytes()]
    if weights(whole) != weights(cut):
        wrong.append("other weights")
    asked = (folder / f"cut-{WORLD}.asked").read_text().splitlines()
    if len(set(asked)) < len(asked):
        wrong.append("a text was judged twice")
    if sorted(asked) != sorted((folder / f"whole-{WORLD}.asked").read_text().splitlines()):
        wrong.append("other texts were judged")
    return wrong + [f"left {p}" for p in (*cut.rglob("*.part*"), *cut.rglob("*.writing"))]


def launch(
    folder: Path,
    run: str,
    faults: list[str],
    seed: int = 0,
    worker: Callable[..., None] | None = None,
) -> None:
    """One job under the agent of torchrun, started again once for each fault."""
    api = importlib.import_module("torch.distributed.launcher.api")
    config = api.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=WORLD,
        run_id=f"{run}-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=len(faults),
        monitor_interval=0.1,
        start_method="fork",
    )
    api.elastic_launch(config, worker or _worker)(str(folder), run, faults, seed)


def weights(run: Path) -> bytes:
    return next((run / "model").glob("*.safetensors")).read_bytes()


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def check(folder: Path, faults: list[str], kills: int = 0, seed: int = 0) -> list[str]:
    """What differs from a run without faults; then jobs that are killed at random, so often."""
    launch(folder, "straight", [])
    began, wrong = time.monotonic(), []
    if faults:
        wrong = job(folder, faults, seed)
    while not wrong and killed(folder) < kills:
        seed += 1
        wrong = job(folder, ["random"] * min(4, kills - killed(folder)), seed)
    print(f"faults took {time.monotonic() - began:.0f} s", file=sys.stderr)
    return wrong


def job(folder: Path, faults: list[str], seed: int) -> list[str]:
    straight, faulty = (folder / f"{name}-{WORLD}" for name in ("straight", "faulty"))
    shutil.rmtree(faulty, ignore_errors=True)
    launch(folder, "faulty", faults, seed)
    wrong = []
    if weights(straight) != weights(faulty):
        wrong.append("other weights")
    if losses(straight) != losses(faulty):
        wrong.append("other losses")
    left = [p.name for p in (faulty / "checkpoints").glob("*.tmp")]
    if left:
        wrong.append(f"left {left}")
    return [f"seed {seed}: {text}" for text in wrong]


def killed(folder: Path) -> int:
    """How many ranks died at a moment drawn."""
    return len(list(folder.glob("killed-*")))


def cli() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("faults", nargs="*")
    parser.add_argument("--kills", type=int, default=0, help="moments at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loop", action="store_true", help="rounds of iterate")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model").exists():
        prepare(args.folder)
    if args.loop:
        faults = args.faults or list(STAGES)
        wrong = check_loop(args.folder, faults)
        print("\n".join(wrong) or f"{len(faults)} kills: equal to the bit")
        return 1 if wrong else 0
    shutil.rmtree(args.folder / f"straight-{WORLD}", ignore_errors=True)
    wrong = check(args.folder, args.faults, args.kills, args.seed)
    print("\n".join(wrong) or f"{len(args.faults) + args.kills} faults: equal to the bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(cli())
