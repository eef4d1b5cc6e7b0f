"""Eager calls are light: few dispatches, options resolved once, no schema on the way."""

import pytest
import torch
from linear_cases import B, H, T, V, labels_of, tensors
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels as dk
from dpo_kernels import losses
from dpo_kernels.inputs import call
from dpo_kernels.loss import stream_pairs
from dpo_kernels.ops.direct import eager

MOST = {"logits": 12, "hidden": 22, "logps": 25}  # plain torch: 46, 59, 27


class Dispatches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls():
    R, T, V, H = 4, 8, 64, 32
    labels, ref = torch.randint(0, V, (R, T)), torch.randn(R)
    logits = torch.randn(R, T, V, requires_grad=True)
    hidden = torch.randn(R, T, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    logps = torch.randn(R, requires_grad=True)
    return {
        "logits": lambda: dk.fused_dpo_loss(logits, labels, ref_logps=ref, backend="cpu"),
        "hidden": lambda: dk.fused_linear_dpo_loss(
            hidden, weight, labels, ref_logps=ref, backend="cpu"
        ),
        "logps": lambda: dk.preference_loss(logps[:2], logps[2:], ref[:2], ref[2:], backend="cpu"),
    }


@pytest.mark.parametrize("name", MOST)
def test_dispatches_of_forward_and_backward(name):
    step = calls()[name]
    step().loss.backward()
    with Dispatches() as mode:
        step().loss.backward()
    assert not [n for n in mode.names if "dpo_kernels" in n]
    assert len(mode.names) <= MOST[name], (len(mode.names), mode.names)


def test_equal_options_are_resolved_once(monkeypatch):
    count = []
    resolve = losses.resolve
    monkeypatch.setattr(losses, "resolve", lambda o: count.append(o) or resolve(o))
    monkeypatch.setattr(call, "_kept", {})
    labels, x = labels_of(), torch.randn(2 * B, T, V)
    for beta in (0.2, 0.2, 0.3):
        for _ in range(3):
            dk.fused_dpo_loss(x, labels, reference_free=True, beta=beta, loss_type=["sigmoid"])
    assert len(count) == 2


@pytest.mark.parametrize("wrong", ({"beta": True}, {"use_weighting": 1}, {"loss_weights": [True]}))
def test_an_equal_value_of_another_type_is_not_taken_for_it(wrong):
    labels, x = labels_of(), torch.randn(2 * B, T, V)
    right = {"beta": 1, "use_weighting": True, "loss_weights": [1]}
    name = next(iter(wrong))
    dk.fused_dpo_loss(x, labels, reference_free=True, **{name: right[name]})
    with pytest.raises(TypeError, match=name):
        dk.fused_dpo_loss(x, labels, reference_free=True, **wrong)


@pytest.mark.parametrize("backend", ("cpu", "triton"))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    "options",
    (
        {},
        {"loss_type": "ipo"},
        {"loss_type": "rdpo", "offset": torch.rand(B)},
        {"loss_type": "simpo"},
        {"loss_type": "robust", "label_smoothing": 0.1, "num_pairs": 7},
        {"ld_alpha": 0.5, "reduction": "none"},
        {"beta": torch.rand(B) + 0.1, "num_pairs": torch.tensor(3.0)},
        {"beta": torch.tensor(0.4)},
    ),
    ids=str,
)
def test_the_closed_form_is_the_composition(options, packed, backend, monkeypatch):
    """Loss, fields and gradients, from logits and streamed, beside those of the ops composed."""
    labels, given = labels_of(), {}
    hidden, weight, _, ref_hidden, _ = tensors()
    ref = torch.randn(2 * B, T, V)
    if packed:
        labels, given["cu_seqlens"] = labels.reshape(-1), torch.arange(0, 2 * B * T + 1, T)
        hidden, ref_hidden, ref = hidden.view(-1, H), ref_hidden.view(-1, H), ref.view(-1, V)
    logits, sums = (hidden @ weight.T).requires_grad_(), torch.randn(2 * B)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    place = torch.get_default_device()
    options = {k: v.to(place) if torch.is_tensor(v) else v for k, v in options.items()}
    given |= {"backend": backend, **options}

    def both():
        out = dk.fused_dpo_loss(logits, labels, ref, **given)
        linear = dk.fused_linear_dpo_loss(
            hidden, weight, labels, ref_hidden=ref_hidden, memory_budget=1, **given
        )
        alone = dk.fused_linear_dpo_loss(hidden, weight, labels, ref_logps=sums, **given)
        grads = torch.autograd.grad(out.loss.sum(), logits)
        for head in (linear, alone):
            grads += torch.autograd.grad(head.loss.sum(), (hidden, weight))
        return [*out, *linear, *alone, *grads]

    direct = both()
    monkeypatch.setattr("dpo_kernels.inputs.call.Ordinary.of", lambda *_: None)
    monkeypatch.setattr(call, "_kept", {})
    for mine, expected in zip(direct, both(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    "options", ({}, {"loss_type": "simpo"}, {"ld_alpha": 0.5, "num_pairs": 7}), ids=str
)
def test_a_head_that_is_one_matrix_takes_no_other_products(options, packed, monkeypatch):
    """The short way of one chunk and the general one: the same bits."""
    labels, given = labels_of(), {"ref_logps": torch.randn(2 * B), **options}
    hidden, weight, *_ = tensors()
    if packed:
        labels, hidden = labels.reshape(-1), hidden.view(-1, H)
        given |= {"cu_seqlens": torch.arange(0, 2 * B * T + 1, T, dtype=torch.int32)}
    leaves = [x.requires_grad_() for x in (hidden, weight)]

    def found():
        out = dk.fused_linear_dpo_loss(*leaves, labels, backend="cpu", **given)
        return [*out, *torch.autograd.grad(out.loss * 3, leaves)]

    short, taken = found(), []
    monkeypatch.setattr(stream_pairs, "_is_plain", lambda *_: taken.append(True))
    assert all(map(torch.equal, short, found())) and taken


def test_what_traces_is_not_eager():
    x = torch.randn(3)
    assert eager(x, None, torch.nn.Parameter(x))
    assert not eager(x.to("meta"))
    assert not eager(torch.complex(x, x).conj().imag)
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    seen = []
    with FakeTensorMode() as mode:
        assert not eager(x) and not eager(mode.from_tensor(x))
    make_fx(lambda y: seen.append(eager(y)) or y + 1)(x)
    torch.func.vmap(lambda y: seen.append(eager(y)) or y)(x[None])
    assert seen == [False, False]


def test_make_fx_and_fake_tensors_see_the_registered_ops():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    labels, x = labels_of(), torch.randn(2 * B, T, V)

    def loss(x):
        return dk.fused_dpo_loss(x, labels, reference_free=True, backend="cpu").loss

    graph = make_fx(loss)(x)
    assert "dpo_kernels.token_logps" in graph.code
    torch.testing.assert_close(graph(x), loss(x))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert loss(mode.from_tensor(x)).shape == ()


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_loss_that_does_not_count_gives_no_gradient(reduction):
    """0 whatever the slopes: an upstream gradient of 0 meets an infinite one."""
    x = torch.tensor([-1e200, -1.0], dtype=torch.float32).clamp(min=-3e38).requires_grad_()
    out = dk.preference_loss(
        x,
        torch.zeros(2),
        loss_type="ipo",
        chosen_lengths=torch.ones(2),
        rejected_lengths=torch.ones(2),
        reduction=reduction,
        backend="cpu",
        beta=1e-300,
    )
    (g,) = torch.autograd.grad(out.loss, x, torch.zeros_like(out.loss))
    assert torch.equal(g, torch.zeros(2))


def test_a_default_device_is_not_taken_for_that_of_the_tensors():
    labels, x = labels_of(), torch.randn(2 * B, T, V, requires_grad=True)
    hidden, weight, *_ = tensors()
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.device("meta"):
        for out in (
            dk.fused_dpo_loss(x, labels, reference_free=True, beta=0.123),
            dk.fused_linear_dpo_loss(hidden, weight, labels, reference_free=True, beta=0.124),
        ):
            out.loss.backward()
            assert out.loss.isfinite() and out.margins.device.type == "cpu"
