"""Our losses, log-probs, rewards and gradients against what the peers' own code returned.

`cases.json.gz` is made by `make_cases.py` (which see for what is called in TRL and Liger). Each
case is checked in float64 on the torch backend, and in float32 on every backend of `SINGLE`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peer_recipes import build, load, probe

import dpo_kernels as dk

DATA = load("cases.json.gz")
CASES = DATA["cases"]
SINGLE = ("torch", "cpu")
EPS32 = 2.0**-23
# TRL's fused head and Liger compute in float32 whatever they are given, TRL's alpha-divergence and
# ORPO cast to it: there the peer's own rounding is what is measured.
PEER_RTOL = {"float64": 1e-9, "float32": 2e-5}
WITHOUT_REFERENCE = ("simpo", "alphapo", "orpo", "cpo")


def name(case: dict[str, Any]) -> str:
    options = [f"{k}={v}".replace(" ", "") for k, v in case["options"].items()]
    return "-".join([case["id"], case["peer"], case["recipe"], *options])


def tensors(case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    arrays = build(DATA["recipes"][case["recipe"]])
    return {
        k: torch.from_numpy(v).to(dtype) if v.dtype.kind == "f" else torch.from_numpy(v)
        for k, v in arrays.items()
    }


def run(case: dict[str, Any], dtype: torch.dtype, backend: str) -> tuple[dk.DPOOutput, dict]:
    """Our result for a case, and its leaves by name."""
    x, options = tensors(case, dtype), case["options"]
    free = options["loss_type"] in WITHOUT_REFERENCE or options.get("reference_free", False)
    if case["peer"] in ("trl", "trl-cpo", "trl-orpo"):
        leaves = {"logits": x["logits"].requires_grad_()}
        ref: dict[str, Any] = {} if free else {"ref_logits": x["ref_logits"]}
        if case.get("ref") == "logps":
            ref = {"ref_logps": torch.tensor(case["expect"]["ref_logps"], dtype=dtype)}
        out = dk.fused_dpo_loss(leaves["logits"], x["labels"], **ref, backend=backend, **options)
        return out, leaves
    used = ("hidden", "weight", "bias") if case["bias"] else ("hidden", "weight")
    leaves = {k: x[k].requires_grad_() for k in used}
    ref = {} if free else {f"ref_{k}": x[f"ref_{k}"] for k in used}
    out = dk.fused_linear_dpo_loss(
        leaves["hidden"],
        leaves["weight"],
        x["labels"],
        bias=leaves.get("bias"),
        shift=case["peer"] != "liger",
        backend=backend,
        **ref,
        **case.get("head", {}),
        **options,
    )
    return out, leaves


def close(ours: Any, theirs: Any, rtol: float, atol: float, what: str) -> None:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol, err_msg=what)


def compare(case: dict[str, Any], out: dk.DPOOutput, leaves: dict, rtol: float, slack: float):
    """`slack`: error allowed in a log-prob, which the loss passes on through its slope."""
    expect = case["expect"]
    slope = float(np.abs(expect.get("dlogps", [1.0])).sum())
    atol = rtol * max(1.0, abs(expect["loss"])) + slope * slack
    close(out.loss.item(), expect["loss"], 0, atol, "loss")
    if "logps" in expect:
        logps = torch.cat([out.chosen_logps, out.rejected_logps])
        close(logps, expect["logps"], rtol, rtol + slack, "sequence log-probs")
    rewards = torch.cat([out.chosen_rewards, out.rejected_rewards])
    close(rewards, expect["rewards"], rtol, rtol + slack, "rewards")
    got = torch.autograd.grad(out.loss, list(leaves.values()), allow_unused=True)
    for (key, x), g in zip(leaves.items(), got, strict=True):
        g = torch.zeros_like(x) if g is None else g
        want = expect["grads"][key]
        # A slope moves by a factor of exp(slack) at most; one near 0 that comes out of 1 - sigmoid
        # is only good to the peer's eps. A projection adds up that many such errors.
        floor = EPS32 if rtol > 1e-6 else 1e-12
        atol = ((10 * rtol + slack) * want["max"] + floor) * g[0].numel() ** 0.5
        close(probe(g.numpy()), want["probe"], 0, atol, f"gradient of {key}")
        if "full" in want:
            close(g.ravel(), want["full"], 0, atol, f"gradient of {key}, entry by entry")


@pytest.mark.parametrize("case", CASES, ids=name)
def test_float64(case: dict[str, Any]) -> None:
    out, leaves = run(case, torch.float64, "torch")
    slack = 0.0
    if case["precision"] == "float32":  # the peer's log-probs are rounded, and its sums of them
        slack = 8 * EPS32 * float(np.abs(case["expect"].get("logps", [50.0])).max())
    compare(case, out, leaves, PEER_RTOL[case["precision"]], slack)


@pytest.mark.parametrize("backend", SINGLE)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_float32(case: dict[str, Any], backend: str) -> None:
    out, leaves = run(case, torch.float32, backend)
    expect = case["expect"]
    if not expect.get("float32_ok", True):  # where TRL itself leaves float32's range: never NaN
        assert not torch.isnan(out.loss)
        for g in torch.autograd.grad(out.loss, list(leaves.values())):
            assert not torch.isnan(g).any()
        return
    sums = [*expect.get("logps", [50.0]), *expect.get("ref_logps", [0.0])]
    compare(case, out, leaves, 2e-5, 8 * EPS32 * float(np.abs(sums).max()))


def separable(case: dict[str, Any]) -> bool:
    """Cases whose loss is a function of the sequence log-probs alone."""
    options = case["options"]
    names = (
        options["loss_type"] if isinstance(options["loss_type"], list) else [options["loss_type"]]
    )
    tokens = {"ld_alpha", "use_weighting"} & set(options)
    return case["peer"] == "trl" and not tokens and "sft" not in names


@pytest.mark.parametrize("case", [c for c in CASES if separable(c)], ids=name)
def test_preference_loss(case: dict[str, Any]) -> None:
    """The same losses from sequence log-probs, with their slopes."""
    expect = case["expect"]
    logps = torch.tensor(expect["logps"], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(expect["ref_logps"], dtype=torch.float64)
    labels = build(DATA["recipes"][case["recipe"]])["labels"]
    lengths = torch.from_numpy((labels[:, 1:] != -100).sum(1))
    (chosen, rejected), (n_w, n_l) = logps.chunk(2), lengths.chunk(2)
    out = dk.preference_loss(
        chosen, rejected, *ref.chunk(2), chosen_lengths=n_w, rejected_lengths=n_l, **case["options"]
    )
    (slopes,) = torch.autograd.grad(out.loss, logps)
    rtol = PEER_RTOL[case["precision"]]
    close(out.loss.item(), expect["loss"], rtol, rtol, "loss")
    close(slopes, expect["dlogps"], rtol, rtol, "slopes")
    rewards = torch.cat([out.chosen_rewards, out.rejected_rewards])
    close(rewards, expect["rewards"], rtol, rtol, "rewards")


@pytest.mark.parametrize("case", [c for c in CASES if "stats" in c["expect"]], ids=name)
def test_statistics(case: dict[str, Any]) -> None:
    """Entropy, mean logit, top-1 and the sum of squared probabilities of TRL's fused head."""
    x, want = tensors(case, torch.float64), case["expect"]["stats"]
    _, stats = dk.linear_sequence_logps(
        x["hidden"],
        x["weight"],
        x["labels"],
        bias=x["bias"] if case["bias"] else None,
        stats=tuple(want),
        backend="torch",
        **case["head"],
    )
    for key, value in stats.items():
        close(value.double(), want[key], 1e-5, 1e-5, key)


def test_what_was_left_out() -> None:
    """Two kinds of input on which TRL gives nothing to compare with, and no others."""
    for case in DATA["left_out"]:
        options = case["options"]
        if case["reason"].startswith("TRL raises"):  # it multiplies the weights in, in place
            assert options["use_weighting"] and options["loss_type"] in ("hinge", "sft")
        else:  # exp(1000)
            assert options["f_divergence_type"] == "forward_kl" and case["recipe"] == "extreme_low"
