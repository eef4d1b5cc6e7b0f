"""The rows of a run: read, tokenised, held out; what is left out of them and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import dpo_kernels as dk

from ..data import (
    DataError,
    LeftOut,
    Limits,
    PreferencePair,
    TokenCompletion,
    TokenSequence,
    read_conversations,
    read_judged,
    read_pairs,
    tokenize_conversations,
    tokenize_judged,
    tokenize_many,
)
from ..data.bulk import cache_root
from ..data.left_out import Problem
from .config import DPOTrainConfig
from .console import Console
from .data_options import columns, is_streamed, streamed_pairs, truncation
from .ending import no_pair_left
from .model import Policy
from .order import epoch_order


class RunRows:
    """What a run trains and evaluates on. `late` is told of rows that are left out while it goes
    on."""

    def __init__(
        self,
        config: DPOTrainConfig,
        left_out: LeftOut,
        console: Console,
        late: Callable[[Problem], None],
    ) -> None:
        self.config, self.left_out, self.console, self._late = config, left_out, console, late
        self.texts: dict[str, Any] = {}  # rows by their places

    def pairs(
        self, policy: Policy, source: Path | None = None
    ) -> tuple[Sequence[Any], Sequence[Any]]:
        """Training and held-out pairs (or other rows), tokenised."""
        config = self.config
        train_file = config.dataset_name or str(source and source / "train.jsonl")
        eval_file = config.eval_file or (str(source / "eval.jsonl") if source else None)
        if config.rows == "pairs" and is_streamed(config, train_file):
            self.left_out.sink = self._late
            stream, apart, self.texts = streamed_pairs(
                train_file, policy, config, self.left_out, self.console.say, not eval_file
            )
            self._check_row_options(train_file, list(self.texts.values()))
            return stream, self._read(policy, eval_file) if eval_file else apart
        pairs = self._read(policy, train_file)
        if eval_file:
            return pairs, self._read(policy, eval_file)
        return self.split(pairs)

    def conversations(self, policy: Policy) -> list[TokenSequence]:
        """The rows of `sft_file`, tokenised; none without it."""
        file = self.config.sft_file
        return self.read_conversations(policy, file) if file is not None else []

    def read_conversations(self, policy: Policy, file: str) -> list[TokenSequence]:
        since = len(self.left_out.problems)
        rows = read_conversations(file, self.left_out, columns(self.config))
        sequences = tokenize_conversations(rows, *self._how(policy))
        if not sequences:
            raise no_pair_left(file, self.left_out, since, "conversation")
        return sequences

    def split(self, rows: list[Any]) -> tuple[list[Any], list[Any]]:
        """Rows to train on and rows held out, where there is no file of such."""
        fraction = self.config.eval_fraction
        n = round(fraction * len(rows))
        if fraction > 0 and len(rows) > 1:
            n = max(n, 1)
        # epoch -1: an order that no training epoch has
        held = set(epoch_order(len(rows), self.config.seed, -1, True)[:n])
        kept = [row for i, row in enumerate(rows) if i not in held]
        return kept, [row for i, row in enumerate(rows) if i in held]

    def _read(self, policy: Policy, file: str) -> list[Any]:
        if self.config.rows != "pairs":
            return self._read_judged(policy, file)
        since = len(self.left_out.problems)
        soft = self.config.soft_labels
        texts = read_pairs(file, self.left_out, columns(self.config), soft)
        if self.config.uses_offset and any(t.offset is None for t in texts):
            where = next(t.source for t in texts if t.offset is None)
            raise DataError(f"{where}: margin: missing, but odpo needs a margin in every row")
        self._check_row_options(file, texts)
        self.texts.update({t.source: t for t in texts})
        limits = Limits.of(policy.model.config)
        pairs = tokenize_many(
            texts,
            policy.tokenizer,
            truncation(self.config),
            self.left_out,
            self.console.say,
            limits,
            self.console.progress,
            self.config.dataset_num_proc,
            cache_root() / "tokens",
        )
        if not pairs:
            raise no_pair_left(file, self.left_out, since)
        return pairs

    def _how(self, policy: Policy) -> tuple[Any, Any, LeftOut, Limits, Any]:
        """What tokenising takes besides the rows."""
        limits = Limits.of(policy.model.config)
        return (
            policy.tokenizer,
            truncation(self.config),
            self.left_out,
            limits,
            self.console.progress,
        )

    def _read_judged(self, policy: Policy, file: str) -> list[Any]:
        """Completions with a label, or ranked lists."""
        since, rows = len(self.left_out.problems), self.config.rows
        judged = read_judged(file, rows, self.left_out, columns(self.config))
        self.texts.update({t.source: t for t in judged})
        found = tokenize_judged(judged, *self._how(policy))
        if not found:
            raise no_pair_left(file, self.left_out, since, self.config.noun[:-1])
        if rows == "unpaired":
            good = sum(isinstance(row, TokenCompletion) and row.desirable for row in found)
            self.console.say(f"{file}: {good} good completions, {len(found) - good} bad ones")
        return found

    def _check_row_options(self, file: str, texts: list[PreferencePair]) -> None:
        """The loss takes the columns that the rows bring, or it is said that it does not."""
        if not self.config.uses_offset and any(t.offset is not None for t in texts):
            self.left_out.once(f"{file}: the column margin is not used: odpo alone reads it")
        if not self.config.learn_groups and any(t.group is not None for t in texts):
            self.left_out.once(f"{file}: the column group is not used: learn_groups reads it")
        options = self.config.loss_options()
        for column, option in (
            ("weight", "weights"),
            ("beta", "beta"),
            ("label_smoothing", "label_smoothing"),
        ):
            if any(getattr(t, column) is not None for t in texts):
                options[option] = torch.full((1,), 0.1)
        if self.config.uses_offset:
            options["offset"] = torch.zeros(1)
        try:
            dk.losses.resolve(options)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{file}: the column weight, beta or label_smoothing does not fit the loss: {error}"
            ) from None
