"""Data that failed: what files may look like, what rows may carry, what of them is scored.

Ids in names and comments are of the public reports that showed the situation.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_data import TEMPLATE, bot, byte_tokenizer, user, write

from dpo_kernels.data import (
    DataError,
    LeftOut,
    Limits,
    NoUsableRow,
    PreferencePair,
    TokenPair,
    make_batch,
    read_pairs,
    tokenize_pairs,
)
from dpo_kernels.data.batches import Sharing

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


# --- files ---


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress], ids=["gzip", "bzip2"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl"])
def test_packed_files_are_unpacked(tmp_path: Path, pack: Any, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pack(b"\n".join(json.dumps(GOOD).encode() for _ in range(3)) + b"\n{"))
    left_out = LeftOut()
    assert [p.source for p in read_pairs(file, left_out)] == [f"{file}:{i}" for i in (1, 2, 3)]
    assert [p.where for p in left_out.problems] == [f"{file}:4"]


def test_a_broken_gzip_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 900)[:-12])
    with pytest.raises(DataError, match="cannot be read to its end"):
        read_pairs(file, LeftOut())


def test_a_byte_order_mark_costs_no_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    left_out = LeftOut()
    assert len(read_pairs(file, left_out)) == 1 and not left_out.problems


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PAR1", "Parquet"),
        (b"ARROW1\0\0", "Arrow"),
        (b"\xff\xfe{\0", "UTF-16"),
        (b"PK\x03\x04", "zip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, head: bytes, what: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(head + b"\n" * 50)
    with pytest.raises(DataError, match=f"{what}.*expected JSONL"):
        read_pairs(file, LeftOut())


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_read_with_its_lines(tmp_path: Path, indent: int | None) -> None:
    """datasets#6891 among them: one object a line, where only the last parsed as a line."""
    file = tmp_path / "a.json"
    file.write_text(json.dumps([GOOD, 3, {**GOOD, "margin": 1}], indent=indent))
    left_out = LeftOut()
    pairs = read_pairs(file, left_out)
    lines = (1, 1, 1) if indent is None else (2, 7, 8)
    assert [p.source for p in pairs] == [f"{file}:{lines[0]}", f"{file}:{lines[2]}"]
    assert [p.where for p in left_out.problems] == [f"{file}:{lines[1]}"]
    rows = ",\n".join(json.dumps(GOOD) for _ in range(3))
    file.write_text(f"[\n{rows}\n]\n")
    assert [p.source for p in read_pairs(file, left_out)] == [f"{file}:{i}" for i in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"a": 1},\n{"a"', 3),
        ("[\n{}\n{}\n]", 3),
        ("[{},]", 1),
        ("[{}]\n{}", 0),
        ("{\n{", 0),
        ("[{}", 1),
        ("[\n{}\n]\n]", 4),
        ("{\n}", 1),
    ],
)
def test_broken_lists_name_the_line(tmp_path: Path, text: str, line: int) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DataError, match=f"a.json:{line}: " if line else "no usable"):
        read_pairs(file, LeftOut())


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    chosen = json.dumps([bot("x")]).replace('"', '""')
    file.write_text(
        "prompt,chosen,rejected,margin,id\r\n"
        'a,"two\nlines",c,0.5,1\r\n'
        "a,b,c\r\n"
        "a,b,c,much,2\r\n"
        f'"[{{""role"": ""user"", ""content"": ""q""}}]","{chosen}",'
        f'"{chosen.replace("x", "y")}",,3\r\n'
    )
    left_out = LeftOut()
    first, second = read_pairs(file, left_out)
    assert (first.source, first.chosen, first.offset) == (f"{file}:2", "two\nlines", 0.5)
    assert (second.source, second.chosen) == (f"{file}:6", [bot("x")])
    assert [(p.where, p.field) for p in left_out.problems] == [
        (f"{file}:4", "line"),
        (f"{file}:5", "margin"),
    ]
    file.write_text("question,chosen,rejected,chosen\na,b,c,d\n")
    with pytest.raises(DataError, match="the columns are question, chosen"):
        read_pairs(file, LeftOut())
    file.write_text("prompt,chosen,rejected\na,\"[{'role': 'assistant'}]\",c\n")
    with pytest.raises(DataError, match="messages as JSON"):
        read_pairs(file, LeftOut())


def test_standard_input_and_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.dumps(GOOD).encode() + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_pairs("-", LeftOut())[0].source == "<stdin>:1"
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: fifo.write_bytes(data * 3))
    thread.start()
    assert len(read_pairs(fifo, LeftOut())) == 3
    thread.join()


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


# --- special tokens, and what is scored ---


def adds(tokenizer: Any, bos: bool, eos: bool) -> Any:
    """The tokenizer with BOS, EOS or both put around every text."""
    from tokenizers.processors import TemplateProcessing

    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("written", ["", "<s>"])
def test_one_bos_whoever_writes_it(written: str, eos: bool) -> None:
    """trl#1591, axolotl#1616; a tokenizer that appends EOS ends no prompt with it."""
    tokenizer = adds(byte_tokenizer(), True, eos)
    for end in ("", "</s>", "</s>\n"):
        pair = PreferencePair(f"{written}ab", f" c{end}", f" d{end}", "f:1")
        ids, left_out = tokens(pair, tokenizer, warn=pytest.fail)
        assert ids and tokenizer.decode(list(ids.prompt)) == "<s>ab"
        assert scored(tokenizer, ids) == (" c</s>", " d</s>")
        found = [note for note in left_out.notes if "BOS" in note]
        assert len(found) == (1 if written else 0)
        assert left_out.notes["plain completions with the end token (EOS) in their text"] == (
            2 if end else 0
        )


def test_the_templates_end_token_is_scored_once() -> None:
    """unsloth#3228"""
    tokenizer = byte_tokenizer()
    ids, left_out = tokens(chat(user("q</s>"), bot("yes</s>"), bot("no</s></s> ")), tokenizer)
    assert ids and tokenizer.decode(list(ids.prompt)) == "<s>user:q</s><s>assistant:"
    assert scored(tokenizer, ids) == ("yes</s>", "no</s>")
    assert sum(n for note, n in left_out.notes.items() if "kept once" in note) == 3


def test_a_begin_token_in_the_text_is_kept_once() -> None:
    """trl#1591 in other places: a completion's text, a conversation's first message."""
    tokenizer = adds(byte_tokenizer(), True, False)
    ids, _ = tokens(PreferencePair("<s>ab", "<s> c", "<s> d", "f:1"), tokenizer)
    assert ids and tokenizer.decode(list(ids.prompt)) == "<s>ab"
    assert scored(tokenizer, ids) == (" c</s>", " d</s>")
    ids, left_out = tokens(chat(user("<s>q"), bot("a"), bot("b")), byte_tokenizer())
    assert ids and tokenizer.decode(list(ids.prompt)) == "<s>user:q</s><s>assistant:"
    assert sum(n for note, n in left_out.notes.items() if "kept once" in note) == 1
    bare = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    ids, left_out = tokens(chat(user("q"), bot("a"), bot("b")), byte_tokenizer(bare))
    assert ids and left_out.notes["conversations that do not end with the end token (EOS)"] == 1


def test_a_repeated_prompt_is_taken_once(tmp_path: Path) -> None:
    """trl#1752"""
    rows = [
        {"prompt": [user("q")], "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
        {"prompt": [user("q")], "chosen": [bot("a")], "rejected": [user("q"), bot("b")]},
        {
            "prompt": [user("0"), bot("1"), user("q")],
            "chosen": [user("q"), bot("a")],
            "rejected": [user("0"), bot("1"), user("q"), bot("b")],
        },
    ]
    pairs, left_out, _ = read(tmp_path, *rows)
    for pair in pairs:
        assert (pair.chosen, pair.rejected) == ([bot("a")], [bot("b")])
    assert sum(left_out.notes.values()) == 5


MULTI = PreferencePair(
    [user("q")], [bot("a"), user("why"), bot("so")], [bot("b"), user("why"), bot("no")], "f:1"
)


def test_the_users_turns_are_not_scored() -> None:
    tokenizer = byte_tokenizer()
    ids, _ = tokens(MULTI, tokenizer, warn=pytest.fail)
    assert ids and scored(tokenizer, ids) == ("a</s>so</s>", "b</s>no</s>")
    # the layout that training and the plain step read
    batch = make_batch([ids], Sharing("padded"), 0)
    assert tokenizer.decode(batch.labels.tolist()) == "a</s>so</s>b</s>no</s>"
    assert batch.cu_seqlens.tolist() == [0, 5, 10]
    shared = make_batch([ids], Sharing("prefix"), 0)
    assert shared.labels.tolist() == batch.labels.tolist()
    # a completion that begins with the user, and a limit that cuts inside the user's turn
    late = PreferencePair([user("q")], [user("r"), bot("a")], [user("s"), bot("b")], "f:1")
    found, _ = tokens(late, tokenizer, warn=pytest.fail)
    assert found and scored(tokenizer, found) == ("a</s>", "b</s>")
    found, left_out = tokens(MULTI, tokenizer, len(ids.prompt) + 4)
    assert found and scored(tokenizer, found) == ("a</s>", "b</s>")
    assert left_out.notes[f"completions cut at max_length={len(ids.prompt) + 4}"] == 2


REWRITES = (  # earlier answers are shortened, as templates do that drop earlier thoughts
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] if loop.last else '-' }}{{ '</s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def test_turns_by_the_templates_marks_or_refused() -> None:
    tokenizer = byte_tokenizer(REWRITES)
    ids, _ = tokens(MULTI, tokenizer, warn=lambda text: None)
    assert ids and scored(tokenizer, ids) == ("-</s>so</s>", "-</s>no</s>")
    bare = REWRITES.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    found, left_out = tokens(MULTI, byte_tokenizer(bare))
    assert found is None and left_out.counts() == {"turns cannot be told apart": 1}


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
