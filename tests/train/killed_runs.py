"""Runs that are killed and taken up again, against one that is not: weights and metrics to the bit.

    python tests/train/killed_runs.py FOLDER [--moments 20] [--places NAME ...] [--seed 0]

A kill is SIGKILL, at each place (in the reference pass, in the middle of writing a checkpoint,
before its name, before `latest`, in a line of metrics, while the model is saved; --places: at these
alone) and at moments drawn at random. The package is imported once, and each run is a fork of that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Loaded before any fork, so that a run's time is its own.
import matplotlib.figure  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

from dpo_kernels.cli import main
from dpo_kernels.train import checkpoints, job, model, resume
from dpo_kernels.train.metrics import MetricsFile

TIMES = {"step_time", "mem/peak", "tokens_per_s", "pairs_per_s", "eval_runtime"}
OPTIONS: dict[str, Any] = {
    "loss_type": "beta_dpo",
    "max_steps": 9,
    "save_steps": 2,
    "logging_steps": 3,
    "eval_steps": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 3e-3,
    "max_length": 96,
    "save_total_limit": 2,
    "sample_max_new_tokens": 4,
    "device": "cpu",
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at(module: Any, name: str, when: Callable[..., bool], behind: bool = False) -> None:
    """Die in a call of `module.name`, before or behind what it does."""
    plain = getattr(module, name)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if when(*args) and not behind:
            _die()
        out = plain(*args, **kwargs)
        if when(*args):
            _die()
        return out

    setattr(module, name, killed)


def _nth(n: int) -> Callable[..., bool]:
    calls = iter(range(10_000))
    return lambda *args: next(calls) == n


def _torn_checkpoint() -> None:
    """Half of a checkpoint's bytes are on the disk, and its index is not."""

    def torn(folder: Path, tensors: Any) -> None:
        (folder / "__0_0.distcp").write_bytes(b"x" * 1000)
        if "step-4" in folder.name:
            _die()
        write(folder, tensors)

    write = checkpoints.write_tensors
    checkpoints.write_tensors = torn


def _torn_metrics() -> None:
    def torn(self: MetricsFile, row: dict[str, Any]) -> None:
        if row["step"] == 6:
            with self.path.open("a") as file:
                file.write(json.dumps(row)[:20])
            _die()
        write(self, row)

    write = MetricsFile.write
    MetricsFile.write = torn  # type: ignore[method-assign]


PLACES: dict[str, Callable[[], None]] = {
    "in the reference pass": lambda: _at(model.Policy, "logps", _nth(2)),
    "in a checkpoint": _torn_checkpoint,
    "before a checkpoint's name": lambda: _at(
        checkpoints, "write_tensors", lambda folder, _: folder.name == "step-6.tmp", behind=True
    ),
    "before latest": lambda: _at(
        checkpoints, "write_text", lambda file, _: file.name == "latest" and "step-6" in _
    ),
    "while old ones go": lambda: _at(checkpoints.Checkpoints, "_prune", lambda _, step: step == 6),
    "in a line of metrics": _torn_metrics,
    "before the reference is kept": lambda: _at(resume, "save_reference", _nth(0)),
    "while the model is saved": lambda: _at(job, "save_policy", _nth(0), behind=True),
}


def forked(action: Callable[[], int | None], log: Path, after: float | None = None) -> int:
    """Run in a child, killed `after` seconds if that comes first; its exit code or -signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            code = action() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status


def prepare(folder: Path) -> None:
    """A tiny model, a tokenizer and pairs."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
    from test_cli import chats
    from test_data import byte_tokenizer, write
    from test_train import tiny_model

    tiny_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write(folder / "pairs.jsonl", chats(16))


def arguments(folder: Path, run: str, **more: Any) -> list[str]:
    options = {
        **OPTIONS,
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "pairs.jsonl",
        "output_dir": folder / run,
        **more,
    }
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


def outcome(run: Path) -> dict[str, Any]:
    """What of a run must be equal to the bit."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    weights = next((run / "model").glob("*model.safetensors")).read_bytes()
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "summary": {
            part: {k: v for k, v in summary[part].items() if k not in TIMES}
            for part in ("before", "after", "sample")
        },
    }


def check(folder: Path, cases: list[str | float], **options: Any) -> list[str]:
    """What differs, a line each; a case is a place or a share of a whole run's time."""
    log = folder / "log"
    began = time.monotonic()
    code = forked(lambda: main(arguments(folder, "straight", **options)), log)
    took = time.monotonic() - began
    if code:
        raise RuntimeError(f"the run that is not killed ended with {code}:\n{log.read_text()}")
    expected, wrong = outcome(folder / "straight"), []
    for number, case in enumerate(cases):
        run = f"run-{number}"

        def start(run: str = run, case: str | float = case) -> int:
            if isinstance(case, str):
                PLACES[case]()
            return main(arguments(folder, run, **options))

        after = None if isinstance(case, str) else case * took
        died = forked(start, log, after)
        if died not in (-signal.SIGKILL, 0):
            wrong.append(f"{case}: ended with {died} before it was killed")
        code = forked(
            lambda run=run: main(arguments(folder, run, resume_from_checkpoint="true", **options)),
            log,
        )
        found = outcome(folder / run) if code == 0 else {}
        odd = [part for part in expected if found.get(part) != expected[part]]
        if code or odd:
            wrong.append(f"{case}: exit code {code}, other {', '.join(odd)}")
        left = [p.name for p in (folder / run / "checkpoints").glob("*.tmp")]
        if left:
            wrong.append(f"{case}: left {left}")
    return wrong


def cases_of(places: Iterable[str], moments: int, seed: int) -> list[str | float]:
    """Places, then moments at random."""
    generator = random.Random(seed)
    return [*places, *(generator.random() for _ in range(moments))]


def cli() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--places", nargs="*", default=list(PLACES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, over those here")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    code = forked(lambda: prepare(args.folder), args.folder / "log")
    if code:
        raise RuntimeError((args.folder / "log").read_text())
    cases = cases_of(args.places, args.moments, args.seed)
    wrong = check(args.folder, cases, **args.options)
    print("\n".join(wrong) or f"{len(cases)} runs killed and resumed: equal to the bit")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(cli())
