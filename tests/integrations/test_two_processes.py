"""FSDP2 and DDP on two CPU processes: a step is that of one process over both their batches.

ZeRO-3 needs a GPU: its test is written and has not been run.
"""

from __future__ import annotations

import gc
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


LAYOUTS = ("ddp", "fsdp2", "fsdp2, head apart", "fsdp2, head apart and let go")
OPTIONS = {"beta": 0.5, "ref_logps": torch.full((4,), -20.0)}
# Plain torch in fp64, streaming, and a head that the backward projects again.
LOSSES = {"plain": "sigmoid", "streaming": "sigmoid", "recompute": "aot"}
DTYPES = {"plain": torch.float64, "streaming": torch.float32, "recompute": torch.float32}


def one_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for layout in LAYOUTS:
        for strategy in LOSSES:
            grads = gradients(layout, rank, strategy)
            if rank == 0:
                torch.save(grads, f"{folder}/{layout} {strategy}.pt")
    # gloo's threads must have ended before the interpreter does: whoever still holds the group, or
    # a rank that leaves early, lets a process end in std::terminate.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def gradients(layout: str, rank: int, strategy: str) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("shard",))
    model = tiny.model(dtype=DTYPES[strategy])
    plain.attach(model)
    if layout == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        for unit in model.model.layers:
            fully_shard(unit, mesh=mesh)
        # A head apart gathers itself when it is called, and lets go before the backward.
        if "head apart" in layout:
            fully_shard(model.lm_head, mesh=mesh, reshard_after_forward="let go" in layout)
        fully_shard(model, mesh=mesh)
        wrapped = model
    out = plain.dpo_step(wrapped, batch_of(rank), loss_type=LOSSES[strategy], **OPTIONS)
    assert out.strategy == strategy, (layout, out.strategy)
    out.loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    return {k: g.full_tensor() if hasattr(g, "full_tensor") else g for k, g in grads.items()}


def test_gradients_are_those_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(tmp_path)), nprocs=2)
    for strategy, loss in LOSSES.items():
        model = tiny.model(dtype=DTYPES[strategy])
        plain.attach(model)
        for rank in (0, 1):
            out = plain.dpo_step(model, batch_of(rank), loss_type=loss, **OPTIONS)
            (out.loss / 2).backward()
        for layout in LAYOUTS:
            got = torch.load(tmp_path / f"{layout} {strategy}.pt")
            for name, p in model.named_parameters():
                error = (p.grad - got[name]).abs().max() / p.grad.abs().max()
                assert error < (1e-9 if strategy == "plain" else 1e-4), (layout, strategy, name)
                assert p.grad.abs().max() > 0, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="ZeRO-3 needs a GPU; not yet run")
def test_zero3_loss_is_that_of_a_plain_model(tmp_path):
    deepspeed = pytest.importorskip("deepspeed", reason="pip install deepspeed")
    batch = {k: v.cuda() for k, v in batch_of(0).items()}
    options = {**OPTIONS, "ref_logps": OPTIONS["ref_logps"].cuda()}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    }
    alone = tiny.model().cuda()
    plain.attach(alone)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    model = tiny.model()
    plain.attach(model)
    engine = deepspeed.initialize(model=model, config=config)[0]
    for fused in ({"head_stats": False}, {}):  # streaming, and a head that the backward projects
        losses = []
        for _ in range(2):
            ours = plain.dpo_step(engine, batch, fused=fused, **options).loss
            wanted = plain.dpo_step(alone, batch, fused=fused, **options).loss
            losses.append((ours.item(), wanted.item()))
            engine.backward(ours)
            engine.step()
            wanted.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(a == pytest.approx(b, abs=1e-4) for a, b in losses)
