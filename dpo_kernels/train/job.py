"""The main job: from a model and pairs to a trained model, its metrics, plot and a summary.

    load -> (embedded default: SFT) -> reference log-probs -> evaluate -> DPO -> evaluate -> save

The same job trains a user's model on a user's pairs, and without either the small model and data
set that ship with the package.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dpo_kernels as dk

from ..data import (
    DataError,
    LeftOut,
    TokenRow,
    TokenSequence,
    embedded,
)
from ..data.left_out import Problem
from .adapters import check_adapter, check_named, name_base
from .calibration import calibration
from .card import write_card
from .checkpoints import newest, of_the_disk, reason
from .config import DPOTrainConfig, UserError, load_config
from .console import Console
from .ending import (
    draw,
    last_fields,
    loss_title,
    plain_torch_times,
    report,
    write_summary,
)
from .evaluation import evaluate
from .fit import check_fits
from .groups import Groups, group_summary, learned_groups
from .identity import identity
from .loop import TrainResult, train
from .machine import peak_memory
from .metrics import MetricsFile
from .model import Policy, load_policy, over_ranks, save_policy
from .optim import TrainingError, check_schedule
from .ranks import ALONE, Ranks, agreed
from .ranks_start import agree, check_ranks, go_on, joined, meshes
from .reference import PairData, Referee
from .resume import Keeper, Resumed, check_room, metrics_of, references, resumed_from
from .run_options import GROUPS
from .run_rows import RunRows
from .sft import SupervisedRows, fine_tune
from .shown import (
    completions,
    prompt_text,
    prompts_of,
    samples,
    write_report,
    write_surprising,
)
from .sinks import Run, Sinks, check_sinks
from .small_model import embedded_layers, small_model, teach
from .start import RunFolder, check_device, find_model, quiet_bars


def run_job(
    options: Mapping[str, Any], console: Console, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Run the job that `options` (names of `DPOTrainConfig`) describe; returns its summary.

    `ranks`: those of a longer run that this one is a part of, which has joined them already.

    Raises `UserError`, `DataError` (both say what to change) or `TrainingError`.
    """
    if ranks is not None:
        return _run_on(replace(ranks), options, console)
    with joined(options, console) as found:
        return _run_on(found, options, console)


def _run_on(ranks: Ranks, options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    with ranks.together():
        config, own = resolve(options)
        check_options(config, own, ranks)
    meshes(config, ranks)
    return started(Job, config, own, console, ranks).run()


def check_options(config: DPOTrainConfig, own: bool, ranks: Ranks = ALONE) -> None:
    """`UserError` for what can be told before anything is loaded, of a run and of a dry one."""
    check_device(config.device)
    check_schedule(config)
    check_adapter(config, own)
    check_ranks(config, ranks, own)
    check_sinks(config.report_to)


def foreseen(kind: type[Job], config: DPOTrainConfig, own: bool, console: Console) -> Job:
    """The job that a dry run looks at, where it would begin or go on."""
    quiet_bars(console)
    resumed = resumed_from(config, dk.__version__, console.say)
    if resumed is not None:
        console.say(f"the run goes on at step {resumed.step}: {resumed.path}")
    run_folder = RunFolder(config, resumed.path if resumed else None)
    return kind(config, own, run_folder, console, resumed)


def started(
    kind: type[Job], config: DPOTrainConfig, own: bool, console: Console, ranks: Ranks
) -> Job:
    """The job that begins, or goes on where it was told to; its folder is the first rank's."""
    quiet_bars(console)
    go_on(config, ranks)

    def begin() -> tuple[Resumed | None, RunFolder]:
        resumed = resumed_from(config, dk.__version__, console.say)
        return resumed, RunFolder(config, resumed.path if resumed else None)

    resumed, run_folder = ranks.first_does(begin)
    run_folder.follows = not ranks.first
    config.output_dir = str(run_folder.path)
    return kind(config, own, run_folder, console, resumed, ranks)


def resolve(options: Mapping[str, Any]) -> tuple[DPOTrainConfig, bool]:
    """(the configuration that `options` give, whether model and data are the user's own)."""
    own = any(options.get(k) for k in ("model_name_or_path", "dataset_name", "train_file"))
    recipe = {} if own else embedded_layers()[0]
    wanted = options.get("loss_type")
    apart = dk.losses.of_no_pairs(wanted) if isinstance(wanted, str | list) else []
    if apart and not own:
        raise UserError(
            f"loss_type {apart[0]!r} is not a loss of pairs, and the embedded data are pairs: pass "
            "a model and data of your own (--model_name_or_path, --dataset_name)"
        )
    if options.get("num_train_epochs") is not None:
        recipe.pop("max_steps", None)  # else the recipe's steps would win over the user's epochs
    config = load_config(recipe, options)
    if own and config.dataset_name is None:
        raise UserError("dataset_name is missing: pass a JSONL file of pairs (--dataset_name FILE)")
    if own and config.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: pass a model's name or folder")
    if own and config.sft_steps and config.sft_file is None:
        raise UserError(
            "sft_steps is of the embedded default: your own model is not fine-tuned, unless "
            "sft_file gives it conversations"
        )
    for option in ("sft_file", "ref_model_name_or_path", "ref_adapter_name"):
        if not own and getattr(config, option) is not None:
            raise UserError(f"{option} goes with a model and pairs of your own (the default's fit)")
    return config, own


class _Begun(NamedTuple):
    """What a run begins with."""

    policy: Policy
    pairs: Sequence[Any]
    held_out: Sequence[Any]
    identity: dict[str, Any]
    conversations: list[TokenSequence]  # of sft_file


class Job:
    """One run, its folder and what was left out of its data."""

    groups = GROUPS  # of the options that it has
    command = "train"

    def __init__(
        self,
        config: DPOTrainConfig,
        own: bool,
        run_folder: RunFolder,
        console: Console,
        resumed: Resumed | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.resumed, self.ranks = resumed, ranks
        self.sinks: Sinks | None = None
        self.config, self.own, self.console = config, own, console
        self.run_folder, self.folder = run_folder, run_folder.path
        self.policy: Policy | None = None
        self.saved = False
        self.left_out = LeftOut(config.strict, console.say)
        self.rows = RunRows(config, self.left_out, console, self._note_left_out, ranks)

    def run(self) -> dict[str, Any]:
        """Run; whatever ends it early keeps the weights, or leaves nothing if there are none."""
        try:
            return self._run()
        except Exception as error:
            self._keep(error)
            if of_the_disk(error) and not isinstance(error, UserError | DataError | TrainingError):
                raise TrainingError(f"{self.folder}: {reason(error)}") from error
            raise
        except BaseException as error:
            self._keep(error)
            raise
        finally:
            if self.sinks is not None:
                self.sinks.close()

    def _keep(self, error: BaseException) -> None:
        """Save a policy that has been trained; take a folder back in which nothing was trained."""
        begun = self.console.begun & {"SFT", "training"}
        if self.policy is None or not begun:
            self.run_folder.drop()
            return
        if self.ranks.many and not getattr(error, "agreed", False):
            return  # the others are elsewhere: weights in shards cannot be put together
        what = "" if "training" in begun else " (SFT alone: training on pairs had not begun)"
        kept = f"its weights are in {self.folder / 'model'}{what}"
        if not self.saved:
            try:
                self._save(self.policy)
            except Exception as error:  # told beside the error that ended the run
                kept = f"its weights could not be saved: {reason(error)}"
        if not self.ranks.first:
            return
        _tell(f"the run did not end; {kept}")
        last = newest(self.folder / "checkpoints")
        if last is not None:
            _tell(f"go on from {last.name} with: {self._command()}")

    def _command(self) -> str:
        """How this run is taken up again."""
        file = shlex.quote(str(self.folder / "config.yaml"))
        return f"dpo-kernels {self.command} --config {file} --resume_from_checkpoint true"

    def _run(self) -> dict[str, Any]:
        config, say = self.config, self.console.say
        began = time.perf_counter()
        torch.manual_seed(config.seed)
        begun = self._begin()
        policy, train_pairs, eval_pairs = begun.policy, begun.pairs, begun.held_out
        self.policy = policy
        backend = dk.backends.choose(config.backend, policy.device, policy.model.dtype)
        counts = f"{len(train_pairs)} {config.noun} to train on, {len(eval_pairs)} held out"
        say(f"backend {backend}; {counts}")
        referee = Referee(policy, config, self.console, self.own)
        data, held_out = references(referee, train_pairs, eval_pairs, self.folder, self.resumed)
        if config.sft_eval_file is not None and held_out is not None:
            kept_out = self.rows.read_conversations(policy, config.sft_eval_file)
            held_out = replace(held_out, conversations=kept_out)
        groups = learned_groups(config, policy.device, train_pairs, say)
        decode = policy.tokenizer.decode
        shown = prompt_text(self.rows.texts, decode)
        some = eval_pairs or train_pairs[:64]
        prompts = prompts_of(policy, config.sample_prompt, some, shown)
        metrics = metrics_of(self.folder, self.resumed, self.ranks)
        margins: list[float] = []

        def evaluated(when: str, step: int, groups: Groups | None = None) -> dict[str, Any]:
            """The numbers of the held-out pairs, whose `margins` are the latest."""
            margins.clear()
            if held_out is None:
                return {}
            found = evaluate(policy, held_out, config, self.console, when, groups, margins)
            epoch = metrics.rows[-1]["epoch"] if metrics.rows else 0.0
            metrics.write({"step": step, "epoch": epoch, **found})
            return found

        def texts() -> list[str]:
            return completions(policy, prompts, config.sample_max_new_tokens)

        def look() -> dict[str, Any]:
            return {"before": evaluated("before training", 0), "texts_before": texts()}

        found = self._found(metrics, look)
        before, texts_before = found["before"], found.get("texts_before", [])
        if config.max_steps == 0:  # to evaluate only
            result, after, texts_after = TrainResult(0, 0.0, 0.0, 0.0), before, texts_before
        else:
            result = self._trained(begun, data, held_out, metrics, found, groups)
            after = evaluated("after training", result.steps, groups)
            texts_after = texts()
        sampled = samples(prompts, texts_before, texts_after)
        if self.ranks.first:
            write_surprising(self.folder, margins, eval_pairs, self.rows.texts, decode)
            draw(metrics, self.folder, loss_title(config), say)
        peak = peak_memory(policy.device)
        timing = plain_torch_times(policy, data, config, self.own)
        summary = {
            "output_dir": str(self.folder),
            "backend": backend,
            "loss": loss_title(config),
            "steps": result.steps,
            "skipped_steps": result.skipped_steps,
            "pairs": len(train_pairs),
            "held_out_pairs": len(eval_pairs),
            "step0_loss": result.step0_loss,
            "step0_expected": result.step0_expected,
            "before": before,
            "after": after,
            "calibration": calibration(margins),
            **({"groups": group_summary(groups, train_pairs)} if groups is not None else {}),
            "sample": sampled[0] if sampled else {"prompt": "", "before": "", "after": ""},
            "samples": sampled,
            "median_step_time": result.median_step_time,
            "peak_memory_bytes": peak,
            **timing,
            **last_fields(self.left_out, began),
        }
        if not self.ranks.first:
            return summary
        write_summary(self.folder, summary)
        if self.saved:
            write_card(self.folder / "model", config, summary, loss_title(config))
        write_report(self.folder, say)
        report(summary, result, self.left_out, say)
        return summary

    def _begin(self) -> _Begun:
        """Model and rows; sft_file, or the embedded conversations, teach the model first."""
        with contextlib.nullcontext() if self.own else embedded.folder() as source:
            with self.ranks.together():
                policy, pairs, held_out = self._loaded(source)
                conversations = self.rows.conversations(policy)
                identity = self._identity(policy, pairs, held_out)
            self._open_folder(policy)
            self._over_ranks(policy, pairs, identity)
            if self.resumed is None:
                self.policy = policy
                given = (self.config, self.folder, self.console)
                if source is None:
                    fine_tune(policy, conversations, *given)
                else:
                    teach(policy, source, len(pairs), self.left_out, *given)
        return _Begun(policy, pairs, held_out, identity, conversations)

    def _loaded(self, source: Path | None) -> tuple[Policy, Sequence[Any], Sequence[Any]]:
        """Model, training and held-out rows: the user's own, or the embedded ones in `source`."""
        if source is None:
            policy = self._users_model()
        else:
            policy = small_model(source, self.config, self.console.say)
        pairs, held_out = self.rows.pairs(policy, source)
        if self.config.max_steps == 0 and not held_out:
            raise UserError(
                "max_steps 0 evaluates only, and no pair is held out: pass eval_file or "
                "eval_fraction"
            )
        return policy, pairs, held_out

    def _found(self, metrics: MetricsFile, look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `look` finds before training, and the run's id; a resumed run has found it."""
        if self.resumed is not None:
            found = self.resumed.values["found"]
        else:
            found = {"run_id": uuid.uuid4().hex[:16]}
        self._report_to(metrics, found["run_id"])
        return found if self.resumed is not None else {**look(), **found}

    def _trained(
        self,
        begun: _Begun,
        data: PairData,
        held_out: PairData | None,
        metrics: MetricsFile,
        found: dict[str, Any],
        groups: Groups | None,
    ) -> TrainResult:
        policy, config = begun.policy, self.config
        keeper = self._keeper(begun.identity, found)
        rows = begun.conversations
        beside = SupervisedRows(policy, rows, config) if config.sft_rows else None
        result = train(
            policy, data, held_out, config, metrics, self.console, keeper, groups, beside
        )
        self._save(policy)  # before anything that could still fail
        return result

    def _keeper(self, identity: dict[str, Any], found: dict[str, Any]) -> Keeper:
        values = {"version": dk.__version__, "identity": identity, "found": found}
        return Keeper.of(self.folder, self.config, values, self.resumed, self.ranks)

    def _save(self, policy: Policy) -> None:
        with self.console.held():
            save_policy(policy, self.folder / "model")
        self.saved = True

    def _identity(
        self,
        policy: Policy,
        pairs: Sequence[TokenRow | TokenSequence],
        held_out: Sequence[TokenRow | TokenSequence],
    ) -> dict[str, Any]:
        """What the run's checkpoints belong to; one that is resumed must belong to the same."""
        now = identity(self.config, policy.model, policy.tokenizer, pairs, held_out)
        if self.resumed is not None:
            self.resumed.check(now)
        return now

    def _refuse(self, policy: Policy, pairs: Sequence[Any], held_out: Sequence[Any]) -> None:
        """What a dry run has left to look at before its numbers: checkpoint, disk."""
        if self.resumed is not None:
            self._identity(policy, pairs, held_out)
        if self.config.save_steps:
            check_room(policy, self.config, self.folder, self.console.say)

    def _open_folder(self, policy: Policy) -> None:
        self.ranks.first_does(lambda: self._make_folder(policy))
        if self.ranks.many:
            self.ranks.watch.begin()

    def _make_folder(self, policy: Policy) -> None:
        if self.config.save_steps:
            check_room(policy, self.config, self.folder, self.console.say)
        self.run_folder.open(self.console.say)
        self.config.save(self.folder / "config.yaml", self.groups)
        every = self.folder / "left_out.jsonl"
        self.left_out.write(every)
        if len(self.left_out.problems) > len(self.left_out.shown()):
            self.console.say(f"every row that is left out is in {every}")
        for remark in self.left_out.remarks():
            self.console.say(f"data: {remark}")

    def _over_ranks(self, policy: Policy, rows: Sequence[Any], identity: dict[str, Any]) -> None:
        """Of many processes: the policy is spread over them, checked on the first rows before."""
        if not self.ranks.many:
            return
        agree(self.ranks, self.config, identity)
        first = list(rows[: self.config.per_device_train_batch_size])
        with self.ranks.together():
            if not isinstance(first[0], TokenSequence):
                policy.batch([r for r in first if len(r.sequences) == len(first[0].sequences)])
        try:
            over_ranks(policy, self.config, self.ranks)
        except UserError as error:  # of the model, which all have
            raise agreed(error) from None

    def _report_to(self, metrics: MetricsFile, run_id: str) -> None:
        """New lines of metrics go to the services of `report_to` as well."""
        if not self.ranks.first:
            return
        step = self.resumed.step if self.resumed is not None else 0
        self.sinks = Sinks(Run(self.folder, self.config, run_id, step), self.console.say)
        metrics.beside = self.sinks.write

    def _note_left_out(self, problem: Problem) -> None:
        """A row that is left out while training goes on."""
        if self.run_folder.opened:
            with (self.folder / "left_out.jsonl").open("a", encoding="utf-8") as file:
                file.write(problem.as_json())

    def _users_model(self) -> Policy:
        name = str(self.config.model_name_or_path)
        reference = self.config.ref_model_name_or_path
        if reference is not None:
            find_model(reference, "ref_model_name_or_path")  # before the data is read
        found = find_model(name)
        if self.config.ref_adapter_name is not None:
            check_named(found, self.config.ref_adapter_name)
        check_fits(found, self.config)
        policy = load_policy(replace(self.config, model_name_or_path=found), self.console.say)
        if self.config.use_peft:
            name_base(policy.model, name)
        return policy


def _tell(text: str) -> None:
    print(f"dpo-kernels: {text}", file=sys.stderr)
