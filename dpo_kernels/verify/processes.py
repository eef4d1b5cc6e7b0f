"""Two processes on this machine's CPU, joined by gloo."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case, NotApplicable, Target, Trained

TIMEOUT = 300  # seconds, of both processes


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _spawn(what: str, target: Target, case: Case, extra: str = "") -> Any:
    """What rank 0 made of it."""
    import torch.distributed as dist
    import torch.multiprocessing as mp

    if not (dist.is_available() and dist.is_gloo_available()):
        raise NotApplicable("this torch has no gloo")
    with tempfile.TemporaryDirectory() as folder:
        made = mp.spawn(
            _rank, (what, target, case, extra, _free_port(), folder), nprocs=2, join=False
        )
        end = time.monotonic() + TIMEOUT
        while not made.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() >= end:
                for process in made.processes:
                    process.kill()
                raise TimeoutError(f"two processes took over {TIMEOUT} s")
        done = torch.load(Path(folder) / "rank0.pt", weights_only=False)
    if isinstance(done, NotApplicable):
        raise done
    return done


def _rank(
    rank: int, what: str, target: Any, case: Case, extra: str, port: int, folder: str
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        if what == "train":
            # As torchrun would have it: the trainer makes the group itself.
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
            done: Any = target.train_here(case)
        else:
            # A trainer that reads the environment makes itself at home in one process.
            dist.init_process_group("gloo", rank=rank, world_size=2)
            done = target.gradients(case, extra)
    except NotApplicable as reason:
        done = reason
    if rank == 0:
        torch.save(done, Path(folder) / "rank0.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def train_on_two(target: Any, case: Case) -> Trained:
    """`target.train_here(case)` in two processes, as torchrun starts them."""
    return _spawn("train", target, case)


def sharded_gradients(target: Target, case: Case, sharding: str) -> dict[str, Tensor]:
    """`target.gradients(case, sharding)` in two processes of one group."""
    return _spawn("gradients", target, case, sharding)
