"""Attention by segments as an operator of compiled models, and on GPUs."""

from __future__ import annotations

import pytest
import torch
from segment_steps import SHAPES, needs_segments, padded_batch, step, tiny

from dpo_kernels.data.segments import Segment, Segments
from dpo_kernels.models import segment_kernels
from dpo_kernels.models.attached import attach_head

pytestmark = needs_segments


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_operator_of_a_compiled_model(softcap, window, sinks) -> None:
    """Its backward is written out: against autograd through the same segments."""
    g = torch.Generator().manual_seed(0)
    segments = Segments([Segment(7), Segment(3, 0, 4), Segment(5), Segment(2, 2, 1)])
    T, double = sum(segments.lengths), torch.float64
    q, k, v = (torch.randn(1, h, T, 8, generator=g, dtype=double) for h in (4, 2, 2))
    sink = torch.randn(4, generator=g, dtype=double) if sinks else None
    leaves = [x.requires_grad_() for x in (q, k, v, sink) if x is not None]
    options = segment_kernels.AttentionOptions(0.3, window, softcap, sink)
    weights = torch.randn(1, T, 4, 8, generator=g, dtype=double)
    own = segment_kernels.each_segment(q, k, v, segments, options)
    expected = torch.autograd.grad((own * weights).sum(), leaves)
    args = (q, k, v, segments.table, sink, 0.3, window or 0, softcap or 0.0, False)
    got = segment_kernels._operator(*args)
    grads = torch.autograd.grad((got * weights).sum(), leaves)
    close = 1e-10 if softcap is None else 1e-5  # soft-capped scores go through fp32
    for a, b in zip((got, *grads), (own, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)
    torch.library.opcheck(
        segment_kernels._operator, args, test_utils=("test_schema", "test_faketensor")
    )


def test_new_lengths_do_not_compile_again() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model = tiny(dtype=torch.float32, num_hidden_layers=1)
    attach_head(model)
    expected = [step(model, padded_batch(s), "shared")[0].loss.item() for s in BATCHES]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.model.forward = torch.compile(model.model.forward, backend=counter)
    found, frames = [], []
    for shapes in BATCHES:
        found.append(step(model, padded_batch(shapes), "shared")[0].loss.item())
        frames.append(counter.frame_count)
    assert found == pytest.approx(expected, rel=1e-5)
    assert frames[-1] == frames[1] and frames[0] > 0  # the second learns that lengths change
    torch._dynamo.reset()


BATCHES = [
    SHAPES,
    [(7, 6, 5), (11, 4, 8), (2, 3, 3)],
    [(13, 5, 8), (6, 4, 2), (3, 9, 4), (8, 8, 1), (5, 5, 5)],
    [(10, 2, 2), (4, 3, 7)],
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [4, 8])
def test_varlen_on_a_gpu(window, heads) -> None:
    """Flash attention with other boundaries of keys than of queries, against each segment alone."""
    segments = Segments([Segment(100), Segment(30, 0, 64), Segment(77), Segment(9, 2, 60)])
    T = sum(segments.lengths)
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, h, T, 64, generator=g, device="cuda", dtype=torch.bfloat16)
        for h in (8, heads, heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options = segment_kernels.AttentionOptions(0.125, window)
    assert segment_kernels._varlen(q, k, v, options) is not None
    own = segment_kernels.attend(q, k, v, segments, options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = segment_kernels.each_segment(*wide, segments, options)
    weights = torch.randn(own.shape, generator=g, device="cuda")
    grads = torch.autograd.grad((own * weights).sum(), leaves)
    expected = torch.autograd.grad((truth * weights).sum(), wide)
    for a, b in zip((own, *grads), (truth, *expected), strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


# --- batches ---
