"""What a checkpoint costs a run: how long steps wait for it, beside the time of a step.

A save copies the state to the host and returns; a thread writes it while steps go on. The stall is
what the loop waits: for the copy, and for the save before if that is not written yet. Its floor is
one copy of as many bytes into memory that is there. The first save also makes that memory. A save
each ten of these steps is far more than runs ask for, so the interval is told at which the stall is
1 % of the steps.

    pytest benchmarks/test_checkpoint.py -s [--loop_results FILE]
"""

import math
import statistics
import time

import pytest
import torch
from conftest import DEVICE, LOOP

from dpo_kernels.train.checkpoints import Checkpoints, newest, read_tensors

SAVE_EVERY = 10  # steps between the saves that are measured
SAVES = 7


def test_stall(tmp_path):
    """A Llama of 8 M parameters with AdamW; prints one line, checks that the state came whole."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.vocab_size, (2, 128), device=DEVICE)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def state():
        found = {f"model/{n}": p for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            moments = optimizer.state[p].items()
            found |= {f"optimizer/{name}/{k}": v for k, v in moments if isinstance(v, torch.Tensor)}
        return found

    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, limit=2)
    step()
    quiet, writing, stalls, floors, waited = [], [], [], [], 0
    for n in range(1, SAVE_EVERY * SAVES + 1):
        last = folder / f"step-{(n - 1) // SAVE_EVERY * SAVE_EVERY}"
        done = n <= SAVE_EVERY or last.is_dir()
        began = time.perf_counter()
        step()
        took = time.perf_counter() - began
        if done:
            quiet.append(took)
        elif not (done := last.is_dir()):  # the writer was at work to the step's end
            writing.append(took)
        if n % SAVE_EVERY == 0:
            waited += not done
            floors.append(copy(state()))
            began = time.perf_counter()
            checkpoints.save(n, state(), {"version": "0"})
            stalls.append(time.perf_counter() - began)
    began = time.perf_counter()
    checkpoints.finish()
    last_write = time.perf_counter() - began
    size = sum(x.numel() * x.element_size() for x in state().values())
    first, stall, floor = stalls[0], statistics.median(stalls[1:]), statistics.median(floors)
    step_time = statistics.median(quiet)
    share, interval = stall / (SAVE_EVERY * step_time), math.ceil(stall / (0.01 * step_time))
    print(
        f"\n{DEVICE}: {size / 2**20:.0f} MiB a checkpoint, step {step_time * 1e3:.1f} ms, stall "
        f"{stall * 1e3:.1f} ms ({share:.2%} of {SAVE_EVERY} steps, 1 % of {interval}), the copy "
        f"alone {floor * 1e3:.1f} ms, the first stall {first * 1e3:.1f} ms; {waited} of {SAVES} "
        f"saves waited for the one before; the last was written in {last_write:.2f} s"
    )
    if writing:
        beside = statistics.median(writing)
        print(f"a step while one is written: {beside * 1e3:.1f} ms ({len(writing)} steps)")
    LOOP["checkpoint"] = {
        "bytes": size,
        "step seconds": step_time,
        "step seconds while one is written": statistics.median(writing) if writing else None,
        "stall seconds": stall,
        "first stall seconds": first,
        "copy alone seconds": floor,
        "steps between saves": SAVE_EVERY,
        "stall over the steps between": share,
        "steps between saves for 1 %": interval,
        "saves that waited for the one before": waited,
        "last write seconds": last_write,
    }
    assert newest(folder).name == f"step-{SAVE_EVERY * SAVES}"
    kept = read_tensors(newest(folder))
    assert all(torch.equal(kept[name], x.cpu()) for name, x in state().items())


def copy(tensors):
    """Seconds of one copy of as many bytes to the host, into memory that is there."""
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    cuda = DEVICE == "cuda"
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
    began = time.perf_counter()
    target.copy_(source, non_blocking=True)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
