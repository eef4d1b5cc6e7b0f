"""Rows that are not scored may hold anything: no value and no gradient comes from them
(pytorch#196170: 0 * NaN is NaN, in a product as in a mask that comes too late)."""

import math

import pytest
import torch
from linear_cases import IGNORE, B, H, T, V, labels_of, tensors

import dpo_kernels as dk

BACKENDS = ("torch", "cpu", "triton", "cuda")
BAD = (math.nan, math.inf)


def spoiled(x, labels, bad):
    """x [2B, T, ...] with the rows that shifted labels do not score overwritten."""
    scored = torch.zeros(labels.shape, dtype=torch.bool)
    scored[:, :-1] = labels[:, 1:] != IGNORE
    return torch.where(scored[..., None], x, bad), scored


def same(call, clean, dirty, names):
    """The loss and each gradient are those of the clean tensors."""
    results = []
    for values in (clean, dirty):
        x = {k: v.detach().clone().requires_grad_(k in names) for k, v in values.items()}
        loss = call(**x).sum()
        results.append((loss, *torch.autograd.grad(loss, [x[k] for k in names])))
    for name, a, b in zip(("loss", *names), *results, strict=True):
        assert b.isfinite().all(), name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo1"))
@pytest.mark.parametrize("transform", ({}, {"logit_softcap": 3.0, "temperature": 0.7}), ids=str)
def test_logits(transform, loss_type, bad, backend):
    if (loss_type, backend) == ("tdpo1", "cuda"):
        pytest.skip("no kernel of its own")
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE], [IGNORE, IGNORE, 4, 0]])  # triton: interpreted
    clean = {"logits": torch.randn(2, 4, 9), "ref_logits": torch.randn(2, 4, 9)}
    dirty = {k: spoiled(x, labels, bad)[0] for k, x in clean.items()}

    for inplace in (False, True):

        def call(logits, ref_logits, inplace=inplace):
            return dk.fused_dpo_loss(
                logits * 1,
                labels,
                ref_logits,
                loss_type=loss_type,
                inplace=inplace,
                use_weighting=True,
                backend=backend,
                **transform,
            ).loss

        same(call, clean, dirty, ("logits",))


@pytest.mark.parametrize("bad", BAD)
def test_ref_logps_per_token(bad):
    labels = labels_of()
    logits, ref = torch.randn(2 * B, T, V), torch.randn(2 * B, T - 1)
    dirty = spoiled(torch.nn.functional.pad(ref, (0, 1))[..., None], labels, bad)[0][:, :-1, 0]
    for backend in ("torch", "cpu"):
        losses = [
            dk.fused_dpo_loss(logits, labels, ref_logps=r, backend=backend, ld_alpha=0.5).loss
            for r in (torch.where(dirty.isfinite(), ref, 0.0), dirty)
        ]
        assert torch.equal(*losses)


CASES = {
    "streaming": ("hidden", "weight", "bias"),
    "recompute": ("hidden", "weight", "bias"),
    "frozen": ("hidden",),
    "torch": ("hidden", "weight", "bias"),
    "fp64": ("hidden", "weight", "bias"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo1"))
@pytest.mark.parametrize("case", CASES)
def test_linear(case, loss_type, lora, bad):
    labels, names = labels_of(), CASES[case]
    hidden, weight, bias, ref_hidden, ref_weight = tensors()
    clean = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
    }
    if lora:
        clean |= {"down": torch.randn(3, H), "up": torch.randn(V, 3)}
        names = (*names, "down") if case == "frozen" else (*names, "down", "up")
    if case == "fp64":
        clean = {k: x.double() for k, x in clean.items()}
    dirty = clean | {k: spoiled(clean[k], labels, bad)[0] for k in ("hidden", "ref_hidden")}
    how = {"torch": {"backend": "torch"}, "fp64": {}}.get(case, {"strategy": case})

    def call(down=None, up=None, **given):
        adapter = {} if down is None else {"lora": (down, up, 0.5)}
        return dk.fused_linear_dpo_loss(
            labels=labels, loss_type=loss_type, **adapter, **given, **how
        ).loss

    same(call, clean, dirty, names)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_linear_sequence_logps(dtype):
    labels = labels_of()
    hidden, weight, *_ = (x.to(dtype) for x in tensors())
    clean = {"hidden": hidden, "weight": weight}
    dirty = clean | {"hidden": spoiled(hidden, labels, math.nan)[0]}
    for backend in ("torch",) if dtype == torch.float64 else ("torch", "cpu"):
        same(
            lambda hidden, weight, b=backend: dk.linear_sequence_logps(
                hidden, weight, labels, backend=b
            ),
            clean,
            dirty,
            ("hidden", "weight"),
        )
