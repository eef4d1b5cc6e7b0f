"""tdpo1 and tdpo2 (arXiv 2404.11999) against the paper's formulas, from logits and hidden states.

K of a completion is the sum over its scored tokens of KL(reference || policy); D as for `sigmoid`.
"""

import math

import pytest
import torch
from linear_cases import (
    BUDGETS,
    IGNORE,
    B,
    H,
    T,
    V,
    at_step_zero,
    check,
    close,
    compiles,
    labels_of,
    pack,
    tensors,
)
from torch.nn.functional import logsigmoid

import dpo_kernels as dk

NAMES = ("tdpo1", "tdpo2")
BACKENDS = ("torch", "cpu", "triton")


def by_hand(name, logits, ref, labels, beta=0.1, alpha=0.5, shift=True, stop=True):
    """Loss and rewards of [2B, T, V] logits, sequence by sequence, token by token."""

    def sums(i):
        ratio = kl = torch.zeros((), dtype=torch.float64)
        for t in range(labels.shape[1] - shift):
            y = labels[i, t + shift].item()
            if y == IGNORE:
                continue
            p, q = logits[i, t].softmax(-1), ref[i, t].softmax(-1)
            ratio = ratio + p[y].log() - q[y].log()
            kl = kl + (q * (q / p).log()).sum()
        return ratio, kl

    losses, rewards, n = [], [], labels.shape[0] // 2
    for i in range(n):
        (u, K_w), (v, K_l) = sums(i), sums(n + i)
        if name == "tdpo1":
            margin = u - v - (K_l - K_w)
        else:
            margin = u - v - alpha * (K_l - (K_w.detach() if stop else K_w))
        losses.append(-logsigmoid(beta * margin))
        rewards.append(beta * u)
    return torch.stack(losses).mean(), torch.stack(rewards)


def batch(dtype=torch.float32):
    """Logits, those of a reference near them, labels."""
    logits = torch.randn(2 * B, T, V)
    return logits.to(dtype), (logits + torch.randn(logits.shape) * 0.5).to(dtype), labels_of()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dtype", "shift"), [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_the_paper(backend, name, dtype, shift):
    logits, ref, labels = batch(dtype)
    options = {"loss_type": name, "beta": 0.3, "shift": shift, "backend": backend}
    exact = logits.double().requires_grad_()
    loss, rewards = by_hand(name, exact, ref.double(), labels, beta=0.3, shift=shift)
    loss.backward()
    x = logits.clone().requires_grad_()
    out = dk.fused_dpo_loss(x, labels, ref, **options)
    out.loss.backward()
    assert abs(out.loss - loss) < 2e-6
    torch.testing.assert_close(out.chosen_rewards.double(), rewards.detach(), rtol=1e-5, atol=1e-5)
    eps = 2 * torch.finfo(dtype).eps
    close(x.grad, exact.grad, max(eps, 2e-5))
    if backend == "triton":
        return  # the interpreter is slow; layouts and in place are the op's, in test_token_kl.py
    leaf = logits.clone().requires_grad_()
    again = dk.fused_dpo_loss(leaf * 1.0, labels, ref, inplace=True, **options)
    again.loss.backward()
    assert torch.equal(leaf.grad, x.grad) or backend == "torch"
    lengths = [9, 7, 3, 9, 8, 9, 5, 9]
    for i, n in enumerate(lengths):
        labels[i, n:] = IGNORE
    cu = torch.tensor([0, *lengths]).cumsum(0)
    padded = dk.fused_dpo_loss(logits, labels, ref, **options)
    packed = dk.fused_dpo_loss(
        *(pack(v, lengths) for v in (logits, labels, ref)), cu_seqlens=cu, **options
    )
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    logits, ref, labels = (v[:, :4] for v in batch(torch.float64))
    x = logits[..., :5].clone().requires_grad_()
    labels = labels.clamp(max=4)

    def f(x, loss_type=name, **options):
        return dk.fused_dpo_loss(x, labels, ref[..., :5], loss_type=loss_type, **options).loss

    if name == "tdpo1":
        assert torch.autograd.gradcheck(f, x)
        return
    # The stopped gradient is not the function's own: compare with the formula's.
    loss, _ = by_hand("tdpo2", x, ref[..., :5], labels)
    free, _ = by_hand("tdpo2", x, ref[..., :5], labels, stop=False)
    ours, stopped, through = (torch.autograd.grad(v, x)[0] for v in (f(x), loss, free))
    torch.testing.assert_close(ours, stopped, rtol=1e-10, atol=1e-12)
    assert (through - stopped)[:B].abs().max() > 1e-4
    torch.testing.assert_close(f(x, tdpo_alpha=0.0), f(x, "sigmoid"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", ("streaming", "recompute"))
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_softcap": 5.0, "temperature": 0.8, "logit_scale": 1.3, "beta": 0.4},
        {"use_weighting": True, "weights": torch.tensor([1.0, 0.0, 2.0, 0.5])},
        {"sft_weight": 0.7, "beta": torch.tensor([0.1, 0.2, 0.5, 0.05])},
    ],
    ids=lambda o: "-".join(o),
)
def test_linear(name, strategy, budget, options):
    hidden, weight, bias, *ref = tensors()
    options = {"loss_type": name, **options}
    call = {"memory_budget": BUDGETS[budget]}
    out = check((hidden, weight, bias), labels_of(), ref, options, strategy, **call)
    assert out.strategy == strategy


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cpu", torch.float16),
        ("triton", torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen", "score"))
def test_linear_backends(backend, dtype, strategy):
    """A reference with a hidden size of its own; the formula by hand."""
    hidden, weight, bias, *_ = tensors(dtype)
    ref_hidden, ref_weight = tensors(dtype, H=H + 5)[3:]
    labels = labels_of()
    ref = ref_hidden.double() @ ref_weight.double().T
    names = ("hidden", "weight", "bias")
    trained = {"score": (), "frozen": names[:1]}.get(strategy, names)
    mine, exact = {}, {}
    for key, value in zip(names, (hidden, weight, bias), strict=True):
        mine[key] = value.clone().requires_grad_(key in trained)
        exact[key] = value.double().requires_grad_(key in trained)
    loss, _ = by_hand(
        "tdpo2", exact["hidden"] @ exact["weight"].T + exact["bias"], ref, labels, alpha=0.8
    )
    out = dk.fused_linear_dpo_loss(
        mine["hidden"],
        mine["weight"],
        labels,
        bias=mine["bias"],
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        loss_type="tdpo2",
        tdpo_alpha=0.8,
        strategy=strategy,
        backend=backend,
        memory_budget=BUDGETS["tight"],
    )
    assert out.strategy == strategy and abs(out.loss - loss) < 1e-5
    if trained:
        out.loss.backward()
        loss.backward()
    for key in trained:
        close(mine[key].grad, exact[key].grad, max(2e-5, 2 * torch.finfo(dtype).eps))


def test_which_strategy_is_taken():
    hidden, weight, _, *ref = tensors()
    labels = labels_of()
    given = {"ref_hidden": ref[0], "ref_weight": ref[1], "loss_type": "tdpo1"}
    for trained, options, expected in (
        (True, {}, "streaming"),
        (False, {}, "streaming"),  # three products; "frozen" needs four
        (True, {"reduction": "none"}, "recompute"),
        (False, {"reduction": "none"}, "frozen"),
        (False, {"loss_type": ["tdpo1", "aot"]}, "frozen"),
        (True, {"memory_budget": 1}, "recompute"),  # 16 rows: a pair may have 18
    ):
        labels = torch.randint(0, V, (2 * B, T + 1)) if "memory_budget" in options else labels_of()
        rows = labels.shape[1]
        x = [torch.randn(2 * B, rows, H) for _ in range(2)]
        given["ref_hidden"] = x[1]
        out = dk.fused_linear_dpo_loss(
            x[0].requires_grad_(), weight.requires_grad_(trained), labels, **{**given, **options}
        )
        assert out.strategy == expected, (trained, options)
    plain = dk.fused_linear_dpo_loss(
        hidden, weight.detach(), labels_of(), ref_hidden=ref[0], loss_type="tdpo1", backend="torch"
    )
    assert plain.strategy == "plain"


@pytest.mark.parametrize("strategy", ("streaming", "frozen", "recompute"))
def test_reduction_none_and_lists(strategy):
    """Losses that need the KL beside losses that do not, each pair's on its own."""
    hidden, weight, _, *ref = tensors()
    labels, trained = labels_of(), strategy != "frozen"
    options = {"loss_type": ["tdpo2", "tdpo1", "ipo"], "loss_weights": [1.0, 0.5, 0.2]}
    if strategy != "streaming":
        options["reduction"] = "none"
    leaves = [
        [x.to(d, copy=True).requires_grad_(t) for x, t in ((hidden, True), (weight, trained))]
        for d in (torch.float32, torch.float64)
    ]
    out = dk.fused_linear_dpo_loss(
        *leaves[0],
        labels,
        ref_hidden=ref[0],
        ref_weight=ref[1],
        strategy=strategy,
        memory_budget=BUDGETS["tight"],
        **options,
    )
    exact = dk.fused_dpo_loss(
        leaves[1][0] @ leaves[1][1].T, labels, ref[0].double() @ ref[1].double().T, **options
    )
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
    probe = torch.randn(out.loss.shape)
    (out.loss * probe).sum().backward()
    (exact.loss * probe).sum().backward()
    for mine, true in zip(*leaves, strict=True):
        if mine.requires_grad:
            close(mine.grad, true.grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen", "score"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_step_zero(name, strategy, dtype):
    """Policy and reference the same: K and rewards are 0, the loss log 2, at any budget."""
    at_step_zero(strategy, dtype, loss_type=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_zero_from_logits(backend):
    logits, _, labels = batch()
    out = dk.fused_dpo_loss(logits, labels, logits, loss_type="tdpo2", backend=backend)
    assert abs(out.loss.item() - math.log(2)) < 1e-7 and not out.margins.any()


def test_lora_and_layouts():
    """An adapter on the head, packed and padded hidden states: the sum, never formed."""
    hidden, weight, bias, *ref = tensors()
    lengths = [9, 7, 0, 9, 8, 9, 5, 9]
    labels = labels_of()
    for i, n in enumerate(lengths):
        labels[i, n:] = IGNORE
    A, up = torch.randn(3, H) * 0.3, torch.randn(V, 3) * 0.3
    wide = [v.double().requires_grad_() for v in (hidden, A, up)]
    total = weight.double() + 0.5 * wide[2] @ wide[1]
    loss, _ = by_hand(
        "tdpo1",
        wide[0] @ total.T + bias.double(),
        ref[0].double() @ weight.double().T + bias.double(),
        labels,
    )
    exact = torch.autograd.grad(loss, wide)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    for strategy in ("streaming", "recompute"):
        for packed in (False, True):
            mine = [v.clone().requires_grad_() for v in (hidden, A, up)]
            x, y, r = (pack(v, lengths) if packed else v for v in (mine[0], labels, ref[0]))
            out = dk.fused_linear_dpo_loss(
                x,
                weight,
                y,
                bias=bias,
                lora=(mine[1], mine[2], 0.5),
                ref_hidden=r,
                loss_type="tdpo1",
                cu_seqlens=cu if packed else None,
                strategy=strategy,
                memory_budget=BUDGETS["tight"],
            )
            assert abs(out.loss - loss) < 1e-5
            for a, b in zip(torch.autograd.grad(out.loss, mine), exact, strict=True):
                close(a, b)


@pytest.mark.parametrize("trained", (True, False))
def test_compile(trained):
    torch._dynamo.reset()
    hidden, weight, _, *ref = tensors()
    labels = labels_of()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]
    wanted = leaves[: 1 + trained]

    def f(hidden, weight):
        return dk.fused_linear_dpo_loss(
            hidden, weight, labels, ref_hidden=ref[0], ref_weight=ref[1], loss_type="tdpo2"
        ).loss

    def g(hidden, weight):
        return dk.fused_dpo_loss(
            hidden @ weight.T, labels, ref[0] @ ref[1].T, loss_type="tdpo2"
        ).loss

    for function in (f, g):
        compiles(function, leaves, wanted)


def test_backward_twice():
    hidden, weight, _, *ref = tensors()
    given = {"ref_hidden": ref[0], "ref_weight": ref[1], "loss_type": "tdpo2"}
    for strategy, trained in (("recompute", True), ("frozen", False)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        loss = dk.fused_linear_dpo_loss(*leaves, labels_of(), strategy=strategy, **given).loss
        wanted = leaves[: 1 + trained]
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(loss, wanted)))


def test_opcheck():
    hidden, weight, bias, *ref = tensors()
    targets = labels_of()
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    count = int((targets != IGNORE).sum())
    for strategy, trained in (("frozen", False), ("recompute", True), ("score", None)):
        h, w = hidden.clone(), weight.clone()
        if trained is not None:
            h.requires_grad_(), w.requires_grad_(trained)
        arguments = (
            h,
            w,
            bias,
            None,
            None,
            targets,
            IGNORE,
            1.0,
            0.0,
            1.0,
            "entropy",
            strategy,
            strategy,
            count,
            1 << 20,
            False,
            "cpu",
            *ref,
        )
        torch.library.opcheck(torch.ops.dpo_kernels.linear_logps, arguments, test_utils=utils)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_that_rules_out_what_the_reference_has(backend):
    """An infinite K_l makes an infinite loss, not a silent number."""
    logits, ref, labels = batch()
    logits[B, 4:6, 3] = float("-inf")
    labels[labels == 3] = 4
    options = {"loss_type": "tdpo1", "reduction": "none", "backend": backend}
    out = dk.fused_dpo_loss(logits, labels, ref, **options)
    assert out.loss[0] == float("inf") and out.loss[1:].isfinite().all()
    ref[B, 4:6, 3] = float("-inf")  # ruled out by both
    assert dk.fused_dpo_loss(logits, labels, ref, **options).loss.isfinite().all()


def test_common_prefix():
    """tdpo1's common tokens cancel; in tdpo2 the gradient goes through one side alone."""
    hidden, weight, _, *ref = tensors()
    labels = torch.randint(0, V, (2 * B, T))
    labels[:, :2] = IGNORE
    labels[B:, :5] = labels[:B, :5]
    for x in (hidden, ref[0]):
        x[B:, :5] = x[:B, :5]
    given = {"ref_hidden": ref[0], "ref_weight": ref[1]}
    results = []
    for drop in (False, True):
        w = weight.clone().requires_grad_()
        out = dk.fused_linear_dpo_loss(
            hidden, w, labels, loss_type="tdpo1", drop_common_prefix=drop, **given
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, w)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"drop_common_prefix .* 'tdpo2'"):
        dk.fused_linear_dpo_loss(
            hidden, weight, labels, loss_type="tdpo2", drop_common_prefix=True, **given
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ref_logps": torch.zeros(2 * B)}, "needs ref_{}, got ref_logps"),
        ({}, "needs ref_{}, got nothing"),
        ({"reference_free": True}, "reference_free=True has none"),
        ({"ref": True, "ld_alpha": 0.5}, "ld_alpha weighs log-probs"),
        ({"ref": True, "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning"),
        ({"ref": True, "offset": torch.zeros(B)}, "not a function of D alone"),
        ({"ref": True, "f_divergence_type": "forward_kl"}, "f_divergence_type"),
        ({"ref": True, "tdpo_alpha": float("nan")}, "tdpo_alpha"),
        ({"ref": True, "backend": "cuda"}, "backend 'cuda' has no kernel for the KL"),
    ],
    ids=str,
)
def test_refused(name, options, words):
    hidden, weight, *_ = tensors()
    options = dict(options)
    from_logits, from_hidden = {}, {}
    if options.pop("ref", False):
        from_logits, from_hidden = {"ref_logits": hidden @ weight.T}, {"ref_hidden": hidden}
    if name == "tdpo1" and "tdpo_alpha" in options:
        options["tdpo_alpha"] = 0.3  # an option that no loss uses
    with pytest.raises(ValueError, match=words.format("logits")):
        dk.fused_dpo_loss(hidden @ weight.T, labels_of(), loss_type=name, **from_logits, **options)
    with pytest.raises(ValueError, match=words.format("hidden")):
        dk.fused_linear_dpo_loss(
            hidden, weight, labels_of(), loss_type=name, **from_hidden, **options
        )
