"""The table of losses: literal formulas in float64, slopes, stability, and what is refused."""

import math

import pytest
import torch
from oracle import pair_term
from torch.nn.functional import logsigmoid, softplus

import dpo_kernels as dk
from dpo_kernels.losses import ALIASES, TABLE, LossOptions

BACKENDS = ("torch", "cpu", "triton", "cuda")
BETA, E = 0.3, 0.1
N_W, N_L = torch.tensor([3, 7, 1, 4]), torch.tensor([5, 2, 6, 4])


def logps(seed=0, scale=3.0):
    g, device = torch.Generator().manual_seed(seed), torch.get_default_device()
    drawn = torch.randn(4, 4, dtype=torch.float64, generator=g, device="cpu")
    return [-20 + scale * x for x in drawn.to(device)]


def sig(x):
    return torch.sigmoid(x)


def cdpo(h, e):
    return -(1 - e) * logsigmoid(h) - e * logsigmoid(-h)


def literal(name, w, l, rw, rl, b=BETA, e=E, off=None):
    """Per-pair losses as the papers write them, without the terms and scores of the table."""
    u, v = w - rw, l - rl
    n_w, n_l = N_W.to(w.device), N_L.to(w.device)
    D, h, m_w, m_l = u - v, b * (u - v), w / n_w, l / n_l
    nll = -w * 4 / n_w.sum().double()  # spread over the pairs: its mean is the token mean
    smooth = {
        "sigmoid": lambda: cdpo(h, e),
        "robust": lambda: (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e),
        "exo_pair": lambda: (
            sig(h) * (logsigmoid(h) - math.log(1 - e)) + sig(-h) * (logsigmoid(-h) - math.log(e))
        ),
        "aot": lambda: cdpo(b * ((w - l).sort()[0] - (rw - rl).sort()[0]), e),
        "aot_unpaired": lambda: cdpo(b * (u.sort()[0] - v.sort()[0]), e),
        "sigmoid_norm": lambda: cdpo(b * (u / n_w - v / n_l), e),
        "simpo": lambda: cdpo(b * (m_w - m_l) - 0.5, e),
        "cpo": lambda: cdpo(b * (w - l), e) + nll,
    }
    if name in smooth:
        return smooth[name]()
    m = sig(h / 0.05)
    odds = (m_w - torch.log1p(-m_w.exp())) - (m_l - torch.log1p(-m_l.exp()))
    p_w, p_l = m_w.exp(), m_l.exp()
    others = {
        "hinge": lambda: torch.relu(1 - h),
        "ipo": lambda: (u / n_w - v / n_l - 1 / (2 * b)) ** 2,
        "ipo_sum": lambda: (D - 1 / (2 * b)) ** 2,
        "nca_pair": lambda: (
            -logsigmoid(b * u) - 0.5 * logsigmoid(-b * u) - 0.5 * logsigmoid(-b * v)
        ),
        "bco_pair": lambda: -logsigmoid(b * u) - logsigmoid(-b * v),
        "sppo_hard": lambda: (u - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2,
        "apo_zero": lambda: 1 - sig(b * u) + sig(b * v),
        "apo_down": lambda: sig(b * u) + 1 - sig(h),
        "discopop": lambda: (1 - m) * softplus(-h) + m * torch.exp(-h),
        "sft": lambda: nll,
        "dpop": lambda: -logsigmoid(b * (D - 50.0 * torch.relu(-u))),
        "odpo": lambda: -logsigmoid(h - off),
        "rdpo": lambda: -logsigmoid(h + 0.01 * (n_w - n_l).double()),
        "cal_dpo": lambda: -logsigmoid(D) + 0.5 * ((u - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2),
        "alphapo": lambda: (
            -logsigmoid(b * ((1 - p_w**-0.25) / 0.25 - (1 - p_l**-0.25) / 0.25) - 0.5)
        ),
        "orpo": lambda: nll - b * logsigmoid(odds),
        "slic": lambda: torch.relu(b - w + l) - 0.1 * w,
        "rpo": lambda: -logsigmoid(h) + nll,
    }
    if name in others:
        return others[name]()
    o = {
        "beta": b,
        "label_smoothing": e,
        "f_divergence_type": "reverse_kl",
        "offset": 0.0 if off is None else off,
        "counts": (n_w, n_l),
    }
    return pair_term(name, o, w, l, rw, rl, n_w, n_l)


def options_for(name):
    row = TABLE[name]
    options = {"loss_type": name, "beta": BETA}
    if row.smoothing is not None:
        options["label_smoothing"] = E
    if name == "odpo":
        options["offset"] = torch.tensor([0.1, 0.5, 0.0, 2.0], dtype=torch.float64)
    return options


def run(name, values, backend=None, **extra):
    w, l, rw, rl = values
    references = (rw, rl) if TABLE[ALIASES.get(name, name)].reference or name == "sft" else ()
    return dk.preference_loss(
        w,
        l,
        *references,
        chosen_lengths=N_W.to(w.device),
        rejected_lengths=N_L.to(w.device),
        backend=backend,
        **{**options_for(ALIASES.get(name, name)), **extra},
    )


# beta_dpo draws at random; the losses of a KL have no meaning on log-probs (test_tdpo.py).
LITERAL = [name for name, row in TABLE.items() if name != "beta_dpo" and not row.needs_kl]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LITERAL)
def test_values_and_gradients_of_the_papers_formulas(name, backend):
    # In fp64 the fused backends refuse what their kernels cannot read; [B] values they can.
    ours, theirs = ([x.clone().requires_grad_() for x in logps()] for _ in range(2))
    out = run(name, ours, backend, reduction="none")
    expected = literal(name, *theirs, off=options_for(name).get("offset"))
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    probe = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    (out.loss * probe).sum().backward()
    (expected * probe).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        want = torch.zeros(4, dtype=torch.float64) if other.grad is None else other.grad
        got = torch.zeros_like(want) if mine.grad is None else mine.grad
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LITERAL)
def test_slopes_in_beta_and_offset(name, backend):
    terms = TABLE[name].terms(
        LossOptions(label_smoothing=E if TABLE[name].smoothing is not None else 0.0)
    )
    values = logps(3)
    beta = torch.tensor([0.1, 0.5, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    offset = None
    if TABLE[name].takes_offset(terms):
        offset = torch.tensor([0.1, 0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)

    def f(beta, offset=None):
        extra = {} if offset is None else {"offset": offset}
        return run(name, values, backend, beta=beta, reduction="none", **extra).loss

    inputs = (beta,) if offset is None else (beta, offset)
    assert torch.autograd.gradcheck(f, inputs, check_undefined_grad=False)


@pytest.mark.parametrize(
    "name", ["sigmoid", "hinge", "robust", "discopop", "exo_pair", "sigmoid_norm", "ipo", "rpo"]
)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergences(name, kind):
    w, l, rw, rl = logps(4, 0.5)
    score = {
        "forward_kl": lambda r: 1 - torch.exp(-r),
        "js_divergence": lambda r: math.log(2) + logsigmoid(r),
        "alpha_divergence": lambda r: (torch.exp(-0.5 * r) - 1) / -0.5,
    }[kind]
    out = run(name, (w, l, rw, rl), f_divergence_type=kind, reduction="none")
    zero = torch.zeros_like(w)
    expected = literal(
        "sigmoid" if name == "rpo" else name,
        score(w - rw),
        score(l - rl),
        zero,
        zero,
        e=0.0 if name == "rpo" else E,
    )
    if name == "rpo":
        expected = expected - w * 4 / N_W.sum().double()
    torch.testing.assert_close(out.loss, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out.chosen_rewards, BETA * (w - rw))


def test_alpha_divergence_of_one_is_reverse_kl():
    values = logps()
    a = run("sigmoid", values, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    torch.testing.assert_close(a.loss, run("sigmoid", values).loss)


def test_aliases():
    values = logps()
    for alias, name in ALIASES.items():
        extra = {"loss_type": alias}
        assert run(name, values, **extra).loss == run(name, values).loss
    assert set(dk.losses.available()) == {*TABLE, *ALIASES}


def test_several_losses_are_a_weighted_sum():
    values = logps()
    mix = run(
        "sigmoid", values, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5]
    )
    parts = [
        run(n, values, label_smoothing=E if n == "sigmoid" else 0.0).loss
        for n in ("sigmoid", "bco_pair", "sft")
    ]
    torch.testing.assert_close(mix.loss, 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2])


def test_weights_normalisers_and_sft_weight():
    values = logps()
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    per_pair = run("hinge", values, reduction="none").loss
    nll = -values[0].sum() / N_W.sum()
    out = run("hinge", values, weights=weights, sft_weight=0.3)
    torch.testing.assert_close(out.loss, (weights * per_pair).sum() / 4 + 0.3 * nll)
    out = run("hinge", values, weights=weights, sft_weight=0.3, num_pairs=16, num_chosen_tokens=100)
    expected = (weights * per_pair).sum() / 16 - 0.3 * values[0].sum() / 100
    torch.testing.assert_close(out.loss, expected)
    spread = run("hinge", values, weights=weights, sft_weight=0.3, reduction="none").loss
    torch.testing.assert_close(spread.mean(), (weights * per_pair).sum() / 4 + 0.3 * nll)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_count_of_tokens_as_a_tensor_rounds_nothing(backend):
    """fp64 losses were rounded to the dtype of `num_chosen_tokens`: fp32."""
    values = logps()
    for kind in (torch.float32, torch.int64):
        out = run("sft", values, backend, num_chosen_tokens=torch.tensor(7, dtype=kind))
        wanted = run("sft", values, backend, num_chosen_tokens=7)
        torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-15, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_of_weight_zero_does_not_poison_the_batch(backend):
    w, l, rw, rl = (x.clone() for x in logps())
    w[1], l[1] = float("nan"), float("-inf")
    w.requires_grad_()
    out = run("sigmoid", (w, l, rw, rl), backend, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    out.loss.backward()
    assert out.loss.isfinite() and w.grad.isfinite().all() and w.grad[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_inputs_on_which_shipping_code_fails(backend, dtype):
    """LOSSES by name: (log-ratios or log-probs, options, the true loss; None: overflows to inf)."""

    def one(name, u, v, expected, lengths=(1, 1), **options):
        row = TABLE[name]
        chosen = torch.tensor([u], dtype=dtype, requires_grad=True)
        rejected = torch.tensor([v], dtype=dtype, requires_grad=True)
        zero = torch.zeros(1, dtype=dtype)
        reference = (zero, zero) if row.reference else ()
        n = [torch.tensor([x]) for x in lengths]
        out = dk.preference_loss(
            chosen,
            rejected,
            *reference,
            chosen_lengths=n[0],
            rejected_lengths=n[1],
            loss_type=name,
            backend=backend,
            **options,
        )
        out.loss.backward()
        assert not out.loss.isnan()
        assert not chosen.grad.isnan().any() and not rejected.grad.isnan().any()
        if expected is None:
            limit = float("inf") if dtype == torch.float32 else 1e40
            assert out.loss >= limit and chosen.grad < 0
        else:
            assert math.isclose(out.loss.item(), expected, rel_tol=1e-6, abs_tol=1e-12)
        return chosen.grad, rejected.grad

    one("discopop", -880.0, 0.0, 88.0)
    one("discopop", -890.0, 0.0, 89.0)
    one("discopop", -1e6, 0.0, 1e5)
    kl = {"f_divergence_type": "forward_kl"}
    for u in (-95.0, -800.0, -1e5):
        one("sigmoid", u, u, math.log(2), **kl)
    one("sigmoid", -800.0, -900.0, 0.0, **kl)  # ahead: the loss is 0, not log 2
    one("sigmoid", -200.0, 0.0, None, f_divergence_type="alpha_divergence")
    one("alphapo", -120.0, -130.0, 0.0, beta=1.0, alphapo_alpha=0.25)
    one("alphapo", -6000.0, -6000.0, math.log1p(math.exp(0.5)))
    sure = -1e-9 - math.log(1e-9)  # log-odds of exp(-1e-9)
    other = -1.0 - math.log(1 - math.exp(-1))
    grad, _ = one("orpo", -1e-9, -1.0, 1e-9 + 0.1 * math.log1p(math.exp(other - sure)))
    assert grad.abs() < 10
    one("orpo", 0.0, 0.0, 0.1 * math.log(2))
    for name in LITERAL:
        if TABLE[name].smoothing is False or name == "odpo":
            continue
        for u, v in ((0.0, 0.0), (1e4, -1e4), (-1e4, 1e4), (-1e4, -1e4)):
            chosen = torch.tensor([u - 2e4], dtype=dtype, requires_grad=True)
            rejected = torch.tensor([v - 2e4], dtype=dtype, requires_grad=True)
            base = torch.full((1,), -2e4, dtype=dtype)
            reference = (base, base) if TABLE[name].reference else ()
            ones = torch.ones(1)
            out = dk.preference_loss(
                chosen,
                rejected,
                *reference,
                chosen_lengths=ones,
                rejected_lengths=ones,
                loss_type=name,
                backend=backend,
            )
            out.loss.backward()
            grads = [x.grad for x in (chosen, rejected) if x.grad is not None]
            assert not out.loss.isnan() and not any(g.isnan().any() for g in grads), (name, u, v)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "orpo", "sigmoid_norm"])
def test_a_completion_without_tokens(name):
    logits = torch.randn(4, 5, 11, requires_grad=True)
    labels = torch.randint(0, 11, (4, 5))
    labels[0] = -100
    reference = {} if not TABLE[name].reference else {"ref_logps": torch.tensor([0.0, -9, -8, -7])}
    out = dk.fused_dpo_loss(logits, labels, loss_type=name, **reference)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad.isfinite().all()
    assert out.chosen_logps[0] == 0 and (logits.grad[0] == 0).all()


def test_step_zero_is_the_loss_at_zero():
    logits = torch.randn(6, 9, 50)
    labels = torch.randint(0, 50, (6, 9))
    out = dk.fused_dpo_loss(logits, labels, logits.clone())
    assert abs(out.loss.item() - math.log(2)) < 1e-7
    assert (out.chosen_rewards == 0).all() and (out.accuracy == 0).all()  # ties count 0


def test_beta_dpo():
    values = logps(6)
    D = (values[0] - values[2]) - (values[1] - values[3])
    state = torch.zeros(2, dtype=torch.float64)
    out = run("beta_dpo", values, beta_dpo_keep=1.0, beta_dpo_state=state)
    mean = 0.1 * D.mean()
    torch.testing.assert_close(state, torch.stack([mean, 0.1 * D.std()]))
    beta = max(BETA * (1 + 0.6 * (D.mean() - mean).item()), 1e-3)
    torch.testing.assert_close(out.loss, -logsigmoid(beta * D).mean())
    torch.testing.assert_close(out.margins, BETA * D)
    kept = run("beta_dpo", values, beta_dpo_keep=0.5, reduction="none").loss
    assert (kept != 0).sum() == 2
    loss = dk.FusedDPOLoss(loss_type="beta_dpo", reference_free=True)
    logits, labels = torch.randn(8, 4, 9), torch.randint(0, 9, (8, 4))
    loss(logits, labels)
    moved = loss.state.clone()
    assert (moved != 0).all() and "state" in loss.state_dict()
    loss.eval()(logits, labels)
    assert torch.equal(loss.state, moved)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss_type": "sigmoyd"}, ValueError, "did you mean 'sigmoid'"),
        ({"loss_type": 3}, TypeError, "loss_type"),
        ({"loss_type": []}, ValueError, "at least one loss"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, ValueError, "loss_weights"),
        ({"betta": 0.1}, TypeError, "did you mean 'beta'"),
        ({"beta": 0.0}, ValueError, "beta must be a positive"),
        ({"beta": float("nan")}, ValueError, "beta"),
        ({"beta": "0.1"}, TypeError, "beta"),
        ({"beta": torch.ones(3)}, ValueError, r"beta must have shape \[4\]"),
        ({"beta": torch.zeros(4)}, ValueError, "beta must be positive"),
        ({"label_smoothing": 0.5}, ValueError, r"\[0, 0.5\)"),
        ({"label_smoothing": -0.1}, ValueError, r"\[0, 0.5\)"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, ValueError, "robust"),
        ({"loss_type": "exo_pair"}, ValueError, r"\(0, 0.5\) for 'exo_pair'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, ValueError, "no meaning"),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, ValueError, "bco_pair"),
        ({"f_divergence_type": "kl"}, ValueError, "f_divergence_type must be one of"),
        ({"loss_type": "odpo"}, ValueError, "offset"),
        ({"loss_type": "nca_pair", "offset": torch.ones(4)}, ValueError, "not a function of D"),
        ({"loss_type": "aot", "offset": torch.ones(4)}, ValueError, "not a function of D"),
        ({"offset": torch.ones(2)}, ValueError, r"offset must have shape \[4\]"),
        ({"weights": torch.ones(5)}, ValueError, r"weights must have shape \[4\]"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"simpo_gamma": 1.0}, ValueError, "simpo_gamma=1.0 has no meaning for sigmoid"),
        ({"rpo_alpha": 1.0}, ValueError, "rpo_alpha=1.0 has no meaning for sigmoid"),  # default
        ({"loss_type": ["cpo", "dpop"], "slic_lambda": 0.1}, ValueError, "slic_lambda=0.1 has no"),
        ({"ld_alpha": 0.5}, ValueError, "ld_alpha needs per-token"),
        ({"ld_alpha": 0.0}, ValueError, "ld_alpha needs per-token"),
        ({"use_weighting": True}, ValueError, "use_weighting needs per-token"),
        ({"loss_type": "tdpo1"}, ValueError, "'tdpo1' needs the KL of reference and policy"),
        ({"loss_type": ["ipo", "tdpo2"]}, ValueError, "'tdpo2' needs the KL"),
        ({"tdpo_alpha": 0.3}, ValueError, "tdpo_alpha=0.3 has no meaning for sigmoid"),
        ({"reference_free": True}, ValueError, "reference_free=True"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, ValueError, "discopop_tau"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        dk.preference_loss(*logps(), chosen_lengths=N_W, rejected_lengths=N_L, **options)


def test_refused_without_lengths():
    for name in ("ipo", "sigmoid_norm", "simpo", "orpo", "sft", "cpo", "rdpo"):
        references = logps()[2:] if TABLE[name].reference else ()
        with pytest.raises(ValueError, match="lengths"):
            dk.preference_loss(*logps()[:2], *references, loss_type=name)
    with pytest.raises(ValueError, match="come together"):
        dk.preference_loss(*logps()[:3])
    with pytest.raises(ValueError, match="no pairs"):
        dk.preference_loss(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match=r"rejected_logps must have shape \[4\]"):
        dk.preference_loss(torch.zeros(4), torch.zeros(3))


@pytest.mark.parametrize("backend", ("cpu", "triton", "cuda"))
@pytest.mark.parametrize("B", (1, 127, 128, 129, 256))
def test_every_pair_of_a_batch_of_blocks(backend, B):
    """Around the kernels' blocks of 128 pairs: each pair is computed, and its own."""
    chosen, rejected = torch.randn(2, B) * 5
    call = {"beta": 0.3, "reduction": "none", "loss_type": "hinge"}
    loss = dk.preference_loss(chosen, rejected, backend=backend, **call).loss
    assert torch.allclose(loss, torch.relu(1 - 0.3 * (chosen - rejected)), atol=1e-6)
