"""LOSSES.md's formulas in plain torch and float64, over full distributions: fuzz.py's oracle.

It shares no code with the package. Letters: `S` sequences, `B` pairs, `T` positions, `V`
vocabulary; `w`, `l` the chosen's and the rejected's log-probs, `rw`, `rl` the reference's.
"""

import torch
from torch.nn.functional import logsigmoid, softplus

IGNORE = -100
WIDE = torch.float64
SMOOTHED = {
    "sigmoid",
    "exo_pair",
    "robust",
    "aot",
    "aot_unpaired",
    "sigmoid_norm",
    "simpo",
    "cpo",
    "sppo_soft",
}
DIVERGENT = {
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
    "rpo",
}
SHIFTED = {
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sigmoid_norm",
    "ipo_sum",
    "odpo",
    "rdpo",
    "beta_dpo",
    "simpo",
    "cpo",
    "rpo",
    "sft",
}
FREE = {"simpo", "orpo", "cpo", "alphapo", "slic"}  # they have no reference
KL = {"tdpo1", "tdpo2"}
SORTED = {"aot", "aot_unpaired"}
OWN = {
    "discopop": {"discopop_tau": 0.2},
    "dpop": {"dpop_lambda": 5.0},
    "rdpo": {"rdpo_alpha": 0.1},
    "simpo": {"simpo_gamma": 0.8},
    "cpo": {"cpo_alpha": 0.7},
    "alphapo": {"alphapo_alpha": 0.3, "simpo_gamma": 0.8},
    "slic": {"slic_lambda": 0.4},
    "rpo": {"rpo_alpha": 0.6},
    "tdpo2": {"tdpo_alpha": 0.3},
    "beta_dpo": {"beta_dpo_alpha": 0.4, "beta_dpo_momentum": 0.7},
}
DEFAULTS = {
    "discopop_tau": 0.05,
    "dpop_lambda": 50.0,
    "rdpo_alpha": 0.01,
    "simpo_gamma": 0.5,
    "alphapo_alpha": 0.25,
    "cpo_alpha": 1.0,
    "slic_lambda": 0.1,
    "rpo_alpha": 1.0,
    "tdpo_alpha": 0.5,
    "beta_dpo_alpha": 0.6,
    "beta_dpo_momentum": 0.9,
}
NAMES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "sppo_soft",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "ipo_sum",
    "dpop",
    "odpo",
    "rdpo",
    "cal_dpo",
    "beta_dpo",
    "simpo",
    "alphapo",
    "cpo",
    "orpo",
    "slic",
    "rpo",
    "tdpo1",
    "tdpo2",
)


def pair_term(name, o, w, l, rw, rl, n_w, n_l, kl=None):
    """Loss of each pair without SFT parts, by LOSSES.md; w, l, rw, rl [B] log-probs."""
    b, e = o["beta"], o["label_smoothing"] if name in SMOOTHED else 0.0
    own = {k: o.get(k, v) for k, v in DEFAULTS.items()}
    u, v = (w, l) if name in FREE else (w - rw, l - rl)
    if name in DIVERGENT:
        u, v = divergence(u, o), divergence(v, o)
    m_w, m_l = u / n_w, v / n_l
    s, D, shift = torch.sigmoid, u - v, o["offset"]
    h = b * D - shift

    def cdpo(x):
        return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)

    def reward(m):
        al = own["alphapo_alpha"]
        return (1 - torch.exp(-al * m)) / al

    def odds(m):
        return m - torch.log(-torch.expm1(m.clamp(max=-1e-300)))

    if name == "beta_dpo":
        gap = D.detach()
        seen = (1 - own["beta_dpo_momentum"]) * gap.mean()
        b_batch = (b * (1 + own["beta_dpo_alpha"] * (gap.mean() - seen))).clamp(min=1e-3)
        return -logsigmoid(b_batch * D - shift)
    if name in KL:
        K_w, K_l = kl
        if name == "tdpo1":
            return -logsigmoid(b * (D - (K_l - K_w)))
        return -logsigmoid(b * (D - own["tdpo_alpha"] * (K_l - K_w.detach())))
    squares = (u - 1 / (2 * b)) ** 2 + (v + 1 / (2 * b)) ** 2
    tau = own["discopop_tau"]
    return {
        "sigmoid": lambda: cdpo(h),
        "odpo": lambda: cdpo(h),
        "rpo": lambda: cdpo(h),
        "cpo": lambda: cdpo(h),
        "hinge": lambda: torch.relu(1 - h),
        "ipo": lambda: (m_w - m_l - shift / b - 1 / (2 * b)) ** 2,
        "ipo_sum": lambda: (D - shift / b - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: (
            s(h) * (logsigmoid(h) - torch.log1p(torch.tensor(-e, dtype=WIDE)))
            + s(-h) * (logsigmoid(-h) - torch.log(torch.tensor(e, dtype=WIDE)))
        ),
        "robust": lambda: (-(1 - e) * logsigmoid(h) + e * logsigmoid(-h)) / (1 - 2 * e),
        "nca_pair": lambda: (
            -logsigmoid(b * u) - 0.5 * logsigmoid(-b * u) - 0.5 * logsigmoid(-b * v)
        ),
        "bco_pair": lambda: -logsigmoid(b * u) - logsigmoid(-b * v),
        "sppo_hard": lambda: squares,
        "sppo_soft": lambda: (u - (0.5 - e) / b) ** 2 + (v + (0.5 - e) / b) ** 2,
        "aot": lambda: cdpo(b * ((w - l).sort()[0] - (rw - rl).sort()[0])),
        "aot_unpaired": lambda: cdpo(b * (u.sort()[0] - v.sort()[0])),
        "apo_zero": lambda: 1 - s(b * u) + s(b * v),
        "apo_down": lambda: s(b * u) + 1 - s(b * D),
        "discopop": lambda: s(-h / tau) * softplus(-h) + s(h / tau) * torch.exp(-h),
        "sigmoid_norm": lambda: cdpo(b * (m_w - m_l) - shift),
        "dpop": lambda: -logsigmoid(b * (D - own["dpop_lambda"] * torch.relu(-u))),
        "rdpo": lambda: -logsigmoid(h + own["rdpo_alpha"] * (n_w0(o) - n_l0(o))),
        "cal_dpo": lambda: -logsigmoid(D) + 0.5 * squares,
        "simpo": lambda: cdpo(b * (m_w - m_l) - own["simpo_gamma"] - shift),
        "alphapo": lambda: cdpo(b * (reward(m_w) - reward(m_l)) - own["simpo_gamma"]),
        "orpo": lambda: -b * logsigmoid(odds(m_w) - odds(m_l)),
        "slic": lambda: torch.relu(b - w + l) - own["slic_lambda"] * w,
        "sft": lambda: torch.zeros_like(w),
    }[name]()


def n_w0(o):
    return o["counts"][0]


def n_l0(o):
    return o["counts"][1]


def divergence(u, o):
    kind, al = o["f_divergence_type"], o["f_alpha_divergence_coef"]
    if kind == "forward_kl":
        return 1 - torch.exp(-u)
    if kind == "js_divergence":
        return torch.log(torch.tensor(2.0, dtype=WIDE)) + logsigmoid(u)
    if kind == "alpha_divergence":
        return (torch.exp((al - 1) * u) - 1) / (al - 1)
    return u


def oracle_loss(o, w, l, rw, rl, counts, plain_w, wpo=None, kl=None):
    """Loss, rewards, from sums [B] in float64; `plain_w` the chosen's sums without LD weights."""
    B = w.shape[0]
    n_w, n_l = (c.clamp(min=1).to(WIDE) for c in counts)
    o = {**o, "counts": [c.to(WIDE) for c in counts]}
    names = o["names"]
    zero = torch.zeros_like(w)
    rw, rl = (zero, zero) if rw is None else (rw, rl)
    total, nll_weight = zero, torch.tensor(o["sft_weight"], dtype=WIDE)
    for name, weight in zip(names, o["loss_weights"], strict=True):
        term = pair_term(name, o, w, l, rw, rl, n_w, n_l, kl)
        total = total + weight * (term if wpo is None else term * wpo)
        nll = {
            "sft": 1.0,
            "orpo": 1.0,
            "cpo": o.get("cpo_alpha", 1.0),
            "rpo": o.get("rpo_alpha", 1.0),
        }.get(name, 0.0)
        if name == "sft" and wpo is not None:
            nll = wpo.mean()
        nll_weight = nll_weight + weight * nll
    tokens = o["num_chosen_tokens"] or counts[0].sum().clamp(min=1).to(WIDE)
    total = total * o["weights"]
    if o["reduction"] == "none":
        loss = total - nll_weight * plain_w * B / tokens
    else:
        loss = total.sum() / (o["num_pairs"] or B) - nll_weight * plain_w.sum() / tokens
    first = names[0]
    u, v = (w, l) if first in FREE else (w - rw, l - rl)
    if first in ("simpo", "alphapo", "orpo"):
        u, v = u / n_w, v / n_l
    if first == "alphapo":
        al = o.get("alphapo_alpha", 0.25)
        u, v = (1 - torch.exp(-al * u)) / al, (1 - torch.exp(-al * v)) / al
    return loss, (o["beta"] * u).detach(), (o["beta"] * v).detach()


def distributions(x, t):
    z = t["logit_scale"] * x
    if t["logit_softcap"]:
        z = t["logit_softcap"] * torch.tanh(z / t["logit_softcap"])
    z = z / t["temperature"]
    return z, z.log_softmax(-1)


def sequences(labels, lengths, shift):
    """Of each sequence: rows (indices into its own positions) that score, and their labels."""
    found = []
    for y, n in zip(labels, lengths, strict=True):
        rows = range(n - 1) if shift else range(n)
        found.append([(t, int(y[t + shift])) for t in rows if int(y[t + shift]) != IGNORE])
    return found


def token_values(logp, scored):
    """A list of [n] tensors: log-probs of the scored tokens of each sequence."""
    none = logp.sum() * 0
    return [
        torch.stack([logp[s, t, y] for t, y in rows]) if rows else none.expand(0)
        for s, rows in enumerate(scored)
    ]


def ld_sums(values, alpha):
    B = len(values) // 2
    sums = []
    for s, x in enumerate(values):
        shorter = min(len(x), len(values[(s + B) % (2 * B)]))
        tail = x[shorter:].sum() * (1.0 if alpha is None else alpha)
        sums.append(x[:shorter].sum() + tail)
    return torch.stack(sums)
