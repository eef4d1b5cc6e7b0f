"""Reading, tokenising and laying out preference pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_kernels.data import (
    DataError,
    LeftOut,
    PreferencePair,
    Sharing,
    TokenPair,
    TokenSequence,
    make_batch,
    make_sequence_batch,
    read_conversations,
    read_pairs,
    tokenize_conversations,
    tokenize_pairs,
)
from dpo_kernels.data.segments import Segments

TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant:' }}{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE, merges: list[tuple[str, str]] | None = None):
    """A real tokenizer with one token a byte (and `merges`), built here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = merges or []
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += ["".join(m) for m in merges]
    raw = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_forms(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        [
            {"prompt": "Q: hi\nA:", "chosen": " yes", "rejected": " no"},
            {"chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"},
            {"prompt": [user("hi")], "chosen": [bot("a")], "rejected": [bot("b")]},
            {"chosen": [user("hi"), bot("a")], "rejected": [user("hi"), bot("b")]},
            {"prompt": "hi", "chosen": [user("hi"), bot("a")], "rejected": [user("hi"), bot("b")]},
            "",
            {"prompt": None, "chosen": "ab", "rejected": "ac", "margin": 2},
        ],
    )
    left_out = LeftOut()
    pairs = read_pairs(file, left_out)
    assert not left_out.problems
    assert [p.source for p in pairs] == [f"{file}:{i}" for i in (1, 2, 3, 4, 5, 7)]
    assert (pairs[1].prompt, pairs[1].chosen, pairs[1].rejected) == ("Q: hi A:", " yes", " no")
    for pair in pairs[2:5]:
        assert (pair.prompt, pair.chosen, pair.rejected) == ([user("hi")], [bot("a")], [bot("b")])
        assert pair.conversational
    assert pairs[5].offset == 2.0


GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}
BAD = [
    ('{"prompt": "a", "chosen"', "line", "broken JSON"),
    ("[1, 2]", "line", "broken JSON"),
    ({"prompt": "a", "chosen": "b"}, "rejected", "missing field"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen", "mis-typed field"),
    (
        {"prompt": ["a"], "chosen": [bot("x")], "rejected": [bot("y")]},
        "prompt[0]",
        "mis-typed field",
    ),
    (
        {"prompt": [{"role": "user"}], "chosen": [bot("x")], "rejected": [bot("y")]},
        "prompt[0].content",
        "mis-typed field",
    ),
    ({"prompt": "a", "chosen": [bot("x")], "rejected": [bot("y")]}, "prompt", "mis-typed field"),
    ({"prompt": "a", "chosen": "b", "rejected": [bot("y")]}, "rejected", "mis-typed field"),
    ({"prompt": "a", "chosen": " \n", "rejected": "c"}, "chosen", "empty completion"),
    (
        {"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("")]},
        "rejected",
        "empty completion",
    ),
    ({"prompt": [user("a")], "chosen": [], "rejected": [bot("b")]}, "chosen", "empty completion"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "chosen equals rejected"),
    (
        {"prompt": [user("a")], "chosen": [bot("x")], "rejected": [user("y")]},
        "rejected[-1].role",
        "last role not assistant",
    ),
    ({"chosen": "x", "rejected": "y"}, "prompt", "missing field"),
    ({**GOOD, "margin": "large"}, "margin", "mis-typed field"),
]


@pytest.mark.parametrize(("row", "field", "reason"), BAD)
def test_bad_rows(tmp_path: Path, row: Any, field: str, reason: str) -> None:
    file = write(tmp_path / "a.jsonl", [GOOD, row, GOOD])
    said: list[str] = []
    left_out = LeftOut(report=said.append)
    assert len(read_pairs(file, left_out)) == 2
    (problem,) = left_out.problems
    assert (problem.where, problem.field, problem.reason) == (f"{file}:2", field, reason)
    assert len(said) == 1 and f"{file}:2: {field}: " in said[0] and "expected" in said[0]
    assert left_out.counts() == {reason: 1} and reason in left_out.summary()
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {field.split('[')[0]}"):
        read_pairs(file, LeftOut(strict=True))


def test_undecodable_line_and_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"prompt": "\xff"}\n' + json.dumps(GOOD).encode())
    left_out = LeftOut()
    assert len(read_pairs(file, left_out)) == 1 and left_out.counts() == {"broken JSON": 1}
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(tmp_path / "none.jsonl", LeftOut())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder without data files"):
        read_pairs(tmp_path / "empty", LeftOut())
    file.write_text("{}\n")
    with pytest.raises(DataError, match="no usable preference pair"):
        read_pairs(file, LeftOut())


def test_tokenise_conversation() -> None:
    tokenizer = byte_tokenizer()
    pair = PreferencePair([user("hi")], [bot("yes")], [bot("no")], "f:1")
    (ids,) = tokenize_pairs([pair], tokenizer, 100, LeftOut())
    assert tokenizer.decode(list(ids.prompt)) == "<s>user:hi</s><s>assistant:"
    assert tokenizer.decode(list(ids.chosen)) == "yes</s>"
    assert tokenizer.decode(list(ids.rejected)) == "no</s>"


def test_no_template() -> None:
    pair = PreferencePair([user("hi")], [bot("yes")], [bot("no")], "f:1")
    with pytest.raises(DataError, match="--chat_template FILE"):
        tokenize_pairs([pair], byte_tokenizer(template=None), 100, LeftOut())


def test_template_that_refuses_a_row() -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = byte_tokenizer(template=refuses + TEMPLATE)
    system = [{"role": "system", "content": "x"}]
    left_out = LeftOut()
    pairs = [
        PreferencePair(system, [bot("a")], [bot("b")], "f:1"),
        PreferencePair([user("q")], [bot("a")], [bot("b")], "f:2"),
    ]
    assert [p.source for p in tokenize_pairs(pairs, tokenizer, 99, left_out)] == ["f:2"]
    assert left_out.counts() == {"chat template refuses": 1}


def test_tokenise_plain_appends_eos_once() -> None:
    tokenizer = byte_tokenizer()
    pairs = [PreferencePair("ab", " c", " d</s>", "f:1")]
    (ids,) = tokenize_pairs(pairs, tokenizer, 100, LeftOut())
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(list(ids.prompt)) == "ab"
    assert ids.chosen[-1] == ids.rejected[-1] == eos
    assert ids.chosen.count(eos) == ids.rejected.count(eos) == 1


def test_prompt_that_merges_with_the_completion() -> None:
    """The completion starts where prompt and prompt + completion diverge, and this is said once."""
    tokenizer = byte_tokenizer(merges=[("b", "c")])
    said: list[str] = []
    pairs = [PreferencePair("ab", "cd", "xd", f"f:{i}") for i in (1, 2)]
    first, _ = tokenize_pairs(pairs, tokenizer, 100, LeftOut(), said.append)
    assert tokenizer.decode(list(first.prompt)) == "a"
    assert tokenizer.decode(list(first.chosen)) == "bcd</s>"
    assert tokenizer.decode(list(first.rejected)) == "bxd</s>"
    assert len(said) == 1 and "f:1" in said[0] and "'b'" in said[0]


def test_truncation() -> None:
    tokenizer, left_out = byte_tokenizer(), LeftOut()
    pairs = [
        PreferencePair("abcdef", "x", "y", "long prompt"),
        PreferencePair("abc", "xy", "xz", "same within the limit"),
        PreferencePair("abc", "xy", "z", "kept"),
    ]
    (kept,) = tokenize_pairs(pairs, tokenizer, 4, left_out)
    assert kept.source == "kept" and len(kept.chosen) == len(kept.rejected) == 1
    assert left_out.counts() == {"prompt too long": 1, "same after truncation": 1}
    assert "6 tokens, expected fewer than max_length=4" in str(left_out.problems[0])
    (whole,) = tokenize_pairs(pairs[:1], tokenizer, None, LeftOut())
    assert len(whole.prompt + whole.chosen) == 8


def test_conversations(tmp_path: Path) -> None:
    rows = [{"messages": [user("q"), bot("a")]}, {"messages": [user("q")]}, {"messages": "q"}]
    left_out = LeftOut()
    read = read_conversations(write(tmp_path / "s.jsonl", rows), left_out)
    assert left_out.counts() == {"last role not assistant": 1, "mis-typed field": 1}
    tokenizer = byte_tokenizer()
    (sequence,) = tokenize_conversations(read, tokenizer, 50, left_out)
    assert tokenizer.decode(list(sequence.ids[sequence.start :])) == "a</s>"


def random_pairs(n: int, seed: int = 0, vocab: int = 90) -> list[TokenPair]:
    """Pairs of many shapes, among them a one-token prompt and completions that start alike."""
    g = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (length,), generator=g).tolist())

    pairs = []
    for i in range(n):
        P, C, R = (int(torch.randint(1, 12, (), generator=g)) for _ in range(3))
        start = ids(2) if i % 2 else ()
        pairs.append(TokenPair(ids(1 if i == 0 else P), start + ids(C), start + ids(R), f"f:{i}"))
    return pairs


def visible_in(segments: Segments) -> torch.Tensor:
    """[T, T] True where a query of the packed row sees a key."""
    bounds = segments.bounds("cpu")
    T = int(bounds.cu_q[-1])
    keys = torch.arange(T) if bounds.keys is None else bounds.keys
    mask = torch.zeros(T, T, dtype=torch.bool)
    for i, part in enumerate(segments.parts):
        places = keys[bounds.cu_k[i] : bounds.cu_k[i + 1]]
        for q in range(part.length):
            mask[int(bounds.cu_q[i]) + q, places[: part.prefix + q + 1]] = True
    return mask


@pytest.mark.parametrize("mode", ["padded", "packed", "prefix", "auto"])
@pytest.mark.parametrize("call_tokens", [None, 0, 4])
def test_batch_rows_and_labels(mode: str, call_tokens: int | None) -> None:
    """Every scored label, in order, with the state that predicts it: that of its prefix."""
    pairs = random_pairs(5)
    batch = make_batch(pairs, Sharing(mode, 0.01, call_tokens), pad_id=0)
    sequences = [p.sequences[0] for p in pairs] + [p.sequences[1] for p in pairs]
    assert batch.labels.tolist() == [i for s in sequences for i in s.ids[s.start :]]
    assert batch.cu_seqlens.diff().tolist() == [s.num_scored for s in sequences]
    assert batch.num_tokens == sum(len(s.ids) for s in sequences)
    assert batch.num_chosen_scored == sum(len(p.chosen) for p in pairs)
    # Follow each row back: the tokens it can see must be exactly the sequence before the label.
    seen: list[tuple[int, ...]] = []
    for call in batch.calls:
        R, S = call.input_ids.shape
        mask = visible_in(call.segments) if call.segments else torch.ones(S, S).tril()
        for r in range(R):
            for t in range(S):
                visible = mask[t].bool()
                seen.append(tuple(call.input_ids[r][visible].tolist()))
                if call.position_ids is not None:
                    at = call.position_ids[r][visible].tolist()
                    assert at == list(range(len(at)))
    expected = [s.ids[:k] for s in sequences for k in range(s.start, len(s.ids))]
    assert [seen[r] for r in batch.rows.tolist()] == expected


def test_prefix_layout_runs_each_token_once() -> None:
    pair = TokenPair((5,) * 20, (6, 7, 8), (9, 10), "f")
    shared = make_batch([pair], Sharing("prefix"), 0)
    assert [c.input_ids.shape for c in shared.calls] == [(1, 25)]
    auto = make_batch([pair], Sharing("auto", attention_ratio=1e-3), 0)
    assert [c.input_ids.shape for c in auto.calls] == [(1, 25)]
    # A rejected completion that is long beside its prompt: its entries cost more than the prompt.
    long = TokenPair((5,), (6,) * 30, (7,) * 30, "f")
    dear = make_batch([long], Sharing("auto", attention_ratio=1.0), 0)
    assert sum(c.input_ids.numel() for c in dear.calls) == 62


def test_empty_prompt_and_empty_batch() -> None:
    """Nothing predicts the first token of an empty prompt's completion: it is not scored."""
    sequence = TokenSequence((4, 5, 6), 0, "f")
    batch = make_sequence_batch([sequence], Sharing(), 0)
    assert batch.labels.tolist() == [5, 6] and batch.rows.tolist() == [0, 1]
    with pytest.raises(ValueError, match="at least one pair"):
        make_batch([], Sharing(), 0)
