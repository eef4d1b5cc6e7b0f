"""Options of the commands: from one dataclass, a configuration file below them, TRL's names."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import refused, run
from test_data import write

import dpo_kernels as dk
from dpo_kernels.commands import bench_command, train_command
from dpo_kernels.commands.options_of import given
from dpo_kernels.loss_options import DEFAULTS
from dpo_kernels.train import trl_options
from dpo_kernels.train.config import ALIASES, DPOTrainConfig, load_config
from dpo_kernels.train.config_files import read_config_file, yaml_text
from dpo_kernels.train.run_options import GROUPS

Capture = pytest.CaptureFixture[str]


def parsed(*argv: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `dpo-kernels train` is given."""
    found: list[dict[str, Any]] = []

    def take(args: argparse.Namespace) -> int:
        found.append(given(args))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(train_command, "run", take)
        assert run("train", *argv) == 0
    return found[0]


# --- one dataclass ---

# Tensors that come with the pairs, and what the loop itself sets.
WITH_A_BATCH = (
    "offset",
    "weights",
    "beta_dpo_state",
    "reduction",
    "num_pairs",
    "num_chosen_tokens",
)


def test_the_loss_options_are_those_of_the_losses() -> None:
    """Every option that is a number, a text or a switch; names, defaults and help of the table."""
    config = DPOTrainConfig()
    fields = {f.name: f for f in dataclasses.fields(DPOTrainConfig)}
    for name, default in DEFAULTS.items():
        if name in WITH_A_BATCH:
            assert name not in fields
        else:
            text = dk.losses.OPTIONS[name].partition(";")[0]
            assert fields[name].metadata["help"].startswith(text)
            expected = None if name in dk.losses.OWN else default
            assert getattr(config, name) == ([expected] if name == "loss_type" else expected)
    assert config.loss_options()["beta"] == DEFAULTS["beta"]
    assert set(config.loss_options()) <= set(DEFAULTS)


def test_every_field_is_in_one_group_and_has_help() -> None:
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(DPOTrainConfig))
    assert all(f.metadata["help"] for f in dataclasses.fields(DPOTrainConfig))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--loss_type", "sigmoid", "sft", "--loss_weights", "0.8", "1", "--beta", "0.3"],
        ["--bf16"],
        ["--bf16", "false", "--strict", "T"],
        ["--gradient-checkpointing", "yes", "--learning-rate", "1e-5"],
        ["--max-length=512", "--warmup_steps=0.1", "--dataset_name", "a.jsonl"],
        ["--dtype", "bfloat16", "--eval_steps", "5", "--ld_alpha", "0.5"],
    ],
    ids=str,
)
def test_the_parser_agrees_with_hf_argument_parser(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same dataclass, transformers' own parser makes the same configuration."""
    transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")
    (theirs,) = transformers.HfArgumentParser(DPOTrainConfig).parse_args_into_dataclasses(
        argv, look_for_args_file=False
    )
    assert load_config(parsed(*argv, monkeypatch=monkeypatch)) == theirs


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("--no_bf16", "--no-bf16", "--bf16=false", "--bf16=0"):
        assert parsed("--bf16", option, monkeypatch=monkeypatch) == {"bf16": False}
    assert parsed("--max_length", "none", monkeypatch=monkeypatch) == {"max_length": None}


# --- a file below the options ---


def test_configuration_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning-rate: 1e-5\nloss_weights: [1e0, 2]\nbeta: 0.2\nreport_to: none\n")
    for first in ([file], ["--config", file], [f"--config={file}"], ["--bf16", "--config", file]):
        found = parsed(*map(str, first), "--beta", "0.4", monkeypatch=monkeypatch)
        bf16 = {"bf16": True} if "--bf16" in first else {}
        assert found == {
            "learning_rate": 1e-5,
            "loss_weights": [1.0, 2],
            "beta": 0.4,
            "report_to": "none",
            **bf16,
        }
    (tmp_path / "c.json").write_text('{"beta": 3}')
    assert parsed(str(tmp_path / "c.json"), monkeypatch=monkeypatch) == {"beta": 3}
    (tmp_path / "empty.yml").write_text("# nothing\n")
    assert parsed(str(tmp_path / "empty.yml"), monkeypatch=monkeypatch) == {}


def test_mistakes_in_files(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lerning_rate: 1\n")
    assert "did you mean 'learning_rate'" in refused(capsys, "train", file)
    assert "one configuration file" in refused(capsys, "train", file, "--config", file)
    assert "does not exist" in refused(capsys, "train", "none.yaml")
    assert "expected one argument" in refused(capsys, "train", "--config")
    file.write_text("1: 2\n")
    assert "an option's name must be a text, got 1" in refused(capsys, "train", file)
    file.write_text("a: [\n")
    assert "cannot be read" in refused(capsys, "train", file)
    file.write_text("- a\n")
    assert "must hold a mapping" in refused(capsys, "train", file)
    assert "did you mean '--warmup_ratio'" in refused(capsys, "train", "--warmup_rato", "1")


def test_files_of_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Their options come first as arguments, so that the command line wins."""
    found: list[argparse.Namespace] = []
    monkeypatch.setattr(bench_command, "run", lambda args: found.append(args) or 0)
    file = tmp_path / "c.yaml"
    file.write_text("set: memory\ncase: abc\njson: null\n")
    assert run("bench", file, "--case", "x") == 0
    assert (found[0].set, found[0].case, found[0].json) == ("memory", "x", None)
    file.write_text("caze: abc\n")
    assert "c.yaml: unknown option 'caze'; did you mean 'case'?" in refused(capsys, "bench", file)
    file.write_text("set: nonsense\n")
    assert "invalid choice: 'nonsense'" in refused(capsys, "bench", file)
    # A JSON file is the data of `data check`; a YAML file before it its options.
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = write(tmp_path / "rows.json", [row])
    file.write_text(f"left_out: {tmp_path / 'out.jsonl'}\n")
    assert run("data", "check", file, data) == 0 and (tmp_path / "out.jsonl").exists()
    file.write_text("json: true\n")
    capsys.readouterr()
    assert run("doctor", file) == 0 and capsys.readouterr().out.startswith("{")
    file.write_text("json: 3\n")
    assert "json must be true or false, got 3" in refused(capsys, "doctor", file)


def test_a_printed_configuration_is_the_same_again(tmp_path: Path, capsys: Capture) -> None:
    options = ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5", "--beta", "1e-3"]
    options += ["--model_name_or_path", "m", "--dataset_name", "d: #x", "--ld_alpha", "none"]
    assert run("train", *options, "--warmup_ratio", "0.1", "--print_config") == 0
    text = capsys.readouterr().out
    file = tmp_path / "c.yaml"
    file.write_text(text)
    config = load_config(read_config_file(file))
    assert yaml_text(config) == text and config.dataset_name == "d: #x"
    assert (config.beta, config.warmup_steps, config.loss_type) == (1e-3, 0.1, ["sigmoid", "sft"])
    assert set(yaml.safe_load(text)) == {f.name for f in dataclasses.fields(DPOTrainConfig)}
    assert run("train", file, "--print-config") == 0 and capsys.readouterr().out == text


# --- names ---


def test_every_name_of_trl_is_known() -> None:
    """Taken, translated or refused with a reason: none is an unknown option."""
    trl = pytest.importorskip("trl", reason="TRL is not here")
    known = {*trl_options.NAMES, *ALIASES, *DPOTrainConfig.__dataclass_fields__}
    for kind in (trl.DPOConfig, trl.ModelConfig, trl.ScriptArguments, trl.SFTConfig):
        assert {f.name for f in dataclasses.fields(kind)} <= known, kind


# --- light ---


def test_version_and_help_are_light() -> None:
    code = "import sys; from dpo_kernels.cli import main\n"
    code += "try: main({})\nexcept SystemExit: pass\n"
    code += "assert not {{'torch', 'transformers', 'yaml'}} & set(sys.modules)\n"
    for argv in (["--version"], ["--help"], ["train", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", code.format(argv)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_version_is_quick() -> None:
    """Processor time: the machine may be busy with something else."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-m", "dpo_kernels", "--version"], capture_output=True)
    assert spent() - before < 0.3
