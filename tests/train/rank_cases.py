"""Cases that many processes run in turn; a world is spawned once and runs all of them.

    python rank_cases.py FOLDER WORLD [CASE ...]

Each case is a run of `dpo-kernels train` (or a check around one) in every process. What it found is
left in FOLDER/<case>-<world>/, and `results-<world>.json` says of each case what a rank has to say.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
    "max_steps": 3,
    "logging_steps": 1,
    "learning_rate": 3e-3,
    "max_length": 96,
    "save_steps": 0,
    "sample_max_new_tokens": 2,
    "device": os.environ.get("RANK_DEVICE", "cpu"),
    "reference_cache": None,
}


def options_of(folder: Path, name: str, world: int, **more: Any) -> dict[str, Any]:
    return {
        **COMMON,
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / f"{name}-{world}"),
        **more,
    }


# Runs whose losses, gradients and weights are the same whatever the number of processes.
SAME: dict[str, dict[str, Any]] = {
    "full_shard": {},
    # Several backwards a rank, of which the last one reduces.
    "float64": {
        "dtype": "float64",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 6,
    },
    "replicas": {"fsdp": "none", "ema_decay": 0.5},
    "autocast": {"bf16": True},
    "bfloat16": {"dtype": "bfloat16"},
    "budget": {"max_tokens_per_batch": 150, "gradient_checkpointing": True},
    "coupled": {"loss_type": "aot"},
    # Against another model: at log-ratios of 0 rounding alone would say which pairs it keeps.
    "drawn": {"loss_type": "beta_dpo", "ref_model_name_or_path": "other"},
    "tied": {"model_name_or_path": "tied", "sft_weight": 0.2},
    "vocabulary": {"fsdp": "none", "vocab_parallel": 2, "dtype": "float64"},
    "rows": {"sft_file": "chats.jsonl", "sft_rows": 2, "sft_steps": 1, "eval_steps": 2},
    "labelled": {"loss_type": "kto", "dataset_name": "labelled.jsonl"},
    "ranked": {"loss_type": "plackett_luce", "dataset_name": "ranked.jsonl"},
}
FILES = ("model_name_or_path", "ref_model_name_or_path", "sft_file", "dataset_name")


if importlib.util.find_spec("peft"):
    SAME["lora"] = {"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]}


def train(options: dict[str, Any]) -> dict[str, Any]:
    from dpo_kernels.train.config_files import UserError
    from dpo_kernels.train.console import Console
    from dpo_kernels.train.job import run_job
    from dpo_kernels.train.optim import TrainingError

    try:
        with kept_gradients(Path(options["output_dir"])):
            summary = run_job(options, Console(quiet=True))
    except (UserError, TrainingError) as error:
        return {"refused": str(error)}
    except SystemExit as end:  # what the first rank says
        return {"quiet": end.code}
    after = {name: x for name, x in summary["after"].items() if name != "eval_runtime"}
    return {"steps": summary["steps"], "after": after}


@contextlib.contextmanager
def kept_gradients(run: Path) -> Iterator[None]:
    """Every weight's gradient, whole, as the first two steps of the run have it."""
    import torch

    from dpo_kernels.train.optim import Stepper

    plain, found = Stepper.step, []

    def step(self: Any, *args: Any) -> Any:
        if len(found) < 2:
            grads = {}
            named = {id(p): name for name, p in self._named}
            for p in self.parameters:
                g = torch.zeros_like(p) if p.grad is None else p.grad
                g = g.full_tensor() if hasattr(g, "full_tensor") else g
                grads[named[id(p)]] = g.detach().clone()
            found.append(grads)
        return plain(self, *args)

    def init(self: Any, model: Any, *args: Any) -> None:
        self._named = list(model.named_parameters())
        begin(self, model, *args)

    begin = Stepper.__init__
    Stepper.step, Stepper.__init__ = step, init  # type: ignore[method-assign]
    try:
        yield
    finally:
        Stepper.step, Stepper.__init__ = plain, begin  # type: ignore[method-assign]
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, run.with_name(f"{run.name}.gradients"))


def case_same(folder: Path, world: int, name: str) -> Any:
    options = dict(SAME[name])
    for key in FILES:
        if key in options:
            options[key] = str(folder / options[key])
    if world == 1:
        options = {k: v for k, v in options.items() if k not in ("fsdp", "vocab_parallel")}
    return train(options_of(folder, name, world, **options))


def case_hybrid(folder: Path, world: int) -> Any:
    more = {"fsdp": "hybrid_shard", "fsdp_shard_size": 2}
    return train(options_of(folder, "hybrid", world, **more))


def case_both(folder: Path, world: int) -> Any:
    more = {"vocab_parallel": 2, "dtype": "float64"}
    return train(options_of(folder, "both", world, **more))


def case_tied_rows(folder: Path, world: int) -> Any:
    more = {"vocab_parallel": 2, "model_name_or_path": str(folder / "tied")}
    return train(options_of(folder, "tied_rows", world, **more))


def case_groups_of_three(folder: Path, world: int) -> Any:
    more = {"fsdp": "hybrid_shard", "fsdp_shard_size": 3}
    return train(options_of(folder, "groups_of_three", world, **more))


SAVED = {"save_steps": 2, "max_steps": 5, "learning_rate": 1e-3, "sft_weight": 0.1}


def case_saved(folder: Path, world: int) -> Any:
    return train(options_of(folder, "saved", world, **SAVED))


def case_resumed(folder: Path, world: int) -> Any:
    """Go on behind step 2 of four processes, in a folder of one's own."""
    step = str(folder / "saved-4/checkpoints/step-2")
    return train(options_of(folder, "resumed", world, **SAVED, resume_from_checkpoint=step))


def case_read_only(folder: Path, world: int) -> Any:
    """One rank's disk can only be read from the checkpoint of step 4 on."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    plain = FileSystem.create_stream

    def refused(self: Any, path: Any, mode: str) -> Any:
        if os.environ["RANK"] == "1" and "step-4" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return plain(self, path, mode)

    FileSystem.create_stream = refused  # type: ignore[method-assign]
    try:
        return train(options_of(folder, "read_only", world, **SAVED))
    finally:
        FileSystem.create_stream = plain  # type: ignore[method-assign]


def case_beta(folder: Path, world: int) -> Any:
    beta = 0.3 if os.environ["RANK"] == "1" else 0.1
    return train(options_of(folder, "beta", world, beta=beta))


def case_data(folder: Path, world: int) -> Any:
    file = folder / "other.jsonl"
    if os.environ["RANK"] == "1":
        text = (folder / "pairs.jsonl").read_text()
        file.write_text(text.replace("say 3", "say three"))
        return train(options_of(folder, "data", world, dataset_name=str(file)))
    return train(options_of(folder, "data", world))


def case_no_model(folder: Path, world: int) -> Any:
    where = "model" if os.environ["RANK"] == "0" else "nowhere/at/all"
    return train(options_of(folder, "no_model", world, model_name_or_path=str(folder / where)))


def _planted(folder: Path, world: int, name: str, module: Any, function: str, fault: Any) -> Any:
    """A run with a fault in what reduces gradients."""
    plain = getattr(module, function)
    setattr(module, function, lambda *args, **kwargs: fault(plain, *args, **kwargs))
    more = {"fsdp": "full_shard" if name == "unreduced" else "none"}
    try:
        return train(options_of(folder, name, world, **more))
    finally:
        setattr(module, function, plain)


def case_left_out(folder: Path, world: int) -> Any:
    from dpo_kernels.train.sharded import Sharded

    return _planted(folder, world, "left_out", Sharded, "meet", lambda *_: None)


def case_doubled(folder: Path, world: int) -> Any:
    from dpo_kernels.train.sharded import Sharded

    def twice(meet: Any, *args: Any) -> None:
        meet(*args)
        meet(*args)

    return _planted(folder, world, "doubled", Sharded, "meet", twice)


def case_unreduced(folder: Path, world: int) -> Any:
    """FSDP is never told that a backward is the last of its step."""
    from dpo_kernels.train.sharded import Sharded

    def never(micro_batch: Any, self: Any, last: bool) -> Any:
        return micro_batch(self, False)

    return _planted(folder, world, "unreduced", Sharded, "micro_batch", never)


RULE = """
import os
from pathlib import Path

def score(prompt, completion):
    with Path(os.environ["ASKED"]).open("a") as file:
        file.write(repr((prompt, completion)) + "\\n")
    return completion.count("e") - completion.count("a")
"""


PLACES = ["harbor", "garden", "library", "station", "market"]
PLACES += ["bakery", "bridge", "park", "school", "theater"]


def loop_options(folder: Path, name: str, world: int, **more: Any) -> dict[str, Any]:
    """Two rounds of `iterate`, whose rule notes what it is asked in <name>-<world>.asked."""
    os.environ["ASKED"] = str(folder / f"{name}-{world}.asked")
    return {
        "model_name_or_path": str(folder / "policy"),
        "prompts": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / f"{name}-{world}"),
        "rounds": 2,
        "num_samples": 3,
        "max_new_tokens": 5,
        "sample_batch_size": 6,
        "eval_fraction": 0.3,
        "eval_samples": 1,
        "min_pairs": 2,
        "device": "cpu",
        "judge": ["callable"],
        "judge_callable": f"{folder / 'rule.py'}:score",
        "reference": "ema",
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_length": 64,
        "save_steps": 1,
        "reference_cache": None,
        **more,
    }


def case_loop(folder: Path, world: int) -> Any:
    from dpo_kernels.iterate.rounds import run_iteration

    summary = run_iteration(loop_options(folder, "loop", world))
    return {"promoted": summary["promoted_round"], "ended": summary["ended"]}


def case_server(folder: Path, world: int) -> Any:
    """A judge behind a server, whose requests are counted and limited over all processes."""
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parents[1] / "iterate"))
    from openai_stand_in import longer, serving

    from dpo_kernels.iterate.rounds import run_iteration

    with serving() as server:
        server.answer = longer
        url = [server.url]
        if world > 1:
            dist.broadcast_object_list(url, 0)
        server.url = url[0]
        found: dict[str, Any] = {}
        for name, more in (("asked", {}), ("limited", {"max_requests": 9, "retries": 0})):
            options = loop_options(folder, name, world, rounds=1, reference="previous")
            options |= {"judge": ["llm"], "base_url": server.url, "model": "judge", **more}
            before = len(server.bodies)
            summary = run_iteration({**options, "min_pairs": 1, "concurrency": 4})
            if world > 1:
                dist.barrier()
            run = Path(options["output_dir"])
            spent = [
                json.loads(line)["sent"]
                for file in run.glob("requests.jsonl*")
                for line in file.read_text().splitlines()
            ]
            judged = summary["each"][0]["judge"]
            found[name] = {
                "sent": len(server.bodies) - before if os.environ["RANK"] == "0" else None,
                "spent": sum(spent),
                "requests": judged.get("requests", {}).get("requests"),
                "said": judged.get("said"),
                "ended": summary["ended"],
            }
        return found


# Of four processes too: what depends on their number most; `make check-full` takes every case.
EVERY = "EVERY_RANK_CASE"
FOUR = (
    [name for name in SAME if name not in ("drawn", "rows", "ranked")]
    if os.environ.get(EVERY)
    else ["full_shard", "float64", "tied", "vocabulary", "budget", *(["lora"] * ("lora" in SAME))]
)
LOOPS = ["loop", *(["server"] if importlib.util.find_spec("openai") else [])]
DIFFERENT = ("beta", "data", "no_model")
PLANTED = ("left_out", "doubled", "unreduced")
CASES: dict[int, list[str]] = {
    1: [*SAME, "saved", *LOOPS],
    4: [*FOUR, "saved", "resumed", "hybrid", "groups_of_three", "both"],
    2: [
        *SAME,
        "resumed",
        "beta",
        "data",
        "no_model",
        "tied_rows",
        "read_only",
        "left_out",
        "doubled",
        "unreduced",
        *LOOPS,
    ],
}


def no_charts() -> None:
    """Charts are most of what a run of three steps does, and each looks like the first."""
    from dpo_kernels.train import job

    def draw(metrics: Any, run: Path, *_: Any) -> None:
        (run / "training.png").touch()

    job.draw = draw


def run_cases(folder: Path, world: int, names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        try:
            if name != names[0]:
                no_charts()
            if name in SAME:
                found[name] = case_same(folder, world, name)
            else:
                found[name] = globals()[f"case_{name}"](folder, world)
        except BaseException as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            break
    return found


def _one(rank: int, folder: str, world: int, port: int, names: list[str]) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({k: str(v) for k, v in here.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import gc

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if COMMON["device"] == "cuda":
        torch.cuda.set_device(rank)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if COMMON["device"] == "cuda" else "gloo")
    found = run_cases(Path(folder), world, names)
    every: list[Any] = [found] * world
    if world > 1:
        dist.all_gather_object(every, found)
    if rank == 0:
        (Path(folder) / f"results-{world}.json").write_text(json.dumps(every))
    if world > 1:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def spawn(folder: Path, world: int, names: list[str]) -> list[dict[str, Any]]:
    """What each rank says of each case."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one, (str(folder), world, port, names), nprocs=world)
    return json.loads((folder / f"results-{world}.json").read_text())


def prepare(folder: Path) -> None:
    """A tiny model, one with tied embeddings, a tokenizer, pairs and conversations."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[1] / "iterate"))
    from test_cli import chats
    from test_data import bot, byte_tokenizer, user, write
    from test_train import tiny_model
    from tiny_policy import save_tiny

    for name, tied in (("model", False), ("tied", True)):
        tiny_model(tie_word_embeddings=tied).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    tiny_model(initializer_range=0.1).save_pretrained(folder / "other")
    byte_tokenizer().save_pretrained(folder / "other")
    rows = chats(20)
    for i, row in enumerate(rows):  # of many lengths
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] += " and on" * (i % 5)
    write(folder / "pairs.jsonl", rows)
    talks = [{"messages": [user(f"say {i}"), bot("word " * (1 + i % 4))]} for i in range(6)]
    write(folder / "chats.jsonl", talks)
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    write(folder / "labelled.jsonl", labelled)
    ranked = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], [bot(f"no {i}")]][: 2 + (i % 3 > 0)],
            "scores": [2.0, 1.0, 0.5][: 2 + (i % 3 > 0)],
        }
        for i, row in enumerate(rows)
    ]
    write(folder / "ranked.jsonl", ranked)
    save_tiny(folder / "policy")
    asked = [{"prompt": [user(f"Tell me about the {place}.")]} for place in PLACES]
    write(folder / "prompts.jsonl", asked)
    (folder / "rule.py").write_text(RULE)


if __name__ == "__main__":
    where, count = Path(sys.argv[1]), int(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "model").exists():
        prepare(where)
    for entry in spawn(where, count, sys.argv[3:] or CASES[count]):
        print(json.dumps(entry, indent=1))
