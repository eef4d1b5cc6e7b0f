"""What the linear head would do on a GPU, read off its real code on meta tensors (`stand_in.py`).

Chunks and their cost, the operands of every product, what the host waits for. Each check is shown
to fail on a fault made on purpose.
"""

import contextlib
import functools

import pytest
import stand_in
import torch
from stand_in import lengths_of, score, step

from dpo_kernels.ops import linear_head, products

# [H, V] of published models.
HEADS = {
    "SmolLM2": (576, 49152),
    "Llama-3": (4096, 128256),
    "Qwen2.5": (3584, 152064),
    "Gemma-2": (2304, 256000),
    "Gemma-3": (1152, 262144),
    "GPT-2": (768, 50257),
}
SIZES = (1024, 8192, 32768, 131072)
UNCHUNKED = 1 << 60


@functools.cache
def cached(kind, name, N, pair, budget=None):
    H, V = HEADS[name]
    if kind == "reference":
        return score(lengths_of(N, pair), V, H)
    return step(lengths_of(N, pair), V, H, trained=kind == "trained", memory_budget=budget)


def check_plan(chunks, N, seconds, unchunked, bound):
    assert sum(chunks) == N
    assert min(chunks[:-1], default=N) >= min(N, 1024), chunks
    assert seconds <= bound * unchunked, (seconds / unchunked, chunks)


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ("trained", "frozen"))
def test_chunks_cost_little(kind, name, N):
    """By the default budget, beside the same passes over one chunk, with an H100's figures."""
    for pair in (200, 512) if kind == "trained" else (512,):
        ours, whole = (cached(kind, name, N, pair, b) for b in (None, UNCHUNKED))
        assert len(whole.chunks) == 1
        bound = 1.25 if HEADS[name][1] > 152064 else 1.15
        check_plan(ours.chunks, N, ours.seconds(), whole.seconds(), bound)


def test_a_budget_of_240_rows_is_noticed():
    N, (H, V) = 8192, HEADS["Llama-3"]
    small = step(lengths_of(N, 64), V, H, memory_budget=384 << 20)  # 256 MiB and the stash
    whole = cached("trained", "Llama-3", N, 64, UNCHUNKED)
    assert 200 < max(small.chunks) < 400
    with pytest.raises(AssertionError):
        check_plan(small.chunks, N, 0, 1, 1.15)
    with pytest.raises(AssertionError):
        check_plan([N], N, small.seconds(), whole.seconds(), 1.15)


def check_products(record, V, per_chunk, rank=0):
    """`rank`: products of an adapter's A, which is fp32, with hidden states are so too."""
    count = record.of_vocabulary(V)
    assert count == per_chunk * len(record.chunks), (count, len(record.chunks))
    for p in record.products:
        sizes = (*p.a.shape, *p.b.shape)
        if rank in sizes and V not in sizes:
            continue
        assert p.narrow and p.out.dtype == torch.float32, [x.dtype for x in p.operands]
        assert all(n % 8 == 0 for n in p.pitches), p.pitches


@pytest.mark.parametrize("dtype", products.NARROW, ids=str)
@pytest.mark.parametrize("name", ("Llama-3", "GPT-2"))
def test_products(name, dtype):
    """Narrow operands, fp32 results, whole vectors from row to row; three, two and one a chunk."""
    (H, V), lengths = HEADS[name], lengths_of(16384, 512)
    check_products(step(lengths, V, H, dtype=dtype), V, 3)
    check_products(step(lengths, V, H, dtype=dtype, trained=False), V, 2)
    check_products(score(lengths, V, H, dtype), V, 1)
    # A reference's logits, and the two operands of an adapter, forward and backward.
    beside = step(lengths, V, H, dtype=dtype, ref=True)
    assert beside.of_vocabulary(V) == 2 * len(beside.chunks)  # a chunk of each is scored
    joint = step(lengths, V, H, dtype=dtype, ref=True, loss_type="tdpo2")
    check_products(joint, V, 4)
    check_products(step(lengths, V, H, dtype=dtype, rank=12), V, 6, rank=12)


def test_sums_without_addmm_stay_within_their_scratch():
    """torch 2.8 and 2.9: dweight is added up in parts, not in a second dweight."""
    H, V = HEADS["Llama-3"]
    record = step(lengths_of(8192, 512), V, H, kind=products.MM)
    check_products(record, V, 3)
    assert not any(p.add for p in record.products)
    parts = [p.out for p in record.products if p.out.shape[1] == H and p.a.shape[0] != V]
    assert len(parts) > 20 and max(map(stand_in.size, parts)) <= 64 << 20


def test_an_fp32_product_is_noticed():
    (H, V), lengths = HEADS["GPT-2"], lengths_of(4096, 512)
    with pytest.raises(AssertionError, match="float32"):
        record = step(lengths, V, H, kind=products.WIDE)
        check_products(record, V, record.of_vocabulary(V) // len(record.chunks))


def test_a_misaligned_operand_is_noticed(monkeypatch):
    def unpadded(self, rows, dtype):
        return torch.empty(rows, self.V, device=self.weight.device, dtype=dtype)

    monkeypatch.setattr(linear_head.Head, "_buffer", unpadded)
    (H, V), lengths = HEADS["GPT-2"], lengths_of(4096, 512)
    with pytest.raises(AssertionError, match="50257"):
        check_products(step(lengths, V, H), V, 3)


def check_waits(record):
    assert record.waits == []
    assert all(begun == 0 for begun, _ in record.uploads), record.uploads


@pytest.mark.parametrize(
    "options",
    ({}, {"ref": True}, {"ref": True, "loss_type": "tdpo2"}, {"rank": 8}, {"trained": False}),
    ids=str,
)
def test_the_host_waits_for_nothing(options):
    """No value is read and nothing is copied within the loop over the chunks."""
    H, V = HEADS["SmolLM2"]
    record = step(lengths_of(40000, 900), V, H, **options)
    assert len(record.chunks) > 4
    check_waits(record)
    check_waits(score(lengths_of(40000, 900), V, H))


@pytest.mark.parametrize(
    "fault",
    (
        lambda cu: torch.tensor([0, 1], device="meta"),
        lambda cu: torch.tensor([0, 1]).to("meta"),
        lambda cu: torch.tensor([0, 1]).to("meta", non_blocking=True),
        lambda cu: cu[-1].item(),
        lambda cu: (cu > 0).nonzero(),
    ),
)
def test_a_wait_within_the_loop_is_noticed(fault, monkeypatch):
    (H, V), records = HEADS["SmolLM2"], []
    kernels = stand_in.kernels

    def watched(record):
        records.append(record)
        made = kernels(record)
        sums = made.sequence_sum

        def sequence_sum(values, targets, cu, *rest):
            fault(cu)
            return sums(values, targets, cu, *rest)

        made.sequence_sum = sequence_sum
        return made

    monkeypatch.setattr(stand_in, "kernels", watched)
    # A meta tensor has no values.
    with contextlib.suppress(RuntimeError, NotImplementedError):
        step(lengths_of(40000, 900), V, H)
    with pytest.raises(AssertionError):
        check_waits(records[0])
