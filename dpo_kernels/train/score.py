"""`dpo-kernels score`: what a model gives to pairs or completions, beside a reference or alone.

    rows -> windows of rows -> batches by tokens -> per-token log-probs -> a row each, as they came

Of a pair: `chosen_logps`, `rejected_logps`, sums over the scored tokens; with a reference
`ref_chosen_logps`, `ref_rejected_logps` (the columns that TRL reads), the implicit rewards
`chosen_rewards`, `rejected_rewards`, beta times the log-ratio, and `margins`. Of a completion the
same without a side: `logps`, `ref_logps`, `rewards`. With `per_token` also the ids that were
scored, their log-probs and log-ratios.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..data import (
    LeftOut,
    Limits,
    RowTokenizer,
    TokenPair,
    TokenSequence,
    make_batch,
    make_sequence_batch,
    read_scorable,
)
from ..models.structure import deterministic
from .config import DPOTrainConfig, UserError, check_fields
from .console import Console
from .model import Policy, load_policy, load_reference, over_ranks
from .ranks import Ranks
from .ranks_start import joined
from .run_options import ModelOptions, RefModel, ScoreOptions
from .score_reference import Logps, Scored, ScoreReference
from .start import check_device, find_model, quiet_bars
from .step_parts import Parts
from .tables import TableWriter

WINDOW = 1024  # rows that are held, sorted by length and written together


@dataclass
class ScoreConfig(ScoreOptions, RefModel, ModelOptions):
    """Everything that the scores depend on."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model_name_or_path", "dataset_name", "output_file"):
            if getattr(self, name) is None:
                raise UserError(f"{name} is missing (--{name})")
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta must be a positive number, got {self.beta}")
        if self.max_tokens_per_batch < 1:
            got = self.max_tokens_per_batch
            raise UserError(f"max_tokens_per_batch must be at least 1, got {got}")

    def of_models(self) -> DPOTrainConfig:
        """The options by which policy and reference are loaded."""
        shared = {f.name for f in fields(DPOTrainConfig)} & {f.name for f in fields(self)}
        return DPOTrainConfig(**{name: getattr(self, name) for name in shared})


def run_score(config: ScoreConfig, console: Console) -> dict[str, Any]:
    """Score the rows of a file; returns counts and means, which it also prints."""
    models = config.of_models()
    with joined({"device": models.device}, console) as ranks:
        return _run(config, models, console, ranks)


def _run(
    config: ScoreConfig, models: DPOTrainConfig, console: Console, ranks: Ranks
) -> dict[str, Any]:
    """The scores, each rank's its share of the batches; the first one writes."""
    quiet_bars(console)
    output: TableWriter | None = None
    with ranks.together():
        check_device(models.device)
        if ranks.many and config.dataset_name == "-":
            raise UserError(f"dataset_name: {ranks.world} processes cannot all read stdin")
        if ranks.many and config.reference_cache is not None:
            raise UserError(f"reference_cache: score reads it in one process, not {ranks.world}")
        if ranks.first:
            output = TableWriter(Path(str(config.output_file)), config.overwrite)
        name, ref = str(config.model_name_or_path), config.ref_model_name_or_path
        found = find_model(name)
        if ref is not None:
            find_model(ref, "ref_model_name_or_path")
        policy = load_policy(replace(models, model_name_or_path=found), console.say)
        other = load_reference(models, policy, console.say) if ref is not None else None
        reference = None
        if other is not None or config.reference_cache is not None:
            reference = ScoreReference(other, config.reference_cache, logps_of, console.say)
    for model in (policy, other):
        if model is not None:
            model.router_weight = 0.0  # nothing is trained
            over_ranks(model, models, ranks)
    scorer = _Scorer(config, policy, reference, console)
    if output is None:
        return scorer.write(lambda rows: None)
    try:
        with output:
            summary = scorer.write(output.write)
    except KeyboardInterrupt:
        if output.part.exists():
            print(f"dpo-kernels: what was scored is in {output.part}", file=sys.stderr)
        raise
    finally:
        if reference is not None:
            reference.close()
    console.say(f"wrote {config.output_file}")
    return summary


@dataclass
class _Totals:
    """Sums over the rows that were written."""

    rows: int = 0
    pairs: int = 0
    wins: float = 0.0
    margins: float = 0.0
    tokens: int = 0
    logps: float = 0.0
    ratios: float = 0.0

    def add(self, row: dict[str, Any], sides: Sequence[str]) -> None:
        self.rows += 1
        for side in sides:
            self.tokens += row[f"{side}num_tokens"]
            self.logps += row[f"{side}logps"]
            self.ratios += row[f"{side}logps"] - row.get(f"ref_{side}logps", 0.0)
        if len(sides) == 2:
            margin = row.get("margins", row["chosen_logps"] - row["rejected_logps"])
            self.pairs += 1
            self.margins += margin
            self.wins += 0.5 if margin == 0 else float(margin > 0)


@dataclass
class _Scorer:
    config: ScoreConfig
    policy: Policy
    reference: ScoreReference | None
    console: Console
    left_out: LeftOut = field(init=False)
    totals: _Totals = field(default_factory=_Totals)

    def __post_init__(self) -> None:
        self.left_out = LeftOut(self.config.strict, self.console.say)

    def write(self, output: Callable[[list[dict[str, Any]]], Any]) -> dict[str, Any]:
        """Score every row of the file into `output`."""
        file, since = str(self.config.dataset_name), time.perf_counter()
        rows = self._tokenised(file)
        while window := list(itertools.islice(rows, WINDOW)):
            output(self._window(window))
            took = time.perf_counter() - since
            done = self.totals
            self.console.note(f"scored {done.rows} rows, {done.tokens / took:.0f} tokens/s")
        if not self.totals.rows:
            raise self.left_out.nothing(file, "no row that can be scored")
        return self._summary()

    def _tokenised(self, file: str) -> Iterator[Scored]:
        limits = Limits.of(self.policy.model.config)
        maker = RowTokenizer(
            self.policy.tokenizer,
            self.config.max_length,
            self.left_out,
            self.console.say,
            limits,
        )
        for row in read_scorable(file, self.left_out):
            found = maker.of(row)
            if isinstance(found, TokenPair | TokenSequence):
                yield found

    def _window(self, window: list[Scored]) -> list[dict[str, Any]]:
        """The rows of a window, in its order."""
        batches = batches_by_tokens(window, self.config.max_tokens_per_batch)
        ranks = self.policy.ranks
        parts = Parts.whole_batches(ranks, batches, lambda i: _size(window[i]))
        found: dict[int, Any] = {}
        plan = self.console.progress(parts, "scoring", parts.rounds, "batches", lines=False)
        for indices in plan:
            ranks.at("scoring")
            if indices is None and not self.policy.sharded.is_sharded:
                continue
            group = [window[i] for i in indices or [0]]  # idle beside others: their weights meet
            ours = logps_of(self.policy, group)
            theirs = self.reference.of(group) if self.reference else None
            for k, i in enumerate(indices or ()):
                found[i] = ours[k], None if theirs is None else theirs[k]
        for part in ranks.objects(found):
            found |= part
        done = {i: self._row(window[i], *found[i]) for indices in batches for i in indices}
        return [done[i] for i in range(len(window))]

    def _row(
        self, row: Scored, ours: list[list[float]], theirs: list[list[float]] | None
    ) -> dict[str, Any]:
        pair = isinstance(row, TokenPair)
        sides = ("chosen_", "rejected_") if pair else ("",)
        result: dict[str, Any] = {"source": row.source}
        for k, side in enumerate(sides):
            sequence = row.sequences[k] if isinstance(row, TokenPair) else row
            self._side(result, side, sequence, ours[k], theirs[k] if theirs else None)
        if pair and theirs is not None:
            result["margins"] = result["chosen_rewards"] - result["rejected_rewards"]
        self.totals.add(result, sides)
        return result

    def _side(
        self,
        result: dict[str, Any],
        side: str,
        sequence: TokenSequence,
        ours: list[float],
        theirs: list[float] | None,
    ) -> None:
        total, ref = math.fsum(ours), None if theirs is None else math.fsum(theirs)
        if not math.isfinite(total) or not math.isfinite(ref or 0.0):
            which, got = ("reference", ref) if math.isfinite(total) else ("model", total)
            raise UserError(
                f"{sequence.source}: the {which} gives a log-prob of {got}: its weights "
                "are not finite, or its dtype is too narrow (--dtype float32)"
            )
        result[f"{side}logps"] = total
        if ref is not None:
            result[f"ref_{side}logps"] = ref
            result[f"{side}rewards"] = self.config.beta * (total - ref)
        result[f"{side}num_tokens"] = len(ours)
        if self.config.per_token:
            result[f"{side}token_ids"] = [sequence.ids[t] for t in sequence.scored]
            result[f"{side}token_logps"] = ours
            if theirs is not None:
                result[f"ref_{side}token_logps"] = theirs
                ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
                result[f"{side}token_log_ratios"] = ratios

    def _summary(self) -> dict[str, Any]:
        t, say = self.totals, self.console.say
        against = "against the reference" if self.reference else "of the model alone"
        summary: dict[str, Any] = {"rows": t.rows, "pairs": t.pairs, "tokens": t.tokens}
        summary["logps_per_token"] = t.logps / t.tokens
        say(f"{t.rows} rows, {t.tokens} scored tokens, {against}")
        say(f"log-prob per token: {summary['logps_per_token']:.4f}")
        if self.reference:
            summary["log_ratio_per_token"] = t.ratios / t.tokens
            say(f"log-ratio per token: {summary['log_ratio_per_token']:.4f}")
        if t.pairs:
            what = "reward" if self.reference else "log-prob"
            summary["accuracy"], summary["margin"] = t.wins / t.pairs, t.margins / t.pairs
            say(
                f"{what} accuracy over {t.pairs} pairs: {summary['accuracy']:.4f} (a tie is a "
                f"half), margin {summary['margin']:.4f}"
            )
        summary["left_out"] = self.left_out.counts()
        say(self.left_out.summary())
        return summary


@torch.no_grad()
def logps_of(policy: Policy, group: list[Scored]) -> Logps:
    """Of each row of the group, of each of its sides, log-probs of the scored tokens."""
    pairs = [row for row in group if isinstance(row, TokenPair)]
    if pairs:
        batch = make_batch(pairs, policy.sharing, policy.pad_id)
    else:
        singles = [row for row in group if isinstance(row, TokenSequence)]
        sharing = replace(policy.sharing, mode="padded")
        batch = make_sequence_batch(singles, sharing, policy.pad_id)
    with deterministic(policy.model):
        values = policy.logps(batch.to(policy.device), "none").double().cpu()
    found = [x.tolist() for x in values.split(batch.scored_lengths)]
    B = len(group)
    return [[found[i], found[B + i]] for i in range(B)] if pairs else [[x] for x in found]


def batches_by_tokens(rows: Sequence[Scored], most: int) -> list[list[int]]:
    """Indices of rows of one kind and of similar length, at most `most` padded tokens a batch.

    A row that is longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    for kind in (TokenPair, TokenSequence):
        sizes = {i: _size(row) for i, row in enumerate(rows) if isinstance(row, kind)}
        group: list[int] = []
        longest = 0
        for i in sorted(sizes, key=lambda i: (-sizes[i], i)):
            if group and longest * (len(group) + 1) > most:
                batches.append(group)
                group = []
            longest = sizes[i] if not group else longest
            group.append(i)
        if group:
            batches.append(group)
    return batches


def _size(row: Scored) -> int:
    if isinstance(row, TokenSequence):
        return len(row.ids)
    return 2 * len(row.prompt) + len(row.chosen) + len(row.rejected)
