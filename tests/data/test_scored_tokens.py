"""Special tokens of pairs, once each, and what of their completions is scored.

Ids in names and comments are of the public reports that showed the situation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user
from test_data_faults import chat, read, scored, tokens

from dpo_kernels.data import (
    Completion,
    LeftOut,
    PreferencePair,
    RowTokenizer,
    TokenSequence,
    Truncation,
    make_batch,
)
from dpo_kernels.data.batches import Sharing
from dpo_kernels.data.tokenize import ALL_TURNS, MERGED, NO_BEGIN


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


def test_a_missing_begin_token_and_merged_boundaries_are_counted() -> None:
    tokenizer = adds(byte_tokenizer(), True, False)
    bare = "{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template = bare
    _, left_out = tokens(chat(user("q"), bot("a"), bot("b")), tokenizer)
    assert left_out.notes[NO_BEGIN] == 1
    plain = byte_tokenizer(bare)
    _, left_out = tokens(chat(user("q"), bot("a"), bot("b")), plain)
    assert NO_BEGIN not in left_out.notes  # it puts none before a text either
    merging = byte_tokenizer(merges=[("a", "b")])
    _, left_out = tokens(PreferencePair("xa", "bc", "bd", "f:1"), merging, warn=lambda text: None)
    assert left_out.notes[MERGED] == 1


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


def test_the_users_turns_are_scored_where_it_is_asked_for(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    every = Truncation(assistant_only=False)
    ids, left_out = tokens(MULTI, tokenizer, every, warn=pytest.fail)
    wanted = "{}</s><s>user:why</s><s>assistant:{}</s>"
    assert ids and scored(tokenizer, ids) == (wanted.format("a", "so"), wanted.format("b", "no"))
    assert ids.unscored == ((), ()) and left_out.notes[ALL_TURNS] == 2
    # templates that do not keep the turns apart are no hindrance then
    found, _ = tokens(MULTI, byte_tokenizer(BARE), every)
    assert found and scored(tokenizer, found)[0].endswith("so</s>")
    row = Completion([user("q")], [bot("a"), user("why"), bot("so")], "f:1")
    left_out = LeftOut()
    one = RowTokenizer(tokenizer, every, left_out).of(row)
    assert isinstance(one, TokenSequence) and left_out.notes[ALL_TURNS] == 1
    text = tokenizer.decode([one.ids[t] for t in one.scored])
    assert text == wanted.format("a", "so")


REWRITES = (  # earlier answers are shortened, as templates do that drop earlier thoughts
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] if loop.last else '-' }}{{ '</s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


BARE = REWRITES.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def test_turns_by_the_templates_marks_or_refused() -> None:
    tokenizer = byte_tokenizer(REWRITES)
    ids, _ = tokens(MULTI, tokenizer, warn=lambda text: None)
    assert ids and scored(tokenizer, ids) == ("-</s>so</s>", "-</s>no</s>")
    found, left_out = tokens(MULTI, byte_tokenizer(BARE))
    assert found is None and left_out.counts() == {"turns cannot be told apart": 1}
