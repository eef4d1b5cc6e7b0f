"""The checks: each runs a trainer on cases made for one mistake, and holds it to plain torch.

Rows are such that the order in which a trainer visits them makes no difference: a step takes all of
them, or they are all equal.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.left_out import one_line
from . import plain_trainer
from .contract import EOS, Case, NotApplicable, Target, make_rows, save_model
from .processes import sharded_gradients

RATE = 0.05
TOLERANCE = 2e-3  # of an update, in fp32 over a few steps; the mistakes are above 2e-2


@dataclass(frozen=True)
class Outcome:
    status: str  # "pass", "fail", "n/a"
    detail: str = ""


@dataclass(frozen=True)
class Check:
    """One kind of mistake."""

    name: str
    about: str
    run: Callable[[Target, Path], Outcome]

    def __call__(self, target: Target) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return self.run(target, Path(folder))
            except NotApplicable as reason:
                return Outcome("n/a", one_line(str(reason), 400))
            except (Exception, SystemExit) as error:  # a script of the user's may leave
                lines = traceback.format_exception_only(error)
                return Outcome("fail", one_line(f"it raised {lines[-1].strip()}", 400))


def case_of(folder: Path, rows: Any, dropout: float = 0.0, **options: Any) -> Case:
    model = save_model(folder / "model", dropout=dropout)
    given = {"beta": 0.5, "learning_rate": RATE, "optim": "sgd", "max_steps": 1, **options}
    return Case(model, tuple(rows), str(folder / "run"), given)


def distance(before: dict[str, Tensor], got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of two updates, relative to the one that is wanted."""
    missing = wanted.keys() - got.keys()
    if missing:
        raise ValueError(f"weights are missing: {sorted(missing)[:3]}")
    error = sum(((got[n].double() - w) ** 2).sum() for n, w in wanted.items())
    size = sum(((w - before[n].double()) ** 2).sum() for n, w in wanted.items())
    return float((error / size) ** 0.5)


def judged(error: float, what: str, tolerance: float = TOLERANCE) -> Outcome:
    return Outcome("pass" if error < tolerance else "fail", f"{what} is off by {error:.1e}")


def update(target: Target, case: Case, what: str = "the update") -> Outcome:
    """One training run against as many steps of plain torch."""
    trained = target.train(case)
    model, reference, _ = plain_trainer.descend(case, case.options["max_steps"])
    return judged(distance(reference.state_dict(), trained.weights, model.state_dict()), what)


def plain(target: Target, folder: Path) -> Outcome:
    case = case_of(folder, make_rows(4), per_device_train_batch_size=4, max_steps=3)
    return update(target, case)


def accumulation(target: Target, folder: Path) -> Outcome:
    """Micro-batches of one pair: of different lengths, so a mean over tokens would show."""
    case = case_of(
        folder,
        make_rows(4),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=2,
    )
    return update(target, case)


def last_batch(target: Target, folder: Path) -> Outcome:
    """Five pairs as 2 + 2 + 1 in one step: the mean of the batches' means is not the mean."""
    case = case_of(
        folder,
        make_rows(5),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    return update(target, case, "the update of a step of 2 + 2 + 1 pairs")


def last_step(target: Target, folder: Path) -> Outcome:
    """Six equal pairs in steps of four: the second step has two, and the same mean."""
    case = case_of(
        folder,
        make_rows(1) * 6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        learning_rate=1e-3,  # one pair alone is soon learnt, and its gradient gone
    )
    return update(target, case, "the update of a step of 4 pairs and one of 2")


def truncation(target: Target, folder: Path) -> Outcome:
    rows = make_rows(4, shortest=6, longest=16)
    case = case_of(folder, rows, per_device_train_batch_size=4, max_length=12, max_steps=2)
    return update(target, case, "the update of sequences cut to 12 tokens")


def end_of_text(target: Target, folder: Path) -> Outcome:
    """Two of four chosen completions end with the EOS already: each is scored with one."""
    rows = [dict(row) for row in make_rows(4)]
    for row in rows[:2]:
        row["chosen"] += f" {EOS}"
    case = case_of(folder, rows, per_device_train_batch_size=4, max_steps=2)
    return update(target, case)


def packing(target: Target, folder: Path) -> Outcome:
    """Pairs in one row: they must not see each other, nor predict each other's first token."""
    case = case_of(folder, make_rows(6), per_device_train_batch_size=6, max_steps=2)
    return update(target, replace(case, layout="packed"), "the update of packed pairs")


def reference_mode(target: Target, folder: Path) -> Outcome:
    """With dropout in the model, the reference is scored without it."""
    case = case_of(
        folder, make_rows(4), dropout=0.5, per_device_train_batch_size=4, disable_dropout=False
    )
    seen: list[bool] = []

    def note(module: Any, _: Any) -> None:
        if not torch.is_grad_enabled() and type(module).__name__.endswith("Attention"):
            seen.append(module.training)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        target.train(case)
    finally:
        hook.remove()
    if not seen:
        return Outcome("n/a", "no forward of a reference was seen in this process")
    if any(seen):
        return Outcome("fail", f"{sum(seen)} of {len(seen)} forwards had dropout on")
    return Outcome("pass", f"{len(seen)} forwards, all in eval mode")


def cached_reference(target: Target, folder: Path) -> Outcome:
    """A cache of the reference filled without `ld_alpha` does not serve a run with it."""
    case = case_of(
        folder,
        make_rows(4),
        per_device_train_batch_size=4,
        max_steps=2,
        max_length=None,
        precompute_ref_log_probs=True,
    )
    target.train(case)
    again = replace(case, options={**case.options, "ld_alpha": 0.3}, folder=str(folder / "again"))
    return update(target, again, "the update with ld_alpha after a run without")


def resume(target: Target, folder: Path) -> Outcome:
    case = case_of(
        folder,
        make_rows(8),
        per_device_train_batch_size=2,
        optim="adamw_torch",
        learning_rate=1e-3,
        max_steps=4,
        save_steps=2,
    )
    whole = target.train(case)
    if 2 not in whole.checkpoints:
        return Outcome("fail", f"no checkpoint of step 2, only of {sorted(whole.checkpoints)}")
    again = target.train(
        replace(case, folder=str(folder / "again"), resume_from=whole.checkpoints[2])
    )
    before, _ = plain_trainer.load(case.model)
    error = distance(
        before.state_dict(), again.weights, {n: w.double() for n, w in whole.weights.items()}
    )
    return judged(error, "the weights after a resume in step 2 of 4", 1e-6)


def data_parallel(target: Target, folder: Path) -> Outcome:
    case = case_of(folder, make_rows(4), per_device_train_batch_size=2, max_steps=2)
    return update(target, replace(case, processes=2), "the update of two processes")


def evaluation_rows(target: Target, folder: Path) -> Outcome:
    """Three held-out pairs on two processes: a sampler repeats one, which counts once."""
    case = case_of(folder, make_rows(4), per_device_train_batch_size=2, max_steps=2)
    case = replace(case, processes=2, eval_rows=make_rows(3, seed=5))
    trained = target.train(case)
    name = "eval_rewards/margins"
    if name not in trained.evaluation:
        return Outcome("n/a", f"it reports no {name}")
    model, reference, tokenizer = plain_trainer.descend(case, 2)
    with torch.no_grad():
        found = plain_trainer.margins(model, reference, case.eval_rows, tokenizer, case.options)
    wanted = found.mean().item()
    error = abs(trained.evaluation[name] - wanted) / float(found.abs().mean())
    return judged(error, f"{name} of 3 pairs on 2 processes")


def fsdp2(sharding: str) -> Callable[[Target, Path], Outcome]:
    def check(target: Target, folder: Path) -> Outcome:
        case = case_of(folder, make_rows(4), per_device_train_batch_size=2)
        got = sharded_gradients(target, case, sharding)
        model, tokenizer = plain_trainer.load(case.model)
        reference, _ = plain_trainer.load(case.model)
        wanted = plain_trainer.gradient(model, reference, case, tokenizer)
        head = {n: g for n, g in wanted.items() if n == "lm_head.weight"}
        zero = {n: torch.zeros_like(g) for n, g in wanted.items()}
        error = distance(zero, got, wanted)
        of_head = distance(zero, got, head)
        return judged(
            max(error, of_head), f"the gradient (of the head by {of_head:.1e}) on 2 processes"
        )

    return check


CHECKS = (
    Check("update", "three steps of one batch", plain),
    Check("accumulation", "a step in four micro-batches", accumulation),
    Check("unequal batches", "a step of 2 + 2 + 1 pairs", last_batch),
    Check("short last step", "an epoch's last step has fewer pairs", last_step),
    Check("truncation", "sequences keep their start", truncation),
    Check("EOS", "one a completion", end_of_text),
    Check("packing", "pairs in one row", packing),
    Check("reference mode", "no dropout in the reference", reference_mode),
    Check("reference cache", "ld_alpha is not answered from another run's cache", cached_reference),
    Check("resume", "as if it had not been interrupted", resume),
    Check("two processes", "data parallel", data_parallel),
    Check("evaluation rows", "repeated rows count once", evaluation_rows),
    Check("FSDP2", "the head in the root unit", fsdp2("fsdp2")),
    Check("FSDP2, head apart", "the head as a unit of its own", fsdp2("fsdp2, head apart")),
)
