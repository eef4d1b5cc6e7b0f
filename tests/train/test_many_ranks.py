"""`train` in 1, 2 and 4 processes: one spawn for each world, whose cases are in `rank_cases.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faulty_ranks import FAULTS, MESSAGES
from rank_cases import CASES, EVERY, FOUR, SAME, case_resumed

from dpo_kernels.train.checkpoints import read_tensors

transformers = pytest.importorskip("transformers", reason="the trainer needs transformers")
if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

# What is another number in every run, or counts what a process did.
OWN = {"step_time", "mem/peak", "tokens_per_s", "pairs_per_s", "eval_runtime", "padding_saved"}
HERE = Path(__file__)
Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[2])}


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What every rank of each world says of each case."""
    every: Found = {}
    for world in (1, 4, 2):  # 2 goes on from checkpoints of 4
        call = [sys.executable, HERE.with_name("rank_cases.py"), folder, str(world)]
        done = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        every[world] = json.loads((folder / f"results-{world}.json").read_text())
    return every


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next((run / "model").glob("*.safetensors")))


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_same(run: Path, alone: Path, loss: float = 1e-5, weight: float = 2e-4) -> None:
    """Metrics and weights are those of one process, to the rounding of their sums."""
    mine, theirs = rows(run), rows(alone)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - OWN:
            assert a[key] == pytest.approx(b[key], rel=loss, abs=2 * loss), (run.name, key, a, b)
    ours, wanted = weights(run), weights(alone)
    assert ours.keys() == wanted.keys()
    for key, x in wanted.items():
        assert ours[key].dtype == x.dtype
        assert float((ours[key] - x).abs().max()) < weight, (run.name, key)


def check_gradients(run: Path, alone: Path, room: float) -> None:
    """Of every weight, number by number, in the first two steps."""
    ours, wanted = (torch.load(f"{folder}.gradients") for folder in (run, alone))
    assert len(ours) == len(wanted) == 2
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        assert any(float(g.abs().max()) > 0 for g in theirs.values())
        largest = max(float(g.abs().max()) for g in theirs.values())
        for key, g in theirs.items():
            assert mine[key].dtype == g.dtype and mine[key].shape == g.shape, key
            error = float((mine[key].double() - g.double()).abs().max())
            scale = max(float(g.abs().max()), 1e-3 * largest)
            assert error <= room * scale, (run.name, key, error, scale)


# What rounding may change: metrics, weights behind three steps of Adam, gradients.
ROOM = {
    "float64": (1e-12, 1e-10, 1e-11),
    "vocabulary": (1e-12, 1e-10, 1e-11),
    "autocast": (2e-2, 2e-2, 3e-2),
    "bfloat16": (5e-2, 4e-2, 5e-2),
}
PLAIN = (1e-5, 2e-4, 1e-4)


@pytest.mark.parametrize(
    ("name", "world"), [*((name, 2) for name in SAME), *((name, 4) for name in FOUR)]
)
def test_losses_gradients_and_weights_are_those_of_one_process(
    folder: Path, found: Found, name: str, world: int
) -> None:
    if name == "lora" and not importlib.util.find_spec("peft"):
        pytest.skip("needs peft")
    for said in found[world]:
        assert said[name] == found[world][0][name] and "error" not in said[name]
    run, alone = (folder / f"{name}-{n}" for n in (world, 1))
    loss, weight, gradient = ROOM.get(name, PLAIN)
    check_same(run, alone, loss, weight)
    check_gradients(run, alone, gradient)
    transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert {p.name for p in run.iterdir()} == {p.name for p in alone.iterdir()}


def test_every_case_was_run(found: Found) -> None:
    for world, said in found.items():
        for entry in said:
            assert set(CASES[world]) == set(entry)
            assert not [name for name in entry if "error" in entry[name]], entry


def test_groups_of_ranks_that_shard_are_one_run(folder: Path, found: Found) -> None:
    """HSDP: 2 copies of the weights, each over 2 ranks."""
    check_same(folder / "hybrid-4", folder / "full_shard-1")


def test_a_checkpoint_of_four_is_resumed_by_two(folder: Path, found: Found) -> None:
    """And by four, equal to the bit; on disk there are shards, not one file of everything."""
    assert len(list((folder / "saved-4/checkpoints/step-2").glob("*.distcp"))) == 4
    alone = folder / "saved-1"
    check_same(folder / "resumed-2", alone)
    assert "error" not in case_resumed(folder, 1)
    check_same(folder / "resumed-1", alone)
    straight, resumed = weights(folder / "saved-4"), weights(folder / "resumed-4")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    # The last save found the memory of those before: each rank's part is of its own step.
    kept = read_tensors(folder / "saved-4/checkpoints/step-5")
    assert all(torch.equal(straight[key], kept[f"model/{key}"]) for key in straight)


def test_a_loop_of_rounds_is_that_of_one_process(folder: Path, found: Found) -> None:
    """Samples, verdicts and pairs to the byte, weights to rounding; nothing is judged twice."""
    run, alone = folder / "loop-2", folder / "loop-1"
    assert found[2][0]["loop"] == found[2][1]["loop"] == found[1][0]["loop"]
    assert found[1][0]["loop"] == {"promoted": 2, "ended": "rounds: 2 done"}
    names = ("samples.jsonl", "verdicts.jsonl", "pairs.jsonl")
    for name in names:
        assert (run / "rounds/001" / name).read_bytes() == (
            alone / "rounds/001" / name
        ).read_bytes()
    assert (run / "rounds/000/eval_samples.jsonl").read_bytes() == (
        alone / "rounds/000/eval_samples.jsonl"
    ).read_bytes()
    for number in ("001", "002"):
        ours, theirs = (weights(x / "rounds" / number / "train") for x in (run, alone))
        assert all(float((ours[k] - x).abs().max()) < 2e-4 for k, x in theirs.items())
    asked = (folder / "loop-2.asked").read_text().splitlines()
    assert sorted(asked) == sorted((folder / "loop-1.asked").read_text().splitlines())
    assert len(set(asked)) == len(asked)
    assert not [*run.rglob("*.part*"), *run.rglob("*.writing")]
    assert {p.name for p in run.iterdir()} == {p.name for p in alone.iterdir()}


def test_budgets_of_a_judges_server_are_of_all_processes(found: Found) -> None:
    if "server" not in CASES[2]:
        pytest.skip("needs openai")
    mine, alone = found[2][0]["server"], found[1][0]["server"]
    assert mine["asked"] == alone["asked"]
    assert mine["limited"]["sent"] == mine["limited"]["spent"] == 9
    assert mine["limited"] == alone["limited"]
    assert "max_requests" in mine["limited"]["ended"]


def test_a_disk_that_one_rank_can_only_read(folder: Path, found: Found) -> None:
    """The rank is named, and the last good checkpoint stays and can be gone on from."""
    first, second = (entry["read_only"] for entry in found[2])
    run = folder / "read_only-2"
    assert first["refused"].startswith(
        f"the checkpoint of step 4 could not be written to {run / 'checkpoints'}: rank 1: the disk "
        "can only be read"
    ), first
    assert first["refused"].endswith(f"the last good one is {run / 'checkpoints/step-2'}")
    assert second == {"quiet": 1}
    assert read_tensors(run / "checkpoints/step-2")


def test_ranks_that_differ_are_named(found: Found) -> None:
    """One error, of the first rank; the others end with its exit code."""
    first, second = found[2]
    assert first["beta"]["refused"] == ("the ranks differ: option beta: rank 1 has 0.3, rank 0 0.1")
    assert first["data"]["refused"].startswith("the ranks differ: training pairs: rank 1 has")
    assert first["no_model"]["refused"].startswith("rank 1: model_name_or_path: ")
    assert "no such folder" in first["no_model"]["refused"]
    assert [second[name] for name in ("beta", "data", "no_model")] == [{"quiet": 2}] * 3


def test_a_head_in_parts_below_sharded_layers(folder: Path, found: Found) -> None:
    """Four ranks: the head over two of them, the trunk over all."""
    run, alone = folder / "both-4", folder / "vocabulary-1"
    check_same(run, alone, 1e-9, 1e-8)
    assert found[2][0]["tied_rows"]["refused"].startswith("vocab_parallel: the head must be")


def test_reductions_left_out_or_doubled_are_found_at_the_first_step(found: Found) -> None:
    wanted = {"left_out": "left out", "doubled": "made twice", "unreduced": "left out"}
    for name, words in wanted.items():
        said = found[2][0][name]["refused"]
        assert said.startswith("step 1, rank 0: the gradients of the ranks do not meet"), said
        assert f": a reduction is {words}" in said, said
        assert found[2][1][name] == {"quiet": 1}


def test_what_does_not_fit_is_refused(found: Found) -> None:
    assert found[4][0]["groups_of_three"]["refused"] == (
        "fsdp_shard_size: 4 processes do not divide into groups of 3"
    )


def test_a_rank_that_is_lost_ends_the_run_which_goes_on(tmp_path: Path) -> None:
    """kill -9 at three moments, a rank that hangs, one without memory, numbers that are not finite,
    no room on one rank's disk, SIGTERM; `make check-full` has twenty kills."""
    faults = list(FAULTS)
    call = [sys.executable, HERE.with_name("faulty_ranks.py"), tmp_path, *faults, "--kills", "1"]
    began = time.monotonic()
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.splitlines()[-1] == f"{len(faults) + 1} faults: equal to the bit"
    attempts = done.stderr.split("attempt ")[1:]
    assert len(attempts) >= len(faults)
    for name, victim, said in told(done.stderr):
        if name in MESSAGES:
            assert said.count("dpo-kernels: training stopped: ") <= 1, said
            assert MESSAGES[name].format(victim) in said, (name, said)
    assert time.monotonic() - began < 600


@pytest.mark.skipif(not os.environ.get(EVERY), reason="minutes: make check-full runs it")
def test_a_loop_that_loses_a_rank_goes_on(tmp_path: Path) -> None:
    """kill -9 in every stage of `iterate`: no text is judged twice, weights the same to the bit."""
    call = [sys.executable, HERE.with_name("faulty_ranks.py"), tmp_path, "--loop"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.splitlines()[-1] == "5 kills: equal to the bit"
    said = re.findall(r"training stopped: rank \d, round 1.*: died or was stopped", done.stderr)
    assert said, done.stderr[-4000:]


def told(text: str) -> list[tuple[str, str, str]]:
    """(fault, its rank, what was written until the next one)."""
    found: dict[str, tuple[str, str, str]] = {}
    parts = re.split(r"^attempt (\d+): (.*), rank (\d)$", text, flags=re.MULTILINE)
    for i in range(1, len(parts) - 3, 4):
        number, name, victim, said = parts[i : i + 4]
        before = found.get(number, (name, victim, ""))
        found[number] = (name, victim, before[2] + said)
    return list(found.values())
