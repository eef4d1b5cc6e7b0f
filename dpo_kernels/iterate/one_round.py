"""One round of the loop: its stages, each with files and an entry in the round's manifest.

    generate -> judge -> pairs -> train -> evaluate -> promote

A round ends by name where it has too few pairs, where a guard's limit is broken, or where the new
policy loses to the old one; then the old one stays.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..train.config_files import UserError
from ..train.console import Console
from ..train.job import run_job
from ..train.ranks import agreed
from .command_options import IterateConfig
from .endpoint import Endpoint
from .guards import broken_limit, kl_of_samples, logps_moved
from .judged_rows import make_rows
from .judges import Judge
from .local_models import LocalModel, weights_digest
from .manifest import Manifest
from .records import digest, read_samples, read_table, write_table
from .sampling import generate, seed_of
from .settings import SamplingOptions
from .verdicts import judge_samples
from .win_rate import win_rate

if TYPE_CHECKING:
    from .rounds import Iteration


class Waiting(Exception):
    """The round is not over, and cannot go on now: called again, the loop goes on with it."""


class Round:
    """One round: its folder, its manifest, its stages."""

    def __init__(self, loop: Iteration, number: int, state: dict[str, Any], zero: Manifest) -> None:
        self.loop, self.number, self.zero = loop, number, zero
        self.config, self.say, self.ranks = loop.config, loop.console.say, loop.ranks
        self.policy, self.reference = state["policy"], state["reference"]
        self.before = loop.folder / "rounds" / f"{state.get('round', 0):03d}"
        self.folder = loop.folder / "rounds" / f"{number:03d}"
        self.seed = seed_of(self.config.seed, "round", number)
        self.ranks.within(f"round {number}")
        self.manifest = Manifest(self.folder, self._facts, self.ranks)
        self._judge: Any = None

    def _facts(self) -> dict[str, Any]:
        return {
            "round": self.number,
            "seed": self.seed,
            "sampled_from": {"path": self.policy, "weights": weights_digest(Path(self.policy))},
            "reference_of_training": self._training_reference(),
            "prompts": digest([p.id for p in self.loop.prompts_of(self.number)]),
            "promoted": False,
            "ended": None,
        }

    def run(self) -> str | None:
        """Do what is not done yet; the reason why the loop ends here, or None."""
        m = self.manifest
        if m["ended"] or m["promoted"]:
            return m["ended"]
        m.stage("generate", self._generate, "samples.jsonl")
        verdicts = m.stage("judge", self._ask, "verdicts.jsonl")
        self.say(f"round {self.number}: {verdicts['said']}")
        counts = m.stage("pairs", self._pairs, "pairs.jsonl")
        self.say(f"round {self.number}: {counts['said']}")
        if counts["pairs"] < self.config.min_pairs:
            return self._end(
                f"min_pairs: {counts['pairs']} pairs in round {self.number}, "
                f"min_pairs is {self.config.min_pairs} ({counts['said']})"
            )
        m.stage("train", self._train, "train/model")
        found = m.stage("evaluate", self._evaluate, "eval_samples.jsonl", "wins_round0.jsonl")
        return self._decide(found)

    def _end(self, why: str) -> str:
        self.manifest.note(ended=why)
        self.say(f"round {self.number} ends: {why}")
        return why

    def _decide(self, found: dict[str, Any]) -> str | None:
        """Promote the new policy, or say why not."""
        c = self.config
        against0, against = found["win_rate_round0"], found["win_rate_previous"]
        self.say(
            f"round {self.number}: win rate over round 0 {_rate(against0)}, over the previous "
            f"policy {_rate(against)}"
        )
        broken = broken_limit(c, found["measures"], self.zero["stages"]["evaluate"]["measures"])
        if broken:
            return self._end(f"guard {broken}; round {self.number} is not promoted")
        if c.stop_below is not None and against["prompts"] and against["high"] < c.stop_below:
            return self._end(
                f"stop_below: win rate over the previous policy {_rate(against)}, below "
                f"{c.stop_below:g}; round {self.number} is not promoted"
            )
        promoted = self.manifest.stage("promote", self._promote)
        reached = c.stop_at is not None and against0["rate"] and against0["rate"] >= c.stop_at
        why = f"stop_at: win rate over round 0 {_rate(against0)}" if reached else None
        # One write: a round is promoted with its reason to end, or not yet.
        self.manifest.note(
            promoted=True, policy=promoted["policy"], reference=promoted["reference"], ended=why
        )
        return why

    # --- stages ---

    def judge(self, names: list[str] | None = None) -> Judge:
        if self._judge is None or names:
            self._judge = self.loop.judge(self.policy, names)
        return self._judge

    def _generate(self) -> dict[str, Any]:
        prompts = self.loop.prompts_of(self.number)
        options = replace(sampling_of(self.config), seed=self.seed)
        with self.ranks.together():
            policy = LocalModel.load(self.policy, self.config.device)
        file = self.folder / "samples.jsonl"
        counts = generate(prompts, policy, options, file, self.loop.console, self.ranks)
        return asdict(counts)

    def _ask(self) -> dict[str, Any]:
        with self.ranks.together():
            samples = read_samples(self.folder / "samples.jsonl")
            judge = self.judge()
        found = self._verdicts(samples, judge, "verdicts.jsonl")
        c = self.config
        if c.fallback_judge:

            def pairs() -> int:
                verdicts = read_table(self.folder / "verdicts.jsonl")
                return len(make_rows(self.loop.rows, samples, verdicts, c, self.seed)[0])

            if self.ranks.first_does(pairs) < c.min_pairs:
                with self.ranks.together():
                    other = self.loop.judge(self.policy, c.fallback_judge)
                second = self._verdicts(samples, other, "verdicts_fallback.jsonl")
                second["said"] = (
                    f"{judge.name}: {found['said']}; asked in its place, {other.name}: "
                    f"{second['said']}"
                )
                self.ranks.first_does(self._fall_back)
                return {**second, "first_judge": found}
        return found

    def _fall_back(self) -> None:
        file = self.folder / "verdicts.jsonl"
        file.replace(self.folder / "verdicts_first.jsonl")
        shutil.copyfile(self.folder / "verdicts_fallback.jsonl", file)

    def _verdicts(self, samples: Any, judge: Any, name: str) -> dict[str, Any]:
        file, how = self.folder / name, self.config.compare
        counts = judge_samples(samples, judge, file, how, self.loop.console, self.ranks)
        found = {"judge": judge.name, "identity": judge.identity, **asdict(counts)}
        found["said"] = counts.describe()
        endpoint = getattr(judge, "endpoint", None)
        if endpoint is not None:
            stats, cost = endpoint.counted()
            found |= {"requests": dict(stats), "cost": cost}
            self.say(endpoint.describe(stats, cost))
            self._heard(endpoint)
        elif counts.errors and counts.errors == counts.verdicts:
            failed = UserError(
                f"judge {judge.name} erred on each of {counts.errors} pairs: {counts.first_error}; "
                "called again, the loop goes on"
            )
            raise agreed(failed)
        return found

    def _heard(self, endpoint: Endpoint) -> None:
        """Leave a stage unfinished whose questions a spent budget or a dead server left open."""
        stats, _ = endpoint.counted()
        first = next(filter(None, self.ranks.objects(endpoint.first_error)), "")
        if stats["over_budget"]:
            raise Waiting(
                f"budget: {stats['over_budget']} questions of round {self.number} were not asked; "
                "with a larger max_requests or max_cost the loop goes on with them"
            )
        if stats["errors"] and not stats["answered"] + stats["cached"]:
            none = UserError(
                f"the judge at {endpoint.options.base_url} answered none of {stats['errors']} "
                f"questions: {first}; called again, the loop goes on"
            )
            raise agreed(none)

    def _pairs(self) -> dict[str, Any]:
        return self.ranks.first_does(self._make_pairs)

    def _make_pairs(self) -> dict[str, Any]:
        samples = read_samples(self.folder / "samples.jsonl")
        verdicts = read_table(self.folder / "verdicts.jsonl")
        rows, counts = make_rows(self.loop.rows, samples, verdicts, self.config, self.seed)
        write_table(self.folder / "pairs.jsonl", rows)
        return {**asdict(counts), "said": counts.describe()}

    def _training_reference(self) -> str:
        kinds = {"initial": str(self.loop.start), "previous": self.policy, "ema": self.reference}
        return kinds[self.config.reference]

    def _train(self) -> dict[str, Any]:
        reference = self._training_reference()
        options = {
            "eval_fraction": 0.0,
            "sample_max_new_tokens": 0,
            "compare_plain_torch": False,
            "seed": self.seed,
            "device": self.config.device,
            **self.loop.training,
            "model_name_or_path": self.policy,
            "dataset_name": str(self.folder / "pairs.jsonl"),
            "output_dir": str(self.folder / "train"),
            "overwrite_output_dir": True,
        }
        if reference != self.policy:
            options["ref_model_name_or_path"] = reference
        checkpoints = self.folder / "train" / "checkpoints"

        def begun() -> bool:
            return checkpoints.is_dir() and any(checkpoints.iterdir())

        if self.ranks.first_does(begun):  # it was killed behind one
            options["resume_from_checkpoint"] = "true"
        with _hushed(self.loop.console):
            summary = run_job(options, self.loop.console, self.ranks)
        self.ranks.within(f"round {self.number}")
        # Optimizer states that nobody asks for again.
        self.ranks.first_does(lambda: shutil.rmtree(checkpoints, ignore_errors=True))
        return {"steps": summary["steps"], "pairs": summary["pairs"]}

    def _evaluate(self) -> dict[str, Any]:
        device = self.config.device
        with self.ranks.together():
            new = LocalModel.load(str(self.folder / "train" / "model"), device)
        found = self.loop.sample_held_out(new, self.folder)

        def measures() -> dict[str, float]:
            samples = read_samples(self.folder / "eval_samples.jsonl")
            start = LocalModel.load(str(self.loop.start), device)
            pairs = read_table(self.folder / "pairs.jsonl")
            first = self.policy == str(self.loop.start)
            old = start if first else LocalModel.load(self.policy, device)
            return {**kl_of_samples(new, start, samples), **logps_moved(new, old, pairs)}

        self.ranks.at("guards")
        found["measures"] |= self.ranks.first_does(measures)
        with self.ranks.together():
            samples = read_samples(self.folder / "eval_samples.jsonl")
            judge = self.judge()
        for name, folder in (("round0", self.zero.folder), ("previous", self.before)):
            if name == "previous" and folder == self.zero.folder:
                found["win_rate_previous"] = found["win_rate_round0"]  # asked once
                continue
            found[f"win_rate_{name}"] = win_rate(
                samples,
                read_samples(folder / "eval_samples.jsonl"),
                judge,
                self.folder / f"wins_{name}.jsonl",
                self.config.win_length_match,
                self.ranks,
            )
        endpoint = getattr(judge, "endpoint", None)
        if endpoint is not None:
            self._heard(endpoint)
        return found

    def _promote(self) -> dict[str, Any]:
        """The new policy becomes current; the EMA reference moves towards it."""
        policy = f"rounds/{self.number:03d}/train/model"
        if self.config.reference != "ema":
            return {"policy": policy, "reference": policy}
        old, new = Path(self.reference), self.loop.folder / policy
        target, decay = self.folder / "reference", self.config.ema_decay
        self.ranks.first_does(lambda: average_models(old, new, target, decay))
        return {"policy": policy, "reference": f"rounds/{self.number:03d}/reference"}


@torch.no_grad()
def average_models(old: Path, new: Path, target: Path, decay: float) -> None:
    """Save decay * old + (1 - decay) * new, each weight, as a model of its own."""
    first, second = LocalModel.load(str(old), "cpu"), LocalModel.load(str(new), "cpu")
    theirs = dict(second.model.named_parameters())
    for name, weight in first.model.named_parameters():
        weight.lerp_(theirs[name], 1 - decay)
    part = target.with_name(target.name + ".writing")
    shutil.rmtree(part, ignore_errors=True)
    first.model.save_pretrained(part)
    first.tokenizer.save_pretrained(part)
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)


def sampling_of(config: IterateConfig) -> SamplingOptions:
    """The options of sampling among those of the loop."""
    return SamplingOptions(**{f.name: getattr(config, f.name) for f in fields(SamplingOptions)})


@contextlib.contextmanager
def _hushed(console: Console) -> Iterator[None]:
    """Nothing printed; signals go on to be heard."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _rate(w: dict[str, Any]) -> str:
    if w["rate"] is None:
        return "unknown (no verdict)"
    return f"{w['rate']:.3f} [{w['low']:.3f}, {w['high']:.3f}] on {w['prompts']} prompts"
