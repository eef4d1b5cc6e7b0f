"""FSDP2 on two CPU processes: one step is the step of one process over both their batches."""

from __future__ import annotations

import socket

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dpo_kernels.integrations import plain

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)


def batch_of(rank: int) -> dict:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(2, 64, (4, 10), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


OPTIONS = {"beta": 0.5, "ref_logps": torch.full((4,), -20.0)}


def one_rank(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    # With a head of its own unit, `full_tensor()` alone would lose the other rank's gradient.
    for head_unit in (False, True):
        model = tiny.model(dtype=torch.float64)
        plain.attach(model)
        units = [*model.model.layers, *([model.lm_head] if head_unit else []), model]
        for unit in units:
            fully_shard(unit, mesh=mesh)
        plain.dpo_step(model, batch_of(rank), **OPTIONS).loss.backward()
        grads = {k: p.grad.full_tensor() for k, p in model.named_parameters()}
        if rank == 0:
            torch.save(grads, f"{folder}/{head_unit}.pt")
    dist.destroy_process_group()


def test_gradients_are_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(tmp_path)), nprocs=2)
    model = tiny.model(dtype=torch.float64)
    plain.attach(model)
    for rank in (0, 1):
        (plain.dpo_step(model, batch_of(rank), **OPTIONS).loss / 2).backward()
    for head_unit in (False, True):
        got = torch.load(tmp_path / f"{head_unit}.pt")
        for name, p in model.named_parameters():
            assert (p.grad - got[name]).abs().max() < 1e-10, (head_unit, name)
            assert p.grad.abs().max() > 0, name
