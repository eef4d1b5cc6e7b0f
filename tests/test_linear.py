"""The linear head: every strategy gives the values and gradients of float64, at any budget."""

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.losses import TABLE

IGNORE = -100
B, T, H, V = 4, 9, 12, 83
ROW = 4 * 128 + 12 * H  # bytes a row of a chunk takes: logits at a pitch of 128, hidden states
BUDGETS = {"tight": 32 * ROW, "some": 48 * ROW, "default": None}
OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "odpo": {"offset": torch.tensor([0.3, -0.2, 0.0, 0.1])},
    "beta_dpo": {"beta_dpo_keep": 1.0},
    "alphapo": {"beta": 1.0},
}
LOSSES = list(TABLE)


def labels_of(V=V):
    labels = torch.randint(0, V, (2 * B, T))
    labels[:, :2] = IGNORE
    labels[0, 6:] = IGNORE
    labels[1, 4] = IGNORE  # a hole
    labels[2] = IGNORE  # an empty completion
    labels[B, :5] = IGNORE
    labels[B + 3, 3:] = IGNORE  # one token
    return labels


def tensors(dtype=torch.float32, H=H, V=V):
    """hidden, weight, bias, reference hidden states and weight."""
    shapes = ((2 * B, T, H), (V, H), (V,), (2 * B, T, H), (V, H))
    return [(torch.randn(s) * (0.5 if len(s) == 2 else 1)).to(dtype) for s in shapes]


def pack(x, lengths):
    return torch.cat([x[i, :n] for i, n in enumerate(lengths)])


def exact(leaves, labels, ref=None, **options):
    """Loss and gradients in float64 from logits, by plain torch, and the output."""
    x = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    logits = x[0] @ x[1].T
    if len(x) > 2 and x[2] is not None:
        logits = logits + x[2]
    if ref is not None:
        options["ref_logits"] = ref[0].double() @ ref[1].double().T
    out = dk.fused_dpo_loss(logits, labels, backend="torch", **options)
    loss = out.loss.sum()
    return out, torch.autograd.grad(loss, [t for t in x if t is not None])


def close(got, expected, rtol=2e-5):
    scale = expected.abs().max().clamp(min=1e-4)
    error = (got.double() - expected).abs().max() / scale
    assert error < rtol, error


def check(leaves, labels, ref, options, strategy, rtol=2e-5, **call):
    mine = [t.detach().requires_grad_() for t in leaves]
    expected, gradients = exact(leaves, labels, ref, **options)
    given = {} if ref is None else {"ref_hidden": ref[0], "ref_weight": ref[1]}
    out = dk.fused_linear_dpo_loss(
        mine[0], mine[1], labels, bias=mine[2], strategy=strategy, **given, **options, **call
    )
    for a, b in zip(out, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol)
    out.loss.sum().backward()
    for x, g in zip(mine, gradients, strict=True):
        assert x.grad.dtype == x.dtype
        close(x.grad, g, rtol)
    return out


def needs_reference(name):
    return TABLE[name].reference or name == "sft"


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_loss(name, budget):
    hidden, weight, bias, *ref = tensors()
    labels = labels_of()
    options = {"loss_type": name, **OPTIONS.get(name, {})}
    strategy = "recompute" if TABLE[name].batch_coupled else "streaming"
    out = check(
        (hidden, weight, bias), labels, ref if needs_reference(name) else None, options, None,
        memory_budget=BUDGETS[budget],
    )  # fmt: skip
    assert out.strategy == strategy
    if strategy == "streaming":
        other = dk.fused_linear_dpo_loss(
            hidden, weight.requires_grad_(), labels, bias=bias, strategy="recompute",
            memory_budget=BUDGETS[budget], **options,
            **({"ref_hidden": ref[0], "ref_weight": ref[1]} if needs_reference(name) else {}),
        )  # fmt: skip
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
        (hidden, weight, bias), labels_of(), None if "reference_free" in options else ref, options,
        strategy, memory_budget=BUDGETS["tight"],
    )  # fmt: skip


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
        x, weight, labels, bias=bias, ref_hidden=ref[0], ref_weight=ref[1], backend=backend,
        memory_budget=BUDGETS["tight"],
    )  # fmt: skip
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
                hidden, weight.requires_grad_(), labels, ref_hidden=ref[0], ref_weight=ref[1],
                strategy=strategy, memory_budget=BUDGETS["tight"], **mine,
            )  # fmt: skip
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
    for x, y in zip(grads, torch.autograd.grad(expected, b[leaves], upstream.double()),
                    strict=True):  # fmt: skip
        close(x, y)


def test_reduction_none():
    hidden, weight, bias, *ref = tensors()
    out = check((hidden, weight, bias), labels_of(), ref, {"reduction": "none"}, None)
    assert out.strategy == "recompute" and out.loss.shape == (B,)


@pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen", "score"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_step_zero(strategy, dtype):
    """Policy and reference the same: the same bits, so rewards are 0 and the loss log 2."""
    hidden, weight, bias, *_ = tensors(dtype)
    labels = labels_of()
    x = hidden.clone().requires_grad_(strategy != "score")
    w = weight.clone().requires_grad_(strategy in ("streaming", "recompute"))
    for budget in BUDGETS.values():
        out = dk.fused_linear_dpo_loss(
            x, w, labels, bias=bias, ref_hidden=hidden, ref_weight=weight, ref_bias=bias,
            strategy=strategy, memory_budget=budget,
        )  # fmt: skip
        assert out.strategy == strategy
        assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
        assert abs(out.loss.item() - math.log(2)) < 1e-7
        again = dk.fused_linear_dpo_loss(
            x, w, labels, bias=bias, ref_hidden=hidden, strategy=strategy, memory_budget=budget
        )  # the reference head: the policy's, without gradient
        assert torch.equal(again.loss, out.loss)


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


class TestBackwardTwice:
    def leaves(self, trained=True):
        hidden, weight, *_ = tensors()
        return hidden.requires_grad_(), weight.requires_grad_(trained), labels_of()

    def test_streaming_says_so(self):
        hidden, weight, labels = self.leaves()
        loss = dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True).loss
        (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
        kept = first.clone()
        with pytest.raises(RuntimeError, match="strategy='recompute'"):
            loss.backward()
        assert torch.equal(first, kept)

    @pytest.mark.parametrize("strategy", ("recompute", "frozen"))
    def test_others_give_it_again(self, strategy):
        hidden, weight, labels = self.leaves(strategy == "recompute")
        wanted = [x for x in (hidden, weight) if x.requires_grad]
        loss = dk.fused_linear_dpo_loss(
            hidden, weight, labels, reference_free=True, strategy=strategy
        ).loss
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        second = torch.autograd.grad(loss, wanted)
        assert all(map(torch.equal, first, second))

    def test_upstream_scalar_and_accumulation(self):
        hidden, weight, labels = self.leaves()
        options = {"reference_free": True}
        loss = dk.fused_linear_dpo_loss(hidden, weight, labels, **options).loss
        plain = torch.autograd.grad(loss, (hidden, weight))
        for _ in range(2):
            loss = dk.fused_linear_dpo_loss(hidden, weight, labels, **options).loss
            (0.25 * loss + loss.detach()).backward()
        torch.testing.assert_close(hidden.grad, 0.5 * plain[0])
        torch.testing.assert_close(weight.grad, 0.5 * plain[1])

    def test_the_gradient_is_handed_over_not_copied(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        made = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and out.shape == (V, H):
                    made.append((str(func), out.data_ptr()))
                return out

        hidden, weight, labels = self.leaves()
        loss = dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True).loss
        with Watch():
            loss.backward()
        assert len({pointer for _, pointer in made}) <= 1, made
        assert weight.grad is not None

    def test_double_backward_is_refused(self):
        hidden, weight, labels = self.leaves()
        loss = dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True).loss
        (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError):
            g.sum().backward()


@pytest.mark.parametrize("trained", (True, False))
def test_compile(trained):
    torch._dynamo.reset()
    hidden, weight, *_ = tensors()
    labels, reference = labels_of(), torch.randn(2 * B) - 20
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]

    def f(hidden, weight):
        return dk.fused_linear_dpo_loss(hidden, weight, labels, ref_logps=reference).loss

    wanted = leaves if trained else leaves[:1]
    eager = f(*leaves)
    expected = torch.autograd.grad(eager, wanted)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_autocast():
    """Hidden states and head are cast; what follows is fp32 all the same."""
    hidden, weight, bias, *_ = tensors()
    labels = labels_of()
    a = [x.clone().requires_grad_() for x in (hidden, weight)]
    b = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        out = dk.fused_linear_dpo_loss(*a, labels, bias=bias, reference_free=True)
    narrow = dk.fused_linear_dpo_loss(*b, labels, bias=bias.bfloat16(), reference_free=True)
    assert out.strategy == "streaming" and out.loss.dtype == torch.float32
    assert torch.equal(out.loss, narrow.loss)
    out.loss.backward()
    narrow.loss.backward()
    assert a[1].grad.dtype == torch.float32 and torch.equal(a[1].grad, b[1].grad.float())


def test_no_grad_and_inference():
    hidden, weight, *_ = tensors()
    labels = labels_of()
    hidden.requires_grad_(), weight.requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True)
        assert out.strategy == "score" and not out.loss.requires_grad


def test_the_log_says_which(caplog):
    hidden, weight, *_ = tensors()
    with caplog.at_level("DEBUG", logger="dpo_kernels"):
        dk.fused_linear_dpo_loss(hidden, weight, labels_of(), reference_free=True)
    assert "strategy score" in caplog.text


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("fastest", {}, "strategy must be one of"),
        ("streaming", {"loss_type": "aot"}, "not a scalar sum over pairs"),
        ("streaming", {"reduction": "none"}, "not a scalar sum over pairs"),
        ("streaming", {"memory_budget": 1, "shift": False}, "more than the 16 scored rows"),
        ("frozen", {}, "recompute does"),
        ("score", {}, "recompute does"),
        ("streaming", {"backend": "torch"}, "torch backend has no strategies"),
    ],
)
def test_refused_strategies(strategy, options, words):
    hidden, weight, *_ = tensors()
    labels = torch.randint(0, V, (2 * B, T))
    with pytest.raises(ValueError, match=words):
        dk.fused_linear_dpo_loss(
            hidden, weight.requires_grad_(), labels, reference_free=True, strategy=strategy,
            **options,
        )  # fmt: skip
    with pytest.raises(ValueError, match="nothing wants a gradient"):
        dk.fused_linear_dpo_loss(
            hidden, weight.detach(), labels, reference_free=True, strategy="streaming"
        )


class TestCommonPrefix:
    """Tokens that both completions start with cancel, and may be left out."""

    def batch(self):
        hidden, weight, _, *ref = tensors()
        labels = torch.randint(0, V, (2 * B, T))
        labels[:, :3] = IGNORE  # the prompt, at other places in pair 1
        labels[B + 1, 3] = IGNORE
        same = {0: 2, 1: 3, 2: 6, 3: 0}  # scored tokens in common; pair 2: all of them
        for i, n in same.items():
            start, other = 3, 3 + (i == 1)
            labels[B + i, other : other + n] = labels[i, start : start + n]
            if n < 5:
                labels[B + i, other + n] = (labels[i, start + n] + 1) % V
            for x in (hidden, ref[0]):  # the same context: the same hidden state
                x[B + i, other - 1 : other + n] = x[i, start - 1 : start + n]
        return hidden, weight, ref, labels, same

    def test_which_tokens(self):
        from dpo_kernels.layout import Layout

        _, _, _, labels, same = self.batch()
        for packed in (False, True):
            cu = torch.arange(2 * B + 1) * T if packed else None
            y = labels.reshape(-1) if packed else labels
            layout = Layout.of(y, cu, shift=True, ignore_index=IGNORE, V=V)
            left = layout.without_common_prefix().scored_counts()
            expected = layout.scored_counts()
            for i, n in same.items():
                expected[[i, B + i]] -= n
            assert left.tolist() == expected.tolist()

    def test_a_hole_ends_it(self):
        from dpo_kernels.layout import Layout

        labels = torch.arange(8).repeat(2, 1)
        labels[:, 3] = IGNORE  # a tool's output, which may differ
        layout = Layout.of(labels, None, shift=False, ignore_index=IGNORE, V=V)
        assert layout.without_common_prefix().scored_counts().tolist() == [4, 4]
        labels[0, 3] = 3
        layout = Layout.of(labels, None, shift=False, ignore_index=IGNORE, V=V)
        assert layout.without_common_prefix().scored_counts().tolist() == [5, 4]

    @pytest.mark.parametrize("options", [{}, {"loss_type": "ipo_sum"}, {"loss_type": "rdpo"},
                                         {"loss_type": "aot"}, {"loss_type": ["robust", "hinge"]}],
                             ids=str)  # fmt: skip
    def test_nothing_changes_but_the_log_probs(self, options):
        hidden, weight, ref, labels, _ = self.batch()
        results = []
        for drop in (False, True):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = dk.fused_linear_dpo_loss(
                x, w, labels, ref_hidden=ref[0], ref_weight=ref[1], drop_common_prefix=drop,
                **options,
            )  # fmt: skip
            # The trunk sees the sum of the gradients of rows that are one state: 0 for these.
            results.append((out, *torch.autograd.grad(out.loss, (x, w))))
        (a, da, wa), (b, db, wb) = results
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.margins, b.margins, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wa, wb, rtol=1e-4, atol=1e-6)
        for i in range(B):
            torch.testing.assert_close((da[i] + da[B + i]).sum(0), (db[i] + db[B + i]).sum(0),
                                       rtol=1e-4, atol=1e-6)  # fmt: skip
        assert (a.chosen_logps[:3] < b.chosen_logps[:3]).all() and b.chosen_logps[2] == 0

    def test_from_logits(self):
        hidden, weight, ref, labels, _ = self.batch()
        logits, ref_logits = hidden @ weight.T, ref[0] @ ref[1].T
        full = dk.fused_dpo_loss(logits, labels, ref_logits)
        less = dk.fused_dpo_loss(logits, labels, ref_logits, drop_common_prefix=True)
        torch.testing.assert_close(full.loss, less.loss)
        tokens = dk.sequence_logps(ref_logits, labels, reduction="none")
        same = dk.fused_dpo_loss(logits, labels, ref_logps=tokens, drop_common_prefix=True)
        torch.testing.assert_close(same.rejected_rewards, less.rejected_rewards)

    @pytest.mark.parametrize(
        "options",
        [
            {"loss_type": "ipo"},
            {"loss_type": "nca_pair"},
            {"loss_type": "rpo"},
            {"loss_type": ["sigmoid", "sft"]},
            {"loss_type": "aot_unpaired"},
            {"loss_type": "dpop"},
            {"loss_type": "apo_down"},
            {"sft_weight": 0.1},
            {"ld_alpha": 0.5},
            {"use_weighting": True},
            {"f_divergence_type": "forward_kl"},
            {"ref_logps": torch.zeros(2 * B)},
        ],
        ids=str,
    )
    def test_refused_where_they_do_not_cancel(self, options):
        logits, labels = torch.randn(2 * B, T, V), labels_of()
        given = {"ref_logits": logits} if "ref_logps" not in options else {}
        with pytest.raises(ValueError, match="drop_common_prefix"):
            dk.fused_dpo_loss(logits, labels, drop_common_prefix=True, **given, **options)


class TestLora:
    """weight + scaling * B @ A, never formed."""

    @pytest.mark.parametrize(
        ("trained", "strategy"),
        [
            ("hidden A B", "streaming"),
            ("hidden A B", "recompute"),
            ("hidden A", "frozen"),
            ("hidden weight bias A B", "streaming"),
            ("A B", "recompute"),
            ("", "score"),
        ],
    )
    def test_is_the_sum(self, trained, strategy):
        hidden, weight, bias, *ref = tensors()
        names = ("hidden", "weight", "bias", "A", "B")
        values = [hidden, weight, bias, torch.randn(3, H) * 0.3, torch.randn(V, 3) * 0.3]
        mine = dict(zip(names, [v.clone() for v in values], strict=True))
        wide = {k: v.double() for k, v in mine.items()}
        for name in trained.split():
            mine[name].requires_grad_(), wide[name].requires_grad_()
        labels = labels_of()
        options = {"logit_softcap": 7.0, "temperature": 1.2, "logit_scale": 0.9}
        out = dk.fused_linear_dpo_loss(
            mine["hidden"], mine["weight"], labels, bias=mine["bias"],
            lora=(mine["A"], mine["B"], 0.5), ref_hidden=ref[0], strategy=strategy,
            memory_budget=BUDGETS["tight"], **options,
        )  # fmt: skip
        total = wide["weight"] + 0.5 * wide["B"] @ wide["A"]
        # The reference is the head without its adapter.
        reference = ref[0].double() @ wide["weight"].detach().T + wide["bias"].detach()
        expected = dk.fused_dpo_loss(
            wide["hidden"] @ total.T + wide["bias"], labels, reference, **options
        )
        assert out.strategy == strategy
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.margins.double(), expected.margins, rtol=1e-5, atol=1e-5)
        if trained:
            out.loss.backward()
            expected.loss.backward()
        for name in trained.split():
            close(mine[name].grad, wide[name].grad)

    def test_sequence_logps_and_torch_backend(self):
        hidden, weight, *_ = tensors()
        A, up, labels = torch.randn(3, H), torch.randn(V, 3), labels_of()
        got = dk.linear_sequence_logps(hidden, weight, labels, lora=(A, up, 2.0))
        expected = dk.linear_sequence_logps(hidden, weight + 2.0 * up @ A, labels)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        plain = dk.linear_sequence_logps(
            hidden.double(), weight.double(), labels, lora=(A.double(), up.double(), 2.0)
        )
        torch.testing.assert_close(got.double(), plain, rtol=1e-5, atol=1e-5)

    def test_refused(self):
        hidden, weight, *_ = tensors()
        for lora, error, words in [
            ((torch.ones(3, H), torch.ones(V, 3)), TypeError, "lora must be"),
            (
                (torch.ones(3, H + 1), torch.ones(V, 3), 1.0),
                ValueError,
                r"lora\[0\] must have",
            ),
            ((torch.ones(3, H), torch.ones(V, 2), 1.0), ValueError, r"lora\[1\] must have"),
            ((torch.ones(3, H), torch.ones(V, 3), "1"), TypeError, "scaling"),
        ]:
            with pytest.raises(error, match=words):
                dk.linear_sequence_logps(hidden, weight, labels_of(), lora=lora)
