"""Checkpoints and resume: equal to the bit after kill -9, and what is refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import OPTIONS, arguments, outcome, prepare
from test_cli import chats
from test_data import byte_tokenizer, write
from test_early_ends import after_step
from test_train import one_thread, tiny_model  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.train import checkpoints, job
from dpo_kernels.train.config import UserError
from dpo_kernels.train.identity import differences

Capture = pytest.CaptureFixture[str]
transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")


def test_killed_at_three_moments(tmp_path: Path) -> None:
    """kill -9 in the reference pass, in a checkpoint, at random; `make check-full` has twenty."""
    script = Path(__file__).with_name("killed_runs.py")
    places = ["in the reference pass", "in a checkpoint"]
    call = [sys.executable, script, tmp_path, "--moments", "1", "--places", *places]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 runs killed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    folder: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The command that is printed goes on: equal to the run that was not stopped."""
    options = {"loss_type": "sigmoid", "save_steps": 100}
    assert main(arguments(folder, "straight", **options)) == 0
    after_step(5, monkeypatch, lambda: os.kill(os.getpid(), number))
    assert main(arguments(folder, "run", **options)) == code
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "go on from step-5 with: " in error and "Traceback" not in error
    command = shlex.split(error.split("go on from step-5 with: ")[1].splitlines()[0])
    assert command[0] == "dpo-kernels"
    assert main(command[1:]) == 0
    assert "resumed at step 5" in capsys.readouterr().out
    assert outcome(folder / "run") == outcome(folder / "straight")
    assert sorted(p.name for p in (folder / "run/checkpoints").glob("step-*")) == [
        "step-5",
        "step-9",
    ]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more(
    folder: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """One line with the reason, the last good checkpoint and the command; it does go on."""

    def full(part: Path, tensors: Any) -> None:
        if part.name == "step-6.tmp":
            (part / "__0_0.distcp").write_bytes(b"half")
            raise OSError(number, os.strerror(number))
        plain(part, tensors)

    plain = checkpoints.write_tensors
    monkeypatch.setattr(checkpoints, "write_tensors", full)
    assert main(arguments(folder, "run")) == 1
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written" in error and "Traceback" not in error
    assert "step-4" in error and "--resume_from_checkpoint true" in error
    assert ("full" if number == errno.ENOSPC else "only be read") in error
    assert main(arguments(folder, "run", resume_from_checkpoint="true")) == 0
    assert main(arguments(folder, "straight")) == 0
    assert outcome(folder / "run") == outcome(folder / "straight")


def test_a_full_disk_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The model cannot be saved: a line, no traceback, and the last checkpoint has all of it."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(job, "save_policy", full)
    assert main(arguments(folder, "run")) == 1
    error = capsys.readouterr().err
    assert "could not be saved: the disk is full" in error and "go on from step-9" in error


def test_no_room_is_said_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    usage = os.statvfs(folder)
    free = type("Usage", (), {"free": 200_000, "total": usage.f_blocks})()
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: free)
    assert main(arguments(folder, "run")) == 2
    assert "two checkpoints of" in capsys.readouterr().err
    assert not (folder / "run").exists()
    assert main(arguments(folder, "run", save_steps=0)) == 0
    assert not (folder / "run/checkpoints").exists()


@pytest.fixture
def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped behind its fifth step."""
    after_step(5, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(arguments(folder, "run")) == 143
    monkeypatch.undo()
    return folder


def refused(capsys: Capture, folder: Path, **options: Any) -> str:
    capsys.readouterr()
    assert main(arguments(folder, "run", **{"resume_from_checkpoint": "true", **options})) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_another_run_is_refused_by_name(stopped: Path, capsys: Capture) -> None:
    line = refused(capsys, stopped, learning_rate=1e-3, beta=0.2, max_steps=12)
    assert "learning_rate: 0.003 there, 0.001 here" in line and "beta: 0.1 there, 0.2" in line
    assert "max_steps: 9 there, 12 here (the schedule depends on it)" in line

    write(stopped / "others.jsonl", chats(17))
    line = refused(capsys, stopped, dataset_name=stopped / "others.jsonl")
    assert "training pairs: 14 there, 15 here" in line

    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    other.save_pretrained(stopped / "other")
    byte_tokenizer().save_pretrained(stopped / "other")
    line = refused(capsys, stopped, model_name_or_path=stopped / "other")
    assert "model: other weights" in line and "tokenizer" not in line

    tiny_model().save_pretrained(stopped / "words")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("bot", "model") + " "
    tokenizer.save_pretrained(stopped / "words")
    line = refused(capsys, stopped, model_name_or_path=stopped / "words")
    assert "tokenizer: another vocabulary" in line and "model:" not in line
    # nothing of it was lost
    assert main(arguments(stopped, "run", resume_from_checkpoint="true", report_steps=1)) == 2
    assert main(arguments(stopped, "run", resume_from_checkpoint="true")) == 0


def test_what_ended_a_run_may_be_mended(stopped: Path) -> None:
    """Memory that ran out, a step that was not finite: going on takes other options of those."""
    more = {"per_device_eval_batch_size": 1, "max_tokens_per_batch": 64, "skip_nonfinite": 2}
    assert main(arguments(stopped, "run", resume_from_checkpoint="true", **more)) == 0


def test_a_newer_release_is_refused(stopped: Path, capsys: Capture) -> None:
    file = stopped / "run/checkpoints/step-5/state.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "version": "99.0.0"}))
    assert "written by dpo-kernels 99.0.0" in refused(capsys, stopped)
    file.write_text(json.dumps({**values, "format": 2}))
    assert "(format 2), which is newer" in refused(capsys, stopped)
    file.write_text("{")
    assert "state.json cannot be read" in refused(capsys, stopped)
    file.write_text(json.dumps({k: v for k, v in values.items() if k != "progress"}))
    assert "state.json cannot be read: KeyError: 'progress'" in refused(capsys, stopped)
    for part in ({"identity": {}}, {"rng": {"python": [1], "numpy": []}}):
        file.write_text(json.dumps({**values, **part}))
        assert "state.json cannot be read" in refused(capsys, stopped)


def test_metrics_that_are_gone(stopped: Path, capsys: Capture) -> None:
    file = stopped / "run/metrics.jsonl"
    file.write_text("{")
    assert "metrics.jsonl cannot be read" in refused(capsys, stopped)
    file.unlink()
    assert "an empty file in its place" in refused(capsys, stopped)
    file.touch()
    assert main(arguments(stopped, "run", resume_from_checkpoint="true")) == 0
    assert json.loads(file.read_text().splitlines()[0])["step"] > 5


class Foreign:
    def __reduce__(self) -> Any:
        return os.system, ("touch was-run",)


def test_a_pickle_is_not_run(
    stopped: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stopped)
    (stopped / "run/checkpoints/step-5/.metadata").write_bytes(pickle.dumps(Foreign()))
    line = refused(capsys, stopped)
    assert "system; nothing of it was run" in line and not (stopped / "was-run").exists()


def test_torn_files_are_named(stopped: Path, capsys: Capture) -> None:
    data = stopped / "run/checkpoints/step-5/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:5000])
    assert "step-5 cannot be read" in refused(capsys, stopped)
    # an earlier one is still good
    earlier = stopped / "run/checkpoints/step-4"
    assert main(arguments(stopped, "run", resume_from_checkpoint=earlier)) == 0
    assert main(arguments(stopped, "straight")) == 0
    assert outcome(stopped / "run") == outcome(stopped / "straight")


def test_partial_folders_are_never_picked(stopped: Path, capsys: Capture) -> None:
    folder = stopped / "run/checkpoints"
    (folder / "step-8.tmp").mkdir()
    (folder / "step-7").mkdir()  # has neither index nor state
    assert checkpoints.newest(folder) == folder / "step-5"
    (folder / "latest").unlink()
    assert checkpoints.newest(folder) == folder / "step-5"
    line = refused(capsys, stopped, resume_from_checkpoint=folder / "step-8.tmp")
    assert "not written to its end" in line
    assert "holds no checkpoint" in refused(
        capsys, stopped, resume_from_checkpoint=folder / "step-7"
    )
    assert "does not exist" in refused(capsys, stopped, resume_from_checkpoint=folder / "step-9")


def test_into_another_folder_and_on_from_a_run_that_ended(folder: Path) -> None:
    """A constant rate has no end to depend on: more steps, beside the first run."""
    options = {"lr_scheduler_type": "constant", "loss_type": "sigmoid"}
    assert main(arguments(folder, "first", max_steps=4, **options)) == 0
    more = {**options, "max_steps": 7, "resume_from_checkpoint": folder / "first"}
    assert main(arguments(folder, "more", **more)) == 0
    assert main(arguments(folder, "straight", max_steps=7, **options)) == 0
    two, one = outcome(folder / "more"), outcome(folder / "straight")
    assert two["weights"] == one["weights"] and two["summary"] == one["summary"]
    assert (folder / "first/checkpoints/step-4").is_dir()
    assert (folder / "first/summary.json").is_file()


def test_true_without_a_checkpoint_starts(folder: Path, capsys: Capture) -> None:
    """A job that is queued again has one command for its first start and the rest."""
    assert main(arguments(folder, "run", resume_from_checkpoint="true", save_steps=0)) == 0
    assert "the run starts from its beginning" in capsys.readouterr().out
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("mine")
    assert main(arguments(folder, "mine", resume_from_checkpoint="true")) == 2
    args = [a for a in arguments(folder, "", resume_from_checkpoint="true") if "output" not in a]
    assert main(args) == 2
    assert "pass --output_dir" in capsys.readouterr().err


def test_only_the_newest_are_kept(folder: Path) -> None:
    assert OPTIONS["save_total_limit"] == 2
    assert main(arguments(folder, "run")) == 0
    found = {p.name for p in (folder / "run/checkpoints").iterdir()}
    assert found == {"step-8", "step-9", "latest", "reference.safetensors"}
    assert (folder / "run/checkpoints/latest").read_text() == "step-9\n"


def test_an_option_of_a_later_release_is_at_its_default() -> None:
    part = {"digest": "x", "count": 1, "name": "m"}
    parts = dict.fromkeys(("model", "tokenizer", "training pairs", "held-out pairs"), part)
    then = {"options": {"beta": 0.1}, **parts}
    now = {"options": {"beta": 0.1, "weight_decay": 0.0}, **parts}
    assert differences(then, now) == []
    assert differences(then, {**now, "options": {**now["options"], "weight_decay": 0.1}})


def test_find_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.find(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        checkpoints.find(tmp_path / "file")
