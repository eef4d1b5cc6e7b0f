"""The front functions: layouts, references, options that need tokens, compile, autocast, errors."""

import copy
import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import ops

BACKENDS = ("torch", "cpu", "triton", "cuda")
IGNORE = -100


def batch(B=3, T=8, V=37, dtype=torch.float32, ragged=True):
    logits = torch.randn(2 * B, T, V).to(dtype)
    labels = torch.randint(0, V, (2 * B, T))
    if ragged:
        labels[:, :2] = IGNORE
        labels[0, 5:] = IGNORE
        labels[B, 4:] = IGNORE
        labels[1, 3] = IGNORE  # a hole: a tool's output in the middle
        labels[2, :5] = IGNORE  # left padding
    return logits, labels


def naive(logits, labels, ref_logits, beta=0.1):
    def sums(x):
        logp = x[:, :-1].double().log_softmax(-1)
        y = labels[:, 1:]
        return torch.where(y != IGNORE, logp.gather(-1, y.clamp(min=0)[..., None])[..., 0], 0).sum(
            -1
        )

    B = labels.shape[0] // 2
    ratio = sums(logits) - sums(ref_logits)
    return -torch.nn.functional.logsigmoid(beta * (ratio[:B] - ratio[B:])).mean()


def pack(x, labels, lengths):
    """Padded to packed: the first `lengths[i]` rows of each sequence."""
    rows = torch.cat([x[i, :n] for i, n in enumerate(lengths)])
    flat = torch.cat([labels[i, :n] for i, n in enumerate(lengths)])
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return rows, flat, cu


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_the_code_it_replaces(backend, dtype):
    logits, labels = batch(dtype=dtype)
    ref = torch.randn(logits.shape).to(dtype)
    x, x64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
    out = dk.fused_dpo_loss(x, labels, ref, backend=backend)
    expected = naive(x64, labels, ref)
    assert out.loss.dtype == torch.float32
    assert abs(out.loss.item() - expected.item()) < 1e-6
    out.loss.backward()
    expected.backward()
    torch.testing.assert_close(
        x.grad.double(), x64.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-8
    )
    assert out.chosen_rewards.shape == out.accuracy.shape == (3,)
    for field in out._fields[1:]:
        assert not getattr(out, field).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_reference_as_logits_sums_or_tokens(backend):
    logits, labels = batch()
    ref = torch.randn_like(logits)
    sums = dk.sequence_logps(ref, labels, backend=backend)
    tokens = dk.sequence_logps(ref, labels, reduction="none", backend=backend)
    assert sums.shape == (6,) and tokens.shape == (6, 7)
    losses = [
        dk.fused_dpo_loss(logits, labels, ref, backend=backend).loss,
        dk.fused_dpo_loss(logits, labels, ref_logps=sums, backend=backend).loss,
        dk.fused_dpo_loss(logits, labels, ref_logps=tokens, backend=backend).loss,
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", (True, False))
def test_packed_is_padded(backend, shift):
    logits, labels = batch()
    lengths = [5, 8, 8, 4, 8, 8]
    rows, flat, cu = pack(logits, labels, lengths)
    options = {"ld_alpha": 0.3, "use_weighting": True, "loss_type": ["ipo", "sft"], "shift": shift}
    padded_labels = labels.clone()
    for i, n in enumerate(lengths):
        padded_labels[i, n:] = IGNORE
    tokens = torch.randn(rows.shape[0])
    a, b = logits.clone().requires_grad_(), rows.clone().requires_grad_()
    ref = torch.randn(6) - 20
    options["loss_type"] = "ipo"
    padded = dk.fused_dpo_loss(a, padded_labels, ref_logps=ref, backend=backend, **options)
    for dtype in (torch.int32, torch.int64):
        packed = dk.fused_dpo_loss(
            b, flat, ref_logps=ref, cu_seqlens=cu.to(dtype), backend=backend, **options
        )
        for x, y in zip(padded, packed, strict=True):
            torch.testing.assert_close(x, y)
    padded.loss.backward()
    packed.loss.backward()
    torch.testing.assert_close(b.grad, pack(a.grad, labels, lengths)[0])
    none = dk.sequence_logps(rows, flat, cu_seqlens=cu, reduction="none", shift=shift)
    assert none.shape == (rows.shape[0],)
    if shift:
        assert (none[cu[1:] - 1] == 0).all()
    by_token = dk.fused_dpo_loss(
        rows, flat, ref_logps=tokens, cu_seqlens=cu, shift=shift, backend=backend
    )
    assert by_token.loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_with_empty_sequences(backend):
    rows, labels = torch.randn(5, 11), torch.randint(0, 11, (5,))
    cu = torch.tensor([0, 0, 3, 3, 5])
    got = dk.sequence_logps(rows, labels, cu_seqlens=cu, backend=backend)
    first = dk.sequence_logps(rows[None, :3], labels[None, :3])
    second = dk.sequence_logps(rows[None, 3:], labels[None, 3:])
    torch.testing.assert_close(
        got, torch.stack([torch.zeros(()), first[0], torch.zeros(()), second[0]])
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ld_alpha_weighs_the_tail_of_the_longer(backend):
    logits, labels = batch(B=1, T=7, ragged=False)
    labels[0, 4:] = IGNORE  # chosen scores 3 tokens, rejected 6
    tokens = dk.sequence_logps(logits, labels, reduction="none").double()
    out = dk.fused_dpo_loss(logits, labels, reference_free=True, ld_alpha=0.25, backend=backend)
    rejected = tokens[1, :3].sum() + 0.25 * tokens[1, 3:].sum()
    torch.testing.assert_close(out.chosen_logps.double(), tokens[0].sum()[None])
    torch.testing.assert_close(out.rejected_logps.double(), rejected[None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_wpo_weighs_and_is_detached(backend):
    logits, labels = batch()
    x = logits.clone().requires_grad_()
    plain = dk.fused_dpo_loss(x, labels, reference_free=True, reduction="none", backend=backend)
    wpo = dk.fused_dpo_loss(
        x, labels, reference_free=True, reduction="none", backend=backend, use_weighting=True
    )
    logp = logits[:, :-1].double().log_softmax(-1)
    y = labels[:, 1:]
    aligned = logp.gather(-1, y.clamp(min=0)[..., None])[..., 0] - (2 * logp).logsumexp(-1)
    w = torch.where(y != IGNORE, aligned, 0).sum(-1) / (y != IGNORE).sum(-1)
    weight = (w[:3] + w[3:]).exp().float()
    torch.testing.assert_close(wpo.loss, plain.loss * weight, rtol=1e-5, atol=1e-6)
    (a,) = torch.autograd.grad((plain.loss * weight).sum(), x, retain_graph=True)
    (b,) = torch.autograd.grad(wpo.loss.sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("reduction", ("sum", "mean"))
def test_reductions(reduction):
    logits, labels = batch()
    tokens = dk.sequence_logps(logits, labels, reduction="none")
    counts = (labels[:, 1:] != IGNORE).sum(-1)
    expected = tokens.sum(-1) / (counts if reduction == "mean" else 1)
    torch.testing.assert_close(dk.sequence_logps(logits, labels, reduction=reduction), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("budget", (1, 4 * 37 * 5, None), ids=("row", "five rows", "default"))
def test_linear_is_logits(backend, dtype, budget):
    _, labels = batch()
    hidden = torch.randn(6, 8, 16).to(dtype)
    weight, bias = torch.randn(37, 16).to(dtype), torch.randn(37).to(dtype)
    ref_hidden = torch.randn(6, 8, 16).to(dtype)
    options = {"logit_softcap": 9.0, "temperature": 0.9, "loss_type": ["sigmoid", "sft"]}
    a = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    b = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    out = dk.fused_linear_dpo_loss(
        a[0],
        a[1],
        labels,
        bias=a[2],
        ref_hidden=ref_hidden,
        memory_budget=budget,
        backend=backend,
        **options,
    )
    reference = ref_hidden.double() @ b[1].T.detach() + b[2].detach()
    expected = dk.fused_dpo_loss(b[0] @ b[1].T + b[2], labels, reference, **options)
    # Plain torch in bf16 rounds the logits to bf16; the fused path does not.
    plain = backend == "torch" and dtype == torch.bfloat16
    tolerance = 0.1 if plain else 1e-5
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=tolerance, atol=tolerance)
    out.loss.backward()
    expected.loss.backward()
    for x, y in zip(a, b, strict=True):
        assert x.grad.dtype == dtype
        rounding = 0.2 if plain else 2 * torch.finfo(dtype).eps + 1e-5
        error = (x.grad.double() - y.grad).norm() / y.grad.norm()
        assert error < rounding, error


def test_linear_needs_only_the_gradients_asked_for():
    _, labels = batch()
    hidden, weight = torch.randn(6, 8, 16, requires_grad=True), torch.randn(37, 16)
    dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True).loss.backward()
    assert hidden.grad is not None and weight.grad is None
    logps, stats = dk.linear_sequence_logps(hidden, weight, labels, stats=("entropy", "is_top1"))
    expected, wanted = dk.sequence_logps(hidden @ weight.T, labels, stats=("entropy", "is_top1"))
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats["entropy"], wanted["entropy"], rtol=1e-5, atol=1e-5)


def test_linear_holds_no_logits():
    """2 x 1024 scored rows of V = 20000: fp32 logits are 160 MB, the budget is 8 MB."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel() * out.element_size())
            return out

    hidden, weight = torch.randn(2, 1024, 8, requires_grad=True), torch.randn(20_000, 8)
    labels = torch.randint(0, 20_000, (2, 1024))
    with Watch():
        dk.fused_linear_dpo_loss(
            hidden, weight, labels, reference_free=True, memory_budget=8 << 20
        ).loss.backward()
    assert largest <= 8 << 20


@pytest.mark.parametrize("kind", ("logits", "linear"))
@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo", "aot", "cpo"))
def test_compile_without_a_break(kind, loss_type):
    torch._dynamo.reset()
    logits, labels = batch()
    hidden, weight = torch.randn(6, 8, 16), torch.randn(37, 16)
    reference = {} if loss_type == "cpo" else {"ref_logps": torch.randn(6) - 20}

    def logits_loss(x):
        return dk.fused_dpo_loss(x, labels, loss_type=loss_type, **reference)

    def linear_loss(x):
        return dk.fused_linear_dpo_loss(x, weight, labels, loss_type=loss_type, **reference)

    f, x = (logits_loss, logits) if kind == "logits" else (linear_loss, hidden)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(a)
    eager = f(b)
    torch.testing.assert_close(compiled.loss, eager.loss)
    compiled.loss.backward()
    eager.loss.backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(compiled.margins, eager.margins)


def test_compile_with_inductor_and_dynamic_lengths():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def f(x, labels):
        return dk.fused_dpo_loss(x * 1.0, labels, reference_free=True, inplace=True).loss

    for T in (5, 9, 12):
        logits, labels = batch(T=T, ragged=False)
        x = logits.requires_grad_()
        loss = f(x, labels)
        loss.backward()
        expected = dk.fused_dpo_loss(logits, labels, reference_free=True).loss
        torch.testing.assert_close(loss, expected)


def test_compiled_bad_labels_are_nan():
    torch._dynamo.reset()
    logits, labels = batch(ragged=False)
    labels[0, 3] = 99
    f = torch.compile(dk.sequence_logps, fullgraph=True, backend="aot_eager")
    assert f(logits, labels).isnan().tolist() == [True, False, False, False, False, False]


def test_autocast():
    logits, labels = batch()
    hidden, weight = torch.randn(6, 8, 16), torch.randn(37, 16)
    with torch.autocast("cpu", torch.bfloat16):
        fp32 = dk.sequence_logps(logits, labels)
        linear = dk.linear_sequence_logps(hidden, weight, labels)
    assert torch.equal(fp32, dk.sequence_logps(logits, labels))  # logits are left alone
    narrow = dk.linear_sequence_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    assert linear.dtype == torch.float32 and torch.equal(linear, narrow)


def test_modules():
    logits, labels = batch()
    reference = torch.randn(6) - 20
    loss = dk.FusedDPOLoss(loss_type="hinge", beta=0.2)
    expected = dk.fused_dpo_loss(logits, labels, ref_logps=reference, loss_type="hinge", beta=0.2)
    assert torch.equal(loss(logits, labels, ref_logps=reference).loss, expected.loss)
    assert "hinge" in repr(loss) and copy.deepcopy(loss).options == loss.options
    hidden, weight = torch.randn(6, 8, 16), torch.randn(37, 16)
    linear = dk.FusedLinearDPOLoss(reference_free=True)
    assert linear(hidden, weight, labels).loss.isfinite()
    assert not list(loss.parameters()) and not loss.state_dict()
    with pytest.raises(ValueError, match="did you mean"):
        dk.FusedDPOLoss(loss_type="higne")
    dk.FusedDPOLoss(loss_type="odpo")  # its offset comes with the batch


def test_double_backward_and_float64():
    logits, labels = batch(B=1, T=4, V=5, dtype=torch.float64, ragged=False)
    logits.requires_grad_()

    def f(x):
        return dk.fused_dpo_loss(x, labels, reference_free=True, loss_type=["sigmoid", "sft"]).loss

    assert f(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(f, logits) and torch.autograd.gradgradcheck(f, logits)


def test_learned_beta_and_offset():
    logits, labels = batch()
    beta = torch.full((3,), 0.2, requires_grad=True)
    offset = torch.zeros(3, requires_grad=True)
    out = dk.fused_dpo_loss(logits, labels, reference_free=True, beta=beta, offset=offset)
    out.loss.backward()
    D = (out.chosen_logps - out.rejected_logps).double()
    slope = -torch.sigmoid(-0.2 * D) / 3
    torch.testing.assert_close(beta.grad.double(), slope * D, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(offset.grad.double(), -slope, rtol=1e-5, atol=1e-7)


def test_memory_in_place_is_not_a_second_tensor_of_logits():
    """Peak of tensors allocated by the call, in units of the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    size = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal size
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != pointer:
                    size += x.numel() * x.element_size()
            return out

    logits, labels = torch.randn(2, 64, 30_000, requires_grad=True) * 1.0, torch.ones(2, 64).long()
    pointer = logits.untyped_storage().data_ptr()
    with Watch():
        loss = dk.fused_dpo_loss(logits, labels, reference_free=True, inplace=True).loss
        torch.autograd.grad(loss, logits)
    assert size < 0.05 * logits.numel() * 4


LOGITS, LABELS = torch.randn(4, 5, 11), torch.zeros(4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": LOGITS.long()}, ValueError, "logits must be fp32.*int64"),
        ({"logits": LOGITS[:3]}, ValueError, r"logits must have shape \[4, 5, V\].*\[3, 5, 11\]"),
        ({"logits": LOGITS[:3], "labels": LABELS[:3]}, ValueError, "even number of rows, got 3"),
        ({"logits": LOGITS[:0], "labels": LABELS[:0]}, ValueError, "no pairs"),
        ({"labels": LABELS.float()}, ValueError, "labels must be torch.int64"),
        ({"labels": LABELS + 11}, ValueError, r"labels must be in \[0, 11\).*got 11 at \[0, 0\]"),
        ({"labels": LABELS - 1}, ValueError, "labels must be in"),
        ({"labels": LABELS[:, :4]}, ValueError, "logits must have shape"),
        ({"labels": LABELS[0]}, ValueError, "labels must have shape"),
        ({"ref_logits": LOGITS[:2]}, ValueError, "ref_logits must have shape"),
        ({"ref_logits": LOGITS[..., :7]}, ValueError, "ref_logits must have shape"),
        ({"ref_logits": LOGITS, "ref_logps": torch.zeros(4)}, ValueError, "not both"),
        ({"ref_logps": None}, ValueError, "'sigmoid' needs a reference"),
        ({"ref_logps": torch.zeros(3)}, ValueError, "ref_logps must have shape"),
        ({"ref_logps": torch.zeros(4).long()}, ValueError, "ref_logps must be fp32"),
        ({"reference_free": True}, ValueError, "reference_free=True, but ref_logps"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap must be None or a positive"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale must be a finite"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, ValueError, "does not take tensors on cpu"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "labels must have shape"),
        ({"beta": -1}, ValueError, "beta"),
        ({"unknown": 1}, TypeError, "unknown loss option 'unknown'"),
    ],
)
def test_refused(change, error, words):
    arguments = {"logits": LOGITS, "labels": LABELS, "ref_logps": torch.zeros(4), **change}
    if "ref_logits" in change and "ref_logps" not in change:
        del arguments["ref_logps"]
    with pytest.raises(error, match=words):
        dk.fused_dpo_loss(**arguments)


@pytest.mark.parametrize(
    ("cu", "words"),
    [
        ([0, 2, 4], "from 0 to the number of rows 5"),
        ([1, 2, 5], "from 0"),
        ([0, 4, 3, 5], "from 0"),
        ([0.0, 5.0], "cu_seqlens must be"),
        ([0], "cu_seqlens must have shape"),
    ],
)
def test_refused_boundaries(cu, words):
    with pytest.raises(ValueError, match=words):
        dk.sequence_logps(LOGITS[0], LABELS[0], cu_seqlens=torch.tensor(cu))


def test_refused_heads():
    hidden, weight = torch.randn(4, 5, 8), torch.randn(11, 8)
    call = dk.fused_linear_dpo_loss
    for arguments, options, words in [
        ((hidden, weight[:, :7], LABELS), {}, r"weight must have shape \[V, H=8\]"),
        ((hidden, weight.bfloat16(), LABELS), {}, "one dtype"),
        ((hidden, weight, LABELS), {"bias": torch.zeros(10)}, "bias must have shape"),
        ((hidden, weight, LABELS), {"memory_budget": 0}, "memory_budget"),
        ((hidden, weight[0], LABELS), {}, r"weight must have shape \[V, H\]"),
        ((hidden[:, :3], weight, LABELS), {}, "hidden must have shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            call(*arguments, reference_free=True, **options)
    with pytest.raises(ValueError, match="ref_weight and ref_bias need ref_hidden"):
        call(hidden, weight, LABELS, ref_weight=weight, ref_logps=torch.zeros(4))


def test_float64_takes_the_torch_backend_and_only_that():
    with pytest.raises(ValueError, match=r"fp32, bf16 and fp16, got torch\.float64"):
        dk.sequence_logps(LOGITS.double(), LABELS, backend="cpu")
    assert dk.sequence_logps(LOGITS.double(), LABELS).dtype == torch.float64


def test_available_names_what_is_missing():
    available = dk.backends.available()
    assert {"cpu", "torch"} <= set(available)
    assert set(available) | set(available.why_not) == {"cuda", "triton", "cpu", "torch"}
    assert all(available.why_not.values())
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
        dk.backends.load("cuda")


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("backend", ("torch", "cpu", "triton", "cuda"))
def test_tail_weights_go_by_the_partner_of_the_pair(backend, packed):
    """LD-DPO: sequence s and s + B are a pair; all lengths differ, so no other could stand in."""
    lengths = [9, 2, 14, 5, 11, 3]
    values, targets = torch.randn(6, 15), torch.full((6, 15), -100)
    for s, n in enumerate(lengths):
        targets[s, 15 - n :] = 1
    wanted = []
    for s, n in enumerate(lengths):
        head = min(n, lengths[(s + 3) % 6])
        row = values[s, 15 - n :].double()
        wanted.append(row[:head].sum() + 0.25 * row[head:].sum())
    cu = torch.arange(0, 91, 15) if packed else None
    shape = (1, 90) if packed else (6, 15)
    sums, counts = ops.sequence_sum(
        values.view(shape),
        targets.view(shape),
        cu,
        ignore_index=-100,
        tail_weight=0.25,
        backend=backend,
    )
    torch.testing.assert_close(sums, torch.stack(wanted), rtol=0, atol=1e-5)
    assert counts.tolist() == lengths
