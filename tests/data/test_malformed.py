"""200 broken files from a generator: each a clear line, no traceback, and the good rows kept.

A file is some good rows with one fault, of a row or of the whole file, in a form that is drawn as
well: JSONL, a JSON list, CSV, gzip.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_data import bot, byte_tokenizer, user

from dpo_kernels.cli import main
from dpo_kernels.data import DataError, LeftOut, read_pairs, tokenize_pairs

FILES = 200
DEEP = "[" * 3000 + "]" * 3000


def good(i: int, chat: bool) -> dict[str, Any]:
    if chat:
        return {
            "prompt": [user(f"q{i}")],
            "chosen": [bot(f"a{i}")],
            "rejected": [bot(f"b{i}")],
        }
    return {"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"b{i}"}


def changed(**fields: Any) -> Callable[[random.Random, dict[str, Any]], str]:
    return lambda draw, row: json.dumps({**row, **fields})


def without(name: str) -> Callable[[random.Random, dict[str, Any]], str]:
    return lambda draw, row: json.dumps({k: v for k, v in row.items() if k != name})


def cut(draw: random.Random, row: dict[str, Any]) -> str:
    text = json.dumps(row)
    return text[: draw.randrange(1, len(text) - 1)]


def raw(text: str) -> Callable[[random.Random, dict[str, Any]], str]:
    return lambda draw, row: text


def half_a_character(draw: random.Random, row: dict[str, Any]) -> str:
    return json.dumps({**row, "chosen": "CUT"}).replace("CUT", "\\ud83d")


# One broken row among good ones: every good row is kept, the broken one named by its line.
ROWS: dict[str, Callable[[random.Random, dict[str, Any]], str]] = {
    "cut": cut,
    "no object": raw("[1, 2]"),
    "a word": raw("hello"),
    "a number": raw("17"),
    "single quotes": raw("{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}"),
    "a comma too many": raw('{"prompt": "a", "chosen": "b", "rejected": "c",}'),
    "twice": raw('{"prompt": "a", "chosen": "b", "chosen": "d", "rejected": "c"}'),
    "deep": raw(f'{{"prompt": {DEEP}, "chosen": "b", "rejected": "c"}}'),
    "a huge number": raw(f'{{"prompt": {"9" * 5000}, "chosen": "b", "rejected": "c"}}'),
    "no chosen": without("chosen"),
    "no rejected": without("rejected"),
    "null": changed(chosen=None),
    "an object": changed(chosen={"text": "a"}),
    "a list of texts": changed(rejected=["a"]),
    "a truth value": changed(prompt=True),
    "an empty completion": changed(chosen=" \n\t"),
    "no messages": changed(chosen=[]),
    "a role": changed(chosen=[{"role": "martian", "content": "x"}]),
    "no content": changed(chosen=[{"role": "assistant"}]),
    "ends with the user": changed(rejected=[user("x")]),
    "mixed": changed(prompt=["a", user("x")]),
    "pictures": changed(images=["a.png"]),
    "a margin": changed(margin="large"),
    "an infinite weight": changed(weight=float("inf")),
    "a negative beta": changed(beta=-1),
    "smoothing": changed(label_smoothing=2),
    "tools": changed(tools="no json"),
    "half a character": half_a_character,
    "double encoded": changed(chosen=json.dumps([bot("x")])),
    "no text": raw('{"prompt": "\\u0000", "chosen": "", "rejected": "c"}'),
}


def truncated(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data) // 2, len(data) - 2)]


def flipped(draw: random.Random, data: bytes) -> bytes:
    at = draw.randrange(12, len(data) - 8)
    return data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :]


def cut_list(draw: random.Random, data: bytes) -> bytes:
    """One element of a list loses its end; where the next one begins is for the reader to find."""
    lines = data.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = truncated(draw, lines[at])
    return b"[\n" + b",\n".join(lines) + b"\n]"


def undecodable(draw: random.Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = draw.randrange(len(lines))
    lines[at] = lines[at].replace(b"a", b"\xff", 1)
    return b"[" + b",\n".join(lines) + b"]"


def table(draw: random.Random, data: bytes) -> Any:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return pa.Table.from_pylist([json.loads(line) for line in data.splitlines()])


def arrow_cut(draw: random.Random, data: bytes) -> bytes:
    """An Arrow file of a batch a row, without the footer that says where they are."""
    made = table(draw, data)
    import pyarrow as pa

    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, made.schema) as writer:
        for batch in made.to_batches(max_chunksize=1):
            writer.write_batch(batch)
    whole = out.getvalue().to_pybytes()
    return whole[: len(whole) * 3 // 4]


def parquet_flipped(draw: random.Random, data: bytes) -> bytes:
    """Parquet of a row group a row, one byte of one of them another."""
    made = table(draw, data)
    import pyarrow as pa
    from pyarrow import parquet

    out = pa.BufferOutputStream()
    parquet.write_table(made, out, row_group_size=1, write_page_checksum=True)
    whole = bytearray(out.getvalue().to_pybytes())
    meta = parquet.ParquetFile(pa.BufferReader(bytes(whole))).metadata
    at = meta.row_group(draw.randrange(meta.num_row_groups)).column(0)
    start = at.dictionary_page_offset or at.data_page_offset
    whole[start : start + 4] = b"\xff\xff\xff\xff"
    return bytes(whole)


def zstd_cut(draw: random.Random, data: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    return truncated(draw, pa.compress(data, codec="zstd", asbytes=True))


def many(data: bytes) -> bytes:
    """Rows that no packing makes one block of."""
    draw = random.Random(5)
    row = json.loads(data.splitlines()[0])
    texts = (draw.randbytes(3000).hex() for _ in range(60))
    rows = ({**row, "note": text} for text in texts)
    return b"\n".join(json.dumps(r).encode() for r in rows)


def noise(draw: random.Random, data: bytes) -> bytes:
    return draw.randbytes(400)


# The whole file: refused in one line, or read as far as its rows are whole.
WHOLE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "empty": lambda draw, data: b"",
    "blank": lambda draw, data: b"\n \n\n",
    "noise": noise,
    "zeros": lambda draw, data: bytes(300),
    "utf-16": lambda draw, data: data.decode().encode("utf-16"),
    "zip": lambda draw, data: b"PK\x03\x04" + data,
    "parquet": lambda draw, data: b"PAR1" + data,
    "arrow": lambda draw, data: b"ARROW1\0\0" + data,
    "zstd": lambda draw, data: b"\x28\xb5\x2f\xfd" + data,
    "gzip cut": lambda draw, data: truncated(draw, gzip.compress(data)),
    "gzip flipped": lambda draw, data: flipped(draw, gzip.compress(data)),
    "a list cut": lambda draw, data: truncated(draw, b"[" + b",".join(data.splitlines()) + b"]"),
    "a list and more": lambda draw, data: b"[" + b",".join(data.splitlines()) + b"]\n{}",
    "one object over lines": lambda draw, data: json.dumps(
        json.loads(data.splitlines()[0]), indent=1
    ).encode(),
    "html": lambda draw, data: b"<!DOCTYPE html>\n<html>\n<body>Not found</body>\n</html>\n",
    "bzip2 cut": lambda draw, data: truncated(draw, bz2.compress(data)),
    "xz cut": lambda draw, data: truncated(draw, lzma.compress(data)),
    "a list with a cut element": cut_list,
    "a list with a byte that is no UTF-8": undecodable,
    "lfs": lambda draw, data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
}


def malformed(seed: int, folder: Path) -> tuple[Path, int | None, int]:
    """(a broken file, good rows that must be kept or None: the file is refused, the bad line)."""
    draw = random.Random(seed)
    n, chat = draw.randrange(2, 6), draw.random() < 0.5
    rows = [good(i, chat) for i in range(n)]
    lines = [json.dumps(row) for row in rows]
    if seed % 4 == 3:
        kind = draw.choice(sorted(WHOLE))
        file = folder / f"{seed}-{kind.replace(' ', '-')}.jsonl"
        file.write_bytes(WHOLE[kind](draw, "\n".join(lines).encode()))
        return file, None, 0
    kind = sorted(ROWS)[seed % len(ROWS)]
    at = draw.randrange(n + 1)
    lines.insert(at, ROWS[kind](draw, good(99, chat)))
    file = folder / f"{seed}-{kind.replace(' ', '-')}.jsonl"
    end = draw.choice(["\n", "\r\n"])
    data = end.join(lines).encode()
    if draw.random() < 0.3:
        file, data = file.with_name(file.name + ".gz"), gzip.compress(data)
    file.write_bytes(data)
    return file, n, at + 1


@pytest.mark.parametrize("part", range(8))
def test_each_is_a_line_and_the_good_rows_are_kept(tmp_path: Path, part: int) -> None:
    tokenizer = byte_tokenizer()
    for seed in range(part, FILES, 8):
        file, kept, line = malformed(seed, tmp_path)
        left_out = LeftOut()
        try:
            pairs = read_pairs(file, left_out)
        except DataError as error:
            text = str(error)
            assert kept is None, (file, text)
            assert str(file) in text and "\n" not in text and "Traceback" not in text, text
            assert len(text) < 600, text
            continue
        tokenize_pairs(pairs, tokenizer, 64, left_out, warn=lambda text: None)
        if kept is None:  # damaged in part: what is whole is read, what is not is named
            assert left_out.problems or len(pairs) <= 5, file
            continue
        assert len(pairs) == kept, (file, left_out.problems)
        (problem,) = left_out.problems
        assert problem.where == f"{file}:{line}", (file, problem)
        assert "\n" not in str(problem) and problem.expected and problem.reason, problem


def test_data_check_of_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line says the same, with its exit code."""
    for seed in range(0, FILES, 9):
        file, kept, _ = malformed(seed, tmp_path)
        code = main(["data", "check", str(file)])
        out = capsys.readouterr()
        assert code in (1, 2), file
        assert "Traceback" not in out.out + out.err
        if kept is not None:
            assert code == 1 and f"{file}:" in out.out, (file, out)


# --- damaged as a whole: how many of the rows are kept ---

DAMAGED: dict[str, tuple[Callable[[random.Random, bytes], bytes], Callable[[int, int], bool]]] = {
    "gzip cut": (lambda d, x: truncated(d, gzip.compress(many(x))), lambda n, k: 20 < k < 60),
    "bzip2 cut": (lambda d, x: truncated(d, bz2.compress(many(x))), lambda n, k: k < 60),
    "xz cut": (lambda d, x: truncated(d, lzma.compress(many(x))), lambda n, k: 20 < k < 60),
    "zstd cut": (lambda d, x: zstd_cut(d, many(x)), lambda n, k: k < 60),
    "gzip checksum": (
        lambda d, x: (lambda z: z[:-8] + b"zero" + z[-4:])(gzip.compress(x)),
        lambda n, k: k >= n - 1,
    ),
    "a list cut": (WHOLE["a list cut"], lambda n, k: 1 <= k < n),
    "a list with a cut element": (cut_list, lambda n, k: k == n - 1),
    "a list with a byte that is no UTF-8": (undecodable, lambda n, k: k == n - 1),
    "a list and more": (WHOLE["a list and more"], lambda n, k: k == n),
    "a list cut in gzip": (
        lambda d, x: truncated(d, gzip.compress(b"[" + b",".join(many(x).splitlines()) + b"]")),
        lambda n, k: 20 < k < 60,
    ),
    "arrow cut": (arrow_cut, lambda n, k: 1 <= k < n),
    "parquet flipped": (parquet_flipped, lambda n, k: k == n - 1),
    "a line that is no UTF-8": (
        lambda d, x: x.replace(b"a3", b"\xff\xfe", 1),
        lambda n, k: k == n - 1,
    ),
}


@pytest.mark.parametrize("kind", sorted(DAMAGED))
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_damaged_file_gives_its_whole_rows(
    tmp_path: Path, kind: str, chat: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    make, kept = DAMAGED[kind]
    rows = [json.dumps(good(i, chat)).encode() for i in range(6)]
    wanted = {f"q{i}" for i in range(6)}
    for seed in range(4):
        file = tmp_path / f"{seed}.json"
        file.write_bytes(make(random.Random(seed), b"\n".join(rows)))
        left_out = LeftOut()
        try:
            pairs = read_pairs(file, left_out)
        except DataError as error:  # nothing could be read at all
            assert kept(6, 0) and str(file) in str(error) and "\n" not in str(error), error
            continue
        prompts = [p.prompt if isinstance(p.prompt, str) else p.prompt[0]["content"] for p in pairs]
        assert kept(6, len(pairs)) and set(prompts) <= wanted, (len(pairs), left_out.problems)
        problem = left_out.problems[-1]
        assert problem.where.startswith(f"{file}") and "\n" not in str(problem), problem
        assert main(["data", "check", str(file), "--near", "false"]) == 1
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err and str(problem) in said.out
