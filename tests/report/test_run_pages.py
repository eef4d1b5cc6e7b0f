"""Pages of folders: whole runs, cut ones, hostile ones, several, iterations."""

import json
import math
import re
from pathlib import Path

import pytest
from page_parts import (
    EVIL,
    Elements,
    charts,
    make_iteration,
    make_run,
    overlaps,
    stands_alone,
    texts,
)

from dpo_kernels.cli import main
from dpo_kernels.report import NoRun, write_page
from dpo_kernels.report.html_page import text

CALIBRATION = {
    "pairs": 4,
    "temperature": 1.5,
    "ece_before": 0.1,
    "ece_after": 0.05,
    "nll_before": 0.6,
    "nll_after": 0.5,
    "bins_before": [
        {"low": 0.5, "high": 0.55, "pairs": 3, "confidence": 0.52, "accuracy": 0.6},
        {"low": 0.9, "high": 0.95, "pairs": 1, "confidence": 0.93, "accuracy": 1.0},
    ],
    "bins_after": [{"low": 0.5, "high": 0.55, "pairs": 4, "confidence": 0.51, "accuracy": 0.7}],
}


def page_of(*folders: Path) -> str:
    out = folders[0].parent / "page.html"
    page = write_page(list(folders), out).read_text(encoding="utf-8")
    stands_alone(page)
    for chart in charts(page):
        assert overlaps(chart) == [], texts(chart)[0]
        if "offset of a group" not in texts(chart)[0]:
            assert len(texts(chart, "tick")) >= 3
    return page


def whole_summary(n: int, **more) -> dict:
    held = {
        "eval_loss": 0.69,
        "eval_rewards/margins": 0.0,
        "eval_rewards/accuracies_ties_half": 0.5,
        "eval_logps/chosen": -100.0,
        "eval_logps/rejected": -100.0,
    }
    return {
        "steps": n,
        "pairs": 100,
        "held_out_pairs": 10,
        "loss": "DPO: 0.8 sigmoid + 0.2 SFT",
        "before": held,
        "after": {**held, "eval_loss": 0.5, "eval_logps/chosen": -90.0},
        "calibration": CALIBRATION,
        "left_out": {"broken JSON": 2},
        "sample": {"prompt": "Say it.", "before": "what", "after": "it"},
        "seconds": 12.0,
        "peak_memory_bytes": 2**30,
        **more,
    }


def test_a_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "first", summary=whole_summary(40))
    surprise = {"source": "f:3", "margin": -2.0, "p_chosen": 0.12, "prompt": "P", "chosen": "C"}
    (run / "surprising_pairs.jsonl").write_text(json.dumps({**surprise, "rejected": "R"}) + "\n")
    (run / "left_out.jsonl").write_text(
        json.dumps({"where": "f:9", "field": "line", "got": "x", "expected": "y", "reason": "r"})
    )
    page = page_of(run)
    found = Elements(page)
    for words in (
        "DPO: 0.8 sigmoid + 0.2 SFT",
        "held-out loss 0.69 0.5 −0.19",
        "Calibration",
        "Say it.",
        "margin −2 nats, P(chosen) 0.12",
        "broken JSON 2",
        "f:9 line x y",
        "config.yaml",
        "whole run 12 s",
        "peak memory 1 GiB",
    ):
        assert words in found.text, words
    assert "not ended" not in found.text
    titles = [texts(c)[0] for c in charts(page)]
    assert titles[:5] == [
        "loss",
        "reward margin",
        "reward accuracy",
        "KL estimate",
        "log-prob of a completion",
    ]
    assert {"gradient norm", "throughput", "reliability"} <= set(titles)
    by_title = {texts(c)[0]: c for c in charts(page)}
    assert "tokens per second" in texts(by_title["throughput"])
    assert "optimizer step" in texts(by_title["loss"])
    assert page.index('id="summary"') < page.index('id="curves"') < page.index('id="configuration"')
    numbers = [a for t, a in found.tags if t == "td" and a.get("class") == "n"]
    assert numbers  # their column is the one that the style keeps on one line
    assert re.search(r"td, th \{[^}]*white-space: nowrap", page)


def test_one_step_and_none(tmp_path: Path) -> None:
    assert "loss" in page_of(make_run(tmp_path / "one", 1))
    none = page_of(make_run(tmp_path / "none", 0))
    assert "No step is logged yet" in none and not charts(none)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text("beta: 0.1\n")
    assert "No step is logged yet" in page_of(tmp_path / "bare")


def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", 0)
    with (run / "metrics.jsonl").open("w") as file:
        for i in range(100_000):
            speed = 9000.0 + (i == 54_321) * 900
            file.write(f'{{"step": {i}, "loss": {i % 7}.5, "tokens_per_s": {speed}}}\n')
    page = page_of(run)
    assert len(page) < 100_000
    for chart in charts(page):
        assert "line: mean of a column; band: its least to most" in texts(chart)


def test_a_run_that_was_cut_off(tmp_path: Path) -> None:
    page = Elements(page_of(make_run(tmp_path / "cut", 57, tail='{"step": 58, "loss": 0.5, "re')))
    assert "has not ended: the last logged step is 57" in page.text
    assert "the last line is half" in page.text
    middle = make_run(tmp_path / "middle", 5)
    lines = (middle / "metrics.jsonl").read_text().splitlines()
    lines[2] = "[1, 2"
    lines.insert(4, '{"loss": 1}')
    (middle / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    (middle / "summary.json").write_text('{"steps": 5')
    said = Elements(page_of(middle)).text
    assert "2 lines are no JSON object (line 3, " in said and "1 lines have no step" in said
    assert "summary.json is no JSON, or half of it" in said


def test_values_that_are_missing_or_not_finite(tmp_path: Path) -> None:
    def change(i: int, row: dict) -> None:
        if i in (10, 11, 30):
            row["loss"], row["grad_norm"] = math.nan, math.inf
        if i > 20:
            del row["tokens_per_s"]
        if i == 12:
            row["learning_rate"] = "x"
            row["pairs_per_s"] = None

    page = page_of(make_run(tmp_path / "nan", change=change))
    assert "The loss was not finite at step 10" in page and "3 values not finite" in page


def test_hostile_text_is_text(tmp_path: Path) -> None:
    name = 'evil<b>"x'
    run = make_run(
        tmp_path / name,
        summary=whole_summary(
            40,
            loss=EVIL,
            backend=EVIL,
            left_out={EVIL: 2},
            samples=[{"prompt": EVIL, "before": EVIL, "after": "y" * 9000}],
        ),
        dataset_name=EVIL,
        change=lambda i, row: row.update({EVIL: 1.0, f"groups/{EVIL}/offset": 0.1}),
    )
    surprise = {k: EVIL for k in ("source", "prompt", "rejected")}
    surprise["chosen"] = [{"role": EVIL, "content": EVIL}, {"role": "user", "content": "x"}]
    (run / "surprising_pairs.jsonl").write_text(json.dumps(surprise) + "\n")
    (run / "left_out.jsonl").write_text(json.dumps({"where": EVIL, "got": EVIL}) + "\n")
    page = page_of(run)
    found = Elements(page)
    assert found.text.count("</script></style></title><script>") >= 8
    assert "\x00" not in page and "\x1b" not in page and "\u202e" not in page
    assert "\\u202eturned \\ud800" in found.text and "… 5,000 more characters" in found.text
    assert text("<a> & \"b\" 'c'") == "&lt;a&gt; &amp; &quot;b&quot; &#x27;c&#x27;"


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / f"run{n}", 30 + n, summary=whole_summary(30 + n), beta=n / 10)
        for n in range(1, 4)
    ]
    page = page_of(*runs)
    loss = next(c for c in charts(page) if texts(c)[0] == "loss")
    assert texts(loss, "name") == ["run1", "run2", "run3"] and len(texts(loss, "end")) == 3
    found = Elements(page)
    assert "0.69 → 0.5" in found.text and "beta 0.1 0.2 0.3" in found.text
    assert write_page([tmp_path]).name == "report.html"  # a folder of runs
    assert (tmp_path / "report.html").read_text().count("run3") > 3
    many = [make_run(tmp_path / "more" / f"m{i}", 12) for i in range(10)]
    head = Elements(page_of(*many))
    assert "10 runs" in head.text


def test_learned_groups(tmp_path: Path) -> None:
    def change(i: int, row: dict) -> None:
        for n, name in enumerate(("alice", "bob", "a/b with a name that is far too long to stand")):
            row[f"groups/{name}/temperature"] = 1 + n * i / 100
            row[f"groups/{name}/offset"] = (n - 1) * i / 50

    page = page_of(make_run(tmp_path / "groups", change=change))
    titles = [texts(c)[0] for c in charts(page)]
    assert "offset of a group" in titles and "temperature over the steps" in titles
    over = next(c for c in charts(page) if texts(c)[0] == "offset over the steps")
    assert {"alice", "bob"} <= set(texts(over, "name"))


def test_a_supervised_run(tmp_path: Path) -> None:
    run = tmp_path / "sft"
    run.mkdir()
    rows = [{"step": 0, "eval_loss": 3.0}] + [{"step": i, "loss": 3.0 / i} for i in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    page = page_of(run)
    assert "SFT" in Elements(page).text
    assert [texts(c)[0] for c in charts(page)] == ["loss"]
    assert "mean of a token's loss (nats)" in Elements(page).text
    pairs = make_run(tmp_path / "dpo", summary={"steps": 40, "pairs": 9})
    both = Elements(page_of(run, pairs)).text
    assert "mean of a pair's or a token's loss (nats)" in both


def test_what_does_not_show_is_no_remark(tmp_path: Path) -> None:
    """The held-out loss rose from 2.226 to 2.226."""
    for name, after, said in (("same", 2.22601, False), ("worse", 2.3, True)):
        summary = {"steps": 40, "before": {"eval_loss": 2.226}, "after": {"eval_loss": after}}
        page = page_of(make_run(tmp_path / name, summary=summary))
        assert ("The held-out loss rose" in page) == said


@pytest.mark.parametrize("ended", [True, False])
def test_an_iteration(tmp_path: Path, ended: bool) -> None:
    page = page_of(make_iteration(tmp_path / "loop", ended=ended))
    found = Elements(page)
    titles = [texts(c)[0] for c in charts(page)]
    assert titles[:2] == ["win rate", "KL to the starting model"]
    assert "0.550 [0.4, 0.8]" in found.text and "callable:rule" in found.text
    assert "Held-out prompts, before and after" in found.text and "<b>new</b> 2" in found.text
    assert "6 (9.4 %)" in found.text and "verdict: a tie" in found.text
    assert ("The loop ended: rounds: 3 done" in found.text) is ended
    assert ("has not ended" in found.text.split("Training of each round")[0]) is not ended
    wins = charts(page)[0]
    assert texts(wins, "name") == ["over round 0", "over the previous"]


def test_two_iterations(tmp_path: Path) -> None:
    page = page_of(make_iteration(tmp_path / "a"), make_iteration(tmp_path / "b", 2))
    assert "a: over round 0" in texts(charts(page)[0], "name")
    with pytest.raises(NoRun, match="no curve in common"):
        write_page([tmp_path / "a", make_run(tmp_path / "c")])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").stat().st_size > 10_000
    assert main(["report", str(run), "--output_dir", str(tmp_path / "dir")]) == 0
    assert (tmp_path / "dir" / "report.html").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    file = tmp_path / "other" / "notes.txt"
    for options, said in (
        ([tmp_path / "nowhere"], "does not exist; expected the folder of a run"),
        ([tmp_path / "other"], "is no run: expected metrics.jsonl"),
        ([tmp_path / "other"], "it holds notes.txt"),
        ([run, tmp_path / "other"], "is no run"),
        ([file], "is not a results file: "),
        ([file], "(a run is named by its folder)"),
        ([run, "--out", tmp_path], "is a folder"),
        ([run, "--out", file / "page.html"], "cannot be written"),
        ([run, "--out", "x", "--output_dir", "y"], "give one of them"),
        ([run, "no-such-folder"], "does not exist"),
    ):
        assert main(["report", *map(str, options)]) == 2, options
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
