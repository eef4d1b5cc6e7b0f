"""What only a GPU can show: its streams, graphs and compiler, and sizes past 2^31 elements.

Values are checked for both backends by the other tests marked `gpu`; `make gpu-check` runs all.
"""

import pytest
import torch

import dpo_kernels as dk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make gpu-check)"),
]
BACKENDS = ("triton", "cuda")
IGNORE = -100
SHAPES = {"small": (4, 9, 1031), "large": (4, 130, 131072)}


def batch(shape, dtype=torch.bfloat16):
    R, T, V = SHAPES[shape]
    logits = torch.randn(R, T, V).mul_(3).to(dtype)
    labels = torch.randint(0, V, (R, T))
    labels[:, : T // 3] = IGNORE
    return logits, labels, torch.randn(R) - 8.0 * T


def step(logits, labels, ref, backend, **options):
    """Loss, margins and gradient."""
    x = logits.detach().clone().requires_grad_()
    out = dk.fused_dpo_loss(x, labels, ref_logps=ref, backend=backend, **options)
    out.loss.backward()
    return out.loss.detach(), out.margins, x.grad


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_31_elements(backend):
    R, T, V = 17, 1024, 131072
    assert R * T * V > 2**31
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    logits = torch.empty(R, T, V, dtype=torch.bfloat16).normal_(0, 3)
    labels = torch.randint(0, V, (R, T))
    labels[:, ::3] = IGNORE
    limit = 2**31 // V  # the row that holds element 2^31
    rows = torch.tensor([0, 1, limit - 1, limit, limit + 1, R * T - 2, R * T - 1])
    kept = logits.view(-1, V)[rows].double()
    y = labels.view(-1)[rows]
    scored = (y != IGNORE).double()
    table = kept.log_softmax(-1)
    exact = table.gather(-1, y.clamp(min=0)[:, None])[:, 0] * scored
    x = logits.requires_grad_()
    call = {"shift": False, "inplace": True, "backend": backend}
    logps = dk.sequence_logps(x, labels, reduction="none", **call)
    assert (logps.view(-1)[rows] - exact).abs().max() < 5e-5
    logps.sum().backward()
    onehot = torch.nn.functional.one_hot(y.clamp(min=0), V)
    wanted = (onehot - table.exp()) * scored[:, None]
    got = x.grad.view(-1, V)[rows].double()
    assert ((got - wanted).abs() <= wanted.abs() / 250 + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend, shape):
    batches = [batch(shape) for _ in range(2)]
    alone = [step(*b, backend) for b in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(10):
        results = []
        for stream, b in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(*b, backend))
        torch.cuda.synchronize()
        for one, other in zip(results, alone, strict=True):
            assert same(one, other)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend, shape):
    logits, labels, ref = batch(shape)
    x = logits.clone().requires_grad_()

    def run():
        out = dk.fused_dpo_loss(x, labels, ref_logps=ref, backend=backend)
        out.loss.backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates before the capture
        for _ in range(2):
            x.grad = None
            run()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        fresh, fresh_labels, fresh_ref = batch(shape)
        with torch.no_grad():
            x.copy_(fresh)
        labels.copy_(fresh_labels)
        ref.copy_(fresh_ref)
        graph.replay()
        graph.replay()  # the counters that a replay leaves serve the next one
        torch.cuda.synchronize()
        assert same((out.loss, out.margins, x.grad), step(fresh, fresh_labels, fresh_ref, backend))


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits(backend, shape, inplace):
    logits, labels, ref = batch(shape)
    step(logits, labels, ref, backend)  # compiles
    x = logits.clone().requires_grad_()
    y = x.view_as(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = dk.fused_dpo_loss(y, labels, ref_logps=ref, backend=backend, inplace=inplace)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss, margins, grad = step(logits, labels, ref, backend)
    assert same((out.loss, out.margins, x.grad), (loss, margins, grad))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile(backend, shape):
    logits, labels, ref = batch(shape)

    @torch.compile(fullgraph=True)
    def loss_of(x, labels, ref):
        return dk.fused_dpo_loss(x, labels, ref_logps=ref, backend=backend).loss

    x = logits.clone().requires_grad_()
    loss = loss_of(x, labels, ref)
    loss.backward()
    exact, _, grad = step(logits, labels, ref, backend)
    torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, grad, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_outside_the_vocabulary_are_nan_rows(backend):
    logits, labels, _ = batch("small")
    V = logits.shape[-1]
    labels[0, 5], labels[1, 6] = V, -7
    logps = dk.sequence_logps(logits, labels, reduction="none", backend=backend, shift=False)
    assert torch.equal(logps.isnan(), (labels == V) | (labels == -7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend):
    for shape in SHAPES:
        b = batch(shape)
        first = step(*b, backend)
        for _ in range(5):
            assert same(step(*b, backend), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_head_in_bf16(backend):
    """Products with fp32 output: log-probs of fp32 grade from bf16 hidden states and weight."""
    V, H = 32001, 512
    hidden = torch.randn(4, 65, H).bfloat16()
    weight = torch.randn(V, H).mul_(0.1).bfloat16()
    labels = torch.randint(0, V, (4, 65))
    labels[:, :20] = IGNORE
    exact = dk.linear_sequence_logps(hidden.double(), weight.double(), labels)
    ours = dk.linear_sequence_logps(hidden, weight, labels, backend=backend)
    rounded = dk.sequence_logps(hidden @ weight.T, labels, backend=backend)
    assert (ours - exact).abs().max() <= (rounded - exact).abs().max() / 10
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    ref = ours + torch.randn(4)
    dk.fused_linear_dpo_loss(*leaves, labels, ref_logps=ref, backend=backend).loss.backward()
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    dk.fused_linear_dpo_loss(*wide, labels, ref_logps=ref.double()).loss.backward()
    for x, w in zip(leaves, wide, strict=True):
        error = (x.grad.double() - w.grad).norm() / w.grad.norm()
        assert error < 4e-3, error


@pytest.mark.parametrize("strategy", ("streaming", "frozen", "recompute"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_head_with_an_adapter(backend, dtype, strategy):
    """Narrow products, several chunks, an fp32 adapter, gradients as large as a loss scale."""
    V, H, r = 5003, 256, 12
    values = {
        "hidden": torch.randn(4, 400, H).to(dtype),
        "weight": torch.randn(V, H).mul_(0.2).to(dtype),
        "A": torch.randn(r, H) * 0.1,
        "B": torch.randn(V, r) * 0.1,
    }
    labels = torch.randint(0, V, (4, 400))
    labels[:, :20] = IGNORE
    trained = ["hidden", "A"] if strategy == "frozen" else list(values)
    wide = {k: v.double().requires_grad_(k in trained) for k, v in values.items()}
    mine = {k: v.clone().requires_grad_(k in trained) for k, v in values.items()}
    losses = []
    for x in (mine, wide):
        options = (
            {}
            if x is wide
            else {"strategy": strategy, "memory_budget": 40 << 20, "backend": backend}
        )
        out = dk.fused_linear_dpo_loss(
            x["hidden"],
            x["weight"],
            labels,
            lora=(x["A"], x["B"], 0.5),
            reference_free=True,
            beta=0.02,
            **options,
        )
        (out.loss * 2.0**12).backward()
        losses.append(out.margins.double())
    assert (losses[0] - losses[1]).abs().max() < 1e-4
    for name in trained:
        error = (mine[name].grad.double() - wide[name].grad).norm() / wide[name].grad.norm()
        assert error < (6e-3 if dtype == torch.bfloat16 else 1e-3), (name, error)


@pytest.mark.parametrize("scored", ("all", "some"))
@pytest.mark.parametrize("trained", (True, False))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_linear_head_never_waits(backend, trained, scored):
    """With the lengths given nothing is read back, and nothing is copied but the boundaries."""
    V, H = 4001, 128
    hidden = torch.randn(8, 300, H).bfloat16().requires_grad_()
    weight = torch.randn(V, H).mul_(0.2).bfloat16().requires_grad_(trained)
    labels = torch.randint(0, V, (8, 300))
    labels[:, : 0 if scored == "all" else 50] = IGNORE
    lengths = [300 if scored == "all" else 250] * 8
    ref = torch.randn(8)

    def run():
        out = dk.fused_linear_dpo_loss(
            hidden,
            weight,
            labels,
            ref_logps=ref,
            scored_lengths=lengths,
            shift=False,
            memory_budget=30 << 20,
            backend=backend,
        )
        out.loss.backward()

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, labels, ref = batch("large")
    here = step(logits, labels, ref, backend)
    there = step(logits.to("cuda:1"), labels.to("cuda:1"), ref.to("cuda:1"), backend)
    assert same(here, [x.to("cuda:0") for x in there])


def test_boundaries_on_the_cpu_are_checked_without_waiting():
    logits, labels, ref = (x.cuda() for x in batch("small"))
    R, T = labels.shape
    packed = {"cu_seqlens": torch.arange(0, R * T + 1, T), "ref_logps": ref}
    flat = logits.reshape(R * T, -1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = dk.fused_dpo_loss(flat, labels.reshape(-1), **packed).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss, dk.fused_dpo_loss(logits, labels, ref_logps=ref).loss)
