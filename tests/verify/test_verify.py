"""`dpo-kernels verify`: what is right passes, each mistake is found by the check made for it."""

import json
from dataclasses import replace

import pytest
import torch

from dpo_kernels.cli import main
from dpo_kernels.verify import (
    CHECKS,
    Case,
    NotApplicable,
    Trained,
    as_json,
    as_text,
    named,
    plain_trainer,
    verify,
)
from dpo_kernels.verify.contract import EOS

TWO = {"two processes", "evaluation rows", "FSDP2", "FSDP2, head apart"}  # processes
BY_NAME = {check.name: check for check in CHECKS}


class Right:
    """Plain gradient descent, with a place for one mistake."""

    name, versions = "stub", "0"

    def rows(self, case: Case):
        return case.rows

    def options(self, case: Case):
        return case.options

    def micro_batches(self, rows, options):
        """(rows, share of the step's loss) of each."""
        return [(rows, 1.0)]

    def train(self, case: Case) -> Trained:
        if case.processes > 1 or case.layout != "padded" or "save_steps" in case.options:
            raise NotApplicable("a stub")
        options, rows = self.options(case), self.rows(case)
        model, tokenizer = plain_trainer.load(case.model)
        reference, _ = plain_trainer.load(case.model)
        size = options["per_device_train_batch_size"]
        size *= options.get("gradient_accumulation_steps", 1)
        for step in range(options["max_steps"]):
            start = step * size % len(rows)
            total: dict[str, torch.Tensor] = {}
            for part, share in self.micro_batches(rows[start : start + size], options):
                found = plain_trainer.gradient(
                    model, reference, replace(case, rows=part, options=options), tokenizer
                )
                for name, g in found.items():
                    total[name] = total.get(name, 0) + share * g
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p -= options["learning_rate"] * total[name]
        return Trained({name: p.detach().float() for name, p in model.named_parameters()})


class MeanOfMeans(Right):
    def micro_batches(self, rows, options):
        size = options["per_device_train_batch_size"]
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [(part, 1 / len(parts)) for part in parts]


class SumOverAccumulation(Right):
    """The last, shorter step is divided by the micro-batches that a full one has."""

    def micro_batches(self, rows, options):
        size = options["per_device_train_batch_size"]
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [(part, 1 / options.get("gradient_accumulation_steps", 1)) for part in parts]


class TwoEnds(Right):
    def rows(self, case):
        return tuple({**row, "chosen": row["chosen"] + f" {EOS}"} for row in case.rows)


class NeverCut(Right):
    def options(self, case):
        return {**case.options, "max_length": None}


class OtherBeta(Right):
    def options(self, case):
        return {**case.options, "beta": 1.02 * case.options["beta"]}


SINGLE = ("update", "accumulation", "unequal batches", "short last step", "truncation", "EOS")


def failed(target) -> set[str]:
    found = verify([target], [BY_NAME[name] for name in SINGLE])["stub"]
    return {name for name, outcome in found.items() if outcome.status != "pass"}


def test_what_is_right_passes():
    assert failed(Right()) == set()


@pytest.mark.parametrize(
    ("mistake", "checks"),
    [
        (MeanOfMeans, {"unequal batches"}),
        (SumOverAccumulation, {"unequal batches", "short last step"}),
        (TwoEnds, {"EOS"}),
        (NeverCut, {"truncation"}),
        (OtherBeta, {*SINGLE}),
    ],
)
def test_a_mistake_is_found(mistake, checks):
    assert checks <= failed(mistake()) <= {*checks, "EOS"}


def test_a_trainer_that_raises_fails_and_says_what():
    class Broken(Right):
        def train(self, case):
            raise RuntimeError("no luck")

    outcome = BY_NAME["update"](Broken())
    assert outcome.status == "fail" and "no luck" in outcome.detail


def test_a_reference_in_train_mode_is_found():
    class Noisy(Right):
        def train(self, case):
            model, tokenizer = plain_trainer.load(case.model)
            model.train()
            ids = torch.tensor([tokenizer(case.rows[0]["prompt"])["input_ids"]])
            with torch.no_grad():
                model(input_ids=ids)
            return Trained({})

    assert BY_NAME["reference mode"](Noisy()).status == "fail"


def test_the_table_and_the_file():
    found = verify([Right()], [BY_NAME["update"], BY_NAME["resume"]])
    text = as_text(found)
    assert text.splitlines()[:2] == ["        stub", "update  pass"]
    assert "n/a: stub, resume: a stub" in text
    assert as_json([Right()], found)["checks"]["stub"]["update"][0] == "pass"


def test_the_table_fits_its_terminal():
    class Long(Right):
        name = "a_package.with.a_module:and_an_object.with_a_name"

    class Other(Right):
        name = "another"

    found = verify([Long(), Other()], [BY_NAME["update"]])
    assert as_text(found, 60).splitlines()[:4] == [
        f"(1) {Long.name}",
        "(2) another",
        "        (1)   (2)",
        "update  pass  pass",
    ]
    assert Long.name in as_text(found, 100).splitlines()[0]


def test_what_a_trainer_raises_is_one_line():
    class Leaves(Right):
        def train(self, case):
            raise SystemExit("see\nbelow")

    class Declines(Right):
        def train(self, case):
            raise NotApplicable("not\nhere")

    assert BY_NAME["update"](Leaves()).status == "fail"
    assert BY_NAME["update"](Declines()).detail == "not here"


def test_transformers_trainer_passes():
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    checks = [check for check in CHECKS if check.name not in TWO]
    found = verify([named("trainer")], checks)["trainer"]
    assert {o.status for o in found.values()} == {"pass"}, found


def test_our_loop_passes_what_one_process_can_show():
    checks = [check for check in CHECKS if "FSDP2" not in check.name]
    found = verify([named("loop")], checks)["loop"]
    assert {name for name, o in found.items() if o.status == "fail"} == set(), found
    assert all(found[name].status == "pass" for name in SINGLE), found


def test_the_head_on_two_processes():
    outcome = BY_NAME["FSDP2, head apart"](named("loop"))
    assert outcome.status == "pass", outcome


def test_command_line(tmp_path, capsys, monkeypatch):
    file = tmp_path / "found.json"
    assert main(["verify", "loop", "--check", "truncation", "--json", str(file)]) == 0
    assert "truncation  pass" in capsys.readouterr().out
    assert json.loads(file.read_text())["checks"]["loop"]["truncation"][0] == "pass"
    assert main(["verify", "nothing"]) == 2
    assert "loop, trl" in capsys.readouterr().err
    assert main(["verify", "loop", "--check", "nothing"]) == 2
    assert main(["verify", "no_such_module:train"]) == 2
    (tmp_path / "raises_at_once.py").write_text("raise RuntimeError('two\\nlines')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["verify", "raises_at_once:train"]) == 2
    assert "RuntimeError: two lines" in capsys.readouterr().err
