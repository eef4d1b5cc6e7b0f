"""The linear head's digits: the same pair in any batch, and bf16 inputs without bf16 logits."""

import pytest
import torch
from linear_cases import IGNORE

import dpo_kernels as dk

V, H, T = 1777, 72, 21


def pairs_of(n, dtype):
    """hidden [2n, T, H] and labels [2n, T] of n pairs of many lengths, holes among them."""
    hidden, labels = torch.randn(2 * n, T, H).to(dtype), torch.randint(0, V, (2 * n, T))
    for i in range(2 * n):
        labels[i, : 2 + i % 5] = IGNORE
        labels[i, T - i % 7 :] = IGNORE
    labels[1, 9] = IGNORE
    # A pair of two tokens: products of so few rows are where a BLAS takes another path.
    for i in (n - 1, 2 * n - 1):
        labels[i, :7] = labels[i, 8:] = IGNORE
    return hidden, labels


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("strategy", ("score", "frozen", "recompute", "streaming"))
@pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo1"))
def test_a_pair_is_the_same_in_any_batch(dtype, strategy, loss_type):
    """Bitwise: alone or among others, first or last, whatever the budget, padded or packed."""
    n = 5
    hidden, labels = pairs_of(n, dtype)
    ref = torch.randn(hidden.shape).to(dtype)
    weight, bias = torch.randn(V, H).to(dtype), torch.randn(V).to(dtype)
    weight.requires_grad_(strategy in ("recompute", "streaming"))

    def run(chosen, budget, packed=False):
        rows = [*chosen, *(n + i for i in chosen)]
        x, y, r = hidden[rows], labels[rows], ref[rows]
        cu = None
        if packed:
            x, y, r = (v.flatten(0, 1) for v in (x, y, r))
            cu = torch.arange(len(rows) + 1) * T
        out = dk.fused_linear_dpo_loss(
            x.requires_grad_(strategy != "score"),
            weight,
            y,
            bias=bias,
            ref_hidden=r,
            cu_seqlens=cu,
            memory_budget=budget,
            batch_invariant=True,
            strategy=strategy,
            loss_type=loss_type,
            backend="cpu",
        )
        assert out.strategy == strategy
        values = torch.stack([out.chosen_logps, out.rejected_logps, out.margins])
        return {pair: values[:, i] for i, pair in enumerate(chosen)}

    alone = {i: run([i], None)[i] for i in range(n)}
    assert len({v[0].item() for v in alone.values()}) == n
    for chosen in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1], [2, 2, 2, 0]):
        # 1 MiB: a block of 64 rows or two; streaming needs room for a pair.
        for budget in (1 << 20, 3 << 20, None):
            for packed in (False, True):
                for pair, values in run(chosen, budget, packed).items():
                    assert torch.equal(values, alone[pair]), (chosen, budget, packed, pair)


@pytest.mark.parametrize("strategy", ("score", "frozen", "recompute"))
@pytest.mark.parametrize("scale", (1.0, 4.0))
def test_bf16_inputs_lose_nothing_to_bf16_logits(strategy, scale):
    """Ten times nearer to float64 than a head that writes its logits in bf16."""
    S, T, V, H = 6, 120, 4000, 128
    hidden = torch.randn(S, T, H).bfloat16().requires_grad_(strategy != "score")
    weight = (torch.randn(V, H) * scale / H**0.5).bfloat16()
    weight.requires_grad_(strategy == "recompute")
    labels = torch.randint(0, V, (S, T))
    with torch.no_grad():
        exact = dk.sequence_logps(hidden.double() @ weight.double().T, labels, backend="torch")
        written = dk.sequence_logps(hidden @ weight.T, labels, backend="cpu")
    ours = dk.linear_sequence_logps(hidden, weight, labels, strategy=strategy, backend="cpu")
    error, theirs = ((x.detach() - exact).abs().mean() for x in (ours, written))
    assert 10 * error < theirs, (error, theirs)
    # The loss as well: pairs of the first and second half against a reference of zeros.
    given = {"ref_logps": exact.float() * 0.9, "beta": 0.05}
    if strategy == "recompute":
        true = dk.fused_dpo_loss(hidden.double() @ weight.double().T, labels, **given).margins
        mine = dk.fused_linear_dpo_loss(hidden, weight, labels, **given)  # streamed
        rough = dk.fused_dpo_loss(hidden @ weight.T, labels, **given).margins
        assert mine.strategy == "streaming"
        assert 10 * (mine.margins - true).abs().mean() < (rough - true).abs().mean()


@pytest.mark.parametrize("shape", ((1000, 33, 64), (5000, 512, 40)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_no_budget_shows(dtype, shape):
    """C7: the width of a widened tile followed the budget, and the sums of the last columns it."""
    V, H, T = shape
    for _ in range(4):
        hidden, weight = torch.randn(4, T, H).to(dtype), torch.randn(V, H).to(dtype)
        labels = torch.randint(0, V, (4, T))
        ours = [
            dk.linear_sequence_logps(
                hidden,
                weight,
                labels,
                reduction="none",
                memory_budget=budget,
                batch_invariant=True,
                backend="cpu",
            )
            for budget in (1, 1 << 18, 1 << 20, None)
        ]
        assert all(torch.equal(x, ours[0]) for x in ours[1:])
