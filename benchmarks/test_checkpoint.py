"""What a checkpoint costs a run: how long steps wait for it, beside the time of a step.

A save copies the state to the host and returns; a thread writes it while steps go on. The stall is
what the loop waits: the copy, and the writing of the save before, if that is not done yet.

    pytest benchmarks/test_checkpoint.py -s [--loop_results FILE]
"""

import statistics
import time

import pytest
import torch
from conftest import DEVICE, LOOP

from dpo_kernels.train.checkpoints import Checkpoints, newest

SAVE_EVERY = 10  # steps between the saves that are measured
SAVES = 2


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

    checkpoints = Checkpoints(tmp_path / "checkpoints", limit=2)
    step()
    steps, stalls = [], []
    for n in range(1, SAVE_EVERY * SAVES + 1):
        began = time.perf_counter()
        step()
        steps.append(time.perf_counter() - began)
        if n % SAVE_EVERY == 0:
            began = time.perf_counter()
            checkpoints.save(n, state(), {"version": "0"})
            stalls.append(time.perf_counter() - began)
    began = time.perf_counter()
    checkpoints.finish()
    last = time.perf_counter() - began
    took, stall = statistics.median(steps), statistics.median(stalls)
    size = sum(x.numel() * x.element_size() for x in state().values())
    share = stall / (SAVE_EVERY * took)
    print(
        f"\n{DEVICE}: {size / 2**20:.0f} MiB a checkpoint, step {took * 1e3:.1f} ms, stall "
        f"{stall * 1e3:.1f} ms ({share:.2%} of {SAVE_EVERY} steps), writing the last {last:.2f} s"
    )
    LOOP["checkpoint"] = {
        "bytes": size,
        "step seconds": took,
        "stall seconds": stall,
        "steps between saves": SAVE_EVERY,
        "stall over the steps between": share,
        "last write seconds": last,
    }
    assert newest(tmp_path / "checkpoints").name == f"step-{SAVE_EVERY * SAVES}"
