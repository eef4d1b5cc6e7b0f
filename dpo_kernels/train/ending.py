"""What a run says and writes at its end."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dpo_kernels as dk

from ..data import LeftOut, NoUsableRow
from .compare import step_times
from .config import DPOTrainConfig
from .loop import TrainResult
from .metrics import MetricsFile
from .model import Policy
from .order import visited, window_of
from .plots import plot_run
from .reference import PairData


def report(
    summary: dict[str, Any], result: TrainResult, left_out: LeftOut, say: Callable[..., None]
) -> None:
    """What a run on pairs says at its end."""
    before, after = summary["before"], summary["after"]
    say()
    if before:
        say(f"{'held out':<34}{'before':>10}{'after':>10}")
        for name, key in (
            ("loss", "eval_loss"),
            ("reward accuracy", "eval_rewards/accuracies"),
            ("reward accuracy, a tie is a half", "eval_rewards/accuracies_ties_half"),
            ("reward margin", "eval_rewards/margins"),
            ("log-prob accuracy", "eval_logps/accuracies"),
            ("loss a token of sft_eval_file", "eval_sft_loss"),
        ):
            if key not in before or key not in after:
                continue
            say(f"{name:<34}{before[key]:>10.4f}{after[key]:>10.4f}")
        if "eval_rewards/accuracies" in before:
            say("reward accuracy asks whether the reward (log-ratio to the reference) prefers the")
            say(f"chosen{_ties(before)}.")
    say_sample(summary["sample"], say)
    if result.steps:
        say(
            f"\nbackend {summary['backend']}: {result.median_step_time:.3f} s an optimizer "
            f"step (median of {result.steps}), peak memory "
            f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
    if "step_seconds" in summary:
        ours, plain = summary["step_seconds"], summary["plain_torch_step_seconds"]
        say(
            f"forward and backward of one batch: {ours:.3f} s; the same in plain torch (model "
            f"logits, log_softmax, gather): {plain:.3f} s, {plain / ours:.2f}x"
        )
    say(left_out.summary())
    folder = Path(summary["output_dir"])
    say(f"saved in {folder}: {files_of(folder)}")


def _ties(before: dict[str, Any]) -> str:
    """Why the accuracy before training is 0, where it is: not with a reference of another model."""
    found = (before["eval_rewards/accuracies"], before.get("eval_rewards/accuracies_ties_half"))
    if found != (0.0, 0.5):
        return ""
    return ": before training policy and reference are one, so every pair is a tie"


def say_sample(sample: dict[str, str], say: Callable[..., None]) -> None:
    if sample["before"] or sample["after"]:
        say(f"\nprompt: {sample['prompt']}")
        say(f"before: {sample['before']}")
        say(f"after:  {sample['after']}")


def files_of(folder: Path) -> str:
    """The files of the run that are there, in words."""
    names = ["metrics.jsonl", "training.png", "report.html", "config.yaml", "summary.json"]
    names.append("left_out.jsonl")
    return ", ".join(n for n in ("model/", *names) if (folder / n).exists())


def loss_title(config: DPOTrainConfig) -> str:
    """The loss in words: "DPO: 0.8 sigmoid + 0.2 ipo + 0.5 SFT, label smoothing 0.1"."""
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    parts = [*zip(weights, config.loss_type, strict=True)]
    if config.sft_weight:
        parts.append((config.sft_weight, "SFT"))
    if config.sft_rows:
        parts.append((config.sft_rows_weight, "SFT rows"))
    kind = "DPO: " if config.rows == "pairs" else ""
    said = [kind + " + ".join(n if w == 1 else f"{w:g} {n}" for w, n in parts)]
    if config.label_smoothing:
        said.append(f"label smoothing {config.label_smoothing:g}")
    if config.f_divergence_type not in (None, "reverse_kl"):
        said.append(str(config.f_divergence_type))
    if config.reference_free:
        said.append("no reference")
    if config.use_weighting:
        said.append("weighted (WPO)")
    if config.learn_groups:
        said.append("learned offsets and temperatures")
    return ", ".join(said)


def draw(metrics: MetricsFile, folder: Path, title: str, say: Callable[..., None]) -> None:
    """The run's chart."""
    try:
        plot_run(metrics.rows, folder / "training.png", title)
    except Exception as error:  # matplotlib is absent or broken: the run is none the worse
        say(f"warning: training.png was not drawn: {error}")


def last_fields(left_out: LeftOut, began: float) -> dict[str, Any]:
    """What every summary ends with."""
    return {
        "left_out": left_out.counts(),
        "left_out_rows": left_out.shown(),
        "data": dict(left_out.notes),
        "seconds": time.perf_counter() - began,
        "version": dk.__version__,
        "torch": torch.__version__,
    }


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    # Rows that were left out are quoted as they came, with what no encoding holds.
    quoted = (text + "\n").encode("utf-8", "backslashreplace")
    (folder / "summary.json").write_bytes(quoted)


_LENGTH_REASONS = {
    "longer than max_length",
    "prompt too long",
    "completion too short",
    "same after truncation",
}


def no_pair_left(file: str, left_out: LeftOut, since: int, kind: str = "pair") -> NoUsableRow:
    """The error of a file whose rows were all left out, the last of them by tokenisation."""
    reasons = {p.reason for p in left_out.problems[since:]}
    what = f"no {kind} fits max_length" if reasons <= _LENGTH_REASONS else f"no {kind} is left"
    return left_out.nothing(file, what, since)


def plain_torch_times(
    policy: Policy, data: PairData, config: DPOTrainConfig, own: bool
) -> dict[str, float]:
    """Seconds of one batch, ours and plain torch's, where that was asked for."""
    if policy.ranks.many:
        return {}
    wanted = config.compare_plain_torch
    if not (wanted if wanted is not None else not own):
        return {}
    config = replace(config, gradient_checkpointing=False)
    every = visited(len(data.pairs), config, window_of(data.pairs))
    indices = every[: config.per_device_train_batch_size]
    ours, plain = step_times(policy, data, indices, config)
    return {
        "step_seconds": statistics.median(ours),
        "plain_torch_step_seconds": statistics.median(plain),
    }
