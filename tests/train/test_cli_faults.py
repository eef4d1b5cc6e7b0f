"""What a new user met on the command line, and how a run ends that does not end well."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import bot, byte_tokenizer, user, write
from test_train import one_thread, tiny_model  # noqa: F401 (a fixture)

from dpo_kernels.cli import main
from dpo_kernels.commands import data_command
from dpo_kernels.data import embedded
from dpo_kernels.train.config import load_config
from dpo_kernels.train.ending import loss_title
from dpo_kernels.train.metrics import read_metrics

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def train(model: str, tmp_path: Path) -> list[Any]:  # noqa: F811
    """Arguments of a short training of the tiny model into tmp_path/run."""
    file = write(tmp_path / "pairs.jsonl", chats(12))
    return [
        "train",
        "--model_name_or_path",
        model,
        "--dataset_name",
        file,
        "--device",
        "cpu",
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        "4",
        "--logging_steps",
        "1",
        "--per_device_train_batch_size",
        "4",
        "--sample_max_new_tokens",
        "0",
        "--max_length",
        "64",
        "--learning_rate",
        "1e-3",
    ]


def folder_of(args: list[Any]) -> Path:
    return Path(args[args.index("--output_dir") + 1])


# --- mistakes of one line ---


def test_wrong_steps(train: list[Any], capsys: Capture) -> None:
    line = refused(capsys, *train, "--max_steps", "-2")
    assert "max_steps must be at least 1, or -1" in line


def test_several_processes_are_refused(
    train: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process only" in refused(capsys, *train)
    assert not folder_of(train).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "mps", "meta", "tpu9"])
def test_a_device_that_is_not_here(train: list[Any], device: str, capsys: Capture) -> None:
    line = refused(capsys, *train, "--device", device)
    assert f"device: '{device}' cannot be used here" in line
    assert not folder_of(train).exists()


def test_unknown_options_name_the_nearest(train: list[Any], capsys: Capture) -> None:
    for option in ("--lerning_rate", "--lerning-rate=1"):
        line = refused(capsys, *train, option, "1e-4")
        assert "unknown option --lerning_rate; did you mean '--learning_rate'?" in line
    assert "did you mean '--left_out'" in refused(capsys, "data", "check", "x", "--leftout", "y")
    assert "unrecognized arguments: extra" in refused(capsys, *train, "extra")
    assert refused(capsys, "train", "--beta", "x").startswith("dpo-kernels: error: ")


def test_without_a_command(capsys: Capture) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert not said.out and "COMMAND" in said.err


def test_bench_names_what_was_not_found(capsys: Capture) -> None:
    line = refused(capsys, "bench", "--case", "nonsense")
    assert "set quick: no case has 'nonsense' in its name" in line and "''" not in line


def test_bench_names_a_provider_that_was_not_found(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from dpo_kernels.bench import cases

    case = cases.Case("pair loss", "-", "fp32", 0, 1.0, pairs=4)
    monkeypatch.setattr(cases, "quick", lambda device: [case])
    line = refused(capsys, "bench", "--provider", "zzz", "--case", "pair loss")
    assert "no provider of these cases has 'zzz'" in line


def test_unreachable_hub_is_asked_once(
    train: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import huggingface_hub.utils as hub

    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("no route to host")

    monkeypatch.setattr(hub, "get_session", Session)
    args = [*train, "--model_name_or_path", "nobody/no-such-model"]
    line = refused(capsys, *args)
    assert len(asked) == 1 and "cannot be loaded" in line and "no route to host" in line
    line = refused(capsys, "data", "check", args[4], "--model_name_or_path", "nobody/no-such-model")
    assert "no route to host" in line
    line = refused(capsys, *train, "--model_name_or_path", "./no/such/folder")
    assert "there is no such folder" in line and len(asked) == 2


def test_a_checkpoint_that_torch_refuses_to_unpickle(
    train: list[Any], tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "pickled"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").unlink()

    class Harm:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'harm'}",)

    torch.save({"lm_head.weight": Harm()}, folder / "pytorch_model.bin")
    line = refused(capsys, *train, "--model_name_or_path", folder)
    assert "the weights of" in line and "cannot be read" in line and len(line) < 300
    assert not (tmp_path / "harm").exists() and not folder_of(train).exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_cut_short(
    train: list[Any], tmp_path: Path, name: str, capsys: Capture
) -> None:
    folder = tmp_path / "cut"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(tiny_model().state_dict(), folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:5000])
    assert f"{folder} cannot be " in refused(capsys, *train, "--model_name_or_path", folder)


@pytest.mark.parametrize(("weight", "value"), [("lm_head", "nan"), ("model.embed_tokens", "inf")])
def test_weights_that_are_no_numbers(
    train: list[Any], tmp_path: Path, weight: str, value: str, capsys: Capture
) -> None:
    """As the policy and as the reference, before anything is written; also of a token unseen."""
    other = tiny_model()
    with torch.no_grad():
        other.get_submodule(weight).weight[200, 3] = float(value)
    other.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    for option in ("--model_name_or_path", "--ref_model_name_or_path"):
        line = refused(capsys, *train, option, tmp_path / "broken")
        assert f"has weights that are NaN or infinite: {weight}.weight" in line
    assert not (tmp_path / "run").exists()


def test_folders_that_are_no_models(train: list[Any], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(capsys, *train, "--model_name_or_path", tmp_path / "empty")
    assert "is no model's folder: it has neither config.json nor a tokenizer" in line
    tiny_model().save_pretrained(tmp_path / "mute")
    line = refused(capsys, *train, "--model_name_or_path", tmp_path / "mute")
    assert "has no tokenizer (tokenizer.json" in line
    assert "too long" in refused(capsys, *train, "--output_dir", "a" * 300)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "inf"),
        ("adam_beta2", "1"),
        ("adam_epsilon", "-1"),
        ("sft_weight", "nan"),
        ("sample_max_new_tokens", "-3"),
        ("num_train_epochs", "inf"),
        ("sft_steps", "-1"),
    ],
)
def test_numbers_that_make_no_sense(
    train: list[Any], name: str, value: str, capsys: Capture
) -> None:
    more = ["--max_steps", "-1"] if name == "num_train_epochs" else []
    assert name in refused(capsys, *train, f"--{name}", value, *more)


# --- options of TRL's ---


def test_trls_options_are_taken_or_refused_by_name(train: list[Any], capsys: Capture) -> None:
    line = refused(capsys, *train, "--save_only_model", "true")
    assert "save_only_model=True" in line and "checkpoints hold the whole run" in line
    assert "report_to must be of" in refused(capsys, *train, "--report_to", "mlflow")
    given = [
        "--report_to",
        "none",
        "--warmup_ratio",
        "0.5",
        "--use_cpu",
        "--save-strategy=no",
        "--load_in_4bit",
        "False",
    ]
    assert run(*train, *given) == 0
    config = yaml.safe_load((folder_of(train) / "config.yaml").read_text())
    assert (config["warmup_steps"], config["device"]) == (0.5, "cpu")


def test_switches_that_are_turned_off(train: list[Any]) -> None:
    """As `--no_remove_unused_columns`, which TRL's own examples carry."""
    off = ["--no_remove_unused_columns", "--no-gradient-checkpointing", "--no_push_to_hub"]
    assert run(*train, *off) == 0
    config = yaml.safe_load((folder_of(train) / "config.yaml").read_text())
    assert config["gradient_checkpointing"] is False


def test_an_unknown_switch_is_named(train: list[Any], capsys: Capture) -> None:
    assert "unknown option --no_beta" in refused(capsys, *train, "--no_beta")


# --- a reader that leaves ---


@contextlib.contextmanager
def broken_pipe() -> Iterator[None]:
    """Standard output whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        yield


def test_data_check_into_head(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [*chats(3), "{"])
    with broken_pipe():
        assert run("data", "check", file) == 1  # the verdict stays


def test_help_into_head() -> None:
    with broken_pipe():
        assert main(["train", "--help"]) == 141


def test_training_outlives_its_reader(train: list[Any]) -> None:
    with broken_pipe():
        assert run(*train) == 0
    assert (folder_of(train) / "summary.json").is_file()


# --- data: one verdict ---


def test_the_same_verdict_in_check_and_train(tmp_path: Path, capsys: Capture) -> None:
    """tokenizers#1609: token ids and positions that the model has not, with file and line."""
    folder = tmp_path / "gpt"
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    options = {"n_embd": 32, "n_layer": 1, "n_head": 2, "max_position_embeddings": 64}
    tiny_model("GPT2", vocab_size=len(tokenizer) - 1, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        *chats(6),
        {"prompt": [user("a <new> one")], "chosen": [bot("x")], "rejected": [bot("y")]},
        {"prompt": [user("q")], "chosen": [bot("long " * 20)], "rejected": [bot("y")]},
        '{"prompt": "\\ud83d", "chosen": "x", "rejected": "y"}',
        json.dumps({**chats(1)[0], "X": 1, "chosen": [{**bot("x"), "X": "X"}]}).replace(
            "X", "\\ud83d"
        ),
        *["{"] * 30,
    ]
    file = write(tmp_path / "a.jsonl", rows)
    out = tmp_path / "check.jsonl"
    assert run("data", "check", file, "--model_name_or_path", folder, "--left_out", out) == 1
    text = capsys.readouterr().out
    assert text.count("invalid JSON") == 20 and "only counted" in text
    assert (
        run(
            "train",
            "--model_name_or_path",
            folder,
            "--dataset_name",
            file,
            "--device",
            "cpu",
            "--output_dir",
            tmp_path / "run",
            "--max_steps",
            "1",
            "--dtype",
            "float32",
            "--sample_max_new_tokens",
            "0",
        )
        == 0
    )
    trained = capsys.readouterr().out
    written = (tmp_path / "run" / "left_out.jsonl").read_text()
    assert written == out.read_text() and len(written.splitlines()) == 34
    for reason in (
        "token id beyond the embedding",
        "longer than the model's positions",
        "lone surrogate",
    ):
        assert f" {reason}" in text and f" {reason}" in trained
    assert "every row that is left out is in" in trained
    assert f"{file}:7: chosen: token id" in text and f"{file}:8: chosen: " in trained


def test_cut_completions_are_counted(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    file = write(
        tmp_path / "a.jsonl",
        [{"prompt": [user("q")], "chosen": [bot("x" * 90)], "rejected": [bot("y")]}],
    )
    assert run("data", "check", file, "--model_name_or_path", model, "--max_length", "64") == 0
    assert "1 completions cut at max_length=64" in capsys.readouterr().out


def test_a_long_check_is_not_silent(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60,800 rows took 30 seconds to tokenise before the first line."""
    file = write(tmp_path / "many.jsonl", chats(6))
    assert main(["data", "check", str(file)]) == 0
    assert "rows read" not in capsys.readouterr().out
    monkeypatch.setattr(data_command, "SILENCE", 0.0)
    assert main(["data", "check", str(file)]) == 0
    assert "6 rows read" in capsys.readouterr().out.splitlines()


def test_no_usable_row_is_a_finding(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "2+2?", "chosen": "Four", "rejected": "Five"}])
    assert run("data", "check", file) == 1
    said = capsys.readouterr()
    assert "the column 'question' is unknown" in said.out and "0 usable pairs" in said.out


def test_an_empty_file_is_a_finding(tmp_path: Path, capsys: Capture) -> None:
    file = write(tmp_path / "a.jsonl", [""])
    assert run("data", "check", file) == 1
    assert "max_length must be at least 2" in refused(
        capsys, "data", "check", file, "--max_length", "0"
    )


def test_version_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from dpo_kernels.cli import main\ntry: main(['--version'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("dpo-kernels "), done.stderr


def test_a_template_that_raises_is_the_error(
    train: list[Any], tmp_path: Path, capsys: Capture
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no users here') }}")
    line = refused(capsys, *train, "--chat_template", template)
    assert "no pair is left" in line and "no users here" in line


def test_weight_and_beta_columns_train(train: list[Any], tmp_path: Path, capsys: Capture) -> None:
    """A pair of weight 0 is as good as absent; a column of betas is the option beta."""

    def losses(name: str, rows: list[dict[str, Any]], *more: str) -> list[float]:
        file = write(tmp_path / f"{name}.jsonl", rows)
        args = [*train, "--dataset_name", file, "--output_dir", tmp_path / name, *more]
        fixed = ("--eval_fraction", "0", "--train_sampling_strategy", "sequential")
        assert run(*args, *fixed, "--max_steps", "2", "--per_device_train_batch_size", "12") == 0
        return [r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")]

    rows = chats(12)
    plain = losses("plain", rows, "--beta", "0.4")
    assert losses("beta", [{**r, "beta": 0.4} for r in rows]) == pytest.approx(plain, rel=1e-5)
    half = losses("half", [{**r, "weight": 0.5} for r in rows], "--beta", "0.4")
    assert half[0] == pytest.approx(plain[0] / 2, rel=1e-5)
    bad = write(tmp_path / "bad.jsonl", [{**r, "margin": 1} for r in rows])
    assert run(*train, "--dataset_name", bad) == 0
    assert "the column margin is not used" in capsys.readouterr().out


# --- what a run shows ---


def test_table_and_metrics_agree(train: list[Any], capsys: Capture) -> None:
    assert run(*train) == 0
    text = capsys.readouterr().out
    rows = read_metrics(folder_of(train) / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    for name, key in (
        ("reward accuracy ", "eval_rewards/accuracies"),
        ("reward accuracy, a tie is a half", "eval_rewards/accuracies_ties_half"),
    ):
        shown = re.search(rf"^{name} +([0-9.]+) +([0-9.]+)$", text, re.MULTILINE)
        assert shown and shown.groups() == (f"{first[key]:.4f}", f"{last[key]:.4f}")
    assert "policy and reference are one, so every pair is a tie." in text
    assert last["eval_loss"] and last["epoch"] == rows[-2]["epoch"] and last["step"] == 4


def test_supervised_steps_follow_max_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    recipe = {
        "sft": {"max_steps": 8},
        "dpo": {"max_steps": 4},
        "sample": {"max_new_tokens": 0},
        "seed": 1,
    }
    with embedded.folder() as whole:
        shutil.copytree(whole, tmp_path / "small")
    for name in ("train", "eval", "sft"):
        file = tmp_path / "small" / f"{name}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:24]))
    (tmp_path / "small" / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(embedded, "folder", lambda: contextlib.nullcontext(tmp_path / "small"))
    fast = ("--device", "cpu", "--compare_plain_torch", "false", "--max_steps", "1")
    assert run("train", "--output_dir", tmp_path / "a", *fast) == 0
    assert "SFT: 2 steps of the recipe's 8" in capsys.readouterr().out
    assert read_metrics(tmp_path / "a" / "sft_metrics.jsonl")[-1]["step"] == 2
    assert run("train", "--output_dir", tmp_path / "b", *fast, "--sft_steps", "0") == 0
    assert not (tmp_path / "b" / "sft_metrics.jsonl").exists()
    assert "sft_steps is of the embedded default" in refused(
        capsys, "train", "--sft_steps", "3", "--model_name_or_path", "x", "--dataset_name", "y"
    )


def test_the_title_says_the_mix() -> None:
    assert loss_title(load_config({})) == "DPO: sigmoid"
    mix = {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.8, 1.0], "sft_weight": 0.5}
    assert loss_title(load_config(mix)) == "DPO: 0.8 sigmoid + ipo + 0.5 SFT"
    assert loss_title(load_config({"label_smoothing": 0.1, "learn_groups": True})) == (
        "DPO: sigmoid, label smoothing 0.1, learned offsets and temperatures"
    )
    assert loss_title(load_config({"f_divergence_type": "js_divergence"})) == (
        "DPO: sigmoid, js_divergence"
    )


def test_plot_of_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks at whole steps, legends that do not repeat the title."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    from matplotlib.figure import Figure

    from dpo_kernels.train.plots import plot_run

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    rows = [{"step": s, "loss": 0.7, "logps/chosen": -s, "logps/rejected": -2} for s in (1, 2)]
    rows += [{"step": s, "eval_loss": 0.7, "eval_logps/chosen": -3} for s in (0, 2)]
    plot_run(rows, tmp_path / "p.png", "DPO: sigmoid + 0.5 SFT")
    loss, *_, logps = figures[0].axes
    assert all(tick == int(tick) for axis in figures[0].axes for tick in axis.get_xticks())
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["train", "held out"]
    texts = [t.get_text() for t in logps.get_legend().get_texts()]
    assert texts == ["chosen, train", "chosen, held out", "rejected, train"]
