"""The cache of reference log-probs: what names a value, damage, runs that are killed or side by
side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data import random_pairs
from test_train import config_of, tiny_model, tiny_policy

from dpo_kernels.data import TokenPair, TokenSequence
from dpo_kernels.models.reference_cache import (
    ReferenceCache,
    reference_identity,
    sequence_key,
    sequences_of,
    weights_digest,
)
from dpo_kernels.train import reference
from dpo_kernels.train.console import Console
from dpo_kernels.train.model import Policy
from dpo_kernels.train.reference import open_cache, with_reference

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of each forward of a reference."""
    seen: list[int] = []
    plain = reference._scores

    def watched(policy: Policy, pairs: Any) -> Any:
        seen.append(len(pairs))
        return plain(policy, pairs)

    monkeypatch.setattr(reference, "_scores", watched)
    return seen


def run(
    folder: Path, pairs: list[TokenPair], policy: Policy | None = None, **options: Any
) -> list[torch.Tensor]:
    """Reference log-probs of the pairs by the cache in `folder`, chosen and rejected of each."""
    policy = policy or tiny_policy()
    config = config_of(reference_cache=str(folder), **options)
    cache = open_cache(policy, config, QUIET)
    assert cache is not None
    with cache:
        data = with_reference(policy, pairs, config, QUIET, "pairs", cache=cache)
    assert data.reference is not None
    n = range(len(pairs))
    return [data.reference.chosen[i] for i in n] + [data.reference.rejected[i] for i in n]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_what_changes_no_value_costs_no_pass(tmp_path: Path, scored: list[int]) -> None:
    """Learning rate, loss, beta, order, folder of the run; added rows cost themselves alone."""
    pairs = random_pairs(9)
    first = run(tmp_path, pairs)
    assert sum(scored) == 9
    scored.clear()
    assert same(run(tmp_path, pairs, learning_rate=0.5, loss_type="ipo", beta=0.7), first)
    assert same(run(tmp_path, pairs[::-1], output_dir="elsewhere")[:9], first[:9][::-1])
    assert scored == []
    tail = run(tmp_path, pairs, ld_alpha=0.5)  # values per token of the same pass
    assert scored == [] and [len(t) for t in tail[:9]] == [p.sequences[0].num_scored for p in pairs]
    torch.testing.assert_close(torch.stack([t.sum() for t in tail]), torch.stack(first))
    more = random_pairs(3, seed=7)
    run(tmp_path, [more[0], *pairs, *more[1:]])
    assert sum(scored) == 3


def test_the_values_are_those_of_a_pass(tmp_path: Path) -> None:
    pairs = random_pairs(6)
    policy, config = tiny_policy(), config_of()
    plain = with_reference(policy, pairs, config, QUIET, "pairs").reference
    assert plain is not None
    cached = run(tmp_path, pairs, policy)
    expected = [*plain.chosen.values(), *plain.rejected.values()]
    torch.testing.assert_close(torch.stack(cached), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_what_changes_a_value_has_another_name(tmp_path: Path, scored: list[int]) -> None:
    """Weights, configuration, dtype; ids, and which of them are scored."""
    pairs = random_pairs(4)
    run(tmp_path, pairs)
    for change in ("weights", "config", "dtype"):
        scored.clear()
        model = tiny_model(dtype=torch.float64 if change == "dtype" else torch.float32)
        options = {"dtype": "float64"} if change == "dtype" else {}
        if change == "weights":
            with torch.no_grad():
                next(model.parameters())[5, 3] += 1e-4
        if change == "config":
            model.config.rms_norm_eps = 1e-3
        policy = tiny_policy(model, **options)
        run(tmp_path, pairs, policy)
        assert sum(scored) == 4, change
    one = TokenSequence((1, 2, 3, 4, 5), 2, "f")
    others = (
        TokenSequence((1, 2, 3, 4, 6), 2, "f"),
        TokenSequence((1, 2, 3, 4, 5), 1, "f"),
        TokenSequence((1, 2, 3, 4, 5), 2, "f", ((3, 4),)),
    )
    assert len({sequence_key(s) for s in (one, *others)}) == 4
    assert sequence_key(one) == sequence_key(TokenSequence((1, 2, 3, 4, 5), 2, "elsewhere:9"))


def test_padded_rows_have_the_same_names() -> None:
    """A framework's batch and our sequences name the same values."""
    pairs = [
        TokenPair((5, 6), (7, 8, 9), (7, 4), "f:1"),
        TokenPair((5,), (7, 8, 9, 3), (2,), "f:2", unscored=(((2, 4),), ())),
    ]
    wanted = [p.sequences[0] for p in pairs] + [p.sequences[1] for p in pairs]
    T = 8
    ids, labels = torch.zeros(4, T, dtype=torch.long), torch.full((4, T), -100)
    mask = torch.zeros(4, T, dtype=torch.long)
    for r, s in enumerate(wanted):
        pad = T - len(s.ids)  # on the left
        ids[r, pad:], mask[r, pad:] = torch.tensor(s.ids), 1
        for t in s.scored:
            labels[r, pad + t] = s.ids[t]
    found = sequences_of(ids, mask, labels)
    assert [sequence_key(s) for s in found] == [sequence_key(s) for s in wanted]


@pytest.mark.parametrize("where", ["title", "head", "key", "value", "last"])
def test_a_flipped_byte_is_found(tmp_path: Path, scored: list[int], where: str) -> None:
    pairs = random_pairs(8)
    first = run(tmp_path, pairs)
    (part,) = tmp_path.glob("*/*.part")
    data = bytearray(part.read_bytes())
    begins = data.index(b"\xd0dk\x01")
    at = {"title": 3, "head": begins + 9, "key": begins + 20, "value": begins + 300, "last": -1}
    data[at[where]] ^= 0x40
    part.write_bytes(data)
    scored.clear()
    said: list[str] = []
    policy = tiny_policy()
    with ReferenceCache(
        tmp_path, reference_identity(policy.model, policy.dtype), said.append
    ) as cache:
        assert cache.counts.damaged + cache.counts.foreign == 1 and str(part) in said[0]
    assert same(run(tmp_path, pairs), first)
    assert sum(scored) == (8 if where == "title" else 4)
    scored.clear()
    assert same(run(tmp_path, pairs), first) and scored == []


def test_a_byte_that_flips_while_the_cache_is_open(tmp_path: Path) -> None:
    policy = tiny_policy()
    identity = reference_identity(policy.model, policy.dtype)
    key = sequence_key(TokenSequence((1, 2, 3), 1, "f"))
    with ReferenceCache(tmp_path, identity) as cache:
        cache.put([key], [torch.tensor([0.5, -2.0])])
        cache.refresh()
        (value,) = cache.get([key]) or []
        assert value.tolist() == [0.5, -2.0]
        (part,) = tmp_path.glob("*/*.part")
        with part.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        assert cache.get([key]) is None and cache.counts.damaged == 1


def test_foreign_and_half_written_files(tmp_path: Path, scored: list[int]) -> None:
    """Another identity's file under this name (a folder copied by hand), and a cut one."""
    pairs = random_pairs(8)
    first = run(tmp_path, pairs)
    (part,) = tmp_path.glob("*/*.part")
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])
    scored.clear()
    assert same(run(tmp_path, pairs), first) and sum(scored) == 4
    other = tiny_model()
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    policy = tiny_policy(other)
    scored.clear()
    expected = run(tmp_path / "fresh", pairs, policy)
    identity = reference_identity(policy.model, policy.dtype)
    with ReferenceCache(tmp_path, identity) as cache:
        (cache.path / "copied.part").write_bytes(whole)
    assert same(run(tmp_path, pairs, policy), expected) and sum(scored) == 16


@pytest.mark.parametrize("what", ["empty", "title cut", "noise", "folder", "identity"])
def test_strange_entries_of_the_folder(tmp_path: Path, scored: list[int], what: str) -> None:
    """What holds no values costs those that it held; nothing else is touched."""
    pairs = random_pairs(8)
    first = run(tmp_path, pairs)
    (part,) = tmp_path.glob("*/*.part")
    lost = {"empty": b"", "title cut": part.read_bytes()[:9], "noise": os.urandom(4000)}
    if what in lost:
        part.write_bytes(lost[what])
    elif what == "folder":
        (part.parent / "a.part").mkdir()
    else:
        (part.parent / "identity.json").write_text("{")
    scored.clear()
    assert same(run(tmp_path, pairs), first) and sum(scored) == 8 * (what in lost)
    scored.clear()
    assert same(run(tmp_path, pairs), first) and not scored


def test_a_file_that_ends_within_a_record_is_told(tmp_path: Path) -> None:
    """Unless its writer is at work on it."""
    policy = tiny_policy()
    identity = reference_identity(policy.model, policy.dtype)
    key = sequence_key(TokenSequence((1, 2, 3), 1, "f"))
    said: list[str] = []
    with ReferenceCache(tmp_path, identity) as writer:
        writer.put([key], [torch.tensor([0.5, -2.0])])
        writer._own.write(b"\xd0dk")
        with ReferenceCache(tmp_path, identity, said.append) as other:
            assert key in other and not said
    with ReferenceCache(tmp_path, identity, said.append) as other:
        assert key in other and other.counts.damaged == 1
    assert len(said) == 1 and "ends within a record" in said[0] and ".part" in said[0]


def test_runs_side_by_side_share(tmp_path: Path, scored: list[int]) -> None:
    """What one has written the other takes, though both were open before; and of two at work at
    once one goes from the back."""
    pairs = random_pairs(8)
    policy = tiny_policy()
    config = config_of(reference_cache=str(tmp_path))
    a, b = (open_cache(policy, config, QUIET) for _ in range(2))
    assert a is not None and b is not None
    with_reference(policy, pairs, config, QUIET, "pairs", cache=a)
    b.refresh()
    with_reference(policy, pairs, config, QUIET, "pairs", cache=b)
    assert sum(scored) == 8
    with a.pass_from_the_front() as first, b.pass_from_the_front() as second:
        assert first and not second
    a.close(), b.close()


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from test_data import random_pairs
from test_train import config_of, tiny_policy
from dpo_kernels.train import reference
from dpo_kernels.train.console import Console
plain, done = reference._scores, []
def scores(policy, pairs):
    if len(done) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    print("scored", *(p.source for p in pairs), flush=True)
    return plain(policy, pairs)
reference._scores = scores
config = config_of(reference_cache=sys.argv[1])
policy = tiny_policy(say=lambda text: None)
cache = reference.open_cache(policy, config, Console(quiet=True))
reference.with_reference(policy, random_pairs(18), config, Console(quiet=True), "p", cache=cache)
"""


def test_killed_twice_each_row_is_scored_once(tmp_path: Path) -> None:
    """kill -9 in mid-pass, twice; the values are those of a run that was not killed."""
    paths = [str(Path(__file__).parents[1] / room) for room in ("data", "train")]
    code = KILLED.format(paths=paths)
    rows: list[str] = []
    for batches, end in ((2, -signal.SIGKILL), (1, -signal.SIGKILL), (99, 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "killed"), str(batches)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == end, done.stderr
        rows += [row for line in done.stdout.splitlines() for row in line.split()[1:]]
    assert sorted(rows) == sorted(p.source for p in random_pairs(18))
    pairs = random_pairs(18)
    assert same(run(tmp_path / "killed", pairs), run(tmp_path / "whole", pairs))


def test_a_fresh_adapter_is_none() -> None:
    """LoRA that adds nothing, whatever its random half holds, shares the base model's values."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = weights_digest(tiny_model())
    digests = []
    for seed in (1, 2):
        model = tiny_model()
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        digests.append(weights_digest(wrapped))
    assert digests == [base, base]
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    trained = weights_digest(wrapped)
    assert trained != base
    with wrapped.disable_adapter():
        assert weights_digest(wrapped) == base


def test_the_folder_is_small_and_told(tmp_path: Path) -> None:
    began = time.time()
    run(tmp_path, random_pairs(4))
    (told,) = tmp_path.glob("*/identity.json")
    assert "weights" in told.read_text() and told.stat().st_mtime >= began - 2
