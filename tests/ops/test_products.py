"""Products of narrow operands that write fp32, with a GPU's two products computed here in fp32."""

import logging

import pytest
import torch
from linear_cases import B, H, T, V, close, labels_of

import dpo_kernels as dk
from dpo_kernels.ops import linear_head, plan, products

DTYPES = (torch.bfloat16, torch.float16)
KINDS = {"addmm": products.ADDMM, "mm": products.MM}


def _fast(a, b, out):
    """Of operands that cuBLAS has its fast kernels for: whole vectors, or a few elements."""
    assert a.dtype == b.dtype and a.dtype in DTYPES and out.dtype == torch.float32
    for size, contiguous in (
        (out.shape[1], out.stride(1) == 1),
        (a.shape[0], a.stride(0) == 1),
        (a.shape[1], a.stride(1) == 1),
    ):
        assert not contiguous or size < products.VECTOR or size % products.VECTOR == 0


def _mm(a, b, out):
    _fast(a, b, out)
    return out.copy_(a.float() @ b.float())


def _addmm(a, b, out):
    _fast(a, b, out)
    return out.add_(a.float() @ b.float())


@pytest.fixture
def narrow(monkeypatch):
    """The CPU as a device with such products."""

    def be(kind):
        def products_of(device, dtype):
            return kind if dtype in DTYPES else products.WIDE

        for module in (plan, linear_head, products):
            monkeypatch.setattr(module, "products_of", products_of)
        monkeypatch.setattr(products, "_wants_whole_vectors", lambda x: True)
        monkeypatch.setattr(products, "_mm", _mm)
        monkeypatch.setattr(products, "_addmm", _addmm)

    return be


@pytest.mark.parametrize(
    ("backend", "kind", "loss_type"),
    [
        *(("cpu", kind, loss) for kind in KINDS for loss in ("sigmoid", "tdpo2")),
        ("triton", "addmm", "sigmoid"),
        ("triton", "addmm", "tdpo2"),
        ("cuda", "addmm", "sigmoid"),
    ],
)
@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_float64(narrow, dtype, kind, strategy, loss_type, backend):
    """Every strategy, with a low-rank part in fp32, several chunks, upstream gradients as large
    as a loss scale: log-probs to fp32, gradients to the rounding of their dtype."""
    narrow(KINDS[kind])
    tensors = {
        "hidden": torch.randn(2 * B, T, H).to(dtype),
        "weight": (torch.randn(V, H) * 0.5).to(dtype),
        "bias": torch.randn(V).to(dtype),
        "A": torch.randn(3, H) * 0.3,
        "B": torch.randn(V, 3) * 0.3,
    }
    wide = {k: v.double().requires_grad_() for k, v in tensors.items()}
    ref = torch.randn(2 * B, T, H).to(dtype)
    labels = labels_of()
    trained = ["hidden", "A"] if strategy == "frozen" else list(tensors)
    for name in trained:
        tensors[name].requires_grad_()
    call = {"loss_type": loss_type, "beta": 0.03}
    out = dk.fused_linear_dpo_loss(
        tensors["hidden"],
        tensors["weight"],
        labels,
        bias=tensors["bias"],
        lora=(tensors["A"], tensors["B"], 0.5),
        ref_hidden=ref,
        strategy=strategy,
        memory_budget=60_000,
        backend=backend,
        **call,
    )
    total = wide["weight"] + 0.5 * wide["B"] @ wide["A"]
    reference = ref.double() @ wide["weight"].detach().T + wide["bias"].detach()
    expected = dk.fused_dpo_loss(wide["hidden"] @ total.T + wide["bias"], labels, reference, **call)
    assert out.strategy == strategy
    torch.testing.assert_close(out.margins.double(), expected.margins, rtol=2e-5, atol=2e-5)
    scale = 2.0**14
    (out.loss * scale).backward()
    (expected.loss * scale).backward()
    for name in trained:
        got = tensors[name].grad
        assert got.dtype == tensors[name].dtype
        close(got, wide[name].grad, 1.5e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("V", (1, 7, 8, 9, 16, 33))
def test_an_odd_vocabulary_is_multiplied_in_parts(V):
    """All three products of a head, whose rows lie `pitch` apart, are those of the whole."""
    n, H = 5, 16
    h, w, z = torch.randn(n, H), torch.randn(V, H), torch.full((n, 40), torch.nan)[:, :V]
    dz = torch.randn(n, 40)[:, :V]
    for a, b, out in ((h, w.T, z), (dz, w, torch.empty(n, H)), (dz.T, h, torch.empty(V, H))):
        parts = products.whole_vectors(a, b, out)
        assert len(parts) == (2 if V > 8 and V % 8 else 0)
        for a_, b_, out_, more in parts:
            out_.copy_(a_ @ b_ + (out_ if more else 0))
        if parts:
            torch.testing.assert_close(out, a @ b)


def test_rows_of_fp16_are_scaled():
    """Gradients of logits from 1e-30 to 1e30 in one chunk: each row as exact as fp16 is."""
    size = 10.0 ** torch.arange(-30, 31, 4.0)
    dz = torch.randn(16, 40) * size[:, None]
    dz[3] = 0
    slopes = products.Slopes.of(dz, torch.empty(16, 40, dtype=torch.float16))
    assert slopes.rows.isfinite().all()
    back = slopes.finish(slopes.rows.float())
    error = (back - dz).abs().amax(1) / dz.abs().amax(1).clamp(min=1e-38)
    assert error.max() < 2**-11
    h = torch.randn(16, 8).half()
    (part,), unit = slopes.meet(h)
    exact = dz.double().T @ h.double()
    got = slopes.rows.double().T @ part.double() * unit
    assert (got - exact).abs().max() < 1e-3 * exact.abs().max()


def test_nothing_scored_and_zero_rows(narrow):
    narrow(products.MM)
    hidden = torch.randn(2, 3, H).half().requires_grad_()
    weight = torch.randn(V, H).half().requires_grad_()
    labels = torch.full((2, 3), -100)
    out = dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True)
    out.loss.backward()
    assert not weight.grad.any() and not hidden.grad.any()


def test_pieces_are_exact():
    x = torch.randn(50, 3) * torch.logspace(-20, 20, 50)[:, None]
    parts = products.split(x, torch.bfloat16, 3)
    assert torch.equal(sum(p.double() for p in parts), x.double())
    low, up = torch.randn(20, 5), torch.randn(30, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = products.low_rank_operand(low, dtype, up=False)
        b = products.low_rank_operand(up.to(dtype), dtype, up=True)
        assert a.shape[1] == b.shape[1] == products.low_rank_columns(5, dtype, products.MM)
        assert a.shape[1] % 8 == 0
        exact = low.double() @ up.to(dtype).double().T
        assert (a.double() @ b.double().T - exact).abs().max() < 2e-7 * exact.abs().max()
    assert products.split(torch.tensor([float("inf")]), torch.bfloat16, 2)[1].item() == 0


@pytest.mark.parametrize(
    ("version", "hip", "kind"),
    [
        ((2, 6), False, products.WIDE),
        ((2, 8), False, products.MM),
        ((2, 9), False, products.MM),
        ((2, 10), False, products.ADDMM),
        ((3, 0), False, products.ADDMM),
        ((2, 13), True, products.WIDE),
    ],
)
def test_what_a_torch_has(version, hip, kind, monkeypatch):
    monkeypatch.setattr(products, "_version", lambda: version)
    monkeypatch.setattr(torch.version, "hip", "6.4" if hip else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert products.products_of(torch.device("cuda"), torch.bfloat16) is kind
    assert products.products_of(torch.device("cuda"), torch.float32) is products.WIDE
    assert products.products_of(torch.device("cpu"), torch.float16) is products.WIDE


@pytest.mark.parametrize("fails", ("_mm", "_addmm", ""))
def test_a_device_is_asked_once(fails, monkeypatch):
    """What the version promises and the device refuses is not used."""
    calls = []

    def product(name):
        def call(a, b, out):
            calls.append(name)
            if name == fails:
                raise RuntimeError("not here")

        return call

    made = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *s, device=None, **kw: made(*s, **kw))
    monkeypatch.setattr(products, "_found", {})
    monkeypatch.setattr(products, "_version", lambda: (2, 11))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_mm", "_addmm"):
        monkeypatch.setattr(products, name, product(name))
    expected = {"_mm": products.WIDE, "_addmm": products.MM, "": products.ADDMM}[fails]
    for _ in range(2):
        assert products.products_of(torch.device("cuda", 0), torch.float16) is expected
    assert calls == (["_mm"] if fails == "_mm" else ["_mm", "_addmm"])


def test_the_log_says_what_is_slow(caplog):
    weight = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")

    class Weight:
        device, dtype = torch.device("cuda"), weight.dtype

    with caplog.at_level(logging.DEBUG, "dpo_kernels"):
        products.tell(Weight, products.ADDMM)
        assert not caplog.records
        products.tell(Weight, products.WIDE)
    assert "slow" in caplog.text and "bfloat16" in caplog.text


class TestDefaultBudget:
    """Llama-3's head, 4096 x 128256."""

    def plan(
        self,
        rows,
        strategy="streaming",
        device="cuda",
        V=128256,
        H=4096,
        budget=plan.DEFAULT,
        dtype=torch.bfloat16,
        **options,
    ):
        weight = torch.empty(V, H, dtype=dtype, device="meta")
        return plan.plan_of(
            strategy,
            budget,
            rows,
            weight,
            None,
            None,
            False,
            device=torch.device(device),
            **options,
        )

    @pytest.mark.parametrize("strategy", ("streaming", "frozen", "recompute", "score"))
    @pytest.mark.parametrize("rows", (500, 1024, 8192, 131072))
    @pytest.mark.parametrize("V", (32000, 128256, 262144, 1_000_000))
    def test_on_a_gpu_a_chunk_has_1024_rows(self, strategy, rows, V):
        got = self.plan(rows, strategy, V=V)
        assert got.chunk >= min(rows, 1024)
        assert got.keep == 0 or got.keep >= min(rows, 1024)
        # 2 GiB hold its logits, their gradient and what else a row takes, or it has 1024 rows.
        assert got.chunk <= 1024 or got.chunk * got.pitch * 4 <= plan.GPU_BUDGET

    def test_an_explicit_budget_is_a_promise(self):
        got = self.plan(8192, budget=256 << 20)
        assert got.chunk * got.pitch * 6 <= 256 << 20 and got.least == 1

    def test_on_a_cpu_it_holds_the_largest_pair(self):
        """Qwen2.5's head: a pair of 1,022 rows was not streamed."""
        head = {"V": 152064, "H": 896, "dtype": torch.float32, "device": "cpu"}
        assert self.plan(4088, **head).chunk < 1022
        assert self.plan(4088, largest=1022, **head).chunk >= 1022
        got = self.plan(40000, largest=20000, **head)
        assert 1022 < got.chunk <= plan.CPU_LARGEST // (4 * 152064)

    def test_chunks_take_another_pair_below_the_least(self):
        lengths = [350] * 20
        for limit in (1300, 1370):
            chunks = plan.chunks_of_pairs(lengths, limit, 1024)
            rows = [700 * (j - i) for i, j in chunks]
            assert min(rows[:-1]) >= 1024
        assert plan.chunks_of_pairs(lengths, 1300) == [(i, i + 1) for i in range(10)]


def test_a_large_pair_is_streamed_by_default():
    """1,022 rows of Qwen2.5's vocabulary in miniature: more than 256 MiB, less than 1 GiB."""
    from dpo_kernels.memory import estimate

    head = {"T": 511, "V": 152064, "H": 896}
    assert estimate("streaming", [511, 511], **head).terms["logits"] > 256 << 20
    with pytest.raises(ValueError, match="takes whole pairs"):
        estimate("streaming", [511, 511], memory_budget=256 << 20, **head)
    on_gpu = estimate("streaming", [511, 511], dtype=torch.bfloat16, device="cuda", **head)
    assert on_gpu.terms["slopes"] == on_gpu.terms["logits"] // 2
    assert "tile" not in on_gpu.terms
