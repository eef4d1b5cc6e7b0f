"""`pairs`: which verdicts become pairs, with which margin, and what they are mixed with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import chat

from dpo_kernels.cli import main
from dpo_kernels.data import LeftOut, read_pairs
from dpo_kernels.iterate.pair_rules import MOST_ODDS, make_pairs
from dpo_kernels.iterate.records import Sample, write_table
from dpo_kernels.iterate.settings import PairOptions
from dpo_kernels.train.config import UserError

TEXTS = ["aa", "bbbb", "cc", "dddddddd"]
SAMPLES = [Sample("p", text, n, 0, 1.0, "stop", id="p") for n, text in enumerate(TEXTS)]


def verdict(first: int, second: int, p: float | None, **more: Any) -> dict[str, Any]:
    tie = p == 0.5
    return {
        "prompt": "p",
        "id": "p",
        "first": first,
        "second": second,
        "p_first": p,
        "tie": tie,
        "error": None if p is not None else "unreadable",
        **more,
    }


def pairs(verdicts: list[dict[str, Any]], **options: Any) -> list[tuple[str, str]]:
    rows, _ = make_pairs(SAMPLES, verdicts, PairOptions(**options))
    return [(row["chosen"], row["rejected"]) for row in rows]


EVERY = [
    verdict(0, 1, 0.9),
    verdict(0, 2, 0.6),
    verdict(0, 3, 0.8),
    verdict(1, 2, 0.3),
    verdict(1, 3, 0.5),
    verdict(2, 3, 0.7),
]


def test_all_pairs_and_their_margins() -> None:
    rows, counts = make_pairs(SAMPLES, EVERY, PairOptions(select="all"))
    assert [(r["chosen"], r["rejected"], r["p_chosen"]) for r in rows] == [
        ("aa", "bbbb", 0.9),
        ("aa", "cc", 0.6),
        ("aa", "dddddddd", 0.8),
        ("cc", "bbbb", 0.7),
        ("cc", "dddddddd", 0.7),
    ]
    assert rows[0]["margin"] == pytest.approx(math.log(9))
    assert counts.dropped == {"ties": 1} and counts.pairs == 5
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "margin", "p_chosen"}


def test_best_against_worst() -> None:
    assert pairs(EVERY) == [("aa", "bbbb")]
    # The best by all verdicts loses to the worst: nothing can be learnt from that.
    contradiction = [verdict(0, 1, 0.1), verdict(0, 2, 0.99), verdict(1, 2, 0.01)]
    rows, counts = make_pairs(SAMPLES, contradiction, PairOptions())
    assert [r["chosen"] for r in rows] == ["aa"] or counts.dropped


def test_ties_dropped_or_soft() -> None:
    tied = [verdict(0, 1, 0.5), verdict(0, 2, 0.5)]
    assert pairs(tied) == []
    rows, _ = make_pairs(SAMPLES, tied, PairOptions(ties="soft", select="all"))
    assert [(r["margin"], r["p_chosen"]) for r in rows] == [(0.0, 0.5)] * 2


def test_errors_make_no_pair() -> None:
    rows, counts = make_pairs(SAMPLES, [verdict(0, 1, None)], PairOptions(ties="soft"))
    assert rows == [] and counts.dropped == {"errors": 1}


def test_scores_give_the_margin() -> None:
    scored = [verdict(0, 1, 1.0, score_first=7.0, score_second=4.5)]
    (row,), _ = make_pairs(SAMPLES, scored, PairOptions())
    assert (row["margin"], row["p_chosen"]) == (2.5, 1.0)
    (row,), _ = make_pairs(SAMPLES, [verdict(0, 1, 1.0)], PairOptions())
    assert row["margin"] == pytest.approx(MOST_ODDS)


def test_margin_threshold_and_keep_fraction() -> None:
    assert pairs(EVERY, select="all", min_margin=math.log(4) - 1e-9) == [
        ("aa", "bbbb"),
        ("aa", "dddddddd"),
    ]
    assert pairs(EVERY, select="all", keep_fraction=0.4) == [("aa", "bbbb"), ("aa", "dddddddd")]


def test_length_penalty_and_match() -> None:
    long = [verdict(3, 0, 0.6)]
    assert pairs(long) == [("dddddddd", "aa")]
    assert pairs(long, length_penalty=0.1) == [("aa", "dddddddd")]
    assert pairs(EVERY, select="all", length_matched=0.2) == [("aa", "cc")]
    _, counts = make_pairs(SAMPLES, EVERY, PairOptions(length_matched=0.2))
    assert counts.dropped == {"lengths too different": 5}


def test_mixed_by_weight(tmp_path: Path) -> None:
    static = tmp_path / "static.jsonl"
    write_table(static, [{"prompt": f"q{i}", "chosen": "x", "rejected": "y"} for i in range(20)])
    sft = tmp_path / "sft.jsonl"
    write_table(
        sft,
        [
            {"messages": [*chat("p"), {"role": "assistant", "content": "good"}]},
            {"messages": [*chat("z"), {"role": "assistant", "content": "other"}]},
        ],
    )
    options = PairOptions(select="all", mix=[f"{static}=2"], mix_sft=[f"{sft}=1"])
    rows, counts = make_pairs(SAMPLES, EVERY, options, seed=1)
    assert counts.sources == {"judged": 5, "static.jsonl": 10, "sft.jsonl": 1}
    assert (rows[-1]["chosen"], rows[-1]["rejected"]) == ("good", "aa")
    assert make_pairs(SAMPLES, EVERY, options, seed=1)[0] == rows
    assert make_pairs(SAMPLES, EVERY, options, seed=2)[0] != rows
    for wrong in ("file", "file=x", "file=-1", "file=nan"):
        with pytest.raises(UserError, match="FILE=WEIGHT"):
            make_pairs(SAMPLES, EVERY, PairOptions(mix=[wrong]))


def test_command_writes_what_the_trainer_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = chat("Say it.")
    write_table(
        tmp_path / "s.jsonl",
        [{"prompt": prompt, "completion": text, "sample": n} for n, text in enumerate(TEXTS)],
    )
    files = ["--samples", str(tmp_path / "s.jsonl"), "--verdicts", str(tmp_path / "v.jsonl")]
    judged = ["judge", *files[:2], "--output", str(tmp_path / "v.jsonl")]
    assert main([*judged, "--judge", "length", "--judge_length", "4"]) == 0
    assert "6 verdicts: 1 ties (16.7%), 0 errors" in capsys.readouterr().out
    out = tmp_path / "pairs.jsonl"
    assert main(["pairs", *files, "--output", str(out), "--select", "all"]) == 0
    assert "5 pairs (5 judged); dropped: 1 ties" in capsys.readouterr().out
    left_out = LeftOut(report=print)
    found = read_pairs(out, left_out)
    assert len(found) == 5 and not left_out.problems
    assert found[0].prompt == prompt and found[0].chosen[0]["role"] == "assistant"
    first = json.loads((tmp_path / "v.jsonl").read_text().splitlines()[0])
    assert {"prompt", "first", "second", "p_first", "tie", "error", "judge", "order", "raw"} <= set(
        first
    )
    write_table(tmp_path / "v.jsonl", [verdict(0, 9, 1.0) | {"prompt": prompt, "id": None}])
    assert main(["pairs", *files, "--output", str(out)]) == 2
    assert "sample 9" in capsys.readouterr().err


ROWS = [{"prompt": "p", "completion": t, "sample": n} for n, t in enumerate(("one", "two"))]
VERDICT = {"prompt": "p", "first": 0, "second": 1, "p_first": 0.9, "tie": False, "error": None}
WRONG: list[tuple[str, dict[str, object], str]] = [
    ("verdicts", {"p_first": "high"}, "row 1: p_first: expected a number or null, got 'high'"),
    ("verdicts", {"p_first": 1.5}, "p_first must be in [0, 1], got 1.5"),
    ("verdicts", {"first": "0"}, "row 1: expected first and second"),
    ("verdicts", {"second": None}, "row 1: expected first and second"),
    ("verdicts", {"second": 0}, "row 1: expected first and second"),
    ("verdicts", {"second": 7}, "a verdict is about sample 7, which is not there"),
    ("verdicts", {"tie": "false"}, "row 1: tie: expected true or false, got 'false'"),
    ("verdicts", {"score_first": []}, "row 1: score_first: expected a number or null"),
    ("verdicts", {"prompt": None}, "row 1: prompt: expected a text or a list of messages"),
    ("verdicts", {"prompt": "other"}, "of which there is no sample"),
    ("samples", {"seed": "x"}, "row 1: seed: expected a number, got 'x'"),
    ("samples", {"temperature": [1]}, "row 1: temperature: expected a number"),
    ("samples", {"logps": 0.5}, "row 1: logps: expected a list, got 0.5"),
    ("samples", {"sample": True}, "row 1: sample: expected a number"),
    ("samples", {"prompt": [{"content": "no role"}]}, "row 1: expected prompt and completion"),
    ("mix", {"margin": "wide"}, "row 1: margin: expected a number, got 'wide'"),
]


@pytest.mark.parametrize("file, change, message", WRONG)
def test_files_of_others_are_checked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    change: dict[str, object],
    message: str,
) -> None:
    """One line that names the row and the field, whoever wrote the file."""
    static = {"prompt": "p", "chosen": "a", "rejected": "b", "p_chosen": None}
    rows = {"samples": ROWS, "verdicts": [VERDICT], "mix": [static]}
    rows[file] = [{**rows[file][0], **change}, *rows[file][1:]]
    command = ["pairs", "--output", str(tmp_path / "pairs.jsonl")]
    for name, content in rows.items():
        path = tmp_path / f"{name}.jsonl"
        write_table(path, content)
        command += [f"--{name}", f"{path}=1" if name == "mix" else str(path)]
    assert main(command) == 2
    assert message in capsys.readouterr().err
