"""`dpo-kernels score`: the values, the files, and what ends with one clear line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import chats, model, refused, run  # noqa: F401 (model is a fixture)
from test_data import bot, random_pairs, user, write
from test_references import other_model
from test_train import one_thread  # noqa: F401

from dpo_kernels.data import TokenSequence
from dpo_kernels.train import score
from dpo_kernels.train.score import batches_by_tokens

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")

Capture = pytest.CaptureFixture[str]
MIXED = [
    {"prompt": [user("say 1")], "chosen": [bot("yes")], "rejected": [bot("no, never")]},
    {"messages": [user("q"), bot("a longer answer"), user("r"), bot("b")]},
    {"prompt": "P: ", "completion": "C"},
    {"prompt": "p", "chosen": "same", "rejected": "same"},
]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def truth(folder: Any, prompt_ids: list[int], ids: list[int]) -> list[float]:
    """Log-probs of `ids` behind `prompt_ids`, from the model's own logits in float64."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = torch.tensor([prompt_ids + ids])
    with torch.no_grad():
        logps = lm(input_ids=whole).logits[0, :-1].double().log_softmax(-1)
    picked = logps.gather(-1, whole[0, 1:, None])[:, 0]
    return picked[len(prompt_ids) - 1 :].tolist()


def test_values(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    """Sums, per-token values and rewards, in the order of the rows, whatever the batches."""
    ref = other_model(tmp_path / "ref")
    file = write(tmp_path / "rows.jsonl", [*MIXED, *chats(9)])
    args = ("score", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    args += ("--ref_model_name_or_path", ref, "--beta", "0.5", "--per_token")
    out = tmp_path / "scores.jsonl"
    assert run(*args, "--output_file", out) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "12 rows" in text and "reward accuracy over 10 pairs" in text
    assert "left out: 1 (1 chosen equals rejected)" in text
    rows = rows_of(out)
    lines = [1, 2, 3, *range(5, 14)]
    assert [r["source"] for r in rows] == [f"{file}:{n}" for n in lines]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompt = tokenizer.apply_chat_template(
        MIXED[0]["prompt"], add_generation_prompt=True, return_dict=False
    )
    pair = rows[0]
    for side in ("chosen", "rejected"):
        ids = pair[f"{side}_token_ids"]
        ours, theirs = truth(model, prompt, ids), truth(ref, prompt, ids)
        assert pair[f"{side}_token_logps"] == pytest.approx(ours, abs=2e-5)
        assert pair[f"ref_{side}_token_logps"] == pytest.approx(theirs, abs=2e-5)
        assert pair[f"{side}_logps"] == pytest.approx(sum(ours), rel=1e-5)
        reward = 0.5 * (pair[f"{side}_logps"] - pair[f"ref_{side}_logps"])
        assert pair[f"{side}_rewards"] == pytest.approx(reward)
        ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
        assert pair[f"{side}_token_log_ratios"] == pytest.approx(ratios, abs=5e-5)
        assert pair[f"{side}_num_tokens"] == len(ids)
    assert pair["margins"] == pair["chosen_rewards"] - pair["rejected_rewards"]
    chat = rows[1]
    assert tokenizer.decode(chat["token_ids"]) == "a longer answer</s>b</s>"
    assert chat["rewards"] == pytest.approx(0.5 * (chat["logps"] - chat["ref_logps"]))
    plain = tokenizer("P: ")["input_ids"]
    assert rows[2]["token_logps"] == pytest.approx(
        truth(model, plain, rows[2]["token_ids"]), abs=2e-5
    )
    small = tmp_path / "small.jsonl"
    more = ("--max_tokens_per_batch", "1", "--layout", "padded")
    assert run(*args, "--output_file", small, *more) == 0
    for a, b in zip(rows, rows_of(small), strict=True):
        assert a.keys() == b.keys()
        for key in ("logps", "chosen_logps", "ref_rejected_logps", "margins"):
            assert a.get(key, 0) == pytest.approx(b.get(key, 0), abs=1e-4)


def test_a_model_alone(model: str, tmp_path: Path, capsys: Capture) -> None:  # noqa: F811
    file = write(tmp_path / "rows.jsonl", chats(3))
    conf = tmp_path / "score.yaml"
    conf.write_text(f"model_name_or_path: {model}\ndataset_name: {file}\ndevice: cpu\n")
    assert run("score", conf, "--output_file", tmp_path / "a.jsonl") == 0
    assert "of the model alone" in capsys.readouterr().out
    (row, *_) = rows_of(tmp_path / "a.jsonl")
    assert set(row) == {
        "source",
        "chosen_logps",
        "chosen_num_tokens",
        "rejected_logps",
        "rejected_num_tokens",
    }


def test_parquet(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    file = write(tmp_path / "rows.jsonl", chats(5))
    args = ("score", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    args += ("--per_token", "--output_file")
    monkeypatch.setattr(score, "WINDOW", 2)
    for name in ("a.jsonl", "a.parquet"):
        assert run(*args, tmp_path / name) == 0
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == rows_of(tmp_path / "a.jsonl")


def test_mistakes(
    model: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    file = write(tmp_path / "rows.jsonl", chats(3))
    empty = write(tmp_path / "empty.jsonl", ["{"])
    out = ("--output_file", tmp_path / "out.jsonl")
    args = ("score", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (args, "output_file is missing"),
        (("score", *args[3:], *out), "model_name_or_path is missing"),
        ((*args, "--output_file", "x.csv"), "must end in .jsonl or .parquet"),
        ((*args, "--output_file", file), "exists; choose another file or pass --overwrite"),
        ((*args, "--output_file", tmp_path / "no" / "x.jsonl"), "no folder that can be written"),
        ((*args, *out, "--beta", "0"), "beta must be a positive number"),
        ((*args, *out, "--max_tokens_per_batch", "0"), "max_tokens_per_batch must be at least 1"),
        ((*args, *out, "--learning_rate", "1"), "unknown option --learning_rate"),
        ((*args, *out, "--dataset_name", empty), "no row that can be scored"),
        ((*args, *out, "--dataset_name", "none.jsonl"), "none.jsonl does not exist"),
        ((*args, *out, "--ref_model_name_or_path", "./none"), "ref_model_name_or_path: ./none"),
    ]
    for given, message in cases:
        assert message in refused(capsys, *given)
    broken = tmp_path / "broken"
    lm = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        lm.lm_head.weight[5, 0] = float("nan")
    lm.save_pretrained(broken)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(broken)
    line = refused(capsys, *args, "--model_name_or_path", broken, *out)
    assert "not finite" in line or "nan" in line.lower()
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_run_keeps_what_it_has(
    model: str,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    file = write(tmp_path / "rows.jsonl", chats(6))
    monkeypatch.setattr(score, "WINDOW", 2)
    window, calls = score._Scorer._window, []

    def watched(self: Any, rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return window(self, rows)

    monkeypatch.setattr(score._Scorer, "_window", watched)
    args = ("score", "--model_name_or_path", model, "--dataset_name", file, "--device", "cpu")
    assert run(*args, "--output_file", tmp_path / "o.jsonl") == 143
    assert f"what was scored is in {tmp_path / 'o.jsonl.part'}" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()
    assert len(rows_of(tmp_path / "o.jsonl.part")) == 4


def test_batches_hold_so_many_tokens() -> None:
    singles = [TokenSequence(tuple(range(n)), 1, "") for n in (5, 9, 2, 9, 30, 1)]
    batches = batches_by_tokens(singles, 18)
    assert batches == [[4], [1, 3], [0, 2, 5]]
    pairs = random_pairs(9)
    mixed = [*pairs, *singles]
    found = batches_by_tokens(mixed, 40)
    assert sorted(i for b in found for i in b) == list(range(len(mixed)))
    assert all(len({type(mixed[i]) for i in b}) == 1 for b in found)
