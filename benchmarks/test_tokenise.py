"""Rows of pairs that are read and tokenised a second, as training does before its first step.

pytest benchmarks/test_tokenise.py -s [--loop_results FILE]
"""

import json
import random
import statistics
import time

import pytest
from conftest import LOOP

from dpo_kernels.data import LeftOut, embedded, read_pairs, tokenize_many

ROWS = 4000
ROUNDS = 3


def test_rows_a_second(tmp_path, monkeypatch):
    """Conversations of the embedded data, each row another one, so that nothing is cached."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("DPO_KERNELS_CACHE", str(tmp_path / "cache"))
    rnd = random.Random(0)
    with embedded.folder() as source:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    file = tmp_path / "pairs.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i in range(ROWS):
            row = dict(rows[i % len(rows)])
            turns = [dict(m) for m in row["chosen"]]
            turns[-1]["content"] += f" {rnd.random()}"
            out.write(json.dumps({**row, "chosen": turns}) + "\n")
    took, tokens = [], 0
    for _ in range(ROUNDS):
        left_out = LeftOut()
        began = time.perf_counter()
        pairs = tokenize_many(read_pairs(str(file), left_out), tokenizer, 512, left_out)
        took.append(time.perf_counter() - began)
        tokens = sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
        assert len(pairs) == ROWS and not left_out.total
    seconds = statistics.median(took)
    LOOP["tokenise"] = {
        "rows": ROWS,
        "rows per second": ROWS / seconds,
        "tokens per second": tokens / seconds,
    }
    print(f"\n{ROWS / seconds:,.0f} rows a second, {tokens / seconds:,.0f} tokens a second")
