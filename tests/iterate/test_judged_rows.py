"""`pairs --format unpaired | ranked`, and rounds whose loss is of such rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_pair_rules import EVERY, SAMPLES, verdict
from test_rounds import options, policy  # noqa: F401 (policy is a fixture)
from tiny_policy import chat

from dpo_kernels.cli import main
from dpo_kernels.data import LeftOut, read_judged
from dpo_kernels.iterate.guards import logps_moved
from dpo_kernels.iterate.judged_rows import make_rows
from dpo_kernels.iterate.manifest import read_json
from dpo_kernels.iterate.records import Sample, read_table, write_table
from dpo_kernels.iterate.rounds import run_iteration
from dpo_kernels.iterate.settings import PairOptions
from dpo_kernels.train.config import UserError

# Mean margins of EVERY: "aa" is best, then "cc", then "bbbb" and "dddddddd".


def labels(**how: Any) -> dict[str, bool]:
    rows, _ = make_rows("unpaired", SAMPLES, EVERY, PairOptions(**how))
    return {row["completion"]: row["label"] for row in rows}


def test_labels_of_single_completions() -> None:
    assert labels(select="all") == {"aa": True, "cc": True, "bbbb": False, "dddddddd": False}
    best = labels()
    assert list(best.values()) == [True, False] and "aa" in best
    assert list(labels(select="all", min_margin=1.1)) == ["aa"]
    assert list(labels(select="all", keep_fraction=0.25)) == ["aa"]
    rows, counts = make_rows("unpaired", SAMPLES, EVERY, PairOptions(select="all"))
    assert counts.pairs == len(rows) == 4
    assert "4 labelled completions" in counts.describe()


def test_a_tie_and_an_error_label_nothing() -> None:
    rows, counts = make_rows(
        "unpaired", SAMPLES, [verdict(0, 1, 0.5), verdict(2, 3, None)], PairOptions()
    )
    assert rows == [] and counts.dropped == {"ties": 2, "errors": 1}
    rows, counts = make_rows("ranked", SAMPLES, [verdict(0, 1, 0.5)], PairOptions())
    assert rows == [] and counts.dropped == {"ties": 1}


def test_ranked_lists_are_what_the_trainer_reads(tmp_path: Path) -> None:
    rows, counts = make_rows("ranked", SAMPLES, EVERY, PairOptions())
    (row,) = rows
    assert row["completions"][:2] == ["aa", "cc"] and len(row["completions"]) == 4
    assert row["scores"] == sorted(row["scores"], reverse=True)
    assert "1 ranked lists" in counts.describe()
    write_table(tmp_path / "r.jsonl", rows)
    (read,) = read_judged(str(tmp_path / "r.jsonl"), "ranked", LeftOut())
    assert read.completions == tuple(row["completions"])  # type: ignore[union-attr]


def test_other_files_are_mixed_in(tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    write_table(more, [{"prompt": "q", "completion": "x", "label": False, "other": 1}] * 8)
    sft = tmp_path / "sft.jsonl"
    write_table(sft, [{"messages": [*chat("q"), {"role": "assistant", "content": "good"}]}] * 4)
    how = PairOptions(select="all", mix=[f"{more}=0.5"], mix_sft=[f"{sft}=0.25"])
    rows, counts = make_rows("unpaired", SAMPLES, EVERY, how)
    assert counts.sources == {"judged": 4, "more.jsonl": 2, "sft.jsonl": 1}
    assert rows[4] == {"prompt": "q", "completion": "x", "label": False}
    assert rows[6]["label"] is True
    with pytest.raises(UserError, match="no place in a ranked list"):
        make_rows("ranked", SAMPLES, EVERY, PairOptions(mix_sft=[f"{sft}=1"]))


@pytest.mark.parametrize("kind", ["unpaired", "ranked"])
def test_from_the_command_line_into_training(
    kind: str,
    policy: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """samples -> judge -> pairs --format -> data check -> train, each a command."""
    samples = [
        Sample(chat(f"place {i}"), "nice " * (n + 1), n, 0, 1.0, "stop", id=f"p{i}")
        for i in range(6)
        for n in range(3)
    ]
    write_table(tmp_path / "s.jsonl", samples)
    files = ["--samples", str(tmp_path / "s.jsonl")]
    assert main(["judge", *files, "--output", str(tmp_path / "v.jsonl")]) == 0
    out = str(tmp_path / "rows.jsonl")
    files += ["--verdicts", str(tmp_path / "v.jsonl"), "--output", out]
    assert main(["pairs", *files, "--format", kind]) == 0
    assert main(["data", "check", out, "--rows", "auto" if kind == "unpaired" else kind]) == 0
    loss = "kto" if kind == "unpaired" else "plackett_luce"
    run = ["train", "--model_name_or_path", policy, "--dataset_name", out, "--device", "cpu"]
    run += ["--loss_type", loss, "--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    run += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
    assert main(run) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["step0_loss"] == pytest.approx(0.5 if kind == "unpaired" else 1.791759, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["kto", "plackett_luce"])
def test_rounds_of_other_rows(policy: str, tmp_path: Path, loss_type: str) -> None:  # noqa: F811
    given = options(tmp_path, policy, loss_type=loss_type, rounds=1)
    summary = run_iteration(given)
    folder = tmp_path / "run" / "rounds" / "001"
    (row, *_) = read_table(folder / "pairs.jsonl")
    assert set(row) == (
        {"prompt", "completion", "label"}
        if loss_type == "kto"
        else {"prompt", "completions", "scores"}
    )
    done = read_json(folder / "manifest.json")
    assert done["stages"]["train"]["steps"] == 2
    measures = summary["each"][0]["measures"]
    assert {"logps_moved/chosen", "logps_moved/rejected"} <= set(measures)


def test_odpo_and_soft_labels_in_rounds(policy: str, tmp_path: Path) -> None:  # noqa: F811
    """The columns that `pairs` writes are what these losses read, tied pairs included."""
    odpo = options(tmp_path / "a", policy, loss_type="odpo", rounds=1, ties="soft")
    assert run_iteration(odpo)["each"][0]["pairs"]["pairs"] >= 2
    soft = options(
        tmp_path / "b", policy, loss_type="sppo_soft", soft_labels=True, rounds=1, ties="soft"
    )
    assert run_iteration(soft)["each"][0]["pairs"]["pairs"] >= 2


def test_moved_of_each_kind_of_row(policy: str) -> None:  # noqa: F811
    from dpo_kernels.iterate.local_models import LocalModel

    model = LocalModel.load(policy, "cpu")
    for row in (
        {"prompt": "p", "completion": "a", "label": True},
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, 0]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ):
        moved = logps_moved(model, model, [row])
        assert moved == {"logps_moved/chosen": 0.0, "logps_moved/rejected": 0.0}
