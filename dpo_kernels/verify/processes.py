"""Two processes on this machine's CPU, joined by gloo: a program, and what starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .contract import Case, NotApplicable, Target, Trained

TIMEOUT = 600  # seconds, of both processes
WORLD = 2


def train_on_two(target: Target, case: Case) -> Trained:
    """`target.train_here(case)` in two processes, as torchrun starts them."""
    return Trained(**_run("train", target, case))


def sharded_gradients(target: Target, case: Case, sharding: str) -> dict[str, Tensor]:
    """`target.gradients(case, sharding)` in two processes of one group."""
    return _run("gradients", target, case, sharding)


def _run(what: str, target: Target, case: Case, sharding: str = "") -> Any:
    """What rank 0 made of it."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise NotApplicable("this torch has no gloo")
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        job = {"what": what, "target": target.name, "case": asdict(case), "sharding": sharding}
        (folder / "job.json").write_text(json.dumps(job))
        free.close()
        ranks = []
        for rank in range(WORLD):
            env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            command = [sys.executable, "-m", "dpo_kernels.verify.processes", name, str(rank)]
            with (folder / f"log{rank}").open("w") as log:
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        _wait(ranks)
        for rank in range(WORLD):
            error = folder / f"error{rank}.json"
            if error.exists():
                kind, text = json.loads(error.read_text())
                raise NotApplicable(text) if kind == "n/a" else RuntimeError(text)
        if not (folder / "done.pt").exists():
            text = (folder / "log0").read_text().strip().splitlines() or ["no output"]
            raise RuntimeError(f"rank 0 left no result: {text[-1]}")
        return torch.load(folder / "done.pt", weights_only=True)


def _wait(ranks: list[subprocess.Popen]) -> None:
    """Until both have ended; one that fails ends the other."""
    end = time.monotonic() + TIMEOUT
    while any(rank.poll() is None for rank in ranks):
        failed = any(rank.returncode for rank in ranks if rank.poll() is not None)
        if failed or time.monotonic() > end:
            time.sleep(1 if failed else 0)  # the other may be writing down why
            for rank in ranks:
                rank.kill()
                rank.wait()
            if not failed:
                raise TimeoutError(f"two processes took over {TIMEOUT} s")
            return
        time.sleep(0.05)


def main(name: str, rank: int) -> int:
    import torch.distributed as dist

    from .targets import named

    folder = Path(name)
    job = json.loads((folder / "job.json").read_text())
    case = Case(**job["case"])
    torch.set_num_threads(1)
    try:
        target: Any = named(job["target"])
        if job["what"] == "train":
            # As torchrun would have it: the trainer makes the group itself.
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD}
            os.environ.update({k: str(v) for k, v in here.items()}, LOCAL_WORLD_SIZE=str(WORLD))
            done: Any = asdict(target.train_here(case))
        else:
            # A trainer that reads the environment makes itself at home in one process.
            dist.init_process_group("gloo", rank=rank, world_size=WORLD)
            done = target.gradients(case, job["sharding"])
        if rank == 0:
            torch.save(done, folder / "done.pt")
    except NotApplicable as reason:
        (folder / f"error{rank}.json").write_text(json.dumps(["n/a", str(reason)]))
    except Exception as error:
        text = traceback.format_exception_only(error)[-1].strip()
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{text} ({Path(where.filename).name}:{where.lineno}, rank {rank})"
        (folder / f"error{rank}.json").write_text(json.dumps(["fail", text]))
        return 1
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
