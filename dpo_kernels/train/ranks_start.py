"""How the processes of a run find each other, what does not fit them, and whether they agree."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dpo_kernels as dk

from ..data import DataError
from .config import DPOTrainConfig, UserError
from .console import Console
from .fit import ADVICE
from .optim import TrainingError
from .ranks import ALONE, Ranks, agreed, described
from .sharded import shard_size
from .start import check_launcher
from .watch import GONE, SETTLING, Watch, is_secondary

_TIMEOUT = 1800  # of `ddp_timeout`, until the options are read


def launched() -> int:
    """How many processes a launcher says it has started."""
    text = os.environ.get("WORLD_SIZE", "1") or "1"
    return int(text) if text.isdigit() else 1


@contextlib.contextmanager
def joined(options: Mapping[str, Any], console: Console) -> Iterator[Ranks]:
    """The run's ranks, joined within; a group that is there already is used, and left to be."""
    check_launcher()
    if launched() == 1:
        yield ALONE
        return
    gpu = torch.cuda.is_available() and options.get("device", "auto") in ("auto", "cuda")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    rank, world = int(os.environ["RANK"]), launched()
    if gpu:
        torch.cuda.set_device(local)
    given = options.get("ddp_timeout")
    timeout = int(given) if isinstance(given, int | str) and str(given).isdigit() else _TIMEOUT
    own = not dist.is_initialized()
    if own:
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        # The watch, which names who is waited for, comes before torch's own time is over.
        wait = timedelta(seconds=timeout + 60)
        dist.init_process_group(backend, timeout=wait, **_own_keys(rank, world, wait))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    watch = Watch(rank, world, timeout)
    ranks = Ranks(
        rank=rank,
        world=world,
        data_rank=rank,
        data_world=world,
        data_group=dist.group.WORLD,
        device=device,
        watch=watch,
    )
    console.follow(not ranks.first)
    try:
        yield ranks
        ranks.wait()  # the first one writes more than the others
    except BaseException as error:
        _ignore_signals()  # of a launcher that ends what a lost rank has left
        ending = _told(ranks, error)
        watch.close()
        if own and not getattr(error, "agreed", False):
            # The others are gone or elsewhere: the group cannot be taken down in order.
            _exit_with(ending)
        if ending is error:
            raise
        raise ending from error
    finally:
        watch.close()
        # gloo's threads must have ended before the interpreter does.
        gc.collect()
        if own and dist.is_initialized():
            dist.destroy_process_group()


def _own_keys(rank: int, world: int, wait: timedelta) -> dict[str, Any]:
    """The store of torchrun's agent outlives the processes that it starts again. torch 2.13 puts no
    attempt before its keys, so that a process may find the address of one that is gone."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world, is_master=False, timeout=wait)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = dist.PrefixStore(f"dpo_kernels/group/{attempt}", store)
    return {"store": prefixed, "rank": rank, "world_size": world}


def _ignore_signals() -> None:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _told(ranks: Ranks, error: BaseException) -> BaseException:
    """What this rank ends with: the error where it is the one to say it, silence elsewhere."""
    code = getattr(error, "code", 1)
    code = code if isinstance(code, int) else 1
    if getattr(error, "agreed", False):  # all raise it, and the first one says it
        code = 2 if isinstance(error, UserError | DataError) else code
        return error if ranks.first else SystemExit(code)
    if isinstance(error, SystemExit):
        return error
    watch = ranks.watch
    text = f"{watch.place}: {_described(error)}"
    cause: str | None = ""
    # A launcher's SIGTERM may come of a rank that died, as a failed collective does.
    if is_secondary(error) or isinstance(error, KeyboardInterrupt):
        cause = watch.cause(SETTLING if is_secondary(error) else 2 * GONE)
        if cause is None:
            return SystemExit(code)
        text = cause or text
    if not watch.fault(text):
        return SystemExit(code)
    if isinstance(error, KeyboardInterrupt) and not cause:
        return error
    return type(error)(text) if isinstance(error, UserError | DataError) else TrainingError(text)


def _described(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted ({(str(error).strip().splitlines() or [''])[0]})"
    if isinstance(error, UserError | DataError | TrainingError):
        return str(error)
    text = described(error)
    return f"{text} ({ADVICE})" if text.startswith("out of memory: ") else text


def _exit_with(ending: BaseException) -> None:
    """What `cli.main` does with it, without the interpreter's own end."""
    code = 1
    if isinstance(ending, SystemExit):
        code = ending.code if isinstance(ending.code, int) else 1
    elif isinstance(ending, UserError | DataError):
        code = 2
        print(f"dpo-kernels: error: {ending}", file=sys.stderr)
    elif isinstance(ending, KeyboardInterrupt):
        code = getattr(ending, "code", 130)
        print("dpo-kernels: interrupted", file=sys.stderr)
    else:
        print(f"dpo-kernels: training stopped: {ending}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_ranks(config: DPOTrainConfig, ranks: Ranks, own: bool) -> None:
    """`UserError` for what does not fit so many processes."""
    if not ranks.many:
        for name, alone in (("fsdp", ("auto", "none")), ("vocab_parallel", (1,))):
            if getattr(config, name) not in alone:
                raise UserError(
                    f"{name}={getattr(config, name)} needs several processes: torchrun "
                    "--nproc-per-node N -m dpo_kernels train ..."
                )
        return
    for name in ("load_in_4bit", "load_in_8bit", "torch_compile", "dataset_streaming"):
        if getattr(config, name):
            raise UserError(f"{name} is not supported on several processes ({ranks.world} here)")
    if not own:
        raise UserError(
            f"the embedded default trains in one process, not in {ranks.world}: pass "
            "model_name_or_path and dataset_name"
        )
    if config.output_dir is None and restarts():
        raise UserError("output_dir is missing: torchrun --max-restarts goes on in it")
    shard_size(config, ranks)
    if ranks.world % config.vocab_parallel:
        raise UserError(
            f"vocab_parallel: {ranks.world} processes do not divide into groups of "
            f"{config.vocab_parallel}"
        )
    if config.vocab_parallel > 1 and config.fsdp == "hybrid_shard":
        raise UserError(
            "vocab_parallel and hybrid_shard: the two meshes do not fit together; use full_shard"
        )


def meshes(config: DPOTrainConfig, ranks: Ranks) -> None:
    """Split the ranks as `vocab_parallel` says; all must have been told the same."""
    told = ranks.objects(config.vocab_parallel)
    for rank, value in enumerate(told):
        if value != told[0]:
            raise agreed(
                UserError(
                    f"the ranks differ: option vocab_parallel: rank {rank} has {value}, rank 0 "
                    f"{told[0]}"
                )
            )
    if ranks.many:
        ranks.split(config.vocab_parallel)


def restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") or 0)


def go_on(config: DPOTrainConfig, ranks: Ranks) -> None:
    """Processes that torchrun has started again go on from the newest checkpoint."""
    again = ranks.many and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") or 0)
    if again and ranks.watch.has_begun():  # else the folder may be another run's
        config.resume_from_checkpoint = "true"


# Where a node has its own copies; what is in them is compared.
OF_A_NODE = {"model_name_or_path", "dataset_name", "eval_file", "sft_file", "sft_eval_file"}
OF_A_NODE |= {"reference_cache", "dataset_num_proc", "device"}


def agree(ranks: Ranks, config: DPOTrainConfig, identity: dict[str, Any]) -> None:
    """`UserError` with every difference between the ranks: options, model, data, code."""
    options = {k: v for k, v in asdict(config).items() if k not in OF_A_NODE}
    facts = {f"option {name}": repr(value) for name, value in options.items()}
    for part in ("model", "tokenizer", "training pairs", "held-out pairs"):
        facts[part] = str(identity[part]["digest"])
    facts["code of dpo_kernels"] = code_digest()
    facts["version of torch"] = torch.__version__
    check_same(ranks, facts)


def check_same(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """`UserError` with every fact that is another on another rank."""
    every = ranks.objects(dict(facts))
    found = []
    for name in dict.fromkeys(name for theirs in every for name in theirs):
        value = every[0].get(name, "none")
        for rank, theirs in enumerate(every):
            mine = theirs.get(name, "none")
            if mine != value:
                plain = name.startswith(("option", "version"))
                shown = f"{mine}, rank 0 {value}" if plain else "another than rank 0"
                found.append(f"{name}: rank {rank} has {shown}")
    if found:
        raise agreed(UserError(f"the ranks differ: {'; '.join(found)}"))


@functools.cache
def code_digest() -> str:
    """sha256 of the package's Python files."""
    root, digest = Path(dk.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}".encode() + file.read_bytes())
    return digest.hexdigest()
