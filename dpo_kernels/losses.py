"""The table of losses: every preference loss is a row, not a kernel.

With `u`, `v` the chosen and rejected scores (log-ratios log pi/pi_ref after a score map) and
`beta` the usual temperature, each loss of this package is

    loss(u, v) = sum_k w_k phi_k(z_k),     z_k = s_k (a_k u + b_k v) + c_k,     K <= 3,

where `s_k` is beta or 1. The heavy kernels never see the loss: they give log-probs forward and take
dloss/dlogp per sequence backward. A variant is added by one entry of `TABLE`; the scalar functions
phi stand once per language (`backends/torch.py`, `csrc/phi.h`, `backends/triton/pair_loss.py`).

Letters: `B` pairs, `e` label smoothing, `D = u - v`, `n_w`, `n_l` scored tokens of the completions.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import checks

# The scalar functions phi; the numbers are shared with csrc/phi.h.
SOFTPLUS, SIGMOID, SQUARE, RELU, EXO, DISCOPOP, IDENTITY = range(7)


@dataclass(frozen=True)
class Term:
    """One w * phi(z), z = s (a u + b v) + c, with s = beta if `scaled` else 1.

    c = c + c_beta beta + c_inv_beta / beta + c_offset offset (offset / beta if not `scaled`);
    w is multiplied by beta if `w_beta`; `p` is phi's own parameter (EXO's e, DISCOPOP's tau).
    """

    phi: int
    w: float
    a: float
    b: float
    scaled: bool = True
    c: float = 0.0
    c_beta: float = 0.0
    c_inv_beta: float = 0.0
    c_offset: float = 0.0
    w_beta: bool = False
    p: float = 0.0


@dataclass(frozen=True)
class LossOptions:
    """Every option a loss may take (`**loss_options` of the public functions), with its default.

    Names are those of TRL's `DPOConfig` wherever it has one.
    """

    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    beta: float | Tensor = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float | None = None
    use_weighting: bool = False
    offset: Tensor | None = None
    weights: Tensor | None = None
    sft_weight: float = 0.0
    reference_free: bool = False
    reduction: str = "mean"
    num_pairs: float | Tensor | None = None
    num_chosen_tokens: float | Tensor | None = None
    dpop_lambda: float = 50.0
    rdpo_alpha: float = 0.01
    beta_dpo_alpha: float = 0.6
    beta_dpo_momentum: float = 0.9
    beta_dpo_keep: float = 0.8
    beta_dpo_state: Tensor | None = None
    simpo_gamma: float = 0.5
    alphapo_alpha: float = 0.25
    cpo_alpha: float = 1.0
    slic_lambda: float = 0.1
    rpo_alpha: float = 1.0
    tdpo_alpha: float = 0.5

    def but(self, **changes: Any) -> LossOptions:
        """These options with some changed. Not `replace`: dynamo of torch 2.6 cannot trace it."""
        return LossOptions(**{name: getattr(self, name) for name in _DEFAULTS} | changes)


Terms = tuple[Term, ...]


@dataclass(frozen=True)
class Loss:
    """A row of the table.

    `score` names the map from (log-ratio, length) to u and v:
    `ratio` the log-ratio; `mean` the log-ratio per scored token; `sort_margin` and `sort` sorted
    over the batch (AOT); `dpop` u - lambda relu(-u); `odds` ORPO's log-odds; `alphapo`;
    `kl` the log-ratio plus `kl_weight` times K, the sum over the completion's scored tokens of
    KL(reference || policy) (TDPO): both models' distributions are needed, log-probs are not enough.
    `smoothing`: None if `label_smoothing` has no meaning, else whether 0 is allowed.
    `kl_weight`: name of the option (or a number) that weighs K; `kl_stops_chosen`: the chosen K
    is taken without its gradient.
    `sft`: name of the option (or a number) that weighs the NLL of the chosen, added to the row.
    `offset`: the offset of each pair [B], where it is more than the option `offset`: of the options
    and the scored tokens of chosen and rejected.
    `options`: the loss's own options.
    """

    name: str
    terms: Callable[[LossOptions], Terms]
    formula: str
    paper: str
    score: str = "ratio"
    reference: bool = True
    smoothing: bool | None = None
    f_divergence: bool = False
    sft: str | float | None = None
    kl_weight: str | float = 1.0
    kl_stops_chosen: bool = False
    offset: Callable[[LossOptions, Tensor | None, Tensor | None], Tensor] | None = None
    options: tuple[str, ...] = ()

    def own(self, o: LossOptions) -> LossOptions:
        """The options as this loss alone takes them: in a list the others' mean nothing to it.

        An f-divergence or an offset is refused for a list in which one loss does not take it, and
        the other options are read by the loss alone whose they are.
        """
        foreign = self.smoothing is None and o.label_smoothing != 0
        return o.but(label_smoothing=0.0) if foreign else o

    @property
    def needs_kl(self) -> bool:
        """Whether u and v need the KL of reference and policy over the whole vocabulary."""
        return self.score == "kl"

    @property
    def by_length(self) -> bool:
        """Whether u, v or the terms depend on how many tokens were scored."""
        return self.score in ("mean", "odds", "alphapo") or self.offset is not None

    @property
    def per_token(self) -> bool:
        """Whether u and v are log-ratios over the number of scored tokens."""
        return self.score == "mean"

    @property
    def closed(self) -> bool:
        """Whether u and v are the log-ratios, or those per token, of the pair alone."""
        plain = self.score in ("ratio", "mean") and self.sft is None
        return plain and not self.batch_coupled

    @property
    def batch_coupled(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the batch."""
        return self.score in ("sort", "sort_margin") or self.name == "beta_dpo"

    def cancels_common_tokens(self, terms: Terms, o: LossOptions) -> bool:
        """Whether tokens that both completions share, in the same context, leave loss and
        gradient unchanged: a function of sums over tokens, u - v, alone."""
        sft = getattr(o, self.sft) if isinstance(self.sft, str) else self.sft
        margin_only = bool(terms) and all(t.a == -t.b for t in terms)
        # A KL cancels like a log-ratio, unless the gradient goes through one side alone.
        cancels = self.score in ("ratio", "sort_margin", "kl") and not self.kl_stops_chosen
        return margin_only and cancels and not sft

    def takes_offset(self, terms: Terms) -> bool:
        """Whether every term is a function of the margin D alone."""
        margin_only = bool(terms) and all(t.a == -t.b for t in terms)
        return margin_only and self.score in ("ratio", "mean") and self.name != "cal_dpo"


def _logistic(e: float, scaled: bool = True, c: float = 0.0, w_beta: bool = False) -> Terms:
    """(1 - e) softplus(-h + c) + e softplus(h - c), h = s (u - v): the cDPO row."""
    yes = Term(SOFTPLUS, 1 - e, -1, 1, scaled, c=c, c_offset=1, w_beta=w_beta)
    no = Term(SOFTPLUS, e, 1, -1, scaled, c=-c, c_offset=-1, w_beta=w_beta)
    return (yes, no) if e else (yes,)


def _sigmoid(o: LossOptions) -> Terms:
    return _logistic(o.label_smoothing)


def _robust(o: LossOptions) -> Terms:
    e = o.label_smoothing
    yes, *no = _logistic(e)
    return (
        replace(yes, w=(1 - e) / (1 - 2 * e)),
        *(replace(t, w=-e / (1 - 2 * e)) for t in no),
    )


def _hinge(o: LossOptions) -> Terms:
    return (Term(RELU, 1, -1, 1, c=1, c_offset=1),)


def _ipo(o: LossOptions) -> Terms:
    return (Term(SQUARE, 1, 1, -1, scaled=False, c_inv_beta=-0.5, c_offset=-1),)


def _exo(o: LossOptions) -> Terms:
    return (Term(EXO, 1, 1, -1, c_offset=-1, p=o.label_smoothing),)


def _nca(o: LossOptions) -> Terms:
    return (
        Term(SOFTPLUS, 1, -1, 0),
        Term(SOFTPLUS, 0.5, 1, 0),
        Term(SOFTPLUS, 0.5, 0, 1),
    )


def _bco(o: LossOptions) -> Terms:
    return (Term(SOFTPLUS, 1, -1, 0), Term(SOFTPLUS, 1, 0, 1))


def _squares(w: float) -> Terms:
    """w [(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2]."""
    return (
        Term(SQUARE, w, 1, 0, scaled=False, c_inv_beta=-0.5),
        Term(SQUARE, w, 0, 1, scaled=False, c_inv_beta=0.5),
    )


def _apo_zero(o: LossOptions) -> Terms:
    return (Term(SIGMOID, 1, -1, 0), Term(SIGMOID, 1, 0, 1))


def _apo_down(o: LossOptions) -> Terms:
    return (Term(SIGMOID, 1, 1, 0), Term(SIGMOID, 1, -1, 1))


def _discopop(o: LossOptions) -> Terms:
    return (Term(DISCOPOP, 1, 1, -1, c_offset=-1, p=o.discopop_tau),)


def _length_offset(o: LossOptions, n_w: Tensor | None, n_l: Tensor | None) -> Tensor:
    assert n_w is not None and n_l is not None
    length = -o.rdpo_alpha * (n_w - n_l).double()
    return length if o.offset is None else o.offset + length


def _cal_dpo(o: LossOptions) -> Terms:
    return (*_logistic(0.0, scaled=False), *_squares(0.5))


def _simpo(o: LossOptions) -> Terms:
    return _logistic(o.label_smoothing, c=o.simpo_gamma)


def _orpo(o: LossOptions) -> Terms:
    return _logistic(0.0, scaled=False, w_beta=True)


def _slic(o: LossOptions) -> Terms:
    return (
        Term(RELU, 1, -1, 1, scaled=False, c_beta=1),
        Term(IDENTITY, o.slic_lambda, -1, 0, scaled=False),
    )


TABLE: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("sigmoid", _sigmoid, "-(1-e) log s(h) - e log s(-h), h = beta D", "2305.18290",
             smoothing=True, f_divergence=True),
        Loss("hinge", _hinge, "relu(1 - h)", "2309.06657", f_divergence=True),
        Loss("ipo", _ipo, "(u/n_w - v/n_l - 1/(2 beta))^2", "2310.12036",
             score="mean", f_divergence=True),
        Loss("exo_pair", _exo, "s(h) [log s(h) - log(1-e)] + s(-h) [log s(-h) - log e], e > 0",
             "2402.00856", smoothing=False, f_divergence=True),
        Loss("nca_pair", _nca, "-log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v)",
             "2402.05369"),
        Loss("robust", _robust, "[-(1-e) log s(h) + e log s(-h)] / (1 - 2e)", "2403.00409",
             smoothing=True, f_divergence=True),
        Loss("bco_pair", _bco, "-log s(beta u) - log s(-beta v)", "2404.04656"),
        Loss("sppo_hard", lambda o: _squares(1.0), "(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2",
             "2405.00675"),
        Loss("aot", _sigmoid, "cDPO of sort(pi_w - pi_l) - sort(ref_w - ref_l)", "2406.05882",
             score="sort_margin", smoothing=True),
        Loss("aot_unpaired", _sigmoid, "cDPO of sort(u) - sort(v)", "2406.05882",
             score="sort", smoothing=True),
        Loss("apo_zero", _apo_zero, "1 - s(beta u) + s(beta v)", "2408.06266"),
        Loss("apo_down", _apo_down, "s(beta u) + 1 - s(beta D)", "2408.06266"),
        Loss("discopop", _discopop, "(1-m)(-log s(h)) + m exp(-h), m = s(h/tau)", "2406.08414",
             f_divergence=True, options=("discopop_tau",)),
        Loss("sft", lambda o: (), "NLL of the chosen, mean over chosen tokens of the batch",
             "2305.18290", reference=False, f_divergence=True, sft=1.0),
        Loss("sigmoid_norm", _sigmoid, "cDPO of u/n_w - v/n_l", "2411.15124",
             score="mean", smoothing=True, f_divergence=True),
        Loss("ipo_sum", _ipo, "(D - 1/(2 beta))^2", "2310.12036"),
        Loss("dpop", _sigmoid, "-log s(beta (D - lambda relu(-u)))", "2402.13228",
             score="dpop", options=("dpop_lambda",)),
        Loss("odpo", _sigmoid, "-log s(h - offset)", "2402.10571"),
        Loss("rdpo", _sigmoid, "-log s(h + alpha (n_w - n_l))", "2403.19159",
             offset=_length_offset, options=("rdpo_alpha",)),
        Loss("cal_dpo", _cal_dpo, "-log s(D) + 1/2 [(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2]",
             "2412.14516"),
        Loss("beta_dpo", _sigmoid, "-log s(beta_b D) on the kept pairs, beta_b from the batch",
             "2407.08639", options=("beta_dpo_alpha", "beta_dpo_momentum", "beta_dpo_keep")),
        Loss("simpo", _simpo, "cDPO of m_w - m_l with margin gamma, m = logp per token",
             "2405.14734", score="mean", reference=False, smoothing=True,
             options=("simpo_gamma",)),
        Loss("alphapo", _simpo, "-log s(beta (r_w - r_l) - gamma), r = (1 - exp(-al m)) / al",
             "2501.03884", score="alphapo", reference=False,
             options=("alphapo_alpha", "simpo_gamma")),
        Loss("cpo", _sigmoid, "cDPO of pi_w - pi_l, + cpo_alpha NLL", "2401.08417",
             reference=False, smoothing=True, sft="cpo_alpha", options=("cpo_alpha",)),
        Loss("orpo", _orpo, "NLL - beta log s(log-odds ratio)", "2403.07691",
             score="odds", reference=False, sft=1.0),
        Loss("slic", _slic, "relu(beta - pi_w + pi_l) - lambda pi_w", "2305.10425",
             reference=False, options=("slic_lambda",)),
        Loss("rpo", _sigmoid, "sigmoid + rpo_alpha NLL", "2404.19733",
             f_divergence=True, sft="rpo_alpha", options=("rpo_alpha",)),
        Loss("tdpo1", _sigmoid, "-log s(beta (D - (K_l - K_w))), K = sum_t KL(ref, pi)",
             "2404.11999", score="kl"),
        Loss("tdpo2", _sigmoid, "-log s(beta (D - alpha (K_l - K_w))), K_w without gradient",
             "2404.11999", score="kl", kl_weight="tdpo_alpha", kl_stops_chosen=True,
             options=("tdpo_alpha",)),
    )
}  # fmt: skip

ALIASES = {"dpo": "sigmoid", "cdpo": "sigmoid", "dpo_norm": "sigmoid_norm",
           "aot_pair": "aot_unpaired"}  # fmt: skip

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_OWN_OPTIONS = sorted({name for loss in TABLE.values() for name in loss.options})
_DEFAULTS = {f.name: f.default for f in fields(LossOptions)}
# Options that may be tensors [B], and take gradients.
PER_PAIR = ("beta", "offset", "weights")
_TINY = 2.2250738585072014e-308  # the smallest fp64 with a finite inverse


def available() -> list[str]:
    """Names that `loss_type` takes, aliases included."""
    return [*TABLE, *ALIASES]


def get(name: str) -> Loss:
    """The row called `name`; `ValueError` with the nearest known name otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"loss_type must be a name or a list of names, got {type(name).__name__}")
    key = ALIASES.get(name, name)
    if key not in TABLE:
        near = difflib.get_close_matches(name, available(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"loss_type: unknown loss {name!r}{hint} Known: {', '.join(available())}")
    return TABLE[key]


def names_of(loss_type: object) -> list[str]:
    """`loss_type` as a list of names."""
    if isinstance(loss_type, str):
        return [loss_type]
    if not isinstance(loss_type, (list, tuple)):
        raise TypeError(
            f"loss_type must be a name or a list of names, got {type(loss_type).__name__}"
        )
    return list(loss_type)


def resolve(options: dict) -> tuple[LossOptions, list[tuple[Loss, float, Terms]]]:
    """Check `**loss_options`; the options and, per loss: its row, its weight, its terms.

    Raises `TypeError` for an unknown or wrongly typed option, `ValueError` for a wrong value.
    """
    checks.names(options, _DEFAULTS, "loss option")
    o = LossOptions(**options)
    losses = [get(name) for name in names_of(o.loss_type)]
    if not losses:
        raise ValueError("loss_type must name at least one loss, got an empty list")
    weights = [1.0] * len(losses) if o.loss_weights is None else o.loss_weights
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"loss_weights must be a list of numbers, got {type(weights).__name__}")
    for i, w in enumerate(weights):
        checks.number(f"loss_weights[{i}]", w)
    if len(weights) != len(losses):
        raise ValueError(
            f"loss_weights must have one weight for each of the {len(losses)} losses, "
            f"got {len(weights)}"
        )
    _check_numbers(o)
    _check_applies(o, losses)
    resolved = [
        (row, float(w), row.terms(row.own(o))) for row, w in zip(losses, weights, strict=True)
    ]
    for row, _, terms in resolved:
        if o.offset is not None and row.name != "sft" and not row.takes_offset(terms):
            raise ValueError(f"offset shifts beta * D; {row.name!r} is not a function of D alone")
        if row.name == "odpo" and o.offset is None:
            raise ValueError("odpo needs offset= of shape [B], got None")
    return o, resolved


def _check_numbers(o: LossOptions) -> None:
    def require(ok: bool, name: str, expected: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {expected}, got {checks.shown(getattr(o, name))}")

    for name in [*_OWN_OPTIONS, "label_smoothing", "sft_weight", "f_alpha_divergence_coef"]:
        checks.number(name, getattr(o, name))
    if not isinstance(o.beta, Tensor):
        x = checks.positive("beta", o.beta, "a positive finite number, or a tensor of such")
        require(x >= _TINY, "beta", "a positive number with a finite inverse")
    for name in ("use_weighting", "reference_free"):
        checks.flag(name, getattr(o, name))
    for name in ("num_pairs", "num_chosen_tokens"):
        if getattr(o, name) is not None:
            _check_count(name, getattr(o, name))
    _check_tensors(o)
    require(o.discopop_tau >= _TINY, "discopop_tau", "positive")
    checks.choice("f_divergence_type", o.f_divergence_type, F_DIVERGENCES)
    checks.choice("reduction", o.reduction, ("mean", "none"))
    require(0 < o.beta_dpo_keep <= 1, "beta_dpo_keep", "in (0, 1]")
    require(0 <= o.beta_dpo_momentum <= 1, "beta_dpo_momentum", "in [0, 1]")
    require(o.alphapo_alpha != 0, "alphapo_alpha", "other than 0 (at 0 it is simpo)")
    if o.ld_alpha is not None:
        checks.number("ld_alpha", o.ld_alpha, "None or a finite number")


def _check_count(name: str, value: object) -> None:
    """A normaliser: a positive number, or a tensor of one without dimensions."""
    expected = "a positive finite number, or a tensor [] of one"
    if not isinstance(value, Tensor):
        checks.positive(name, value, expected)
        return
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise ValueError(f"{name} must be {expected}, got {value.dtype}")
    checks.shape(name, checks.is_tensor(name, value), (), "one number")
    checks.values(name, value, lambda x: (x > 0) & x.isfinite(), expected)


def _check_tensors(o: LossOptions) -> None:
    """Types and values of what may come a pair; shapes and devices are known with the batch."""
    for name in PER_PAIR:
        value = getattr(o, name)
        if value is None or (name == "beta" and not isinstance(value, Tensor)):
            continue
        checks.floating(name, value)
        checks.values(name, value, torch.isfinite, "finite")
        if name == "beta":
            checks.values(name, value, lambda x: x.double() >= _TINY, "positive")
    if o.beta_dpo_state is not None:
        checks.floating("beta_dpo_state", o.beta_dpo_state)
        checks.shape("beta_dpo_state", o.beta_dpo_state, (2,), "mean and deviation")


def _check_applies(o: LossOptions, losses: list[Loss]) -> None:
    """An option that no chosen loss can use is an error, not silence."""
    names = ", ".join(row.name for row in losses)
    e = o.label_smoothing
    smoothed = [row for row in losses if row.smoothing is not None]
    if e and not smoothed:
        raise ValueError(f"label_smoothing={e} has no meaning for loss_type {names}")
    for row in smoothed:
        if not 0 <= e < 0.5 or (row.smoothing is False and e == 0):
            bracket = "[" if row.smoothing else "("
            raise ValueError(
                f"label_smoothing must be in {bracket}0, 0.5) for {row.name!r}, got {e!r}"
            )
    if o.f_divergence_type != "reverse_kl":
        for row in losses:
            if not row.f_divergence:
                raise ValueError(f"f_divergence_type={o.f_divergence_type!r} has no meaning for "
                                 f"{row.name!r}")  # fmt: skip
    if o.use_weighting:
        for row in losses:
            if row.score in ("sort", "sort_margin"):
                raise ValueError(f"use_weighting (WPO) cannot be combined with {row.name!r}")
    for row in losses:
        if row.needs_kl and o.reference_free:
            raise ValueError(
                f"{row.name!r} compares with a reference; reference_free=True has none"
            )
        if row.needs_kl and o.ld_alpha is not None:
            raise ValueError(f"ld_alpha weighs log-probs; it has no meaning for {row.name!r}")
    for option in _OWN_OPTIONS:
        used = any(option in row.options for row in losses)
        if not used and getattr(o, option) != _DEFAULTS[option]:
            raise ValueError(f"{option}={getattr(o, option)!r} has no meaning for {names}")


def table_markdown() -> str:
    """The losses as a Markdown table: docs/losses.md, by tools/readme_tables.py."""
    names = {v: [k for k, t in ALIASES.items() if t == v] for v in TABLE}
    lines = ["| `loss_type` | loss | own options (default) | paper |", "|---|---|---|---|"]
    for row in TABLE.values():
        alias = "".join(f", `{a}`" for a in names[row.name])
        own = ", ".join(f"`{n}={_DEFAULTS[n]}`" for n in row.options) or "-"
        if row.name == "odpo":
            own = "`offset` `[B]`, required"
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})"
        lines.append(f"| `{row.name}`{alias} | {row.formula} | {own} | {paper} |")
    return "\n".join(lines)
