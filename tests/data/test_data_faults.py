"""Data that failed: what files may look like, what rows may carry, what of them is scored.

Ids in names and comments are of the public reports that showed the situation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data import TEMPLATE, bot, byte_tokenizer, user, write

from dpo_kernels.data import (
    LeftOut,
    Limits,
    NoUsableRow,
    PreferencePair,
    TokenPair,
    read_pairs,
    tokenize_pairs,
)

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
CHAT = {"prompt": [user("q")], "chosen": [bot("yes")], "rejected": [bot("no")]}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
TOOL_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<no/>{% endif %}{% endif %}"
)


def read(path: Path, *rows: Any) -> tuple[list[PreferencePair], LeftOut, list[str]]:
    said: list[str] = []
    left_out = LeftOut(report=said.append)
    try:
        pairs = read_pairs(write(path / "a.jsonl", list(rows)), left_out)
    except NoUsableRow:
        pairs = []
    return pairs, left_out, said


def tokens(
    row: PreferencePair, tokenizer: Any, max_length: int | None = None, **options: Any
) -> tuple[TokenPair | None, LeftOut]:
    left_out = LeftOut()
    found = tokenize_pairs([row], tokenizer, max_length, left_out, **options)
    return (found[0] if found else None), left_out


def scored(tokenizer: Any, pair: TokenPair) -> tuple[str, str]:
    """What is scored of chosen and rejected, as texts."""
    return tuple(  # type: ignore[return-value]
        tokenizer.decode([s.ids[t] for t in s.scored]) for s in pair.sequences
    )


def chat(*rows: dict[str, Any]) -> PreferencePair:
    prompt, chosen, rejected = rows
    return PreferencePair([prompt], [chosen], [rejected], "f:1")


# --- rows ---


@pytest.mark.parametrize("name", ["question", "instruction", "query", "messages_before"])
def test_a_prompt_under_another_name_is_refused(tmp_path: Path, name: str) -> None:
    """LlamaFactory#4720: the letter that both answers share passed for the prompt."""
    for value, chosen, rejected in (
        ("2+2?", "Four", "Five"),
        ([user("2+2?")], [bot("Four")], [bot("Five")]),
    ):
        row = {name: value, "chosen": chosen, "rejected": rejected}
        _, left_out, _ = read(tmp_path, row)
        assert f"the column {name!r} is unknown" in str(left_out.problems[0])
    with pytest.raises(NoUsableRow, match=name):
        read_pairs(write(tmp_path / "b.jsonl", [row]), LeftOut())


def test_unused_columns_are_named_once(tmp_path: Path) -> None:
    rows = [{**GOOD, "score": i, "why": "x", "empty": None} for i in range(5)]
    pairs, left_out, said = read(tmp_path, *rows)
    assert len(pairs) == 5 and not left_out.problems
    assert len(said) == 1 and "not used: score (5 rows), why (5 rows)" in said[0]


@pytest.mark.parametrize("name", ["images", "image", "videos", "audio"])
def test_pictures_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """trl#2385"""
    pairs, left_out, _ = read(tmp_path, {**GOOD, name: ["a.png"]}, {**GOOD, name: []})
    assert len(pairs) == 1
    assert (left_out.problems[0].field, left_out.problems[0].reason) == (name, "not supported")


def test_system_column(tmp_path: Path) -> None:
    """trl#2385: it becomes the first message, or is refused where it cannot."""
    implicit = {"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]}
    pairs, left_out, _ = read(
        tmp_path,
        {**CHAT, "system": "be kind"},
        {**implicit, "system": "be kind"},
        {**GOOD, "system": "be kind"},
        {**CHAT, "system": 3},
        {**CHAT, "system": ""},
        {**CHAT, "prompt": [{"role": "system", "content": "rude"}, user("q")], "system": "kind"},
    )
    system = {"role": "system", "content": "be kind"}
    assert [p.prompt for p in pairs] == [[system, user("q")], [system, user("q")], [user("q")]]
    assert [(p.where[-1], p.field) for p in left_out.problems] == [
        ("3", "system"),
        ("4", "system"),
        ("6", "system"),
    ]


@pytest.mark.parametrize("content", ["", None, "missing"])
def test_tool_calls_are_completions(tmp_path: Path, content: str | None) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": CALL}
    if content == "missing":
        del call["content"]
    (pair,), left_out, _ = read(tmp_path, {**CHAT, "chosen": [call]})
    assert not left_out.problems
    tokenizer = byte_tokenizer(TOOL_TEMPLATE)
    ids, _ = tokens(pair, tokenizer)
    assert ids and scored(tokenizer, ids)[0] == json.dumps(CALL) + "</s>"
    ids, left_out = tokens(pair, byte_tokenizer())
    assert ids is None and left_out.problems[0].field == "tool_calls"


def test_tools_and_template_kwargs_reach_the_template(tmp_path: Path) -> None:
    """LlamaFactory#9092; a template that does not read them refuses the row by name."""
    tool = {"type": "function", "function": {"name": "f"}}
    options = {"enable_thinking": False}
    row = {**CHAT, "tools": [tool], "chat_template_kwargs": options}
    text = {**row, "tools": json.dumps([tool]), "chat_template_kwargs": json.dumps(options)}
    pairs, left_out, _ = read(tmp_path, row, text, {**CHAT, "tools": [], "system": None})
    assert not left_out.problems and pairs[2].tools is None
    tokenizer = byte_tokenizer(TOOL_TEMPLATE)
    for pair in pairs[:2]:
        ids, _ = tokens(pair, tokenizer)
        assert ids is not None
        prompt = tokenizer.decode(list(ids.prompt))
        assert prompt.startswith("<tools>") and '"name": "f"' in prompt
        ids, left_out = tokens(pair, byte_tokenizer())
        assert ids is None and left_out.problems[0].field == "tools"
    only = {**CHAT, "chat_template_kwargs": options}
    (pair,), _, _ = read(tmp_path, only)
    ids, left_out = tokens(pair, byte_tokenizer())
    assert ids is None and "'enable_thinking', which the chat template" in str(left_out.problems[0])
    bad = (
        {**GOOD, "tools": [tool]},
        {**CHAT, "tools": "no json"},
        {**CHAT, "tools": [1]},
        {**CHAT, "chat_template_kwargs": {"tokenize": False}},
    )
    _, left_out, _ = read(tmp_path, *bad)
    assert [p.field.partition(".")[0] for p in left_out.problems] == [
        "tools",
        "tools",
        "tools",
        "chat_template_kwargs",
    ]


def test_weight_and_beta_columns(tmp_path: Path) -> None:
    (pair,), left_out, _ = read(
        tmp_path,
        {**GOOD, "weight": 0.5, "beta": 0.2},
        {**GOOD, "weight": -1},
        {**GOOD, "beta": 0},
        {**GOOD, "margin": float("nan")},
        {**GOOD, "weight": True},
        {**GOOD, "margin": 10**400},
    )
    assert (pair.weight, pair.beta) == (0.5, 0.2)
    assert [p.field for p in left_out.problems] == ["weight", "beta", "margin", "weight", "margin"]
    ids, _ = tokens(pair, byte_tokenizer())
    assert ids and (ids.weight, ids.beta) == (0.5, 0.2)


def test_unknown_roles_are_refused(tmp_path: Path) -> None:
    bogus = {"role": "bogus", "content": "x"}
    _, left_out, _ = read(
        tmp_path,
        {**CHAT, "prompt": [bogus]},
        {**CHAT, "chosen": [bogus, bot("y")]},
        {**CHAT, "chosen": [{"from": "gpt", "value": "y"}]},
        {**CHAT, "chosen": [{"role": "system", "content": "x"}, bot("y")]},
    )
    assert [p.reason for p in left_out.problems] == [
        "unknown role",
        "unknown role",
        "mis-typed field",
        "system message in a completion",
    ]


def test_a_lone_surrogate_is_a_line(tmp_path: Path) -> None:
    """tokenizers#1609, transformers#43459"""
    half = '"\\ud83d"'
    rows = [
        f'{{"prompt": {half}, "chosen": "b", "rejected": "c"}}',
        f'{{"prompt": "a", "chosen": "b", "rejected": {half}}}',
        f'{{"prompt": [{{"role": "user", "content": {half}}}], "chosen": '
        '[{"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", '
        '"content": "y"}]}',
        json.dumps({**CHAT, "tools": [{"a": "X"}]}).replace('"X"', half),
        json.dumps({**GOOD, "unused": "X"}).replace('"X"', half),
    ]
    pairs, left_out, _ = read(tmp_path, *rows)
    assert len(pairs) == 1
    assert [p.field for p in left_out.problems] == [
        "prompt",
        "rejected",
        "prompt[0].content",
        "tools",
    ]
    left_out.write(tmp_path / "left_out.jsonl")


def test_a_key_that_comes_twice(tmp_path: Path) -> None:
    _, left_out, _ = read(tmp_path, '{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": 1}')
    assert "the key 'chosen' twice" in str(left_out.problems[0])


def test_twenty_lines_of_a_kind_and_all_in_the_file(tmp_path: Path) -> None:
    rows = [*["{"] * 500, *[{**GOOD, "chosen": 3}] * 30, GOOD]
    _, left_out, said = read(tmp_path, *rows)
    assert len(said) == 42 and sum("only counted" in line for line in said) == 2
    assert left_out.counts() == {"broken JSON": 500, "mis-typed field": 30}
    assert len(left_out.shown()) == 40
    left_out.write(tmp_path / "left_out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "left_out.jsonl").open()]
    assert len(written) == 530 and set(written[0]) == {
        "where",
        "field",
        "got",
        "expected",
        "reason",
    }


# --- what the model can be fed, and templates that raise ---


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(vocabulary=60), "token id beyond the embedding"),
        (Limits(positions=5), "longer than the model's positions"),
    ],
)
def test_what_the_model_cannot_be_fed_is_left_out(limits: Limits, reason: str) -> None:
    ids, left_out = tokens(
        PreferencePair("ab", "long one", "c", "f:7"), byte_tokenizer(), limits=limits
    )
    assert ids is None and left_out.counts() == {reason: 1}
    assert left_out.problems[0].where == "f:7" and left_out.problems[0].field == "chosen"


def test_limits_of_configurations() -> None:
    transformers = pytest.importorskip("transformers")
    assert Limits.of(transformers.GPT2Config(n_positions=64, vocab_size=9)) == Limits(9, 64, None)
    llama = transformers.LlamaConfig(max_position_embeddings=64, vocab_size=9)
    assert Limits.of(llama) == Limits(9, None, 64)
    assert Limits.of(transformers.OPTConfig()).positions == 2048
    assert Limits.of(transformers.MambaConfig()).positions is None
    assert Limits.of(transformers.BloomConfig()).positions is None


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ 'a' + messages[0].nothing.at_all }}",
        "{{ 'a' + 1 }}",
        "{% if %}",
        "{{ messages[9]['role'] + 1 }}",
    ],
)
def test_a_template_that_raises_is_a_line(template: str) -> None:
    ids, left_out = tokens(chat(user("q"), bot("a"), bot("b")), byte_tokenizer(template))
    assert ids is None and left_out.counts() == {"chat template refuses": 1}
    assert "refused by the chat template (" in str(left_out.problems[0])


def test_message_keys_that_no_template_reads_are_named_once(tmp_path: Path) -> None:
    said: list[str] = []
    left_out = LeftOut(report=said.append)
    pair = chat({**user("q"), "name": "Ann"}, bot("a"), bot("b"))
    assert len(tokenize_pairs([pair, pair], byte_tokenizer(), 99, left_out)) == 2
    assert said == ["the chat template does not read 'name' of a message; it is not used"]


def test_long_lists_show_their_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_kernels.data import tokenize

    seen = []

    def progress(items: Any, what: str, total: int, unit: str) -> Any:
        seen.append((what, total, unit))
        return iter(items)

    pairs = [PreferencePair("a", "b", "c", f"f:{i}") for i in range(5)]
    for long in (6, 5):
        monkeypatch.setattr(tokenize, "LONG", long)
        assert len(tokenize_pairs(pairs, byte_tokenizer(), 9, LeftOut(), progress=progress)) == 5
    assert seen == [("tokenising", 5, "pairs")]
    assert TEMPLATE
