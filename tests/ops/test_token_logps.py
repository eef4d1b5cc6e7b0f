"""Log-probs, statistics and gradients of every backend against float64, and no worse than torch."""

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import _C, ops
from dpo_kernels.backends import interpreted

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
BACKENDS = ("cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# V: one class; less than a vector; odd; one tile and a bit; odd, several blocks and segments.
SIZES = (1, 7, 257, 2049, 50257)
TRANSFORMS = (
    {},
    {"temperature": 0.7},
    {"logit_scale": -1.3},
    {"logit_softcap": 30.0, "temperature": 1.2},
)
IGNORE = -100


def case(dtype, V, offset=0.0, rows=3, T=4):
    logits = (torch.randn(rows, T, V) * 4 + offset).to(dtype)
    labels = torch.randint(0, V, (rows, T))
    labels[0, :2] = IGNORE
    labels[-1] = IGNORE
    return logits, labels


def logps_and_grad(logits, labels, weights, backend, **options):
    x = logits.detach().clone().requires_grad_()
    logps = dk.sequence_logps(x, labels, reduction="none", backend=backend, **options)
    (logps * weights.to(logps.dtype)).sum().backward()
    return logps.detach(), x.grad


def allowed(error_of_torch, floor):
    return torch.clamp(error_of_torch * 1.5, min=floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_no_worse_than_torch(backend, dtype, V, options):
    if backend == "triton" and interpreted() and V > 10_000 and options:
        pytest.skip("the interpreter is slow: large V once, without a transform")
    for offset in (0.0, 100.0):
        logits, labels = case(dtype, V, offset)
        weights = torch.randn(labels[:, 1:].shape)
        exact, exact_grad = logps_and_grad(logits.double(), labels, weights, "torch", **options)
        torchs, torchs_grad = logps_and_grad(logits, labels, weights, "torch", **options)
        ours, grad = logps_and_grad(logits, labels, weights, backend, **options)
        assert grad.dtype == dtype and ours.dtype == torch.float32
        error = (ours - exact).abs().max()
        assert error <= allowed((torchs - exact).abs().max(), 2e-6), error
        # The interpreter narrows to bf16 by cutting, a GPU by rounding: one unit against a half.
        factor = 2.1 if backend == "triton" and interpreted() and dtype == torch.bfloat16 else 1.0
        error = (grad.double() - exact_grad).abs()
        bound = torch.maximum(
            (torchs_grad.double() - exact_grad).abs().max() * 1.1,
            torch.finfo(dtype).eps / 2 * exact_grad.abs() + 3e-7,
        )
        assert (error <= factor * bound).all(), (error.max(), bound.max())


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
@pytest.mark.parametrize("V", (1, 7, 2049))
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_statistics(backend, V, options):
    logits, labels = case(torch.float32, V, offset=3.0)
    logits[1, 0, V // 2 :] = float("-inf")
    labels[1, 1] = 0
    labels[1, 2] = logits[1, 1].argmax()
    call = {"reduction": "none", "stats": STATS, **options}
    exact_logps, exact = dk.sequence_logps(logits.double(), labels, **call)
    logps, stats = dk.sequence_logps(logits, labels, backend=backend, **call)
    assert list(stats) == list(STATS)
    torch.testing.assert_close(logps.double(), exact_logps, rtol=1e-6, atol=3e-6, equal_nan=True)
    for name in STATS:
        torch.testing.assert_close(
            stats[name].double(), exact[name], rtol=3e-6, atol=2e-5, equal_nan=True
        )
    one = dk.sequence_logps(
        logits, labels, backend=backend, reduction="none", stats=("is_top1",), **options
    )[1]
    torch.testing.assert_close(one["is_top1"], stats["is_top1"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
def test_statistics_by_hand(backend):
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    logits = p.log().expand(1, 2, 4).contiguous()
    logps, stats = dk.sequence_logps(
        logits, torch.tensor([[0, 3]]), shift=False, reduction="none", stats=STATS, backend=backend
    )
    torch.testing.assert_close(logps, torch.tensor([[0.5, 0.125]]).log())
    torch.testing.assert_close(stats["entropy"], -(p * p.log()).sum().expand(1, 2))
    torch.testing.assert_close(stats["mean_logits"], p.log().mean().expand(1, 2))
    torch.testing.assert_close(stats["log_sum_sq_probs"], (p * p).sum().log().expand(1, 2))
    assert stats["is_top1"].tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
def test_is_top1_takes_the_lowest_of_equals(backend):
    logits = torch.zeros(1, 3, 5)
    logits[:, :, 4] = -1.0
    labels = torch.tensor([[0, 1, 4]])
    _, stats = dk.sequence_logps(
        logits, labels, shift=False, reduction="none", stats=("is_top1",), backend=backend
    )
    assert stats["is_top1"].tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_never_read(backend, dtype):
    logits, labels = case(dtype, 300)
    clean = dk.sequence_logps(logits, labels, reduction="none", backend=backend)
    logits[:, :-1][labels[:, 1:] == IGNORE] = float("nan")
    logits[:, -1] = float("nan")
    logps, grad = logps_and_grad(logits, labels, torch.ones(labels[:, 1:].shape), backend)
    assert torch.equal(logps, clean)
    assert torch.isfinite(grad).all()
    assert (grad[:, :-1][labels[:, 1:] == IGNORE] == 0).all() and (grad[:, -1] == 0).all()


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
def test_extreme_logits(backend):
    V = 3000
    inf = float("inf")
    x = torch.randn(1, 8, V)
    x[0, 0, 1000:] = -inf  # masked classes
    x[0, 1] = -inf
    x[0, 1, 5] = 2.0  # all mass on one class
    x[0, 2, 7] = float("nan")
    x[0, 3, 7] = inf
    x[0, 4] = -inf
    x[0, 5] *= 1e4  # far apart
    x[0, 6] += 1e4  # a common offset
    x[0, 7, 2500] = float("nan")
    x[0, 7, :2500] = -inf
    labels = torch.tensor([[3, 5, 1, 1, 1, 8, 9, 1]])
    logps, grad = logps_and_grad(x, labels, torch.ones(1, 8), backend, shift=False)
    exact, exact_grad = logps_and_grad(x.double(), labels, torch.ones(1, 8), "torch", shift=False)
    assert logps[0, [2, 3, 4, 7]].isnan().all() and grad[0, [2, 3, 4, 7]].isnan().any(-1).all()
    fine = [0, 1, 5, 6]
    torch.testing.assert_close(logps[0, fine].double(), exact[0, fine], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad[0, fine].double(), exact_grad[0, fine], rtol=1e-5, atol=1e-6)
    # A target that is ruled out: -inf, not a number made up.
    impossible = dk.sequence_logps(x[:, :1], torch.tensor([[2000]]), shift=False, backend=backend)
    assert impossible.item() == -inf


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
@pytest.mark.parametrize(
    "options", [{"logit_scale": 0.25, "temperature": 3.0}, {"logit_scale": -1.5}]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_far_out_are_scaled_exactly(backend, options, inplace):
    """C5 with a scale or a temperature: rounded after it, their differences lost digits."""
    logits, labels = case(torch.float32, 300, offset=1e6)
    how = {**options, "reduction": "none", "shift": False, "stats": ("entropy", "mean_logits")}
    found = []
    for x, by in ((logits, backend), (logits.double(), "torch")):
        leaf = x.clone().requires_grad_()
        given = leaf * 1 if inplace else leaf
        logps, stats = dk.sequence_logps(given, labels, backend=by, inplace=inplace, **how)
        logps.sum().backward()
        found.append((logps.detach(), leaf.grad, stats["entropy"], stats["mean_logits"]))
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_tokens_keep_their_digits(backend):
    logits = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    logits[0, 0, 3] = 24.0
    labels = torch.tensor([[3]])
    logps, grad = logps_and_grad(logits, labels, torch.ones(1, 1), backend, shift=False)
    exact, exact_grad = logps_and_grad(
        logits.double(), labels, torch.ones(1, 1), "torch", shift=False
    )
    # 1 - p is 3.8e-8. fp32 sums keep it to a lane's share; plain fp32 torch rounds it away.
    assert -4e-8 < exact.item() < -3.7e-8 and logps.item() <= 0
    assert abs(logps - exact).item() <= 5e-9
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-7, atol=5e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_scored_where_they_lie(backend):
    base = torch.randn(4, 7, 333).to(torch.bfloat16)
    for view in (base[:, :-1], base[::2, 1:, :257], base.transpose(0, 1), base[1:2, :, 3:300]):
        rows, T, V = view.shape
        labels = torch.randint(0, V, (rows, T))
        weights = torch.randn(rows, T)
        ours = logps_and_grad(view, labels, weights, backend, shift=False)
        x = view.detach().requires_grad_()
        logps = dk.sequence_logps(x, labels, shift=False, reduction="none", backend=backend)
        (logps * weights).sum().backward()
        # The phase of a row against 16 bytes moves columns between Triton's lanes: last digits.
        torch.testing.assert_close(logps, ours[0], rtol=3e-7, atol=0)
        torch.testing.assert_close(x.grad, ours[1])
    wrong = base.transpose(1, 2)
    with pytest.raises(ValueError, match="unit stride in V"):
        dk.sequence_logps(wrong, torch.zeros(4, 333, dtype=torch.long), backend=backend)


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
@pytest.mark.parametrize("shape", [(0, 5, 11), (3, 0, 11), (3, 1, 11), (2, 3, 1)])
def test_empty_and_tiny(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[:2], dtype=torch.long)
    logps = dk.sequence_logps(x, labels, backend=backend)
    assert logps.shape == (shape[0],) and (logps == 0).all()  # shift leaves nothing, or V = 1
    logps.sum().backward()
    assert x.grad is None or (x.grad == 0).all()


def test_rows_do_not_depend_on_their_batch_or_the_threads():
    logits = torch.randn(40, 1, 40_000).to(torch.bfloat16)
    labels = torch.randint(0, 40_000, (40, 1))
    together = dk.sequence_logps(logits, labels, shift=False, backend="cpu")
    alone = torch.cat(
        [
            dk.sequence_logps(logits[i : i + 1], labels[i : i + 1], shift=False, backend="cpu")
            for i in range(40)
        ]
    )
    assert torch.equal(together, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = dk.sequence_logps(logits, labels, shift=False, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, single)


@pytest.mark.parametrize("isa", _C.instruction_sets().split(","))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    assert _C.use_instruction_set(isa)
    try:
        for V in (5, 1031, 20_000):
            logits, labels = case(dtype, V, offset=30.0)
            logits[1, 0, :2] = float("-inf")
            for options in TRANSFORMS:
                weights = torch.randn(labels[:, 1:].shape)
                ours, grad = logps_and_grad(logits, labels, weights, "cpu", **options)
                exact, exact_grad = logps_and_grad(
                    logits.double(), labels, weights, "torch", **options
                )
                torch.testing.assert_close(
                    ours.double(), exact, rtol=1e-6, atol=4e-6, equal_nan=True
                )
                rtol = torch.finfo(dtype).eps + 4e-6
                torch.testing.assert_close(
                    grad.double(), exact_grad, rtol=rtol, atol=1e-6, equal_nan=True
                )
    finally:
        _C.use_instruction_set("")


def test_unknown_instruction_set_changes_nothing():
    assert not _C.use_instruction_set("z80")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("isa", _C.instruction_sets().split(","))
def test_narrowing_is_round_to_nearest_even(dtype, isa):
    """The gradient of one class against rest, swept over every magnitude the dtype has."""
    _C.use_instruction_set(isa)
    try:
        scale = torch.logspace(-9, 4.7, 4000)
        logits = torch.zeros(4000, 1, 2, dtype=dtype)
        x = logits.requires_grad_()
        logps = dk.sequence_logps(x, torch.zeros(4000, 1, dtype=torch.long), shift=False)
        logps.backward(scale)
        expected = (scale * 0.5).to(dtype)
        assert torch.equal(x.grad[:, 0, 0], expected) and torch.equal(x.grad[:, 0, 1], -expected)
    finally:
        _C.use_instruction_set("")


@pytest.mark.parametrize("backend", (*BACKENDS, "torch"))
def test_in_place(backend):
    base, labels = case(torch.float32, 97)
    weights = torch.randn(labels[:, 1:].shape)
    _, expected = logps_and_grad(base, labels, weights, backend)
    leaf = base.clone().requires_grad_()
    logits = leaf * 1.0
    logps = dk.sequence_logps(logits, labels, reduction="none", inplace=True, backend=backend)
    before = logits._version
    assert torch.equal(logits, base)  # nothing is written forward
    loss = (logps * weights).sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(logits.detach(), expected)
    torch.testing.assert_close(leaf.grad, expected)
    assert logits._version > before
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_under_another_consumer_raises(backend):
    logits = torch.randn(2, 3, 9, requires_grad=True) * 1.0
    labels = torch.randint(0, 9, (2, 3))
    other = (logits * logits).sum()
    logps = dk.sequence_logps(logits, labels, inplace=True, backend=backend)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_needs_its_own_memory():
    labels = torch.zeros(3, 4, dtype=torch.long)
    shared = torch.randn(1, 4, 9, requires_grad=True).expand(3, 4, 9)
    with pytest.raises(ValueError, match="overlap"):
        dk.sequence_logps(shared, labels, inplace=True)
    out = torch.randn(1, 4, 9, requires_grad=True)
    dk.sequence_logps(out.expand(3, 4, 9), labels).sum().backward()  # out of place it is fine
    assert torch.isfinite(out.grad).all()
    with torch.no_grad():  # nothing will be written
        dk.sequence_logps(shared, labels, inplace=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_double_backward_but_an_error(backend):
    x, labels = case(torch.float32, 11)
    x.requires_grad_()
    logps = dk.sequence_logps(x, labels, backend=backend)
    (grad,) = torch.autograd.grad((logps**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_the_specification_differentiates_twice():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, IGNORE], [0, 4, 4]])

    def f(x):
        return dk.sequence_logps(x, labels, logit_softcap=3.0, temperature=0.8, reduction="none")

    assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("backend", ("torch", *BACKENDS))
def test_opcheck(backend):
    logits = torch.randn(2, 3, 17, requires_grad=True)
    targets = torch.tensor([[1, IGNORE, 3], [0, 16, IGNORE]])
    arguments = (logits, targets, IGNORE, 1.0, 0.0, 1.0, "entropy,is_top1", False, backend)
    # aot_dispatch is checked by the compile tests: here it would trace the interpreter.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.dpo_kernels.token_logps, arguments, test_utils=utils)
    values = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(
        torch.ops.dpo_kernels.sequence_sum,
        (values, targets, None, IGNORE, 0.5, backend),
        test_utils=utils,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_out_of_range_gives_nan_not_a_read(backend):
    """What happens where labels cannot be checked first: on a GPU, under torch.compile."""
    logits = torch.randn(1, 3, 10, requires_grad=True)
    targets = torch.tensor([[3, 10, -1]])
    impl = ops.token_logps(logits, targets, backend=backend)
    assert impl.logps.isnan().tolist() == [[False, True, True]]
    impl.logps.sum().backward()
    assert logits.grad[0, 0].isfinite().all() and logits.grad[0, 1:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_more_than_2_to_31_elements_apart(backend):
    """Offsets are 64 bits wide. On the host only the pages that hold rows are ever touched."""
    V, far = 517, 2**31 + 40
    memory = torch.empty(far + 2 * V, dtype=torch.bfloat16)
    logits = memory.as_strided((2, 2, V), (far, V, 1))
    logits.copy_(torch.randn(2, 2, V) * 4)
    labels = torch.randint(0, V, (2, 2))
    exact = logits.double().log_softmax(-1)
    onehot = torch.nn.functional.one_hot(labels, V)
    x = logits.detach().requires_grad_()
    call = {"reduction": "none", "shift": False, "backend": backend}
    logps = dk.sequence_logps(x.view_as(x), labels, inplace=True, **call)
    torch.testing.assert_close(logps.double(), (exact * onehot).sum(-1), rtol=0, atol=1e-5)
    logps.sum().backward()
    torch.testing.assert_close(x.grad.double(), onehot - exact.exp(), rtol=2**-7, atol=1e-6)
    assert torch.equal(x.grad, logits)  # where the logits were
