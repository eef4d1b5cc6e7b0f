"""The linear head: every strategy gives the values and gradients of float64, at any budget."""

import math

import pytest
import torch
from linear_cases import (
    BUDGETS,
    IGNORE,
    OPTIONS,
    B,
    H,
    T,
    V,
    at_step_zero,
    check,
    close,
    exact,
    labels_of,
    needs_reference,
    pack,
    tensors,
)

import dpo_kernels as dk
from dpo_kernels.losses import TABLE

LOSSES = list(TABLE)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_loss(name, budget):
    hidden, weight, bias, *ref = tensors()
    labels = labels_of()
    options = {"loss_type": name, **OPTIONS.get(name, {})}
    strategy = "recompute" if TABLE[name].batch_coupled else "streaming"
    out = check(
        (hidden, weight, bias),
        labels,
        ref if needs_reference(name) else None,
        options,
        None,
        memory_budget=BUDGETS[budget],
    )
    assert out.strategy == strategy
    if strategy == "streaming":
        other = dk.fused_linear_dpo_loss(
            hidden,
            weight.requires_grad_(),
            labels,
            bias=bias,
            strategy="recompute",
            memory_budget=BUDGETS[budget],
            **options,
            **({"ref_hidden": ref[0], "ref_weight": ref[1]} if needs_reference(name) else {}),
        )
        assert other.strategy == "recompute"
        torch.testing.assert_close(other.loss, out.loss)


@pytest.mark.parametrize("strategy", ("streaming", "recompute"))
@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"loss_type": ["sigmoid", "sft", "ipo"], "loss_weights": [1.0, 0.5, 2.0]},
        {"sft_weight": 0.7, "loss_type": "hinge"},
        {"label_smoothing": 0.2, "f_divergence_type": "js_divergence"},
        {"weights": torch.tensor([1.0, 0.0, 2.0, 0.5])},
        {"num_pairs": 7, "num_chosen_tokens": 50.0, "sft_weight": 1.0},
        {"logit_softcap": 5.0, "temperature": 0.8, "logit_scale": 1.3},
        {"reference_free": True},
        {"beta": torch.tensor([0.1, 0.2, 0.5, 0.05])},
    ],
    ids=lambda o: "-".join(o),
)
def test_every_option(options, strategy):
    hidden, weight, bias, *ref = tensors()
    check(
        (hidden, weight, bias),
        labels_of(),
        None if "reference_free" in options else ref,
        options,
        strategy,
        memory_budget=BUDGETS["tight"],
    )


@pytest.mark.parametrize("backend", ("cpu", "triton"))
@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_backends_and_dtypes(backend, strategy, dtype):
    hidden, weight, bias, *ref = tensors(dtype)
    leaves = (hidden, weight, bias)
    rtol = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    if strategy != "frozen":
        check(leaves, labels_of(), ref, {}, strategy, rtol, backend=backend)
        return
    x, labels = hidden.requires_grad_(), labels_of()
    expected, gradients = exact(leaves, labels, ref)
    out = dk.fused_linear_dpo_loss(
        x,
        weight,
        labels,
        bias=bias,
        ref_hidden=ref[0],
        ref_weight=ref[1],
        backend=backend,
        memory_budget=BUDGETS["tight"],
    )
    assert out.strategy == "frozen" and abs(out.loss - expected.loss) < 1e-5
    out.loss.backward()
    close(x.grad, gradients[0], rtol)


@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen"))
@pytest.mark.parametrize("shift", (True, False))
@pytest.mark.parametrize("per_token", (True, False))
def test_layouts(strategy, shift, per_token):
    """Packed and padded, strided hidden states, reference log-probs per token or summed."""
    hidden, weight, bias, *ref = tensors()
    labels = labels_of()
    lengths = [9, 7, 0, 9, 8, 9, 5, 9]
    for i, n in enumerate(lengths):
        labels[i, n:] = IGNORE
    none = {"reduction": "none"} if per_token else {}
    given = {"ref_logps": dk.linear_sequence_logps(ref[0], ref[1], labels, shift=shift, **none)}
    expected, gradients = exact((hidden, weight, bias), labels, shift=shift, **given)
    trained = strategy != "frozen"
    options = {"shift": shift, "strategy": strategy, "memory_budget": BUDGETS["tight"]}

    def run(hidden, labels, **more):
        leaves = [hidden.requires_grad_(), weight.clone().requires_grad_(trained)]
        out = dk.fused_linear_dpo_loss(*leaves, labels, bias=bias, **options, **more)
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad(out.loss, leaves if trained else leaves[:1])
        if trained:
            close(grads[1], gradients[1])
        return grads[0]

    strided = torch.randn(T + 3, H, 2 * B).permute(2, 0, 1)[:, :T]
    strided.copy_(hidden)
    assert not strided.is_contiguous()
    close(run(strided.detach(), labels, **given), gradients[0])
    cu = torch.tensor([0, *lengths]).cumsum(0)
    if per_token:
        full = torch.nn.functional.pad(given["ref_logps"], (0, 1)) if shift else given["ref_logps"]
        given = {"ref_logps": pack(full, lengths)}
    got = run(pack(hidden, lengths), pack(labels, lengths), cu_seqlens=cu, **given)
    close(got, pack(gradients[0], lengths))


def test_learned_options_and_weights():
    """beta (one, or a value a pair), offset and weights get the gradients of the composition."""
    hidden, weight, _, *ref = tensors()
    labels = labels_of()
    for size in ((), (B,)):
        leaves = {
            "beta": torch.full(size, 0.2),
            "offset": torch.randn(B) * 0.1,
            "weights": torch.rand(B),
        }
        got = []
        for strategy in ("streaming", "recompute"):
            mine = {k: v.clone().requires_grad_() for k, v in leaves.items()}
            out = dk.fused_linear_dpo_loss(
                hidden,
                weight.requires_grad_(),
                labels,
                ref_hidden=ref[0],
                ref_weight=ref[1],
                strategy=strategy,
                memory_budget=BUDGETS["tight"],
                **mine,
            )
            got.append(torch.autograd.grad(3.0 * out.loss, list(mine.values())))
        for a, b in zip(*got, strict=True):
            assert (a != 0).any()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ("sum", "mean", "none"))
@pytest.mark.parametrize("trained", (True, False))
@pytest.mark.parametrize("budget", BUDGETS)
def test_sequence_logps(reduction, trained, budget):
    hidden, weight, bias, *_ = tensors()
    labels = labels_of()
    stats = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    a = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
    b = [x.detach().double().requires_grad_(x.requires_grad) for x in a]
    got, table = dk.linear_sequence_logps(
        *a, labels, bias=bias, reduction=reduction, stats=stats, memory_budget=BUDGETS[budget]
    )
    logits = b[0] @ b[1].T + bias.double()
    expected, wanted = dk.sequence_logps(logits, labels, reduction=reduction, stats=stats)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for name in stats:
        torch.testing.assert_close(table[name].double(), wanted[name], rtol=1e-5, atol=1e-5)
    upstream = torch.randn(got.shape)
    leaves = slice(None) if trained else slice(1)
    grads = torch.autograd.grad(got, a[leaves], upstream)
    for x, y in zip(
        grads, torch.autograd.grad(expected, b[leaves], upstream.double()), strict=True
    ):
        close(x, y)


def test_reduction_none():
    hidden, weight, bias, *ref = tensors()
    out = check((hidden, weight, bias), labels_of(), ref, {"reduction": "none"}, None)
    assert out.strategy == "recompute" and out.loss.shape == (B,)


@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen", "score"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_step_zero(strategy, dtype):
    """Policy and reference the same: the same bits, so rewards are 0 and the loss log 2."""
    at_step_zero(strategy, dtype)


def test_one_pair_and_nothing_scored():
    hidden, weight = torch.randn(2, 4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    labels = torch.randint(0, V, (2, 4))
    for given in (labels, torch.full_like(labels, IGNORE)):
        out = dk.fused_linear_dpo_loss(hidden, weight, given, reference_free=True)
        assert out.strategy == "streaming"
        grads = torch.autograd.grad(out.loss, (hidden, weight))
        assert all(g.isfinite().all() for g in grads)
    assert abs(out.loss.item() - math.log(2)) < 1e-7 and not any(g.any() for g in grads)
    logps = dk.linear_sequence_logps(hidden, weight, given)
    assert not torch.autograd.grad(logps.sum(), (hidden, weight))[1].any()


def test_a_pair_of_weight_zero_reaches_nothing():
    """Even with logits that are not numbers."""
    hidden, weight, _, *ref = tensors()
    labels = labels_of()
    hidden[1] = float("nan")
    weights = torch.ones(B)
    weights[1] = 0
    for strategy, trained in (("streaming", True), ("recompute", True), ("frozen", False)):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        out = dk.fused_linear_dpo_loss(
            x, w, labels, ref_hidden=ref[0], ref_weight=ref[1], weights=weights, strategy=strategy
        )
        out.loss.backward()
        assert out.loss.isfinite() and x.grad.isfinite().all()
