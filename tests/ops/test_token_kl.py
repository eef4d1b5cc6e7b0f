"""The KL of reference and policy a token: each backend against float64, no worse than torch."""

import pytest
import torch
from torch.nn.functional import kl_div

import dpo_kernels as dk
from dpo_kernels import _C, ops
from dpo_kernels.backends import interpreted
from dpo_kernels.inputs.transform import LogitTransform

BACKENDS = ("cpu", "triton")  # cuda has no kernel: test_cuda_says_what_is_missing
ALL = (*BACKENDS, "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# V: one class; less than a vector; odd, several tiles; odd, several blocks and segments.
SIZES = (1, 7, 4099, 33003)
TRANSFORMS = (
    {},
    {"logit_scale": -1.3},
    {"logit_softcap": 30.0, "temperature": 1.2},
)
IGNORE = -100
inf = float("inf")


def case(dtype, V, offset=0.0, rows=3, T=4):
    """Policy, a reference near it, targets."""
    logits = torch.randn(rows, T, V) * 4
    ref = logits + torch.randn(rows, T, V)
    targets = torch.randint(0, V, (rows, T))
    targets[0, :2] = IGNORE
    targets[-1] = IGNORE
    return (logits + offset).to(dtype), (ref - offset).to(dtype), targets


def token_kl(logits, ref, targets, **options):
    return ops.token_logps(logits, targets, ref_logits=ref, **options)


def run(logits, ref, targets, weights, backend, **options):
    """logps, reference's logps, KL, and the gradient of the logits of weights [2, R, T]."""
    x = logits.detach().clone().requires_grad_()
    transform = LogitTransform.of(**options)
    out = token_kl(x, ref, targets, transform=transform, backend=backend)
    (out.logps * weights[0] + out.kl * weights[1]).sum().backward()
    return out.logps.detach(), out.ref_logps, out.kl.detach(), x.grad


def by_hand(logits, ref, targets, weights, **options):
    """The same in float64 by torch's own functions, autograd included."""
    x = logits.detach().double().requires_grad_()
    transform, scored = LogitTransform.of(**options), targets != IGNORE
    log_p, log_q = (transform(z.double()).log_softmax(-1) for z in (x, ref))
    index = targets.clamp(min=0).unsqueeze(-1)
    logps, ref_logps = (torch.where(scored, z.gather(-1, index)[..., 0], 0) for z in (log_p, log_q))
    kl = torch.where(scored, kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1), 0)
    (logps * weights[0] + kl * weights[1]).sum().backward()
    return logps.detach(), ref_logps.detach(), kl.detach(), x.grad


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
def test_logits_far_out_are_scaled_exactly(backend):
    """Rounded after a scale, their differences lost digits."""
    options = {"logit_scale": 0.25, "temperature": 3.0}
    logits, ref, targets = case(torch.float32, 300, offset=1e6)
    weights = torch.randn(2, *targets.shape)
    mine = run(logits, ref, targets, weights, backend, **options)
    exact = by_hand(logits, ref, targets, weights, **options)
    for a, b in zip(mine, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_no_worse_than_torch(backend, dtype, V, options):
    if backend == "triton" and interpreted() and V > 10_000 and (options or dtype != DTYPES[0]):
        pytest.skip("the interpreter is slow: large V once, in fp32 and without a transform")
    for offset in (100.0,) if options else (0.0, 100.0):
        logits, ref, targets = case(dtype, V, offset)
        weights = torch.randn(2, *targets.shape)
        exact = by_hand(logits, ref, targets, weights, **options)
        torchs = run(logits, ref, targets, weights, "torch", **options)
        ours = run(logits, ref, targets, weights, backend, **options)
        assert ours[3].dtype == dtype and all(x.dtype == torch.float32 for x in ours[:3])
        for mine, theirs, true in zip(ours[:3], torchs[:3], exact[:3], strict=True):
            error = (mine - true).abs().max()
            assert error <= max(1.5 * (theirs - true).abs().max(), 3e-6), error
        # The interpreter narrows to bf16 by cutting, a GPU by rounding: one unit against a half.
        cut = 2.1 if backend == "triton" and interpreted() and dtype == torch.bfloat16 else 1.0
        error = (ours[3].double() - exact[3]).abs()
        bound = torch.maximum(
            (torchs[3].double() - exact[3]).abs().max() * 1.1,
            torch.finfo(dtype).eps / 2 * exact[3].abs() + 6e-7,
        )
        assert (error <= cut * bound).all(), (error.max(), bound.max())


@pytest.mark.parametrize("backend", ALL)
def test_the_same_model_twice(backend):
    """KL and the difference of the log-probs are 0, not nearly; KL's gradient is 0 to rounding."""
    for dtype in DTYPES:
        logits, _, targets = case(dtype, 5003)
        weights = torch.stack([torch.zeros(targets.shape), torch.ones(targets.shape)])
        logps, ref_logps, kl, grad = run(logits, logits.clone(), targets, weights, backend)
        assert torch.equal(logps, ref_logps) and not kl.any()
        assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("backend", ALL)
def test_extreme_logits(backend):
    V = 5000
    x, r = torch.randn(1, 8, V), torch.randn(1, 8, V)
    for z in (x, r):
        z[0, 0, 1000:] = -inf  # ruled out by both
    x[0, 1, 4000:] = -inf  # by the policy alone: infinite
    r[0, 2, 100:] = -inf  # by the reference alone: finite
    x[0, 3, 7] = float("nan")
    r[0, 4, 4097] = float("nan")
    x[0, 5] = -inf
    r[0, 6] += 1e4  # a common offset, and a large one between the two
    x[0, 7] = -inf  # all mass on one class, that of the reference
    x[0, 7, 5] = 2.0
    r[0, 7] = -inf
    r[0, 7, 5] = -3.0
    targets = torch.tensor([[3, 3, 3, 1, 1, 1, 9, 5]])
    weights = torch.ones(2, 1, 8)
    logps, ref_logps, kl, grad = run(x, r, targets, weights, backend)
    assert kl[0, 1] == inf and logps[0, 1].isfinite() and grad[0, 1].isfinite().all()
    assert kl[0, [3, 4, 5]].isnan().all() and grad[0, [3, 4, 5]].isnan().any(-1).all()
    assert ref_logps[0, [3, 5]].isfinite().all() and logps[0, 4].isfinite()
    assert kl[0, 7] == 0 and logps[0, 7] == 0
    # torch's kl_div has no 0 * (-inf + inf): by hand on the classes that both have.
    exact = [by_hand(x[:, :1, :1000], r[:, :1, :1000], targets[:, :1], weights[..., :1])]
    log_p, log_q = x[0, 2].double().log_softmax(-1)[:100], r[0, 2, :100].double().log_softmax(-1)
    exact_kl = (log_q.exp() * (log_q - log_p)).sum()
    exact.append(by_hand(x[:, 6:7], r[:, 6:7], targets[:, 6:7], weights[..., :1]))
    for value, true in ((kl[0, 0], exact[0][2]), (kl[0, 2], exact_kl), (kl[0, 6], exact[1][2])):
        assert abs(value - true) < (2e-3 if backend == "torch" else 3e-6)
    torch.testing.assert_close(grad[0, 0, :1000].double(), exact[0][3][0, 0], rtol=1e-5, atol=1e-6)
    assert grad[0, 0, 1000:].abs().max() < 1e-30


@pytest.mark.parametrize("backend", ALL)
def test_a_probability_too_small_for_fp32_is_still_one(backend):
    """The policy rules out a class whose reference probability underflows: infinite, not NaN."""
    x, r = torch.zeros(1, 1, 5000), torch.zeros(1, 1, 5000)
    x[..., 3000] = -inf
    r[..., 3000] = -300.0
    out = token_kl(x, r, torch.tensor([[1]]), backend=backend)
    assert out.kl.item() == inf


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_rows_are_never_read(backend, dtype):
    logits, ref, targets = case(dtype, 300)
    weights = torch.randn(2, *targets.shape)
    clean = run(logits, ref, targets, weights, backend)
    logits[targets == IGNORE] = float("nan")
    ref[targets == IGNORE] = float("nan")
    out = run(logits, ref, targets, weights, backend)
    assert all(map(torch.equal, out, clean))
    assert not out[3][targets == IGNORE].any() and not out[2][targets == IGNORE].any()


@pytest.mark.parametrize("backend", ALL)
def test_no_gradient_reads_nothing(backend):
    """Rows whose KL is not wanted do not see the reference; rows of gradient 0 give 0."""
    logits, ref, targets = case(torch.float32, 300)
    targets[:] = 5
    weights = torch.randn(2, *targets.shape)
    weights[1, 1] = 0
    weights[:, 2] = 0
    clean = run(logits, ref, targets, weights, backend)[3]
    backward = dk.backends.load(backend).token_kl_backward
    lse, ref_lse = (z.double().logsumexp(-1) for z in (logits, ref))
    ref[1:] = float("nan")
    logits[2] = float("nan")
    out = torch.empty_like(logits)
    backward(*weights, logits, ref, targets, lse, ref_lse, IGNORE, LogitTransform(), out)
    torch.testing.assert_close(out, clean, rtol=1e-5, atol=1e-6)
    assert out[1].any() and not out[2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_dtypes_of_their_own(backend):
    """Strided operands that lie differently against 16 bytes; a bf16 policy, an fp32 reference."""
    base, other = torch.randn(4, 7, 333).bfloat16(), torch.randn(4, 9, 257)
    views = [
        (base[:, :-1, :257], other[:, 2:8]),
        (base[::2, 1:, 3:260], other[:2, 3:]),
        (base[..., 70:327].transpose(0, 1), other[:, :7].transpose(0, 1)),
    ]
    for x, r in views:
        targets = torch.randint(0, 257, x.shape[:2])
        weights = torch.randn(2, *targets.shape)
        expected = run(x.contiguous(), r.contiguous(), targets, weights, backend)
        leaf = x.detach().requires_grad_()
        out = token_kl(leaf, r, targets, backend=backend)
        (grad,) = torch.autograd.grad((out.logps * weights[0] + out.kl * weights[1]).sum(), leaf)
        torch.testing.assert_close(out.kl, expected[2], rtol=1e-6, atol=1e-6)
        # One unit of bf16: columns may fall to other lanes.
        torch.testing.assert_close(grad, expected[3], rtol=2**-7, atol=1e-6)
    for bad in ((base.transpose(1, 2), other), (base[..., :9], base.transpose(1, 2)[:, :7, :])):
        with pytest.raises(ValueError, match=r"ref_logits must have shape|unit stride in V"):
            token_kl(*bad, torch.zeros(bad[0].shape[:2], dtype=torch.long), backend=backend)


@pytest.mark.parametrize("backend", ALL)
def test_in_place(backend):
    logits, ref, targets = case(torch.float32, 97)
    weights = torch.randn(2, *targets.shape)
    expected = run(logits, ref, targets, weights, backend)[3]
    leaf = logits.clone().requires_grad_()
    x, kept = leaf * 1.0, ref.clone()
    out = token_kl(x, ref, targets, inplace=True, backend=backend)
    loss = (out.logps * weights[0] + out.kl * weights[1]).sum()
    assert torch.equal(x, logits)  # nothing is written forward
    before = x._version
    loss.backward(retain_graph=True)
    assert x._version > before
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(x.detach(), expected)
    assert torch.equal(ref, kept)
    with pytest.raises(RuntimeError):
        loss.backward()
    # The very same memory is read before it is written; memory that overlaps otherwise is not.
    same = leaf * 1.0
    out = token_kl(same, same.detach(), targets, inplace=True, backend=backend)
    out.kl.sum().backward()
    assert same.abs().max() < 1e-7
    both = torch.randn(4, 4, 97, requires_grad=True) * 1.0
    with pytest.raises(ValueError, match="share memory"):
        token_kl(both[:3], both[1:].detach(), targets, inplace=True, backend=backend)
    token_kl(both[:2], both[2:].detach(), targets[:2], inplace=True, backend=backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("shape", [(0, 5, 11), (3, 0, 11), (3, 1, 1)])
def test_empty_and_tiny(backend, shape):
    x, targets = torch.randn(shape, requires_grad=True), torch.zeros(shape[:2], dtype=torch.long)
    out = token_kl(x, torch.randn(shape), targets, backend=backend)
    assert out.kl.shape == shape[:2] and not out.kl.any()
    out.kl.sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_out_of_range_gives_nan_not_a_read(backend):
    x = torch.randn(1, 3, 10, requires_grad=True)
    out = token_kl(x, torch.randn(1, 3, 10), torch.tensor([[3, 10, -1]]), backend=backend)
    for value in (out.kl, out.logps, out.ref_logps):
        assert value.isnan().tolist() == [[False, True, True]]
    out.kl.sum().backward()
    assert x.grad[0, 0].isfinite().all() and x.grad[0, 1:].isnan().all()


@pytest.mark.parametrize("isa", _C.instruction_sets().split(","))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    assert _C.use_instruction_set(isa)
    try:
        for options in TRANSFORMS:
            logits, ref, targets = case(dtype, 4099)
            weights = torch.randn(2, *targets.shape)
            ours = run(logits, ref, targets, weights, "cpu", **options)
            exact = by_hand(logits, ref, targets, weights, **options)
            for mine, true in zip(ours[:3], exact[:3], strict=True):
                torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=4e-6)
            rtol = torch.finfo(dtype).eps + 4e-6
            torch.testing.assert_close(ours[3].double(), exact[3], rtol=rtol, atol=1e-6)
    finally:
        _C.use_instruction_set("")


def test_rows_do_not_depend_on_their_batch_or_the_threads():
    logits, ref, targets = case(torch.bfloat16, 40_000, rows=9)
    together = token_kl(logits, ref, targets, backend="cpu").kl
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        alone = [
            token_kl(
                logits[i : i + 1, j : j + 1],
                ref[i : i + 1, j : j + 1],
                targets[i : i + 1, j : j + 1],
                backend="cpu",
            ).kl
            for i in range(9)
            for j in range(4)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together.view(-1), torch.cat(alone).view(-1))


def test_the_specification_differentiates_twice():
    targets = torch.tensor([[1, 2, IGNORE], [0, 4, 4]])
    ref = torch.randn(2, 3, 5, dtype=torch.float64)
    ref[0, 0, 3] = -inf
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def f(x):
        transform = LogitTransform.of(logit_softcap=3.0, temperature=0.8)
        out = token_kl(x, ref, targets, transform=transform)
        plain = token_kl(x, ref, targets)
        return out.logps, out.kl, plain.kl

    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("backend", ALL)
def test_opcheck(backend):
    logits, ref = torch.randn(2, 3, 17, requires_grad=True), torch.randn(2, 3, 17)
    targets = torch.tensor([[1, IGNORE, 3], [0, 16, IGNORE]])
    # aot_dispatch is checked by the compile tests: here it would trace the interpreter.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (logits, targets, IGNORE, 1.0, 0.0, 1.0, "", False, backend, ref)
    torch.library.opcheck(torch.ops.dpo_kernels.token_logps, arguments, test_utils=utils)
    (grad, grad_kl), (lse, ref_lse) = torch.randn(2, 2, 3), torch.randn(2, 2, 3).double()
    options = (IGNORE, 1.0, 0.0, 1.0, backend)
    arguments = (grad, logits.detach(), targets, lse, *options, grad_kl, ref, ref_lse)
    for name in ("token_logps_backward", "token_logps_backward_"):
        op = getattr(torch.ops.dpo_kernels, name)
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_cuda_says_what_is_missing():
    logits, ref, targets = case(torch.float32, 5)
    words = "backend 'cuda' has no kernel for the KL of reference and policy"
    with pytest.raises(ValueError, match=words):
        token_kl(logits, ref, targets, backend="cuda")
    chosen = dk.backends.choose(None, torch.device("cuda"), torch.float32, "token_kl")
    assert chosen == ("triton" if "triton" in dk.backends.available() else "torch")


def test_refused():
    x, y = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    for ref, error, words in (
        (torch.randn(2, 3, 6), ValueError, "ref_logits must have shape"),
        (torch.randn(6, 5), ValueError, "ref_logits must have 3 dimensions"),
        (torch.zeros(2, 3, 5, dtype=torch.long), ValueError, "ref_logits must be fp32"),
        (3, TypeError, "ref_logits must be a torch.Tensor"),
    ):
        with pytest.raises(error, match=words):
            token_kl(x, ref, y)
