"""Losses beyond pairs: kto, apo_zero_unpaired, plackett_luce, held to their formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dpo_kernels as dk

N, T, V, H = 6, 7, 11, 5
DESIRABLE = torch.tensor([True, False, True, True, False, False])


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(V, (N, T), generator=g)
    labels[:, :2] = -100
    labels[1, 4:] = -100

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "logits": normal(N, T, V),
        "ref": normal(N, T, V),
        "labels": labels,
        "hidden": normal(N, T, H),
        "ref_hidden": normal(N, T, H),
        "weight": normal(V, H),
    }


def sums(logits: Tensor, labels: Tensor) -> Tensor:
    """[N], by log_softmax and gather."""
    keep = labels[:, 1:] != -100
    at = labels[:, 1:].clamp(min=0)[..., None]
    return (logits[:, :-1].log_softmax(-1).gather(-1, at)[..., 0] * keep).sum(-1)


def literal(
    name: str, pi: Tensor, rho: Tensor, z: Any, beta: float, w: tuple[float, float]
) -> Tensor:
    """[N], as LOSSES writes them."""
    r, s = pi - rho, torch.sigmoid
    if name == "kto":
        good, bad = 1 - s(beta * (r - z)), 1 - s(beta * (z - r))
    else:
        good, bad = 1 - s(beta * r), s(beta * r)
    return torch.where(DESIRABLE, w[0] * good, w[1] * bad)


CASES = [("kto", {"z": 0.7}), ("kto", {"z": torch.tensor(0.0)}), ("apo_zero_unpaired", {})]


@pytest.mark.parametrize("name, more", CASES)
def test_unpaired_from_logits(name: str, more: dict[str, Any]) -> None:
    b = batch()
    mine, theirs = (b["logits"].clone().requires_grad_() for _ in range(2))
    options = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    out = dk.fused_unpaired_loss(
        mine, b["labels"], b["ref"], desirable=DESIRABLE, loss_type=name, **more, **options
    )
    pi, rho = sums(theirs, b["labels"]), sums(b["ref"], b["labels"])
    wanted = literal(name, pi, rho, more.get("z", 0.0), 0.3, (1.5, 0.5))
    torch.testing.assert_close(out.loss, wanted.mean())
    torch.testing.assert_close(out.logps, pi.detach())
    torch.testing.assert_close(out.rewards, 0.3 * (pi - rho).detach())
    assert float(out.kl) == float(more.get("z", 0.0))
    out.loss.backward()
    wanted.mean().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert not out.logps.requires_grad and not out.rewards.requires_grad


@pytest.mark.parametrize("name, more", CASES)
def test_unpaired_from_hidden_states(name: str, more: dict[str, Any]) -> None:
    b = batch()
    ours = [b[k].clone().requires_grad_() for k in ("hidden", "weight")]
    plain = [b[k].clone().requires_grad_() for k in ("hidden", "weight")]
    out = dk.fused_linear_unpaired_loss(
        *ours, b["labels"], desirable=DESIRABLE, ref_hidden=b["ref_hidden"], loss_type=name, **more
    )
    pi = sums(plain[0] @ plain[1].T, b["labels"])
    rho = sums(b["ref_hidden"] @ b["weight"].T, b["labels"])
    wanted = literal(name, pi, rho, more.get("z", 0.0), 0.1, (1.0, 1.0)).mean()
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    wanted.backward()
    for a, c in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, c.grad)


def test_unpaired_packed_is_padded() -> None:
    b = batch()
    keep = torch.ones(N, T, dtype=torch.bool)
    keep[1, 4:] = False
    lengths = keep.sum(1)
    cu = torch.tensor([0, *lengths.tolist()]).cumsum(0)
    how = {"desirable": DESIRABLE, "z": 0.2, "reduction": "none"}
    padded = dk.fused_unpaired_loss(b["logits"], b["labels"], b["ref"], **how)
    packed = dk.fused_unpaired_loss(
        b["logits"][keep], b["labels"][keep], b["ref"][keep], cu_seqlens=cu, **how
    )
    torch.testing.assert_close(packed.loss, padded.loss)
    assert padded.loss.shape == (N,)


def test_unpaired_in_parts_is_the_whole() -> None:
    """`num_rows` of the step: shares of batches add up."""
    pi, rho = torch.randn(2, N, dtype=torch.float64)
    whole = dk.unpaired_loss(pi, rho, DESIRABLE, z=0.1).loss
    parts = [
        dk.unpaired_loss(pi[i], rho[i], DESIRABLE[i], z=0.1, num_rows=N).loss
        for i in (slice(0, 2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_baseline() -> None:
    pi, rho = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5])
    assert float(dk.kl_baseline(pi, rho)) == 1.0
    assert float(dk.kl_baseline(rho, pi)) == 0.0
    assert float(dk.kl_baseline(pi, rho, count=4)) == 0.5
    assert not dk.kl_baseline(pi.requires_grad_(), rho).requires_grad


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_unpaired_far_out_is_finite(far: float) -> None:
    pi = torch.full((N,), far, dtype=torch.float64, requires_grad=True)
    for name, more in CASES:
        out = dk.unpaired_loss(pi, torch.zeros(N), DESIRABLE, loss_type=name, beta=1.0, **more)
        (grad,) = torch.autograd.grad(out.loss, pi)
        assert out.loss.isfinite() and grad.isfinite().all()


def test_weights_of_rows() -> None:
    """A row of weight 0 adds nothing, also where its log-prob is NaN."""
    pi = torch.randn(N, dtype=torch.float64)
    pi[2] = torch.nan
    pi.requires_grad_()
    w = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    out = dk.unpaired_loss(pi, torch.zeros(N), DESIRABLE, z=0.0, weights=w, reduction="none")
    assert out.loss[2] == 0 and out.loss.isfinite().all()
    out.loss.sum().backward()
    assert pi.grad[2] == 0 and pi.grad.isfinite().all()


WRONG = [
    ({"z": None}, "kto needs z"),
    ({"z": -1.0}, "z must be at least 0"),
    ({"z": torch.zeros(2)}, "z must"),
    ({"loss_type": "apo_zero_unpaired"}, "z has no meaning"),
    ({"loss_type": "sigmoid"}, "loss_type"),
    ({"desirable": torch.ones(N)}, "desirable must be bool"),
    ({"desirable": torch.ones(3, dtype=torch.bool)}, "desirable"),
    ({"beta": 0.0}, "beta"),
    ({"desirable_weight": -1.0}, "desirable_weight"),
    ({"ref_logps": None}, "ref_logps"),
    ({"ref_logps": torch.zeros(2)}, "ref_logps"),
    ({"weights": torch.ones(2)}, "weights"),
    ({"weights": torch.full((N,), torch.nan)}, "weights must be finite"),
    ({"num_rows": 0}, "num_rows must be a positive"),
    ({"num_rows": torch.tensor(-1.0)}, "num_rows must be a positive"),
    ({"ref_logps": None, "reference_free": 1}, "reference_free must be True or False"),
    ({"reduction": "sum"}, "reduction"),
    ({"logps": torch.zeros(0)}, "logps must have shape"),
    ({"logps": torch.zeros(N, dtype=torch.int64)}, "logps"),
]


@pytest.mark.parametrize("change, message", WRONG)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given = {"logps": torch.zeros(N), "ref_logps": torch.zeros(N), "desirable": DESIRABLE, "z": 0.0}
    with pytest.raises((ValueError, TypeError), match=message):
        dk.unpaired_loss(**{**given, **change})


@pytest.mark.parametrize("name, more", CASES)
def test_weights_take_gradients(name: str, more: dict[str, Any]) -> None:
    """They were detached without a word; at a weight of 0 the gradient is the row's loss too."""
    pi = torch.randn(N, dtype=torch.float64)
    w = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    each = dk.unpaired_loss(pi, torch.zeros(N), DESIRABLE, loss_type=name, reduction="none", **more)
    out = dk.unpaired_loss(pi, torch.zeros(N), DESIRABLE, loss_type=name, weights=w, **more)
    (grad,) = torch.autograd.grad(out.loss, w)
    torch.testing.assert_close(grad, each.loss / N)
    ranks = {"loss_type": "plackett_luce", "num_completions": 2, "reference_free": True}
    b, w = batch(), w.detach()[:3].requires_grad_()
    each = dk.fused_dpo_loss(b["logits"], b["labels"], reduction="none", **ranks)
    out = dk.fused_dpo_loss(b["logits"], b["labels"], weights=w, **ranks)
    (grad,) = torch.autograd.grad(out.loss, w)
    torch.testing.assert_close(grad, each.loss.double() / 3)


def test_weights_of_rows_are_exact() -> None:
    """A weight that fp32 does not hold was rounded to it, in fp64 losses too."""
    pi = torch.randn(N, dtype=torch.float64)
    how = {"z": 0.1, "desirable_weight": 1.33, "undesirable_weight": 0.1, "reduction": "none"}
    out = dk.unpaired_loss(pi, torch.zeros(N), DESIRABLE, **how)
    wanted = literal("kto", pi, torch.zeros(N), 0.1, 0.1, (1.33, 0.1))
    torch.testing.assert_close(out.loss, wanted, rtol=1e-14, atol=0)


def of_no_pairs(linear: bool, ranked: bool, b: dict[str, Any], **given: Any) -> Any:
    if ranked:
        options = {"loss_type": "plackett_luce", "num_completions": 3, "beta": 0.4}
        function = dk.fused_linear_dpo_loss if linear else dk.fused_dpo_loss
    else:
        options = {"desirable": DESIRABLE, "z": 0.2, "beta": 0.4}
        function = dk.fused_linear_unpaired_loss if linear else dk.fused_unpaired_loss
    x = {k: b[k] for k in (("hidden", "weight") if linear else ("logits",))}
    return function(**x, **options, **given)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("ranked", [False, True])
def test_ref_logps_per_token(linear: bool, ranked: bool) -> None:
    """As the losses of pairs take them: what is not scored counts nothing, whatever it holds; it
    was added, and packed values were refused."""
    b = batch()
    labels, rows = b["labels"], torch.randn(N, T)
    rows[:, : T - 1][labels[:, 1:] == -100] = torch.nan
    sums = rows[:, :-1].nansum(1)
    wanted = of_no_pairs(linear, ranked, b, labels=labels, ref_logps=sums)
    got = of_no_pairs(linear, ranked, b, labels=labels, ref_logps=rows[:, :-1])
    torch.testing.assert_close(got.loss, wanted.loss)
    packed = {k: b[k].flatten(0, 1) for k in ("logits", "hidden", "labels")}
    packed |= {"weight": b["weight"]}
    place = {"labels": packed["labels"], "cu_seqlens": torch.arange(N + 1) * T}
    got = of_no_pairs(linear, ranked, packed, ref_logps=rows.flatten(), **place)
    torch.testing.assert_close(got.loss, wanted.loss)
    told = {"labels": labels, "ref_logps": sums, "ref_logps_per_token": True}
    with pytest.raises(ValueError, match="ref_logps must have shape"):
        of_no_pairs(linear, ranked, b, **told)
    with pytest.raises(ValueError, match="ref_logps must have shape"):
        of_no_pairs(linear, ranked, b, labels=labels, ref_logps=rows)


def test_packed_values_that_may_be_sums_are_refused() -> None:
    """C8: one row a sequence."""
    b = batch()
    x = {"logits": b["logits"][:, 0]}
    given = {"labels": b["labels"][:, -1], "cu_seqlens": torch.arange(N + 1), "shift": False}
    for ranked in (False, True):
        with pytest.raises(ValueError, match="say ref_logps_per_token"):
            of_no_pairs(False, ranked, x, ref_logps=torch.zeros(N), **given)
        of_no_pairs(False, ranked, x, ref_logps=torch.zeros(N), ref_logps_per_token=False, **given)


# --- plackett_luce ---


def ranked(scores: Tensor) -> Tensor:
    """[B] of scores [K, B], by permutations' probabilities."""
    total = torch.zeros(scores.shape[1], dtype=scores.dtype)
    for k in range(len(scores) - 1):
        total = total - (scores[k] - scores[k:].logsumexp(0))
    return total


@pytest.mark.parametrize("K", [2, 3, 6])
def test_plackett_luce(K: int) -> None:
    b = batch()
    mine, theirs = (b["logits"].clone().requires_grad_() for _ in range(2))
    options = {"loss_type": "plackett_luce", "num_completions": K, "beta": 0.4}
    out = dk.fused_dpo_loss(mine, b["labels"], b["ref"], **options)
    ratio = (sums(theirs, b["labels"]) - sums(b["ref"], b["labels"])).view(K, N // K)
    wanted = ranked(0.4 * ratio).mean()
    torch.testing.assert_close(out.loss, wanted)
    out.loss.backward()
    wanted.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(out.margins, 0.4 * (ratio[0] - ratio[-1]).detach())
    torch.testing.assert_close(out.chosen_logps, sums(theirs, b["labels"]).detach()[: N // K])
    assert out.accuracy.shape == (N // K,)
    linear = dk.fused_linear_dpo_loss(
        b["hidden"], b["weight"], b["labels"], ref_hidden=b["ref_hidden"], **options
    )
    both = [sums(b[h] @ b["weight"].T, b["labels"]) for h in ("hidden", "ref_hidden")]
    wanted = ranked(0.4 * (both[0] - both[1]).view(K, N // K)).mean()
    torch.testing.assert_close(linear.loss, wanted)


def test_plackett_luce_of_two_is_sigmoid() -> None:
    b = batch()
    pair = dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], loss_type="sigmoid")
    two = dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], loss_type="plackett_luce")
    for a, c in zip(pair, two, strict=True):
        torch.testing.assert_close(a, c)
    same = dk.fused_dpo_loss(
        b["logits"], b["labels"], b["ref"], loss_type="sigmoid", num_completions=2
    )
    assert torch.equal(same.loss, pair.loss)


def test_plackett_luce_takes_the_head_of_the_reference_without_the_adapter() -> None:
    """As pairs do: a reference without a head of its own has the policy's weight alone."""
    b = batch(dtype=torch.float32)
    r = 2
    lora = (torch.randn(r, H), torch.randn(V, r), 0.5)
    call = (b["hidden"], b["weight"], b["labels"])
    given = {"lora": lora, "ref_hidden": b["hidden"] + 0.1}
    ranked = dk.fused_linear_dpo_loss(*call, loss_type="plackett_luce", num_completions=2, **given)
    torch.testing.assert_close(ranked.loss, dk.fused_linear_dpo_loss(*call, **given).loss)


def test_plackett_luce_stats_and_reduction() -> None:
    b = batch()
    options = {"loss_type": ["plackett_luce"], "num_completions": 3, "stats": ("entropy",)}
    each = dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], reduction="none", **options)
    mean = dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], **options)
    assert each.loss.shape == (2,) and each.stats["entropy"].shape == (N, T - 1)
    torch.testing.assert_close(each.loss.mean(), mean.loss)
    weighted = dk.fused_dpo_loss(
        b["logits"], b["labels"], b["ref"], weights=torch.tensor([2.0, 0.0]), **options
    )
    torch.testing.assert_close(weighted.loss, each.loss[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_completions": 4}, "needs K B sequences"),
        ({"num_completions": 1}, "at least 2"),
        ({"num_completions": 2.0}, "num_completions must be an int"),
        ({"loss_type": ["plackett_luce", "sft"]}, "cannot be mixed"),
        ({"loss_type": "sigmoid", "num_completions": 3}, "num_completions=3 is of"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"drop_common_prefix": True}, "drop_common_prefix"),
        ({"ref_logits": None}, "exactly one reference"),
        ({"weights": torch.ones(6)}, "weights"),
        ({"weights": torch.tensor([1.0, torch.inf])}, "weights must be finite"),
        ({"num_pairs": -2}, "num_pairs must be a positive"),
    ],
)
def test_plackett_luce_wrong(options: dict[str, Any], message: str) -> None:
    b = batch()
    given = {"ref_logits": b["ref"], "loss_type": "plackett_luce", "num_completions": 3}
    with pytest.raises((ValueError, TypeError), match=message):
        dk.fused_dpo_loss(b["logits"], b["labels"], **{**given, **options})


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "plackett_luce"])
def test_pairs_say_where_the_others_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"use .*fused_"):
        dk.preference_loss(torch.zeros(2), torch.zeros(2), loss_type=name)


# --- labels of each pair ---


def soft(name: str, w: Tensor, l: Tensor, e: Tensor, beta: float) -> Tensor:
    """[B] by LOSSES: of a = log-ratio of the chosen, b of the rejected, p = 1 - e."""
    if name == "sigmoid":
        h = beta * (w - l)
        return -(1 - e) * torch.nn.functional.logsigmoid(h) - e * torch.nn.functional.logsigmoid(-h)
    return (w - (0.5 - e) / beta) ** 2 + (l + (0.5 - e) / beta) ** 2


@pytest.mark.parametrize("name", ["sigmoid", "sppo_soft"])
def test_soft_labels(name: str) -> None:
    """`label_smoothing` [B] = 1 - p: from log-probs, logits and hidden states."""
    b = batch()
    e = torch.tensor([0.0, 0.5, 0.2], dtype=torch.float64)
    options = {"loss_type": name, "label_smoothing": e, "beta": 0.3}
    logits = b["logits"].clone().requires_grad_()
    mine = b["logits"].clone().requires_grad_()
    ratio = sums(logits, b["labels"]) - sums(b["ref"], b["labels"])
    wanted = soft(name, ratio[:3], ratio[3:], e, 0.3).mean()
    out = dk.fused_dpo_loss(mine, b["labels"], b["ref"], **options)
    torch.testing.assert_close(out.loss, wanted)
    wanted.backward()
    out.loss.backward()
    torch.testing.assert_close(mine.grad, logits.grad)
    rho, pi = sums(b["ref"], b["labels"]), sums(b["logits"], b["labels"])
    pairs = dk.preference_loss(pi[:3], pi[3:], rho[:3], rho[3:], **options)
    torch.testing.assert_close(pairs.loss, wanted.detach())
    both = [sums(b[h] @ b["weight"].T, b["labels"]) for h in ("hidden", "ref_hidden")]
    ratio = both[0] - both[1]
    for budget in (None, 256):
        linear = dk.fused_linear_dpo_loss(
            b["hidden"].clone().requires_grad_(),
            b["weight"],
            b["labels"],
            ref_hidden=b["ref_hidden"],
            memory_budget=budget,
            **options,
        )
        torch.testing.assert_close(linear.loss, soft(name, ratio[:3], ratio[3:], e, 0.3).mean())
    one = {**options, "label_smoothing": 0.2}
    each = {**options, "label_smoothing": torch.full((3,), 0.2)}
    torch.testing.assert_close(
        dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], **one).loss,
        dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], **each).loss,
    )


def test_sppo_of_certain_labels_is_hard() -> None:
    b = batch()
    hard = dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], loss_type="sppo_hard")
    sure = dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], loss_type="sppo_soft")
    torch.testing.assert_close(hard.loss, sure.loss)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing": torch.full((3,), 0.6)}, r"label_smoothing must be in \[0, 0.5\]"),
        ({"label_smoothing": torch.zeros(2)}, "label_smoothing"),
        ({"label_smoothing": torch.zeros(3), "loss_type": "robust"}, "has no meaning for robust"),
        ({"label_smoothing": torch.zeros(3), "loss_type": "hinge"}, "has no meaning for hinge"),
        ({"label_smoothing": torch.zeros(3, requires_grad=True)}, "takes no gradient"),
        ({"offset": torch.zeros(3), "loss_type": "sppo_soft"}, "offset"),
    ],
)
def test_soft_labels_wrong(options: dict[str, Any], message: str) -> None:
    b = batch()
    with pytest.raises(ValueError, match=message):
        dk.fused_dpo_loss(b["logits"], b["labels"], b["ref"], **options)
