"""`torch.library.opcheck` of every op the package registers, and that none is left out."""

import pytest
import torch

from dpo_kernels.backends.terms import flatten
from dpo_kernels.losses import TABLE, LossOptions

IGNORE = -100
BACKENDS = ("torch", "cpu", "triton")
# aot_dispatch is checked by the compile tests: here it would trace the interpreter.
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor")
R, T, V, H, r, S = 2, 5, 19, 6, 3, 2
HEADS = 1 << 20, False, "cpu"  # memory budget, invariant, backend


def targets():
    return torch.tensor([[1, IGNORE, 3, 18, 2], [0, 16, IGNORE, 4, IGNORE]])


COUNT = int((targets() != IGNORE).sum())


def floats(*shape, grad=True, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def lse():
    return floats(R, T, grad=False, dtype=torch.float64) + 4


def numbers():  # scale, softcap, inverse temperature
    return 0.9, 5.0, 1.1


def pair_loss(backend):
    terms = TABLE["nca_pair"].terms(LossOptions())
    u, v, beta, offset = (floats(4, dtype=torch.float64) for _ in range(4))
    return u, v, beta, offset, [t.phi for t in terms], flatten(terms), backend


def token_logps(backend):
    return floats(R, T, V), targets(), IGNORE, *numbers(), "entropy", False, backend


def token_logps_beside(backend):
    return *token_logps(backend), floats(R, T, V, grad=False)


def backward_of_rows(backend):
    rows = (floats(R, T, grad=False), floats(R, T, V, grad=False), targets(), lse())
    return *rows, IGNORE, *numbers(), backend


def sequence_sum(backend):
    return floats(R, T), targets(), None, IGNORE, 0.5, backend


def packed_sums(backend):
    boundaries = torch.tensor([0, 3, 3, 8, 10])
    return floats(1, R * T), targets().view(1, -1), boundaries, IGNORE, 0.5, backend


def sums_backward(backend):
    return floats(S, dtype=torch.float64), targets(), None, IGNORE, 0.5, backend


def head(grad):
    return floats(R, T, H, grad=grad), *(floats(*s, grad=grad) for s in ((V, H), (V,)))


def adapter(grad):
    return floats(r, H, grad=grad), floats(V, r, grad=grad)


def linear(strategy, *, low=True, trained=True):
    def given(_):
        hidden, weight, bias = head(trained)
        if strategy == "frozen":
            hidden, weight, bias = hidden.detach().requires_grad_(), weight.detach(), bias.detach()
        down, up = adapter(trained) if low else (None, None)
        if low and strategy == "frozen":
            up = up.detach()
        place = (targets(), IGNORE, *numbers(), "entropy", strategy, strategy, COUNT)
        return hidden, weight, bias, down, up, *place, *HEADS

    return given


def linear_backward(kept):
    def given(_):
        parts = *head(False), *adapter(False)
        logits = floats(16 if kept else 0, 24, grad=False) if kept else torch.empty(0)
        budget = (HEADS[0] if kept else 1, *HEADS[1:])  # too small to keep any
        rows = (floats(R, T, grad=False), *parts, targets(), lse(), logits)
        return *rows, IGNORE, *numbers(), [True] * 5, "recompute", COUNT, *budget

    return given


def scaled_rows(_):
    grads, stashes = [floats(R, T, grad=False)] * 2, [floats(COUNT, H, grad=False)] * 2
    return grads, stashes, targets(), IGNORE, COUNT, torch.bfloat16


def scaled_product(_):
    grads, stashes = [floats(R, T, grad=False)], [floats(COUNT, r, grad=False)]
    return grads, stashes, floats(R, T, H, grad=False), targets(), IGNORE, COUNT


# op -> what makes its arguments, and the backends that have it.
CASES = [
    ("pair_loss", pair_loss, BACKENDS[1:]),  # plain torch's is differentiated as it is
    ("token_logps", token_logps, BACKENDS),
    ("token_logps", token_logps_beside, BACKENDS),
    ("token_logps_backward", backward_of_rows, BACKENDS),
    ("token_logps_backward_", backward_of_rows, BACKENDS),
    ("sequence_sum", sequence_sum, BACKENDS),
    ("sequence_sum", packed_sums, BACKENDS),
    ("sequence_sum_backward", sums_backward, BACKENDS),
    ("linear_logps", linear("score", trained=False), ("cpu",)),
    ("linear_logps", linear("frozen"), ("cpu",)),
    ("linear_logps", linear("recompute"), ("cpu",)),
    ("linear_logps", linear("recompute", low=False), ("cpu",)),
    ("linear_logps_backward", linear_backward(kept=False), ("cpu",)),
    ("linear_logps_backward", linear_backward(kept=True), ("cpu",)),
    ("scaled_rows", scaled_rows, ("cpu",)),
    ("scaled_product", scaled_product, ("cpu",)),
]
# Of attention, which has a test of its own beside it: tests/models/test_segment_kernels.py.
ELSEWHERE = {"segment_attention", "segment_attention_backward"}


@pytest.mark.parametrize(
    ("op", "arguments", "backend"),
    [
        pytest.param(op, given, backend, id=f"{op}-{i}-{backend}")
        for i, (op, given, backends) in enumerate(CASES)
        for backend in backends
    ],
)
def test_opcheck(op, arguments, backend):
    torch.library.opcheck(getattr(torch.ops.dpo_kernels, op), arguments(backend), test_utils=UTILS)


def test_every_op_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    registered = {n.partition("::")[2] for n in names if n.startswith("dpo_kernels::")}
    assert registered - ELSEWHERE == {op for op, *_ in CASES}
