"""`data check`: what of a file would be trained, what is twice, what is cut, what leaks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user, write

from dpo_kernels.cli import main
from dpo_kernels.data import LeftOut, PreferencePair, Truncation, tokenize_pairs
from dpo_kernels.data.show import columns, folded, shown_pair, token_text, visible
from dpo_kernels.data.survey import Lengths, Marks, repeats

LONG = " ".join(f"word{i}" for i in range(60)) + " "


def row(prompt: str, chosen: str = "good", rejected: str = "bad") -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer alone: all that the check needs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def check(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    code = main(["data", "check", *map(str, args)])
    return code, capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, dict[str, Any]]:
    code, out = check(capsys, *args, "--json")
    return code, json.loads(out)


def kinds(report: dict[str, Any]) -> dict[str, int]:
    return {f["kind"]: f["count"] for f in report["findings"]}


def test_rows_that_are_there_twice(tmp_path: Path, capsys: Any) -> None:
    rows = [
        row("a"),
        row("b"),
        row("a"),
        row("b", "bad", "good"),
        row(LONG + "one"),
        row(LONG + "two"),
        row("nothing like the others at all, really"),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    code, report = found(capsys, file)
    assert code == 1
    assert kinds(report) == {"duplicates": 1, "contradictions": 1, "near-duplicates": 1}
    by_kind = {f["kind"]: f for f in report["findings"]}
    assert by_kind["duplicates"]["examples"] == [f"{file}:1 and {file}:3"]
    assert by_kind["near-duplicates"]["examples"] == [f"{file}:5 and {file}:6"]
    assert [f["kind"] for f in report["findings"] if f["wrong"]] == ["contradictions"]
    assert "near-duplicates" not in kinds(found(capsys, file, "--near", "false")[1])
    # twice is worth a line, and no mistake
    assert check(capsys, write(tmp_path / "b.jsonl", [row("a"), row("a")]))[0] == 0


def test_leaks_into_the_evaluation_set(tmp_path: Path, capsys: Any) -> None:
    train = write(tmp_path / "a.jsonl", [row("a"), row("b"), row(LONG), row("free")])
    held = write(tmp_path / "e.jsonl", [row("a"), row("b", "x", "y"), row(LONG + "z")])
    code, report = found(capsys, train, "--eval_file", held)
    assert code == 1
    assert kinds(report) == {"leaked pairs": 1, "leaked prompts": 2, "near leaks": 1}
    assert check(capsys, train, "--eval_file", write(tmp_path / "f.jsonl", [row("q")]))[0] == 0


def test_what_is_cut_and_how_it_ends(tmp_path: Path, model: str, capsys: Any) -> None:
    file = write(tmp_path / "a.jsonl", [row("abc", "x" * 30), row("abc")])
    code, report = found(capsys, file, "--model_name_or_path", model, "--max_length", 10)
    assert code == 0 and report["lengths"]["unit"] == "tokens"
    assert report["notes"]["completions cut at max_length=10"] == 1
    assert report["notes"]["tokens cut from completions"] == 24
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}ENDS{% endif %}{% endfor %}"
    )
    chat = {"prompt": [user("q")], "chosen": [bot("good")], "rejected": [bot("bad")]}
    file = write(tmp_path / "c.jsonl", [chat])
    for ends, kind in (("</s>" * 2, "EOS) twice"), ("", "do not end with the end token")):
        (tmp_path / "t.jinja").write_text(template.replace("ENDS", ends))
        code, report = found(
            capsys, file, "--model_name_or_path", model, "--chat_template", tmp_path / "t.jinja"
        )
        assert code == 1 and any(kind in k for k in kinds(report)), report
    code, _text = check(capsys, file, "--model_name_or_path", model)
    assert code == 0


def test_the_histogram_fits_a_terminal(tmp_path: Path, capsys: Any) -> None:
    rows = [row("a" * n, "b" * (n * 7 % 500 + 1), "c" * (n % 90 + 1)) for n in range(1, 400, 3)]
    code, text = check(capsys, write(tmp_path / "a.jsonl", rows))
    assert code == 0
    bars = [line for line in text.splitlines() if re.match(r" *[\d,]+-[\d,]+ ", line)]
    assert len(bars) >= 5 and all(columns(line) <= 80 for line in bars)
    assert "computing each once saves" in text
    lengths = Lengths()
    lengths.add(30, 10, 10)
    assert lengths.prompt_share == 0.75 and lengths.saving == 0.375


COLOUR = re.compile(r"\x1b\[[\d;]*m")


@pytest.mark.parametrize("colour", [False, True])
def test_show_fits_80_columns_and_loses_nothing(colour: bool) -> None:
    tokenizer = byte_tokenizer()
    pair = PreferencePair(
        [user("x" * 200 + "\n界 ")], [bot("yes" * 50), user("no"), bot("so")], [bot("no")], "f:7"
    )
    (whole,) = tokenize_pairs([pair], tokenizer, None, LeftOut())
    cut = Truncation(240, max_prompt_length=150)
    (kept,) = tokenize_pairs([pair], tokenizer, cut, LeftOut())
    lines = list(shown_pair(kept, whole, tokenizer, 80, colour))
    bare = [COLOUR.sub("", line) for line in lines]
    assert all(columns(line) <= 80 for line in bare)
    assert (bare != lines) == colour
    titles = [line for line in bare if re.match(r"  \S", line)]
    assert titles[0].startswith("  prompt, cut off")
    assert any("chosen, cut off" in t for t in titles)
    counted = sum(int(re.search(r"\((\d+) tok", t)[1]) for t in titles)  # type: ignore[index]
    prompts = len(whole.prompt)
    assert counted == prompts + len(whole.chosen) + len(whole.rejected)
    # others' turns have a title of their own
    (apart,) = tokenize_pairs([pair], tokenizer, None, LeftOut())
    assert any("chosen, not scored" in x for x in shown_pair(apart, None, tokenizer))
    assert visible("a b\n\x07") == "a·b⏎<7>"


def test_show_on_the_command_line(tmp_path: Path, model: str, capsys: Any) -> None:
    file = write(tmp_path / "a.jsonl", [row(f"q{i}") for i in range(5)])
    code, text = check(capsys, file, "--model_name_or_path", model, "--show", 2)
    assert code == 0 and text.count("chosen, scored (5 tokens)") == 2
    assert "g│o│o│d│</s>" in text and "\x1b" not in text
    text = check(capsys, file, "--model_name_or_path", model, "--show", 1, "--color", "always")[1]
    assert "\x1b[32mg\x1b[0m" in text
    assert main(["data", "check", file, "--show", "2"]) == 2
    assert main(["data", "check", file, "--model_name_or_path", model, "--show", "-1"]) == 2


def test_show_tells_the_bytes_of_parts_of_letters() -> None:
    """They were question marks, as a question mark is."""
    tokenizer = byte_tokenizer()
    told = [token_text(tokenizer, i) for i in tokenizer("é? ")["input_ids"]]
    assert told == ["<c3>", "<a9>", "?", "·"]

    class Pieces:
        def decode(self, ids: list[int]) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, i: int) -> str:
            return ["<0xE4>", "一"][i]

    assert [token_text(Pieces(), i) for i in (0, 1)] == ["<e4>", "?"]


def test_no_line_is_wider_than_the_terminal(
    tmp_path: Path, model: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide characters, emoji, tabs, what is not seen, long names of files and many numbers."""
    folder = tmp_path / ("a folder with 长长的名字 " * 4).strip()
    folder.mkdir()
    rows = [
        row("这是一个很长的提示，没有任何空格" * 12, " 好的👩‍👩‍👧 😀❤️ é", "\tbad\ttabs\t\n\n   x"),
        row("a" * 300 + "\u2028\u00a0\u200b", " " + "😀" * 90, " " + "한국어 " * 40),
        *(row("q" * (i * i + 1), "c" * (i + 1), "d" * (2 * i + 1)) for i in range(60)),
        row("q", "好" * 500, "好" * 500),
        row("q", ""),
    ]
    file = write(folder / "data.jsonl", [*rows, rows[4]])
    for width in (80, 30):
        monkeypatch.setenv("COLUMNS", str(width))
        for tty in (True, False):
            monkeypatch.setattr("sys.stdout.isatty", lambda tty=tty: tty)
            _, text = check(capsys, file, "--model_name_or_path", model, "--show", 3)
            lines = [COLOUR.sub("", line) for line in text.splitlines()]
            wide = [line for line in lines if columns(line) > width]
            assert not wide if tty else all(str(folder) in x or " " in x for x in wide), wide
            if not tty:  # words that someone looks for are not broken there
                assert any(line.startswith("left out: ") and str(file) in line for line in lines)
            assert ("\x1b[32m" in text) == tty
    assert visible("a\u2028\u00a0\u200bb") == "a<2028><a0><200b>b"
    assert list(folded("one two three", 8)) == ["one two", "  three"]
    assert list(folded("好" * 5, 4)) == ["好好", "好好", "好"]


def test_truncation_policies() -> None:
    tokenizer = byte_tokenizer()
    pair = PreferencePair("abcdef", "xyz", "w", "f:1")

    def cut(**options: Any) -> tuple[str, str, str] | str:
        left_out = LeftOut()
        kept = tokenize_pairs([pair], tokenizer, Truncation(**options), left_out)
        if not kept:
            return next(iter(left_out.counts()))
        assert len(kept[0].prompt + kept[0].chosen) <= (options.get("max_length") or 99)
        return tuple(  # type: ignore[return-value]
            tokenizer.decode(list(x)) for x in (kept[0].prompt, kept[0].chosen, kept[0].rejected)
        )

    assert cut() == ("abcdef", "xyz</s>", "w</s>")
    assert cut(max_length=8) == ("abcdef", "xy", "w</s>")
    assert cut(max_length=8, mode="keep_end") == ("cdef", "xyz</s>", "w</s>")
    assert cut(max_length=3, mode="keep_end") == ("f", "xy", "w</s>")
    assert cut(max_length=8, mode="drop") == "longer than max_length"
    assert cut(max_length=10, mode="drop") == ("abcdef", "xyz</s>", "w</s>")
    assert cut(max_prompt_length=2, max_completion_length=2) == ("ef", "xy", "w</s>")
    assert cut(max_length=6) == "prompt too long"


def test_many_rows_in_little_memory() -> None:
    marks = Marks(near=False)
    for i in range(5000):
        marks.add(PreferencePair(f"q{i % 4990}", "a", "b", f"f:{i + 1}"))
    (finding,) = repeats(marks)
    assert finding.count == 10 and finding.examples[0] == "f:1 and f:4991"
    assert marks.pairs.itemsize * len(marks.pairs) == 8 * 5000
