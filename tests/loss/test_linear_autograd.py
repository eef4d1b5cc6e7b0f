"""The linear head under autograd: backward twice, compile, autocast, and what is refused."""

import pytest
import torch
from linear_cases import B, H, T, V, compiles, labels_of, tensors

import dpo_kernels as dk


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

    compiles(f, leaves, leaves if trained else leaves[:1])


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
            hidden,
            weight.requires_grad_(),
            labels,
            reference_free=True,
            strategy=strategy,
            **options,
        )
    with pytest.raises(ValueError, match="nothing wants a gradient"):
        dk.fused_linear_dpo_loss(
            hidden, weight.detach(), labels, reference_free=True, strategy="streaming"
        )
