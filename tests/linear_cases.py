"""The batch that the tests of the linear head share, and what float64 says of it."""

import math

import torch

import dpo_kernels as dk
from dpo_kernels.losses import TABLE

IGNORE = -100
B, T, H, V = 4, 9, 12, 83
ROW = 4 * 128 + 12 * H  # bytes a row of a chunk takes: logits at a pitch of 128, hidden states
# What a loss needs beside the batch.
OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "odpo": {"offset": torch.tensor([0.3, -0.2, 0.0, 0.1])},
    "beta_dpo": {"beta_dpo_keep": 1.0},
    "alphapo": {"beta": 1.0},
}
BUDGETS = {"tight": 32 * ROW, "some": 48 * ROW, "default": None}


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


def at_step_zero(strategy, dtype, **options):
    """The outputs, at any budget, where policy and reference are the same: rewards 0, loss log 2.

    First with the reference's head given, then with the policy's, without gradient.
    """
    hidden, weight, bias, *_ = tensors(dtype)
    labels = labels_of()
    x = hidden.clone().requires_grad_(strategy != "score")
    w = weight.clone().requires_grad_(strategy in ("streaming", "recompute"))
    given = {"bias": bias, "ref_hidden": hidden, "strategy": strategy, **options}
    for budget in BUDGETS.values():
        outputs = []
        for head in ({"ref_weight": weight, "ref_bias": bias}, {}):
            out = dk.fused_linear_dpo_loss(x, w, labels, memory_budget=budget, **given, **head)
            assert out.strategy == strategy
            assert (out.chosen_rewards == 0).all() and (out.rejected_rewards == 0).all()
            assert abs(out.loss.item() - math.log(2)) < 1e-7
            outputs.append(out)
        assert torch.equal(outputs[0].loss, outputs[1].loss)


def compiles(function, leaves, wanted):
    """Compiled, a function of `leaves` and its gradients in `wanted` are what they are eagerly."""
    eager = function(*leaves)
    expected = torch.autograd.grad(eager, wanted)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
