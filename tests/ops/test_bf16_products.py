"""Products of bf16 matrices written in fp32 on CPUs that multiply pairs of bf16."""

import pytest
import torch
from linear_cases import B, H, T, V, close, labels_of

import dpo_kernels as dk
from dpo_kernels import _C
from dpo_kernels.backends import cpu
from dpo_kernels.inputs.transform import LogitTransform
from dpo_kernels.ops import products

has_them = pytest.mark.skipif(not cpu.has_bf16_products(), reason="this CPU has no AVX512-BF16")

# Around the groups of 6 rows, 64 columns and 16 lanes, and beyond a tile and a block of K.
SIZES = [
    (1, 1, 1),
    (6, 64, 2),
    (7, 65, 3),
    (5, 3, 0),
    (13, 200, 33),
    (97, 1000, 129),
    (400, 513, 515),
    (390, 70, 1100),
]


def matrix(rows: int, columns: int, along: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if along == "columns":
        return torch.randn(rows, columns + 3, generator=g).bfloat16()[:, :columns]
    if along == "rows":
        return torch.randn(columns, rows + 3, generator=g).bfloat16()[:, :rows].T
    return torch.randn(2 * rows, 2 * columns, generator=g).bfloat16()[::2, ::2]


@has_them
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_as_float64(M, N, K):
    kinds = ("columns", "rows", "neither")
    for a_kind, b_kind in [(a, b) for a in kinds for b in kinds]:
        a, b = matrix(M, K, a_kind, 1), matrix(K, N, b_kind, 2)
        expected = a.double() @ b.double()
        room = torch.full((M, N + 5), 7.0)
        out = room[:, :N]
        close_to = 2e-6 * (a.double().abs() @ b.double().abs()) + 1e-30
        cpu.bf16_product(a, b, out, add=False)
        assert ((out - expected).abs() <= close_to).all()
        cpu.bf16_product(a, b, out, add=True)
        assert ((out - 2 * expected).abs() <= 3 * close_to).all()
        assert (room[:, N:] == 7).all()


@has_them
def test_an_element_does_not_depend_on_its_neighbours_or_on_threads():
    a, b = matrix(211, 1100, "columns", 1), matrix(1100, 700, "rows", 2)
    whole = cpu.bf16_product(a, b, torch.empty(211, 700), add=False)
    part = cpu.bf16_product(a[50:83], b[:, 131:307], torch.empty(33, 176), add=False)
    assert torch.equal(part, whole[50:83, 131:307])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 40):
            torch.set_num_threads(count)
            again = cpu.bf16_product(a, b, torch.empty(211, 700), add=False)
            assert torch.equal(again, whole)
    finally:
        torch.set_num_threads(threads)


@has_them
def test_infinities_and_nan_stay_where_they_are():
    a, b = matrix(9, 40, "columns", 1).clone(), matrix(40, 70, "columns", 2)
    a[2, 5], a[7, 0] = float("inf"), float("nan")
    out = cpu.bf16_product(a, b, torch.empty(9, 70), add=False)
    assert torch.equal(out.isfinite().all(1), torch.tensor([i not in (2, 7) for i in range(9)]))
    assert out[7].isnan().all() and out[2].isinf().all()


@pytest.mark.parametrize("kind", ["WIDE", pytest.param("ADDMM", marks=has_them)])
@pytest.mark.parametrize("strategy", ["streaming", "recompute", "frozen"])
def test_the_head_with_and_without_them(strategy, kind, monkeypatch):
    monkeypatch.setattr(products, "_on_cpu", lambda: getattr(products, kind))
    hidden = torch.randn(2 * B, T, H).bfloat16().requires_grad_()
    weight = (torch.randn(V, H) * 0.5).bfloat16().requires_grad_(strategy != "frozen")
    labels = labels_of()
    out = dk.fused_linear_dpo_loss(
        hidden, weight, labels, reference_free=True, strategy=strategy, memory_budget=60_000
    )
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dk.fused_dpo_loss(wide[0] @ wide[1].T, labels, reference_free=True)
    torch.testing.assert_close(out.margins.double(), expected.margins, rtol=2e-5, atol=2e-5)
    out.loss.backward()
    expected.loss.backward()
    close(hidden.grad, wide[0].grad, 1.5e-2)
    if strategy != "frozen":
        close(weight.grad, wide[1].grad, 1.5e-2)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("classes", [1, 257, 9001])
def test_a_backward_rounds_as_it_writes(classes, softcap):
    """fp32 logits, a bf16 gradient: that of fp32, rounded once, whatever instruction set."""
    g = torch.Generator().manual_seed(0)
    transform = LogitTransform(softcap=softcap)
    logits = torch.randn(300, 1, classes, generator=g) * 4
    labels = torch.randint(0, classes, (300, 1), generator=g)
    labels[::3] = -100
    grad = torch.randn(300, 1, generator=g)
    lse = cpu.token_logps(logits, labels, -100, transform, ())[1]
    try:
        for name in _C.instruction_sets().split(","):
            _C.use_instruction_set(name)
            wide = torch.empty_like(logits)
            cpu.token_logps_backward(grad, logits, labels, lse, -100, transform, wide)
            out = torch.full((300, 1, classes + 7), 3.0).bfloat16()
            narrow = out[..., :classes]
            cpu.token_logps_backward(grad, logits, labels, lse, -100, transform, narrow)
            assert torch.equal(narrow, wide.bfloat16())
            assert (out[..., classes:] == 3).all()
    finally:
        _C.use_instruction_set("")
