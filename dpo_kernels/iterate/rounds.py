"""`iterate`: the policy improves on its own judged samples, round after round.

    prompts -> samples -> verdicts -> pairs -> train -> evaluate -> promote

This file is the loop and its folder; what a round does is in `one_round.py`. What is finished is
never done again, so a loop that was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..data import embedded
from ..train.config import UserError, load_config
from ..train.console import Console
from ..train.ranks import ALONE, Ranks
from ..train.ranks_start import OF_A_NODE, check_ranks, check_same, code_digest, joined
from .command_options import MAY_CHANGE, IterateConfig
from .guards import text_statistics
from .iteration_report import write_report
from .judges import make_judge
from .local_models import LocalModel, weights_digest
from .manifest import LOCK, Manifest, locked, read_json, write_json
from .model_judges import NO_REFERENCE
from .one_round import Round, Waiting, sampling_of
from .one_round import average_models as average_models
from .records import Prompt, prompt_id, read_prompts, read_samples, write_table
from .sampling import generate, seed_of
from .settings import load_options
from .start_model import embedded_start

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
    console = console or Console(quiet=True)
    with joined(options, console) as ranks:
        with ranks.together():
            loop = Iteration(*resolve(options), console, ranks)
        return loop.run()


class Iteration:
    """One loop and its folder."""

    def __init__(
        self,
        config: IterateConfig,
        training: dict[str, Any],
        console: Console,
        ranks: Ranks = ALONE,
    ) -> None:
        """Of many `ranks` each samples, judges and trains its part; the first one writes."""
        self.config, self.console, self.ranks = config, console, ranks
        self.embedded = config.model_name_or_path is None
        self.training = dict(training)
        if config.online:
            self.training["max_steps"] = config.online
        forbidden = {*OF_A_ROUND, "train_file"} & set(training)
        if forbidden:
            raise UserError(f"{sorted(forbidden)[0]}: each round has its own")
        # A mistake is found before anything is sampled.
        trained = load_config(self.training, {"output_dir": config.output_dir})
        check_ranks(trained, ranks, own=True)
        self.rows = trained.rows  # what the loss is of: pairs, unpaired or ranked
        self.per_step = trained.per_device_train_batch_size * trained.gradient_accumulation_steps
        self.folder = Path(config.output_dir)
        self.start = self.folder / "start"
        self.train_prompts: list[Prompt] = []
        self.eval_prompts: list[Prompt] = []

    # --- the loop ---

    def run(self) -> dict[str, Any]:
        """Go on to the end. One process at a time: a second one is refused."""
        self._agree()
        with contextlib.ExitStack() as held:

            def begin() -> None:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.folder))
                self._open()

            self.ranks.first_does(begin)
            return self._run()

    def _agree(self) -> None:
        """Every rank runs this loop, with this code."""
        if self.ranks.many:
            options = {**asdict(self.config), **self.training}
            facts = {f"option {k}": repr(v) for k, v in options.items() if k not in OF_A_NODE}
            check_same(self.ranks, {**facts, "code of dpo_kernels": code_digest()})

    def _run(self) -> dict[str, Any]:
        with self.ranks.together():
            self.train_prompts = read_prompts(self.folder / "prompts.jsonl")
            self.eval_prompts = read_prompts(self.folder / "eval_prompts.jsonl")
        zero = self._round_zero()
        state: dict[str, Any] = {"policy": str(self.start), "reference": str(self.start)}
        done: list[dict[str, Any]] = []
        ended = None
        for number in range(1, self.config.rounds + 1):
            one = Round(self, number, state, zero)
            try:
                ended = one.run()
            except Waiting as why:
                ended = str(why)
                self.console.say(f"round {number} waits: {why}")
            done.append(one.manifest.content)
            if one.manifest["promoted"]:
                state = {k: str(self.folder / one.manifest[k]) for k in ("policy", "reference")}
                state["round"] = number
            if ended:
                break
        return self.ranks.first_does(lambda: self._finish(done, state, ended, zero))

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
            "waits": not (done[-1]["promoted"] or done[-1]["ended"]),  # to be called again
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
        apart = {prompt_id(p.prompt) for p in held}  # an id may mean another prompt there
        kept = [p for p in train if prompt_id(p.prompt) not in apart]
        if not kept or not held:
            raise UserError("prompts: there must be prompts to train on and held-out ones")
        return kept, held

    def _round_zero(self) -> Manifest:
        """The starting policy and its samples of the held-out prompts."""
        self.ranks.within("round 0")
        zero = Manifest(self.folder / "rounds" / "000", lambda: {"round": 0}, self.ranks)
        c = self.config
        if self.embedded:

            def fine_tune() -> dict[str, Any]:
                self.ranks.first_does(
                    lambda: embedded_start(self.start, c.seed, c.sft_steps, self.console)
                )
                return {}

            zero.stage("start", fine_tune, "../../start")
        else:
            self.start = Path(str(c.model_name_or_path))

        def sample() -> dict[str, Any]:
            with self.ranks.together():
                policy = LocalModel.load(str(self.start), c.device)
            return self.sample_held_out(policy, zero.folder)

        zero.stage("evaluate", sample, "eval_samples.jsonl")
        return zero

    # --- what rounds share ---

    def sample_held_out(self, policy: LocalModel, folder: Path) -> dict[str, Any]:
        """Sample the held-out prompts; each round with the same seed."""
        options = replace(sampling_of(self.config), num_samples=self.config.eval_samples)
        file = folder / "eval_samples.jsonl"
        counts = generate(self.eval_prompts, policy, options, file, self.console, self.ranks)
        measures = self.ranks.first_does(lambda: text_statistics(read_samples(file)))
        return {"measures": measures, "samples": counts.samples}

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
        if (
            "implicit" in c.judge
            and c.judge_ref_path is None
            and _one(c.judge_model_path, self.start)
        ):
            c.judge_ref_path = NO_REFERENCE
            self.console.say(
                "judge implicit: the policy is still the starting model, so its reward over it is "
                "0 for every text; asked without a reference (the mean log-prob)"
            )
        c.judge_ref_path = c.judge_ref_path or str(self.start)
        return make_judge(c, self.folder / "requests.jsonl", self.ranks)


def _one(model: str, other: Path) -> bool:
    """Whether two folders hold the same weights."""
    if Path(model) == other:
        return True
    return weights_digest(Path(model)) == weights_digest(other) != ""


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
