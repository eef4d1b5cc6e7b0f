"""The job of `dpo-kernels sft`: from a model and conversations to a fine-tuned model.

    load -> evaluate -> SFT -> evaluate -> save

Folder, signals and what is kept of a run that ends early are as in `job.py`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

import dpo_kernels as dk

from ..data import TokenSequence
from .config import DPOTrainConfig, UserError, load_config
from .console import Console
from .ending import draw, files_of, last_fields, say_sample, write_summary
from .job import Job, check_options, started
from .machine import peak_memory
from .model import Policy
from .ranks_start import joined, meshes
from .resume import metrics_of
from .run_options import GROUPS, SFT_DEFAULTS, SFT_GROUPS
from .sft import evaluate_sft, train_sft
from .shown import completions, wanted_prompt, write_report

# What belongs to pairs alone.
_OF_PAIRS = {f for g in GROUPS if g not in SFT_GROUPS for f in g.__dataclass_fields__}


def resolve_sft(options: Mapping[str, Any]) -> DPOTrainConfig:
    """The configuration that `options` give; what belongs to pairs alone is refused."""
    for name in options:
        if name in _OF_PAIRS:
            raise UserError(f"{name} is an option of `train`: sft has no preference loss")
    config = load_config(SFT_DEFAULTS, options)
    if config.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: pass a model's name or folder")
    if config.dataset_name is None:
        raise UserError(
            "dataset_name is missing: pass a JSONL file of conversations (--dataset_name FILE)"
        )
    if config.dataset_streaming:
        raise UserError("dataset_streaming: sft reads its rows at once")
    return config


def run_sft(options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Run the job that `options` (names of `DPOTrainConfig`) describe; returns its summary.

    Raises `UserError`, `DataError` (both say what to change) or `TrainingError`.
    """
    with joined(options, console) as ranks:
        with ranks.together():
            config = resolve_sft(options)
            check_options(config, True, ranks)
        meshes(config, ranks)
        return started(SFTJob, config, True, console, ranks).run()


class SFTJob(Job):
    groups = SFT_GROUPS
    command = "sft"

    def _run(self) -> dict[str, Any]:
        config, say, began = self.config, self.console.say, time.perf_counter()
        torch.manual_seed(config.seed)
        with self.ranks.together():
            policy = self._users_model()
            train_rows, eval_rows = self._rows(policy)
            identity = self._identity(policy, train_rows, eval_rows)
        self._open_folder(policy)
        self._over_ranks(policy, train_rows, identity)
        self.policy = policy
        backend = dk.backends.choose(config.backend, policy.device, policy.model.dtype)
        say(f"backend {backend}; {len(train_rows)} rows to train on, {len(eval_rows)} held out")
        metrics = metrics_of(self.folder, self.resumed, self.ranks)
        size = config.per_device_eval_batch_size

        def evaluate() -> dict[str, float]:
            return evaluate_sft(policy, eval_rows, size) if eval_rows else {}

        prompt = self._sft_prompt(policy, eval_rows or train_rows)

        def complete() -> str:
            return completions(policy, [prompt], config.sample_max_new_tokens)[0]

        def look() -> dict[str, Any]:
            numbers, text = evaluate(), complete()
            if numbers:
                metrics.write({"step": 0, "epoch": 0.0, **numbers})
            return {"before": numbers, "text_before": text}

        found = self._found(metrics, look)
        before = found["before"]
        keeper = self._keeper(identity, found)
        between = evaluate if eval_rows else None
        train_sft(policy, train_rows, config, metrics, self.console, between, keeper)
        self._save(policy)  # before anything that could still fail
        last = metrics.rows[-1]
        after = evaluate()
        if after:
            metrics.write({"step": last["step"], "epoch": last["epoch"], **after})
        if self.ranks.first:
            draw(metrics, self.folder, "SFT", say)
        summary = {
            "output_dir": str(self.folder),
            "backend": backend,
            "loss": "SFT",
            "steps": last["step"],
            "rows": len(train_rows),
            "held_out_rows": len(eval_rows),
            "before": before,
            "after": after,
            "sample": {
                "prompt": prompt[0],
                "before": found["text_before"],
                "after": complete(),
            },
            "peak_memory_bytes": peak_memory(policy.device),
            **last_fields(self.left_out, began),
        }
        if not self.ranks.first:
            return summary
        write_summary(self.folder, summary)
        write_report(self.folder, say)
        self._say_end(summary)
        return summary

    def _say_end(self, summary: dict[str, Any]) -> None:
        before, say = summary["before"], self.console.say
        if before:
            was, now = before["eval_loss"], summary["after"]["eval_loss"]
            say(f"\nheld-out loss per token: {was:.4f} before, {now:.4f} after")
        say_sample(summary["sample"], say)
        say(self.left_out.summary())
        say(f"saved in {self.folder}: {files_of(self.folder)}")

    def _rows(self, policy: Policy) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """Training and held-out rows, tokenised."""
        config = self.config
        rows = self.rows.read_conversations(policy, str(config.dataset_name))
        if config.eval_file:
            return rows, self.rows.read_conversations(policy, config.eval_file)
        return self.rows.split(rows)

    def _sft_prompt(self, policy: Policy, rows: list[TokenSequence]) -> tuple[str, list[int]]:
        """(text to show, ids to complete): the wanted text, or the shortest held-out prompt."""
        if self.config.sample_prompt is not None:
            return wanted_prompt(policy, self.config.sample_prompt)
        found = min(rows, key=lambda r: (r.start == 0, r.start))
        ids = list(found.ids[: found.start])
        return policy.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids
