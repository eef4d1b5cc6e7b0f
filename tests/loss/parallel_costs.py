"""What a sharded head costs: bytes sent, memory, chunks. `parallel_ranks.py` runs these checks."""

from pathlib import Path

import torch
import torch.distributed as dist
from linear_cases import IGNORE, B, H, T, labels_of, tensors
from parallel_parts import Largest, check, counted, leaf, rows, shards, status

import dpo_kernels as dk


@check
def bytes_sent_do_not_depend_on_the_vocabulary():
    sent = []
    for size in (64, 4096):
        s = shards(size)
        torch.manual_seed(8)
        hidden, weight, *_ = tensors(V=size)
        labels = labels_of(size)
        scored = int((labels[:, 1:] != IGNORE).sum())
        for kind in ("score", "streaming"):
            x = leaf(hidden, kind == "streaming")
            w = leaf(rows(s, weight), kind == "streaming")
            options = {"reference_free": True, "vocab_group": s, "strategy": kind}
            dk.fused_linear_dpo_loss(x, w, labels, **options)  # options are looked at once
            with counted() as calls:
                out = dk.fused_linear_dpo_loss(x, w, labels, **options)
                if kind == "streaming":
                    out.loss.backward()
            sent.append(calls)
            logps = [n for n in calls if n <= 16 * scored]
            assert sum(logps) == 24 * scored and len(logps) == 2, (calls, scored)
    score, streaming, *larger = sent
    assert larger == [score, streaming], sent
    assert streaming[2:] == [4 * 2 * B * T * H]  # the gradient of hidden, once


@check
def nothing_of_the_whole_vocabulary_is_made():
    """The largest tensor made is a shard's: its weight gradient, or a chunk of its logits."""
    size = 4096
    s = shards(size)
    torch.manual_seed(10)
    hidden, weight, *_ = tensors(V=size)
    labels = labels_of(size)
    scored = int((labels[:, 1:] != IGNORE).sum())
    own = rows(s, weight)
    for strategy in ("streaming", "recompute"):
        x, w = leaf(hidden), leaf(own)
        with Largest() as largest:
            out = dk.fused_linear_dpo_loss(
                x, w, labels, reference_free=True, vocab_group=s, strategy=strategy
            )
            out.loss.backward()
        most = max(s.widest * H, (scored + 15) // 16 * 16 * s.widest)
        assert s.rows * H <= largest.numel <= most, (largest.numel, most)


@check
def memory_is_a_share_and_a_chunk():
    """Peak above the arguments: one rank's, divided by the ranks, and a chunk of logits."""
    size, width, budget = 64000, 512, 16 << 20
    labels = torch.randint(0, 64, (4, 65))
    hidden = torch.randn(4, 65, width)

    def peak(n, group):
        x, w = leaf(hidden), torch.full((n, width), 0.01).requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
        before = status("VmRSS")
        out = dk.fused_linear_dpo_loss(
            x, w, labels, reference_free=True, memory_budget=budget, vocab_group=group
        )
        out.loss.backward()
        return status("VmHWM") - before

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not everywhere allowed
        return
    s = shards(size)
    peak(s.rows, s)  # what is made once
    sharded, whole = peak(s.rows, s), peak(size, None)
    assert whole > 4 * size * width  # the gradient of the weight
    assert sharded <= whole / dist.get_world_size() + 1.5 * budget, (sharded, whole)


@check
def chunks_are_the_same_on_all_ranks():
    """However uneven: planned for the largest shard. The head's logits are those of a shard."""
    s = shards()
    torch.manual_seed(9)
    hidden, weight, *_ = tensors()
    labels = labels_of()
    for strategy in ("recompute", "streaming", "frozen", "score"):
        x = leaf(hidden, strategy != "score")
        w = leaf(rows(s, weight), strategy in ("recompute", "streaming"))
        options = {"reference_free": True, "vocab_group": s, "memory_budget": 1}
        dk.fused_linear_dpo_loss(x, w, labels, strategy=strategy, **options)
        with counted() as calls:
            dk.fused_linear_dpo_loss(x, w, labels, strategy=strategy, **options)
        if strategy in ("recompute", "score"):  # of all chunks at once
            assert len(calls) == 2, calls
        else:  # a gradient is formed while the logits are there
            assert len(calls) > 2, (strategy, calls)
        numbers = [None] * dist.get_world_size()
        dist.all_gather_object(numbers, calls)
        assert all(n == calls for n in numbers), numbers
