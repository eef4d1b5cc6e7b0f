"""The training loop: batches in an order fixed by the seed, one guarded optimizer step at a time.

An optimizer step is `gradient_accumulation_steps` batches. Its loss is the mean over all of its
pairs: each batch passes `num_pairs=` (and `num_chosen_tokens=` for SFT terms) of the whole step, so
that unequal batches do not weigh unequally, and batch losses are shares that add up.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.batches import padded_tokens
from ..models.attached import HeadOutput
from ..models.falling import FallingWatch
from .averages import Average
from .collectives import check_collectives
from .config import DPOTrainConfig
from .console import Console
from .evaluation import check_first_rows, check_step0, evaluate
from .groups import Groups
from .machine import compiled, peak_memory
from .metrics import EVAL_ONLY, MetricsFile
from .model import Policy
from .optim import Stepper, TrainingError
from .order import step_indices, steps_of, window_of
from .ranks import agreed
from .reference import LiveReference, PairData
from .resume import Keeper, fine_tuned_first
from .sft import SupervisedRows
from .state import Progress, TrainingState
from .step_batches import batches_of, begin, groups_of
from .step_loss import PairLoss, StepLoss, chosen_tokens, loss_of
from .step_parts import Parts, Table, add_signal, idle_pair, signal_of, tokens_of
from .whole_step import coupled, coupled_gradients


@dataclass(frozen=True)
class TrainResult:
    """What the loop did."""

    steps: int
    median_step_time: float  # seconds, the first step left out
    step0_loss: float
    step0_expected: float
    skipped_steps: int = 0


@dataclass
class Work:
    """What a step ran over, on all ranks."""

    tokens: int = 0  # real ones, prompts counted in each sequence
    computed: int = 0  # positions of the trunk's calls
    padded: int = 0  # positions of the same batches, each sequence padded to the longest
    signal: int | None = None  # that a rank was sent
    blame: Callable[[], str] = str  # which ranks' pairs have log-probs that are not finite


def _gradients(
    loss: StepLoss,
    data: PairData,
    indices: list[int],
    config: DPOTrainConfig,
    meter: Any,
    falling: FallingWatch,
    more: bool = False,
    signal: int | None = None,
) -> tuple[Tensor, Work]:
    """Accumulate the gradients of one optimizer step's pairs; the step's loss, and its work.

    `more`: gradients of other rows follow. `signal`: that this rank was sent.
    """
    policy, pairs = loss.policy, data.pairs
    beta = config.beta if data.reference else None
    num_chosen = chosen_tokens([pairs[i] for i in indices])
    parts = Parts.of(
        policy.ranks,
        indices,
        lambda i: tokens_of(pairs[i]),
        lambda mine: batches_of(mine, pairs, config, policy),
    )
    begin(loss, data, indices, config)
    groups = groups_of(parts.items, pairs, config, policy)
    work = Work(padded=sum(padded_tokens([pairs[i] for i in group]) for group in groups))

    def note(out: HeadOutput, names: list[str]) -> None:
        meter.add(out, beta)
        if beta is not None and out.rewards is not None and out.pair_logps is not None:
            falling.add(out.rewards, out.pair_logps, beta, names)

    total = torch.zeros((), device=policy.device)
    sources = [pairs[i].source for i in indices]
    table = None
    if coupled(config) and (parts.rounds > 1 or policy.ranks.many):
        assert isinstance(loss, PairLoss)
        out, work.tokens, work.computed = coupled_gradients(
            loss, data, indices, parts, num_chosen, more
        )
        note(out, sources)
        assert out.loss is not None
        total = out.loss
    else:
        step = {i: at for at, i in enumerate(indices)}
        if policy.ranks.many:
            table = loss.table(len(indices))
        for k, part in enumerate(parts):
            with policy.sharded.micro_batch(k == parts.rounds - 1 and not more):
                if part is None:
                    idle_pair(policy, pairs[indices[0]])
                    continue
                out, batch = loss(data, part, len(indices), num_chosen)
                assert out.loss is not None
                (out.loss * policy.sharded.scale).backward()
                total = total + out.loss.detach()
                if table is None:
                    note(out, batch.sources[: len(part)])
                else:
                    table.put_out([step[i] for i in part], out)
                work.tokens += batch.num_tokens
                work.computed += sum(call.input_ids.numel() for call in batch.calls)
                del out, batch  # the graph's last references: free it before the next forward
    if loss.groups is not None and policy.ranks.data_rank == 0:  # once, not once a rank
        loss.groups.penalty([pairs[i] for i in indices]).backward()
    if policy.ranks.many:
        total = _over_ranks(policy, total, work, table, signal, lambda out: note(out, sources))
    return total, work


def _over_ranks(
    policy: Policy,
    total: Tensor,
    work: Work,
    table: Table | None,
    signal: int | None,
    note: Callable[[HeadOutput], None],
) -> Tensor:
    """What each rank has found of a step becomes what all have; the step's loss."""
    known = table is None  # its loss is the whole step's on every rank already
    table = table or Table(policy.ranks, policy.device, 0, 0)
    for name in ("tokens", "computed", "padded"):
        table.add(name, float(getattr(work, name)))
    add_signal(table, signal)
    table.reduce()
    for name in ("tokens", "computed", "padded"):
        setattr(work, name, int(table.totals[name]))
    work.signal = signal_of(table)
    if known:
        return total
    note(table.out())
    work.blame = table.blame
    return table.loss


def train(
    policy: Policy,
    data: PairData,
    held_out: PairData | None,
    config: DPOTrainConfig,
    metrics: MetricsFile,
    console: Console,
    keeper: Keeper | None = None,
    groups: Groups | None = None,
    beside: SupervisedRows | None = None,
) -> TrainResult:
    """Train the policy in place, `beside` supervised rows of its own.

    Metrics are written every `logging_steps`, checkpoints as `keeper` has it.

    Raises `TrainingError` on a loss or gradient that is not finite, naming the pairs of the step,
    or if the policy is not the reference before the first step; `Interrupted` between two steps,
    behind a checkpoint of the last one.
    """
    keeper = keeper or Keeper(None, 0, {})
    return _Loop(policy, data, held_out, config, metrics, console, keeper, groups, beside).run()


class _Loop:
    """Steps, lines of metrics, evaluations and checkpoints, in this order."""

    def __init__(
        self,
        policy: Policy,
        data: PairData,
        held_out: PairData | None,
        config: DPOTrainConfig,
        metrics: MetricsFile,
        console: Console,
        keeper: Keeper,
        groups: Groups | None,
        beside: SupervisedRows | None,
    ) -> None:
        self.beside = beside
        self.added: dict[str, Any] = {}  # metrics of the rows beside the pairs
        self.policy, self.data, self.held_out = policy, data, held_out
        self.config, self.metrics, self.console = config, metrics, console
        self.keeper = keeper
        self.steps = steps_of(len(data.pairs), config)
        self.groups = groups
        self.stepper = Stepper(policy.model, config, self.steps, groups)
        self.loss = loss_of(policy, config, groups)
        self.progress = Progress(meter=self.loss.meter())
        self.average = Average(policy.model, config.ema_decay) if config.ema_decay else None
        modules: dict[str, Any] = {"loss": self.loss.function}
        if groups is not None:
            modules["groups"] = groups
        if self.average is not None:
            modules["average"] = self.average
        live = data.reference if isinstance(data.reference, LiveReference) else None
        if live is not None and (live.every or fine_tuned_first(config)):
            modules["reference"] = live.reference.model  # no start of the run gives it again
        self.state = TrainingState(policy.model, self.stepper, modules, self.progress)
        self.falling = FallingWatch(said=config.on_falling_logps == "ignore")
        self.between = True  # two steps: weights, optimizer and counters are of one step

    def run(self) -> TrainResult:
        progress, config = self.progress, self.config
        pairs = self.data.pairs
        plan = step_indices(len(pairs), config, self.steps, window_of(pairs))
        if self.keeper.resumed:
            self.keeper.resumed.restore(self.state)
            self.console.say(f"resumed at step {progress.step}: {self.keeper.resumed.path}")
        else:
            first = next(step_indices(len(pairs), config, self.steps, window_of(pairs)))[0]
            first = first[: config.per_device_train_batch_size]
            if config.check_first_step:
                check_first_rows(self.policy, [pairs[i] for i in first])
            progress.step0 = check_step0(self.policy, self.data, config, first, self.console.say)
            step0, expected = progress.step0
            if config.check_first_step:
                check_collectives(self.policy, [self.data.pairs[i] for i in first[:2]])
            self.console.say(f"step 0: loss {step0:.6f}, at zero log-ratios {expected:.6f}")
        rest = itertools.islice(plan, progress.step, None)
        left = self.steps - progress.step
        try:
            with compiled(self.policy.model, config), self.console.sharing(self.policy.ranks.many):
                for indices, epoch in self.console.progress(
                    rest, "training", left, "steps", lines=False
                ):
                    if self._patience_is_over():
                        break
                    self.between = False
                    self._step(indices, epoch)
                    self.between = True
        except KeyboardInterrupt:
            if self.between:
                with self.console.held():
                    self.keeper.save(self.state, len(self.metrics.rows), wait=True)
            raise
        if self.keeper.every:
            self.keeper.save(self.state, len(self.metrics.rows))
        self.keeper.finish()
        if self.average is not None:
            self.average.put_into_model()
        rest_times = sorted(progress.times[1:] or progress.times)
        median = rest_times[len(rest_times) // 2]
        return TrainResult(progress.step, median, *progress.step0, progress.skipped_steps)

    def _patience_is_over(self) -> bool:
        patience = self.config.early_stopping_patience
        if patience is None or self.progress.worse < patience:
            return False
        self.console.say(
            f"stopped at step {self.progress.step}: {patience} evaluations without an eval_loss "
            f"below {self.progress.best:.4f}"
        )
        return True

    def _step(self, indices: list[int], epoch: float) -> None:
        progress, config = self.progress, self.config
        began = time.perf_counter()
        step = progress.step + 1
        state = None if self.loss.function.state is None else self.loss.function.state.clone()
        meter = self.loss.meter()
        ranks, beside = self.policy.ranks, self.beside
        ranks.at("forward and backward", step)
        total, work = _gradients(
            self.loss,
            self.data,
            indices,
            config,
            meter,
            self.falling,
            beside is not None,
            self.console.signal,
        )
        self.console.agreed = work.signal
        if beside is not None:
            more, self.added = beside.gradients(step)
            total = total + more
        self.policy.sharded.meet(self.groups.parameters() if self.groups is not None else ())
        ranks.at("the optimizer", step)
        sources = [self.data.pairs[i].source for i in indices]
        may_skip = progress.skipped_steps < config.skip_nonfinite
        extra = self.stepper.step(total, f"step {step}", sources, may_skip, work.blame)
        skipped = extra.pop("skipped", None)
        if skipped is not None:
            progress.skipped_steps += 1
            self.console.say(f"warning: left out: {skipped}")
            if state is not None and self.loss.function.state is not None:
                self.loss.function.state.copy_(state)
        else:
            progress.meter.merge(meter)
            progress.logged_steps += 1
            if self.average is not None:
                self.average.follow(step)
            if self.data.reference:
                self.data.reference.after_step(self.policy, step)
        progress.times.append(time.perf_counter() - began)
        if self.stepper.warning:
            self.console.say(self.stepper.warning)
            self.stepper.warning = ""
        progress.step = step
        progress.tokens += work.tokens
        progress.logged_tokens += work.tokens
        progress.computed += work.computed
        progress.padded += work.padded
        self._after(step, epoch, extra)

    def _after(self, step: int, epoch: float, extra: dict[str, Any]) -> None:
        """Lines, evaluations and checkpoints that are due behind this step."""
        config = self.config
        if step % config.logging_steps == 0 or step == self.steps:
            self._log(epoch, extra)
            self._say_falling(step)
        if (
            self.held_out
            and config.eval_steps
            and step % config.eval_steps == 0
            and step < self.steps
        ):
            self._evaluate(epoch)
        if self.keeper.due(step):
            self.keeper.save(self.state, len(self.metrics.rows))

    def _say_falling(self, step: int) -> None:
        text = self.falling.look()
        if text and self.config.on_falling_logps == "stop":
            # Of all ranks' pairs, so all come here.
            raise agreed(TrainingError(f"step {step}: {text} (--on_falling_logps warn goes on)"))
        if text:
            self.console.say(f"warning: step {step}: {text}")

    def _evaluate(self, epoch: float) -> None:
        assert self.held_out is not None
        progress, quiet = self.progress, Console(quiet=True)
        found = evaluate(self.policy, self.held_out, self.config, quiet, "", self.groups)
        self.metrics.write({"step": progress.step, "epoch": epoch, **found})
        if progress.best is None or found["eval_loss"] < progress.best:
            progress.best, progress.worse = found["eval_loss"], 0
        else:
            progress.worse += 1

    def _log(self, epoch: float, extra: dict[str, Any]) -> None:
        progress, config = self.progress, self.config
        meter = progress.meter
        since = progress.step % config.logging_steps or config.logging_steps
        times = progress.times[-since:]  # a resumed run has the latest alone
        took = sum(times) * since / len(times)
        row: dict[str, Any] = {"step": progress.step, "epoch": epoch, **extra, **self.added}
        if config.skip_nonfinite:
            row["skipped_steps"] = progress.skipped_steps
        if not meter.pairs:  # all that was not finite
            self.metrics.write(row)
            return
        means = meter.result(progress.logged_steps)
        row = {k: v for k, v in means.items() if k not in EVAL_ONLY} | row
        row |= {
            **(self.groups.metrics() if self.groups is not None else {}),
            "num_tokens": progress.tokens,
            "step_time": took / since,
            "tokens_per_s": progress.logged_tokens / took,
            "pairs_per_s": meter.pairs / took,
            "padding_saved": 1 - progress.computed / progress.padded,
            "mem/peak": peak_memory(self.policy.device) / 2**30,
        }
        self.metrics.write(row)
        shown = [
            f"{name} {row[key]:.{digits}f}"
            for name, key, digits in (
                ("loss", "loss", 4),
                ("margin", "rewards/margins", 4),
                ("accuracy", "rewards/accuracies", 3),
            )
            if key in row
        ]
        self.console.postfix(**dict(text.split() for text in shown[:2]))
        told = ", ".join([*shown, f"{row['step_time']:.2f} s a step"])
        self.console.note(f"step {progress.step}/{self.steps}: {told}")
        progress.meter = self.loss.meter()
        progress.logged_steps = progress.logged_tokens = 0
        progress.computed = progress.padded = 0
