"""`judge eval`: agreement, swap consistency, ties, errors and length bias, each by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_stand_in import serving

from dpo_kernels.cli import main
from dpo_kernels.iterate.judge_eval import (
    LabelledPair,
    eval_table,
    evaluate_judge,
    quality,
    read_labelled,
    wilson,
)
from dpo_kernels.iterate.judges import length_judge
from dpo_kernels.iterate.records import PairItem, Verdict, write_table

PAIRS = [
    LabelledPair(PairItem("p", "long text", "short"), 1, "a"),
    LabelledPair(PairItem("p", "short", "long text"), 1, "a"),
    LabelledPair(PairItem("p", "short", "long text"), 2, "b"),
    LabelledPair(PairItem("p", "long text", "short"), 2, "b"),
]


def test_rates_by_hand() -> None:
    verdicts = [
        Verdict(1.0, False, None, "", "both"),
        Verdict(0.5, True, None, "", "both", position=1),
        Verdict(0.2, False, None, "", "both"),
        Verdict(None, False, "unreadable", "", "both"),
    ]
    q = quality("all", PAIRS, verdicts)
    assert q.agreement == pytest.approx(2.5 / 3) and q.decided == 1.0
    assert q.consistency == pytest.approx(2 / 3) and q.says_first == 1.0
    assert (q.ties, q.errors) == (0.25, 0.25)
    assert q.length_bias == 0.0  # the longer was right each time it was preferred
    low, high = wilson(2.5, 3)
    assert (q.agreement_low, q.agreement_high) == (low, high)
    assert quality("all", PAIRS, [verdicts[3]] * 4).agreement is None


@pytest.mark.parametrize("right", [0, 1])
def test_a_judge_that_is_always_right_is_drawn(tmp_path: Path, right: int) -> None:
    """Of all or of none the share is the end of its interval, which rounding had beside it."""
    from dpo_kernels.iterate.judge_eval import plot_eval

    pytest.importorskip("matplotlib", reason="the chart")
    for n in (4, 46, 92, 419):
        low, high = wilson(n * right, n)
        assert low <= right <= high
        pairs = [PAIRS[0]] * n
        table = [quality("all", pairs, [Verdict(float(right), False, None, "")] * n)]
        plot_eval(table, tmp_path / "chart.png", "oracle")
        assert (tmp_path / "chart.png").stat().st_size > 1000


def test_wilson() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = wilson(8, 10)  # the textbook's
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943)


def test_subsets_files_and_table(tmp_path: Path) -> None:
    table = evaluate_judge(length_judge(), PAIRS, tmp_path)
    assert [(q.subset, q.pairs, q.agreement) for q in table] == [
        ("all", 4, 0.5),
        ("a", 2, 0.5),
        ("b", 2, 0.5),
    ]
    assert table[0].length_bias == -0.5 and table[0].consistency is None
    assert len((tmp_path / "verdicts.jsonl").read_text().splitlines()) == 4
    assert "agreement of all: 0.500" in eval_table(table)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{i}", "output_1": "x" * i, "output_2": "y" * 5, "label": 1 + (i < 5)}
        for i in range(1, 11)
    ]
    write_table(tmp_path / "labelled.jsonl", rows)
    return tmp_path / "labelled.jsonl"


def test_a_judge_that_always_says_first(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai", reason="the endpoints' client: pip install dpo-kernels[judge]")
    with serving() as server:
        out = ["--output_dir", str(tmp_path / "out")]
        llm = ["--judge", "llm", "--base_url", server.url, "--model", "m"]
        assert main(["judge", "eval", str(file), *llm, *out]) == 0
    text = capsys.readouterr().out
    assert "this judge looks at the position" in text and "20 requests: 20 answered" in text
    row = json.loads((tmp_path / "out" / "judge_eval.jsonl").read_text().splitlines()[0])
    assert (row["agreement"], row["ties"], row["consistency"], row["says_first"]) == (0.5, 1, 0, 1)
    assert (tmp_path / "out" / "judge_eval.png").stat().st_size > 1000


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row, message in (
        ({"prompt": "p", "output_1": "a", "output_2": "b", "label": 3}, "label: 3"),
        ({"prompt": "p", "output_1": "a", "label": 1}, "output_2"),
    ):
        write_table(tmp_path / "f.jsonl", [row])
        assert main(["judge", "eval", str(tmp_path / "f.jsonl")]) == 2
        assert message in capsys.readouterr().err
    assert main(["judge", "evaluate", "x"]) == 2
    assert "eval FILE" in capsys.readouterr().err


def test_reads_the_labelled(file: Path) -> None:
    assert [p.label for p in read_labelled(file)] == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
