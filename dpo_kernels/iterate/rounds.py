"""`iterate`: the policy improves on its own judged samples, round after round.

    prompts -> samples -> verdicts -> pairs -> train -> evaluate -> promote

Each arrow is a stage with files of its own and an entry in the round's manifest; what is finished
is never done again, so a loop that was killed goes on where it was. A round ends by name where it
has too few pairs, where a guard's limit is broken, or where the new policy loses to the old one;
then the old one stays.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..data import embedded
from ..train.config import UserError, load_config
from ..train.console import Console
from ..train.job import run_job
from .command_options import MAY_CHANGE, IterateConfig
from .guards import broken_limit, kl_of_samples, logps_moved, text_statistics
from .iteration_report import write_report
from .judges import Judge, make_judge
from .local_models import LocalModel, weights_digest
from .manifest import LOCK, Manifest, locked, read_json, write_json
from .pair_rules import make_pairs
from .records import Prompt, digest, read_prompts, read_samples, read_table, write_table
from .sampling import generate, seed_of
from .settings import SamplingOptions, load_options
from .start_model import embedded_start
from .verdicts import judge_samples
from .win_rate import win_rate

PROMPT_FILES = tuple(
    name + ending
    for name in ("prompts.jsonl", "eval_prompts.jsonl", "config.json")
    for ending in ("", ".writing")
)
# Options of `train` that a round sets itself.
OF_A_ROUND = (
    "dataset_name",
    "eval_file",
    "overwrite_output_dir",
    "ref_model_name_or_path",
    "resume_from_checkpoint",
)
# The embedded model's loop: three rounds within minutes on two cores.
EMBEDDED_LOOP = {
    "prompts_per_round": 512,
    "num_samples": 4,
    "max_new_tokens": 48,
    "sample_batch_size": 256,
}
EMBEDDED_ROUND = {"max_steps": 90, "learning_rate": 5e-4}


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(options of the loop, options of each round's training)."""
    mine = {f.name for f in fields(IterateConfig)}
    loop = {k: v for k, v in options.items() if k in mine}
    return loop, {k: v for k, v in options.items() if k not in mine}


def resolve(options: Mapping[str, Any]) -> tuple[IterateConfig, dict[str, Any]]:
    """(the loop's configuration, options of each round's training)."""
    loop, training = split_options(options)
    if loop.get("model_name_or_path") is None and loop.get("prompts") is None:
        loop = {**EMBEDDED_LOOP, **loop}
        training = {**embedded.recipe()["dpo"], **EMBEDDED_ROUND, **training}
    return load_options(IterateConfig, loop), training


def run_iteration(options: Mapping[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Run the loop that the options describe, or go on with it; returns its summary."""
    config, training = resolve(options)
    return Iteration(config, training, console or Console(quiet=True)).run()


class Iteration:
    """One loop and its folder."""

    def __init__(self, config: IterateConfig, training: dict[str, Any], console: Console) -> None:
        self.config, self.console = config, console
        self.embedded = config.model_name_or_path is None
        self.training = dict(training)
        if config.online:
            self.training["max_steps"] = config.online
        forbidden = {*OF_A_ROUND, "train_file"} & set(training)
        if forbidden:
            raise UserError(f"{sorted(forbidden)[0]}: each round has its own")
        trained = load_config(self.training)  # a mistake is found before anything is sampled
        self.per_step = trained.per_device_train_batch_size * trained.gradient_accumulation_steps
        self.folder = Path(config.output_dir)
        self.start = self.folder / "start"
        self.train_prompts: list[Prompt] = []
        self.eval_prompts: list[Prompt] = []

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Go on to the end. One process at a time: a second one is refused."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            return self._run()

    def _run(self) -> dict[str, Any]:
        self._open()
        zero = self._round_zero()
        state: dict[str, Any] = {"policy": str(self.start), "reference": str(self.start)}
        done: list[dict[str, Any]] = []
        ended = None
        for number in range(1, self.config.rounds + 1):
            one = Round(self, number, state, zero)
            ended = one.run()
            done.append(one.manifest.content)
            if one.manifest["promoted"]:
                state = {k: str(self.folder / one.manifest[k]) for k in ("policy", "reference")}
                state["round"] = number
            if ended:
                break
        return self._finish(done, state, ended, zero)

    def _finish(
        self, done: list[dict[str, Any]], state: dict[str, Any], ended: str | None, zero: Manifest
    ) -> dict[str, Any]:
        best = state.get("round", 0)
        model = self.folder / "model"
        part = self.folder / "model.writing"
        source = Path(state["policy"])
        if source.is_dir():
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(source, part)
            shutil.rmtree(model, ignore_errors=True)
            part.replace(model)
        summary = {
            "output_dir": str(self.folder),
            "rounds": len(done),
            "promoted_round": best,
            "ended": ended or f"rounds: {self.config.rounds} done",
            "model": str(model),
            "weights": weights_digest(source),
            "round0": zero["stages"]["evaluate"]["measures"],
            "each": [_summary_of(m) for m in done],
        }
        write_json(self.folder / "summary.json", summary)
        write_report(self.folder, summary, self.console.say)
        self.console.say(f"the loop ended: {summary['ended']}; policy of round {best} in {model}")
        return summary

    def _open(self) -> None:
        """Make the folder, or see that it is this loop's; settle the prompts."""
        c = self.config
        settings = {
            "loop": {k: v for k, v in asdict(c).items() if k not in (*MAY_CHANGE, "output_dir")},
            "training": self.training,
        }
        file = self.folder / "config.json"
        if file.exists():
            _same_settings(read_json(file), settings, file)
        elif {f.name for f in self.folder.iterdir()} - {LOCK, *PROMPT_FILES}:
            raise UserError(f"output_dir: {self.folder} is not empty and no iteration's folder")
        if not file.exists():
            train, held = self._read_prompts()
            write_table(self.folder / "prompts.jsonl", train)
            write_table(self.folder / "eval_prompts.jsonl", held)
            write_json(file, settings)  # last: a folder with it is whole
        self.train_prompts = read_prompts(self.folder / "prompts.jsonl")
        self.eval_prompts = read_prompts(self.folder / "eval_prompts.jsonl")

    def _read_prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        c = self.config
        if self.embedded:
            with embedded.folder() as source:
                train = read_prompts(source / "train.jsonl")
                held = read_prompts(source / "eval.jsonl")
        else:
            train = read_prompts(str(c.prompts))
            held = read_prompts(c.eval_prompts) if c.eval_prompts else []
            if not held and c.eval_fraction > 0 and len(train) > 1:
                n = max(1, round(c.eval_fraction * len(train)))
                out = {p.id for p in sorted(train, key=lambda p: seed_of(c.seed, p.id))[:n]}
                held = [p for p in train if p.id in out]
        ids = {p.id for p in held}
        kept = [p for p in train if p.id not in ids]
        if not kept or not held:
            raise UserError("prompts: there must be prompts to train on and held-out ones")
        return kept, held

    def _round_zero(self) -> Manifest:
        """The starting policy and its samples of the held-out prompts."""
        zero = Manifest(self.folder / "rounds" / "000", {"round": 0})
        c = self.config
        if self.embedded:

            def fine_tune() -> dict[str, Any]:
                embedded_start(self.start, c.seed, c.sft_steps, self.console)
                return {}

            zero.stage("start", fine_tune, "../../start")
        else:
            self.start = Path(str(c.model_name_or_path))

        def sample() -> dict[str, Any]:
            return self.sample_held_out(LocalModel.load(str(self.start), c.device), zero.folder)

        zero.stage("evaluate", sample, "eval_samples.jsonl")
        return zero

    # --- what rounds share ---

    def sample_held_out(self, policy: LocalModel, folder: Path) -> dict[str, Any]:
        """Sample the held-out prompts; each round with the same seed."""
        options = replace(_sampling(self.config), num_samples=self.config.eval_samples)
        counts = generate(
            self.eval_prompts, policy, options, folder / "eval_samples.jsonl", self.console
        )
        samples = read_samples(folder / "eval_samples.jsonl")
        return {"measures": text_statistics(samples), "samples": counts.samples}

    def prompts_of(self, number: int) -> list[Prompt]:
        """The prompts of a round, by seed; each round goes on in the same shuffled list."""
        c, every = self.config, self.train_prompts
        wanted = c.prompts_per_round or (c.online * self.per_step if c.online else None)
        if wanted is None or wanted >= len(every):
            return every
        at = (number - 1) * wanted
        found: list[Prompt] = []
        while len(found) < wanted:
            epoch, i = divmod(at + len(found), len(every))
            if not found or i == 0:
                order = sorted(every, key=lambda p: seed_of(c.seed, epoch, p.id))
            found.append(order[i])
        return list({p.id: p for p in found}.values())

    def judge(self, policy: str, names: list[str] | None = None) -> Any:
        """The judge; models that a judge needs are the current and the starting policy."""
        c = replace(self.config, judge=names or self.config.judge)
        c.cache_dir = c.cache_dir or str(self.folder / "judge_cache")
        c.judge_model_path = c.judge_model_path or policy
        c.judge_ref_path = c.judge_ref_path or str(self.start)
        return make_judge(c, self.folder / "requests.jsonl")


class Round:
    """One round: its folder, its manifest, its stages."""

    def __init__(self, loop: Iteration, number: int, state: dict[str, Any], zero: Manifest) -> None:
        self.loop, self.number, self.zero = loop, number, zero
        self.config, self.say = loop.config, loop.console.say
        self.policy, self.reference = state["policy"], state["reference"]
        self.before = loop.folder / "rounds" / f"{state.get('round', 0):03d}"
        self.folder = loop.folder / "rounds" / f"{number:03d}"
        self.seed = seed_of(self.config.seed, "round", number)
        self.manifest = Manifest(
            self.folder,
            {
                "round": number,
                "seed": self.seed,
                "sampled_from": {"path": self.policy, "weights": weights_digest(Path(self.policy))},
                "reference_of_training": self._training_reference(),
                "prompts": digest([p.id for p in loop.prompts_of(number)]),
                "promoted": False,
                "ended": None,
            },
        )
        self._judge: Any = None

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
        options = replace(_sampling(self.config), seed=self.seed)
        policy = LocalModel.load(self.policy, self.config.device)
        counts = generate(
            prompts, policy, options, self.folder / "samples.jsonl", self.loop.console
        )
        return asdict(counts)

    def _ask(self) -> dict[str, Any]:
        samples = read_samples(self.folder / "samples.jsonl")
        judge = self.judge()
        found = self._verdicts(samples, judge, "verdicts.jsonl")
        c = self.config
        if c.fallback_judge:
            pairs, _ = make_pairs(samples, read_table(self.folder / "verdicts.jsonl"), c, self.seed)
            if len(pairs) < c.min_pairs:
                other = self.loop.judge(self.policy, c.fallback_judge)
                second = self._verdicts(samples, other, "verdicts_fallback.jsonl")
                second["said"] = (
                    f"{judge.name}: {found['said']}; asked in its place, {other.name}: "
                    f"{second['said']}"
                )
                (self.folder / "verdicts.jsonl").replace(self.folder / "verdicts_first.jsonl")
                shutil.copyfile(
                    self.folder / "verdicts_fallback.jsonl", self.folder / "verdicts.jsonl"
                )
                return {**second, "first_judge": found}
        return found

    def _verdicts(self, samples: Any, judge: Any, name: str) -> dict[str, Any]:
        counts = judge_samples(
            samples, judge, self.folder / name, self.config.compare, self.loop.console
        )
        found = {"judge": judge.name, "identity": judge.identity, **asdict(counts)}
        found["said"] = counts.describe()
        endpoint = getattr(judge, "endpoint", None)
        if endpoint is not None:
            found |= {"requests": dict(endpoint.stats), "cost": endpoint.cost}
            self.say(endpoint.describe())
        return found

    def _pairs(self) -> dict[str, Any]:
        samples = read_samples(self.folder / "samples.jsonl")
        rows, counts = make_pairs(
            samples, read_table(self.folder / "verdicts.jsonl"), self.config, self.seed
        )
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
        if checkpoints.is_dir() and any(checkpoints.iterdir()):  # it was killed behind one
            options["resume_from_checkpoint"] = "true"
        with _hushed(self.loop.console):
            summary = run_job(options, self.loop.console)
        shutil.rmtree(checkpoints, ignore_errors=True)  # optimizer states nobody asks for again
        return {"steps": summary["steps"], "pairs": summary["pairs"]}

    def _evaluate(self) -> dict[str, Any]:
        device = self.config.device
        new = LocalModel.load(str(self.folder / "train" / "model"), device)
        found = self.loop.sample_held_out(new, self.folder)
        samples = read_samples(self.folder / "eval_samples.jsonl")
        start = LocalModel.load(str(self.loop.start), device)
        found["measures"] |= kl_of_samples(new, start, samples)
        pairs = read_table(self.folder / "pairs.jsonl")
        old = start if self.policy == str(self.loop.start) else LocalModel.load(self.policy, device)
        found["measures"] |= logps_moved(new, old, pairs)
        for name, folder in (("round0", self.zero.folder), ("previous", self.before)):
            if name == "previous" and folder == self.zero.folder:
                found["win_rate_previous"] = found["win_rate_round0"]  # asked once
                continue
            found[f"win_rate_{name}"] = win_rate(
                samples,
                read_samples(folder / "eval_samples.jsonl"),
                self.judge(),
                self.folder / f"wins_{name}.jsonl",
                self.config.win_length_match,
            )
        return found

    def _promote(self) -> dict[str, Any]:
        """The new policy becomes current; the EMA reference moves towards it."""
        policy = f"rounds/{self.number:03d}/train/model"
        if self.config.reference != "ema":
            return {"policy": policy, "reference": policy}
        target = self.folder / "reference"
        average_models(
            Path(self.reference), self.loop.folder / policy, target, self.config.ema_decay
        )
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


def _sampling(config: IterateConfig) -> SamplingOptions:
    return SamplingOptions(**{f.name: getattr(config, f.name) for f in fields(SamplingOptions)})


@contextlib.contextmanager
def _hushed(console: Console) -> Iterator[None]:
    """Nothing printed; signals go on to be heard."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def _same_settings(old: dict[str, Any], new: dict[str, Any], file: Path) -> None:
    for part in ("loop", "training"):
        for name in sorted({*old[part], *new[part]}):
            a, b = old[part].get(name), new[part].get(name)
            if a != b:
                raise UserError(
                    f"{name} is {b!r}, but the loop in {file.parent} began with {a!r}; "
                    "go on with the old value or start a new output_dir"
                )


def _summary_of(manifest: dict[str, Any]) -> dict[str, Any]:
    stages = manifest["stages"]
    evaluated = stages.get("evaluate", {})
    keep = {k: manifest[k] for k in ("round", "promoted", "ended")}
    return {
        **keep,
        "judge": {k: v for k, v in stages.get("judge", {}).items() if k not in ("files",)},
        "pairs": {k: v for k, v in stages.get("pairs", {}).items() if k not in ("files",)},
        "measures": evaluated.get("measures"),
        "win_rate_round0": evaluated.get("win_rate_round0"),
        "win_rate_previous": evaluated.get("win_rate_previous"),
        "seconds": {k: v["seconds"] for k, v in stages.items()},
    }


def _rate(w: dict[str, Any]) -> str:
    if w["rate"] is None:
        return "unknown (no verdict)"
    return f"{w['rate']:.3f} [{w['low']:.3f}, {w['high']:.3f}] on {w['prompts']} prompts"
