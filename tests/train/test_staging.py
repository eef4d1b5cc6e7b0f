"""What a checkpoint holds is the state at its save, whatever steps do while it is written."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_kernels.train import checkpoints
from dpo_kernels.train.checkpoints import Checkpoints, read_tensors
from dpo_kernels.train.optim import TrainingError
from dpo_kernels.train.staging import Staging

Tensors = dict[str, Tensor]


def state() -> Tensors:
    """Weights of a few shapes, a view, a broadcast buffer, a moment in bf16, a counter."""
    whole = torch.arange(600.0)
    return {
        "model/weight": torch.nn.Parameter(torch.randn(64, 32)),
        "model/view": whole[100:400].view(30, 10).t(),
        "model/images": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "buffer/one": torch.ones(1).expand(7),
        "optimizer/weight/exp_avg": torch.randn(64, 32).bfloat16(),
        "optimizer/weight/step": torch.tensor(3.0),
        "rng/torch": torch.get_rng_state(),
        "empty": torch.empty(0, 4),
    }


def next_step(tensors: Tensors) -> None:
    """In place, as optimizers do."""
    with torch.no_grad():
        for name, x in tensors.items():
            if name not in ("rng/torch", "buffer/one"):
                x.add_(1)


def values_of(tensors: Tensors) -> Tensors:
    return {name: x.detach().clone() for name, x in tensors.items()}


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits until this is set."""
    opened, plain = threading.Event(), checkpoints.write_tensors

    def held(folder: Path, tensors: Any) -> None:
        assert opened.wait(60)
        plain(folder, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", held)
    yield opened
    opened.set()


def test_a_save_is_of_its_step_and_no_later_one(tmp_path: Path, gate: threading.Event) -> None:
    """Steps go on before the first byte is written; the third save finds the memory used twice."""
    saves, tensors = Checkpoints(tmp_path), state()
    expected = {}
    for step in (1, 2, 3):
        expected[step] = values_of(tensors)
        gate.clear()
        saves.save(step, tensors, {"version": "0"})
        next_step(tensors)
        next_step(tensors)
        gate.set()
        saves._wait()
    saves.finish()
    for step, then in expected.items():
        assert same(read_tensors(tmp_path / f"step-{step}"), then), step
    assert not torch.equal(expected[1]["model/weight"], expected[2]["model/weight"])


def test_a_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    """Its copies are read until then, so they are not written over."""
    saves, tensors = Checkpoints(tmp_path), state()
    first = values_of(tensors)
    saves.save(1, tensors, {"version": "0"})
    next_step(tensors)
    second = values_of(tensors)
    later = threading.Thread(target=saves.save, args=(2, tensors, {"version": "0"}))
    later.start()
    later.join(0.2)
    assert later.is_alive()
    gate.set()
    later.join()
    saves.finish()
    assert same(read_tensors(tmp_path / "step-1"), first)
    assert same(read_tensors(tmp_path / "step-2"), second)


def test_memory_stays_from_save_to_save() -> None:
    staging, tensors = Staging(), state()
    first = staging.take(tensors)
    places = {name: x.data_ptr() for name, x in first.items()}
    next_step(tensors)
    again = staging.take(tensors)
    assert same(again, values_of(tensors))
    assert {name: x.data_ptr() for name, x in again.items()} == places
    assert not set(places.values()) & {x.data_ptr() for x in tensors.values() if x.numel()}


def test_a_state_of_another_form_has_memory_of_its_own() -> None:
    """Other sizes, another dtype, one name less, one more, another kind of tensor."""
    staging, tensors = Staging(), state()
    staging.take(tensors)
    tensors["model/weight"] = torch.randn(65, 32)
    tensors["optimizer/weight/exp_avg"] = torch.randn(64, 32)
    tensors["model/images"] = torch.randn(2, 3, 8, 8).to_sparse()
    tensors["new"] = torch.randn(5)
    del tensors["buffer/one"]
    taken = staging.take(tensors)
    assert taken.keys() == tensors.keys()
    for name, x in tensors.items():
        assert torch.equal(taken[name].to_dense(), x.detach().to_dense()), name
        assert taken[name].dtype == x.dtype
    tensors["model/images"] = torch.randn(2, 3, 8, 8)
    assert same(staging.take(tensors), values_of(tensors))


def test_a_failed_write_leaves_the_copies_fit_for_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes with the next save; the one after that is whole."""

    def full(folder: Path, tensors: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saves, tensors = Checkpoints(tmp_path), state()
    saves.save(1, tensors, {"version": "0"})
    saves._wait()
    with monkeypatch.context() as broken:
        broken.setattr(checkpoints, "write_tensors", full)
        saves.save(2, tensors, {"version": "0"})
        with pytest.raises(TrainingError, match=r"step 2 .*the disk is full.*step-1"):
            saves.save(3, tensors, {"version": "0"})
    next_step(tensors)
    saves.save(4, tensors, {"version": "0"})
    saves.finish()
    assert same(read_tensors(tmp_path / "step-4"), values_of(tensors))


def test_the_end_gives_the_memory_back(tmp_path: Path) -> None:
    saves = Checkpoints(tmp_path)
    saves.save(1, state(), {"version": "0"})
    assert saves._staging._copies
    saves.finish()
    assert not saves._staging._copies


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make gpu-check)")
def test_of_a_gpu_it_is_pinned_and_there() -> None:
    staging = Staging()
    tensors = {"a": torch.randn(1 << 20, device="cuda"), "b": torch.randn(3, 5)}
    for _ in range(3):
        tensors["a"].mul_(1.5)
        taken = staging.take(tensors)
        then = tensors["a"].cpu()
        tensors["a"].zero_().add_(1)
        assert taken["a"].is_pinned() and torch.equal(taken["a"], then)


def test_a_shard_is_written_over_where_it_is_laid_out_alike() -> None:
    """Another placement, or a tensor that is whole, has memory of its own."""
    dist = pytest.importorskip("torch.distributed")
    if not (dist.is_available() and dist.is_gloo_available()) or dist.is_initialized():
        pytest.skip("torch without gloo, or a group in use")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, staging = init_device_mesh("cpu", (1,)), Staging()
        x = distribute_tensor(torch.randn(6, 4), mesh, [Shard(0)])
        first = staging.take({"a": x})["a"]
        x.add_(1)
        again = staging.take({"a": x})["a"]
        assert again is first and torch.equal(again.to_local(), x.to_local())
        x.add_(1)
        assert not torch.equal(again.to_local(), x.to_local())
        other = distribute_tensor(torch.randn(6, 4), mesh, [Replicate()])
        found = staging.take({"a": other})["a"]
        assert found is not first and found.placements == other.placements
        whole = torch.randn(6, 4)
        assert same(staging.take({"a": whole}), {"a": whole})
        assert staging.take({"a": x})["a"].placements == x.placements
    finally:
        dist.destroy_process_group()
