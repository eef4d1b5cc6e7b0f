"""The command line: runs end to end, and mistakes that end with one clear line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_data import BAD, bot, byte_tokenizer, user, write
from test_train import one_thread, tiny_model  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.data import embedded
from dpo_kernels.train.metrics import read_metrics

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and a byte tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def chats(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [user(f"say {i}")],
            "chosen": [bot("yes " * (1 + i % 3))],
            "rejected": [bot("no")],
        }
        for i in range(n)
    ]


def run(*args: str) -> int:
    return main([str(a) for a in args])


def test_train(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad rows are left out and counted; the folder holds all that is promised."""
    rows = [
        *chats(12),
        *(row for row, _, _ in BAD[:3]),
        {"prompt": [user("long " * 40)], "chosen": [bot("a")], "rejected": [bot("b")]},
    ]
    file = write(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "run"
    code = run(
        "train",
        "--model-name-or-path",
        model,
        "--dataset_name",
        file,
        "--output-dir",
        out,
        "--max_steps=6",
        "--learning_rate",
        "5e-3",
        "--per-device-train-batch-size=4",
        "--max_length",
        "128",
        "--eval-fraction",
        "0.25",
        "--logging_steps",
        "2",
        "--eval_steps",
        "3",
        "--device",
        "cpu",
        "--sample_max_new_tokens",
        "5",
        "--compare_plain_torch",
    )
    text = capsys.readouterr().out
    assert code == 0, text
    assert f"{file}:13: line: invalid JSON" in text and text.count(f"{file}:16:") == 1
    assert "left out: 4 (2 broken JSON, 1 missing field, 1 prompt too long)" in text
    assert "step 0: loss 0.693147" in text and "plain torch" in text
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["pairs"], summary["held_out_pairs"], summary["steps"]) == (9, 3, 6)
    assert summary["before"]["eval_rewards/accuracies_ties_half"] == 0.5
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]
    assert summary["left_out"]["broken JSON"] == 2 and len(summary["left_out_rows"]) == 4
    metrics = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in metrics if "loss" in r] == [2, 4, 6]
    assert [r["step"] for r in metrics if "eval_loss" in r] == [0, 3, 6]
    assert (out / "training.png").read_bytes()[:4] == b"\x89PNG"
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["max_length"] == 128 and config["beta"] == 0.1
    trained = transformers.AutoModelForCausalLM.from_pretrained(out / "model")
    transformers.AutoTokenizer.from_pretrained(out / "model")
    start = transformers.AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(trained.lm_head.weight, start.lm_head.weight)


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line of an error, exit code 2."""
    try:
        code = run(*args)
    except SystemExit as error:  # argparse's own
        code = error.code
    error_text = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error_text, error_text
    return error_text.strip().splitlines()[-1]


def test_user_errors(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.jsonl", chats(4))
    bad = write(tmp_path / "bad.jsonl", [*chats(4), "{"])
    train = ("train", "--model_name_or_path", model, "--device", "cpu", "--output_dir")
    new = tmp_path / "new"
    cases = [
        ((*train, new, "--dataset_name", bad, "--strict"), "bad.jsonl:5: line: invalid JSON"),
        (
            (*train, new, "--dataset_name", "none.jsonl", "--overwrite_output_dir"),
            "none.jsonl does not exist",
        ),
        ((*train, tmp_path, "--dataset_name", good), "is not empty"),
        ((*train, new), "dataset_name is missing"),
        (("train", "--dataset_name", good), "model_name_or_path is missing"),
        ((*train, new, "--dataset_name", good, "--betta", "1"), "--betta"),
        ((*train, new, "--dataset_name", good, "--loss_type", "sigmodi"), "did you mean"),
        ((*train, new, "--dataset_name", good, "--config", "none.json"), "does not exist"),
        (
            (*train, new, "--dataset_name", good, "--max_length", "3", "--overwrite_output_dir"),
            "no pair fits max_length",
        ),
        (
            (*train, new, "--dataset_name", good, "--loss_type", "odpo", "--overwrite_output_dir"),
            "odpo needs a margin",
        ),
        (
            (
                "train",
                "--model_name_or_path",
                tmp_path / "x",
                "--dataset_name",
                good,
                "--output_dir",
                new,
                "--overwrite_output_dir",
            ),
            "cannot be loaded",
        ),
        (
            (
                "train",
                "--model_name_or_path",
                tmp_path / "x.gguf",
                "--dataset_name",
                good,
                "--output_dir",
                new,
                "--overwrite_output_dir",
            ),
            "x.gguf does not exist",
        ),
    ]
    for args, message in cases:
        assert message in refused(capsys, *args)


def test_chat_template(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversational data without a template says what to pass, and passing it works."""
    bare = tmp_path / "bare"
    tiny_model().save_pretrained(bare)
    byte_tokenizer(template=None).save_pretrained(bare)
    args = (
        "train",
        "--model_name_or_path",
        bare,
        "--dataset_name",
        write(tmp_path / "a.jsonl", chats(4)),
        "--output_dir",
        tmp_path / "run",
        "--device",
        "cpu",
        "--max_steps",
        "1",
        "--eval_fraction",
        "0",
        "--overwrite_output_dir",
    )
    assert "--chat_template FILE" in refused(capsys, *args)
    template = tmp_path / "template.jinja"
    template.write_text(byte_tokenizer().chat_template)
    assert run(*args, "--chat_template", template) == 0
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template == template.read_text()


def test_config_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line wins over the file; an unknown key names the nearest."""
    file = tmp_path / "c.json"
    options = {
        "model_name_or_path": model,
        "train_file": write(tmp_path / "a.jsonl", chats(6)),
        "loss_type": ["sigmoid", "sft"],
        "max_steps": 9,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
        "sample_max_new_tokens": 0,
    }
    file.write_text(json.dumps(options))
    assert run("train", "--config", file, "--max_steps", "1", "--ld_alpha", "none") == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["max_steps"], saved["loss_type"]) == (1, ["sigmoid", "sft"])
    file.write_text(json.dumps({**options, "learning_rat": 1}))
    assert "did you mean 'learning_rate'" in refused(capsys, "train", "--config", file)


def test_embedded_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without model and data: the embedded ones, cut short here (the recipe has its own test)."""
    recipe = {
        "sft": {"max_steps": 2, "learning_rate": 1e-3},
        "dpo": {"max_steps": 2},
        "sample": {"max_new_tokens": 4},
        "seed": 1,
    }
    monkeypatch.setattr(embedded, "recipe", lambda: recipe)
    assert run("train", "--output_dir", tmp_path / "run", "--device", "cpu") == 0
    text = capsys.readouterr().out
    for words in (
        "reward accuracy",
        "log-prob accuracy",
        "before: ",
        "after: ",
        "backend ",
        "in plain torch",
        "left out: nothing",
    ):
        assert words in text
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pairs"] >= 600 and summary["held_out_pairs"] >= 120
    assert summary["before"]["eval_rewards/accuracies_ties_half"] == 0.5
    assert (tmp_path / "run" / "sft_metrics.jsonl").is_file()


def test_data_check(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", [*chats(3), *(row for row, _, _ in BAD)])
    assert run("data", "check", file) == 1
    text = capsys.readouterr().out
    assert f"{file}:4: line: invalid JSON" in text and f"left out: {len(BAD)} (" in text
    assert "3 usable pairs (3 of 3 read are conversational)" in text
    good = write(tmp_path / "b.jsonl", chats(3))
    assert run("data", "check", good, "--model_name_or_path", model) == 0
    assert "tokens of a sequence: median" in capsys.readouterr().out
    assert run("data", "check", good, "--model_name_or_path", model, "--max_length", "9") == 1


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["self_test"]["passed"] and report["backends"]["torch"]["usable"]
    assert all(state["usable"] or state["reason"] for state in report["backends"].values())
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert "backends:" in text and "self-test" in text and report["python"] in text


def test_help_shows_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("train", "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("model:", "loss:", "--gradient_accumulation_steps", "(default: 0.1)"):
        assert words in text


def test_module_runs() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "dpo_kernels", "--version"], capture_output=True, text=True
    )
    assert out.returncode == 0 and out.stdout.startswith("dpo-kernels ")
