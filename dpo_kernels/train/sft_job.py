"""The job of `dpo-kernels sft`: from a model and conversations to a fine-tuned model.

    load -> evaluate -> SFT -> evaluate -> save

Folder, signals and what is kept of a run that ends early are as in `job.py`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

import torch

import dpo_kernels as dk

from ..data import TokenSequence
from .adapters import check_adapter
from .config import DPOTrainConfig, UserError, load_config
from .console import Console
from .ending import draw, files_of, last_fields, say_sample, write_summary
from .job import Job, started
from .machine import peak_memory
from .model import Policy, save_policy
from .optim import check_schedule
from .ranks_start import check_ranks, joined, meshes
from .resume import Keeper, metrics_of
from .run_options import GROUPS, SFT_DEFAULTS, SFT_GROUPS
from .sft import evaluate_sft, train_sft
from .shown import completions, write_report
from .sinks import check_sinks
from .start import check_device

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
            check_device(config.device)
            check_schedule(config)
            check_adapter(config, True)
            check_ranks(config, ranks, True)
            check_sinks(config.report_to)
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

        run_id = self.resumed.values["found"]["run_id"] if self.resumed else uuid.uuid4().hex[:16]
        self._report_to(metrics, run_id)
        prompt = self._sft_prompt(policy, eval_rows or train_rows)

        def complete() -> str:
            return completions(policy, [prompt], config.sample_max_new_tokens)[0]

        if self.resumed is None:
            before, text_before = evaluate(), complete()
            if before:
                metrics.write({"step": 0, "epoch": 0.0, **before})
        else:
            found = self.resumed.values["found"]
            before, text_before = found["before"], found["text_before"]
        kept = {"before": before, "text_before": text_before, "run_id": run_id}
        values = {"version": dk.__version__, "identity": identity, "found": kept}
        keeper = Keeper.of(self.folder, config, values, self.resumed, self.ranks)
        between = evaluate if eval_rows else None
        train_sft(policy, train_rows, config, metrics, self.console, between, keeper)
        with self.console.held():  # before anything that could still fail
            save_policy(policy, self.folder / "model")
        self.saved = True
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
                "before": text_before,
                "after": complete(),
            },
            "peak_memory_bytes": peak_memory(policy.device),
            **last_fields(self.left_out, began),
        }
        if not self.ranks.first:
            return summary
        write_summary(self.folder, summary)
        write_report(self.folder, say)
        if before:
            was, now = before["eval_loss"], after["eval_loss"]
            say(f"\nheld-out loss per token: {was:.4f} before, {now:.4f} after")
        say_sample(summary["sample"], say)
        say(self.left_out.summary())
        say(f"saved in {self.folder}: {files_of(self.folder)}")
        return summary

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
            return self._wanted_prompt(policy, self.config.sample_prompt)
        found = min(rows, key=lambda r: (r.start == 0, r.start))
        ids = list(found.ids[: found.start])
        return policy.tokenizer.decode(ids, skip_special_tokens=True).strip(), ids
