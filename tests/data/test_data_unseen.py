"""Relatives of the data that failed: other columns and templates, numbers at the edge of fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user, write
from test_data_faults import CALL, CHAT, GOOD, TOOL_TEMPLATE, chat, read, scored, tokens

from dpo_kernels.data import DataError, LeftOut, Limits, PreferencePair, read_pairs, tokenize_pairs

TWO_ENDS = (  # Phi's: a token behind every turn, another behind the conversation
    "{% for m in messages %}{{ '|' + m.role + '|' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|assistant|' }}{% else %}{{ '<pad>' }}{% endif %}"
)


@pytest.mark.parametrize("row", [GOOD, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("documents", [{"text": "t"}]),
        ("chosen_tools", [{"name": "f"}]),
        ("rejected_tools", json.dumps([{"name": "f"}])),
        ("pixel_values", [[1.0]]),
    ],
)
def test_what_the_model_would_see_is_refused_by_name(
    tmp_path: Path, row: dict[str, Any], name: str, value: Any
) -> None:
    """Relatives of trl#2385."""
    pairs, left_out, _ = read(tmp_path, {**row, name: value}, {**row, name: None})
    assert len(pairs) == 1
    assert [(p.field, p.reason) for p in left_out.problems] == [(name, "not supported")]


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("beta", 1e-320, False),
        ("beta", 1e39, False),
        ("beta", 1e-30, True),
        ("weight", 1e39, False),
        ("weight", 0, True),
        ("margin", -1e39, False),
    ],
)
def test_numbers_that_fp32_cannot_hold(tmp_path: Path, name: str, value: float, good: bool) -> None:
    """They passed the check, and the first step raised."""
    pairs, left_out, _ = read(tmp_path, {**GOOD, name: value}, GOOD)
    assert len(pairs) == 1 + good
    assert good or "in the range of fp32" in str(left_out.problems[0])


def test_messages_packed_in_a_text(tmp_path: Path) -> None:
    """Lists that were written as JSON twice would be trained on as text."""
    packed = {k: json.dumps(v) for k, v in CHAT.items()}
    pairs, left_out, _ = read(tmp_path, packed, {**GOOD, "chosen": '["a list", "of texts"]'}, GOOD)
    assert len(pairs) == 2
    assert "messages as JSON within a text, expected the list itself" in str(left_out.problems[0])


def test_utf_32_has_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(json.dumps(GOOD).encode("utf-32"))
    with pytest.raises(DataError, match="UTF-32"):
        read_pairs(file, LeftOut())


@pytest.mark.parametrize(
    "where", ["{# tools #}", "Use the tools.", "{{ 'tools' }}", "{{ m.tools }}"]
)
def test_a_word_in_a_template_is_no_variable(tmp_path: Path, where: str) -> None:
    """Tools were dropped where the template only speaks of them."""
    template = "{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}" + where
    pairs, left_out, _ = read(tmp_path, {**CHAT, "tools": [{"name": "f"}]})
    assert not tokenize_pairs(pairs, byte_tokenizer(template), None, left_out)
    assert "'tools', which the chat template does not read" in str(left_out.problems[0])


def test_a_function_call_is_a_tool_call(tmp_path: Path) -> None:
    call = {**bot("x"), "function_call": CALL[0]["function"]}
    pairs, left_out, _ = read(tmp_path, {**CHAT, "chosen": [call]})
    assert not tokenize_pairs(pairs, byte_tokenizer(), None, left_out)
    assert left_out.problems[0].field == "function_call"
    reads = TOOL_TEMPLATE.replace("tool_calls", "function_call")
    assert len(tokenize_pairs(pairs, byte_tokenizer(reads), None, LeftOut())) == 1


@pytest.mark.parametrize("written", ["yes</s>", "yes<pad>", "yes</s><pad>", "yes</s>\n<pad></s> "])
def test_every_token_that_the_template_puts_behind_a_turn(written: str) -> None:
    """unsloth#3228 with two tokens: the second was doubled."""
    tokenizer = byte_tokenizer(TWO_ENDS)
    ids, left_out = tokens(chat(user("q"), bot(written), bot("no")), tokenizer)
    assert ids and scored(tokenizer, ids) == ("yes</s><pad>", "no</s><pad>")
    assert sum(n for note, n in left_out.notes.items() if "kept once" in note) == 1


def test_a_begin_token_in_a_completion_of_a_conversation() -> None:
    """trl#1591: the template's BOS, and another before the answer."""
    tokenizer = byte_tokenizer()
    ids, left_out = tokens(chat(user("q"), bot("<s>yes"), bot("<s><s>no")), tokenizer)
    assert ids and scored(tokenizer, ids) == ("yes</s>", "no</s>")
    assert sum(n for note, n in left_out.notes.items() if "BOS), which" in note) == 2


@pytest.mark.parametrize(
    "pair",
    [
        chat(user("q"), bot("</s>"), bot("no")),
        PreferencePair("q", "</s>", "no", "f:1"),
        PreferencePair("q", "<s> </s>", "no", "f:1"),
    ],
)
def test_special_tokens_alone_are_no_completion(pair: PreferencePair) -> None:
    ids, left_out = tokens(pair, byte_tokenizer())
    assert ids is None and left_out.counts() == {"empty completion": 1}
    assert left_out.problems[0].field == "chosen"


def test_equal_once_the_end_token_is_there_once() -> None:
    """The reason spoke of max_length=None."""
    ids, left_out = tokens(chat(user("q"), bot("yes</s>"), bot("yes")), byte_tokenizer())
    assert ids is None and left_out.counts() == {"chosen equals rejected": 1}
    assert "the same tokens as chosen" in str(left_out.problems[0])


def test_notes_count_the_rows_that_are_used(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "chosen": "b" * 50}]), LeftOut())
    left_out = LeftOut()
    assert (
        len(tokenize_pairs(pairs, byte_tokenizer(), None, left_out, print, Limits(None, 20))) == 1
    )
    assert left_out.notes["plain completions given an end token (EOS)"] == 2


def test_pictures_among_the_parts_of_a_message(tmp_path: Path) -> None:
    image = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "what is it?"}]
    row = {**CHAT, "prompt": [{"role": "user", "content": image}]}
    pairs, left_out, _ = read(tmp_path, row, CHAT)
    assert len(pairs) == 1
    problem = left_out.problems[0]
    assert problem.field == "prompt[0].content" and problem.reason == "not supported"
    assert "a part of type 'image'" in str(problem) and "text alone" in str(problem)
