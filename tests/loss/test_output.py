"""`DPOOutput`: seven fields as a tuple; strategy and statistics beside them."""

import copy
import pickle

import pytest
import torch
from linear_cases import B, T, V, labels_of, tensors

import dpo_kernels as dk
from dpo_kernels.ops import STATS

FIELDS = (
    "loss",
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "margins",
    "accuracy",
)
BACKENDS = ("torch", "cpu", "triton")


def packed(labels):
    cu = torch.arange(0, labels.numel() + 1, labels.shape[1])
    return labels.reshape(-1), cu


def test_it_is_a_tuple_of_seven_with_attributes_beside():
    hidden, weight, *_ = tensors()
    out = dk.fused_linear_dpo_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels_of(),
        reference_free=True,
        stats=("entropy",),
    )
    assert out._fields == FIELDS and len(out) == 7 and len([*out]) == 7
    loss, *_, accuracy = out
    assert loss is out.loss and accuracy is out.accuracy
    assert out.strategy == "streaming" and list(out.stats) == ["entropy"]
    assert not hasattr(out.loss, "_dpo_strategy")
    changed = out._replace(loss=loss.detach())
    assert changed.strategy == "streaming" and changed.stats is out.stats
    for again in (copy.copy(changed), pickle.loads(pickle.dumps(changed))):
        assert again.strategy == "streaming" and list(again.stats) == ["entropy"]
    plain = dk.preference_loss(torch.zeros(2), torch.zeros(2))
    assert plain.strategy is None and dict(plain.stats) == {}
    assert pickle.loads(pickle.dumps(plain)).stats == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"use_weighting": True}, {"loss_type": "tdpo1"}), ids=str)
@pytest.mark.parametrize("layout", ("padded", "packed", "unshifted"))
def test_statistics_beside_the_loss_are_those_of_sequence_logps(layout, options, backend):
    labels, x, ref = labels_of(), torch.randn(2 * B, T, V), torch.randn(2 * B, T, V)
    given = {"shift": layout != "unshifted", "backend": backend}
    if layout == "packed":
        labels, given["cu_seqlens"] = packed(labels)
        x, ref = x.view(-1, V), ref.view(-1, V)
    x.requires_grad_()
    plain = dk.fused_dpo_loss(x, labels, ref, **options, **given)
    (expected_grad,) = torch.autograd.grad(plain.loss, x)
    out = dk.fused_dpo_loss(x, labels, ref, stats=STATS, **options, **given)
    (grad,) = torch.autograd.grad(out.loss, x)
    _, expected = dk.sequence_logps(x, labels, reduction="none", stats=STATS, **given)
    assert torch.equal(out.loss, plain.loss) and torch.equal(grad, expected_grad)
    assert tuple(out.stats) == STATS
    for name, value in out.stats.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"use_weighting": True}, {"loss_type": "tdpo1"}), ids=str)
@pytest.mark.parametrize("strategy", ("streaming", "frozen", "recompute", "score"))
def test_statistics_under_every_strategy(strategy, options, backend):
    labels = labels_of()
    hidden, weight, bias, ref_hidden, ref_weight = tensors()
    hidden.requires_grad_(strategy != "score")
    weight.requires_grad_(strategy in ("streaming", "recompute"))
    wish = None if backend == "torch" else strategy
    out = dk.fused_linear_dpo_loss(
        hidden,
        weight,
        labels,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        stats=["is_top1", "entropy"],
        strategy=wish,
        memory_budget=1,
        backend=backend,
        **options,
    )
    assert out.strategy == (wish or "plain") and list(out.stats) == ["is_top1", "entropy"]
    _, expected = dk.sequence_logps(
        hidden @ weight.T + bias, labels, reduction="none", stats=("entropy", "is_top1")
    )
    for name, value in out.stats.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, expected[name], msg=name)


def test_statistics_in_a_module_and_of_a_wrong_name():
    labels, x = labels_of(), torch.randn(2 * B, T, V)
    out = dk.FusedDPOLoss(stats=("entropy",), reference_free=True)(x, labels)
    assert out.stats["entropy"].shape == (2 * B, T - 1)
    for call in (
        lambda **o: dk.FusedDPOLoss(**o),
        lambda **o: dk.FusedLinearDPOLoss(**o),
        lambda **o: dk.fused_dpo_loss(x, labels, **o),
    ):
        with pytest.raises(ValueError, match="stats"):
            call(stats=("entropie",), reference_free=True)


def test_statistics_under_compile():
    labels, x = labels_of(), torch.randn(2 * B, T, V)

    def call(x):
        out = dk.fused_dpo_loss(x, labels, reference_free=True, stats=("entropy",), backend="cpu")
        return out.loss, out.stats["entropy"]

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    for mine, expected in zip(got, call(x), strict=True):
        torch.testing.assert_close(mine, expected)
