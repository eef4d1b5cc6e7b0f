"""Peak resident memory of calls above their arguments, each in a process of its own; prints JSON.

    python memory_probe.py '[{"strategy": "streaming", "lengths": [...], "T": ..., "V": ...}, ...]'

The keys are the arguments of `dpo_kernels.memory.estimate`; a line for each case, in order. Memory
is the kernel's high-water mark of a fork, which starts at what the fork holds. A first call of the
same kind on one pair and a tiny head makes what is made once: the BLAS's buffers, autograd's graph.
"""

from __future__ import annotations

import json
import os
import resource
import sys

import torch

import dpo_kernels as dk


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def batch(lengths, T, V, H, dtype, strategy, kl=False, ref_H=0, **_):
    """The call's arguments, every page of them touched."""
    labels = torch.full((len(lengths), T), -100)
    for i, n in enumerate(lengths):
        labels[i, T - n :] = torch.randint(0, V, (n,))
    options = {"shift": False, "loss_type": "tdpo2" if kl else "sigmoid"}
    if strategy in ("in_place", "out_of_place"):
        x = torch.empty(len(lengths), T, V, dtype=dtype).fill_(0.5).requires_grad_()
        if kl:
            options["ref_logits"] = torch.empty(x.shape, dtype=dtype).fill_(0.25)
        return [x], labels, options
    x = torch.randn(len(lengths), T, H, dtype=dtype).requires_grad_(strategy != "score")
    w = torch.empty(V, H, dtype=dtype).fill_(0.01)
    w.requires_grad_(strategy in ("streaming", "recompute"))
    if ref_H:
        options["ref_hidden"] = torch.randn(len(lengths), T, ref_H, dtype=dtype)
        options["ref_weight"] = torch.empty(V, ref_H, dtype=dtype).fill_(0.01)
    return [x, w], labels, options


def call(tensors, labels, options, strategy, memory_budget=None, batch_invariant=False, **_):
    if not {"ref_hidden", "ref_logits"} & set(options):
        options = {**options, "ref_logps": torch.zeros(labels.shape[0])}
    if strategy in ("in_place", "out_of_place"):
        x = tensors[0]
        if strategy == "in_place":
            # A leaf is the model's stand-in: its own gradient is not the call's.
            x = x.detach().requires_grad_()
        loss = dk.fused_dpo_loss(x, labels, inplace=strategy == "in_place", **options).loss
    else:
        out = dk.fused_linear_dpo_loss(
            *tensors,
            labels,
            strategy=strategy,
            memory_budget=memory_budget,
            batch_invariant=batch_invariant,
            **options,
        )
        assert out.strategy == strategy
        loss = out.loss
    if loss.requires_grad:
        loss.backward()
    return loss.item()


def main(case: dict) -> None:
    torch.manual_seed(0)
    case["dtype"] = getattr(torch, case["dtype"])
    small = {**case, "lengths": [8, 8], "T": 8, "V": 64, "memory_budget": None}
    call(*batch(**{"H": 0, **small}), **small)
    arguments = batch(**{"H": 0, **case})
    before, peak_before = resident(), peak()
    loss = call(*arguments, **case)
    result = {"bytes": peak() - before, "slack": peak_before - before, "loss": loss}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        # Nothing has run here but imports: no thread pool that a fork would lack.
        child = os.fork()
        if child == 0:
            main(case)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(f"failed: {case}")
