"""The table of losses: every preference loss is a row, not a kernel.

The heavy kernels never see the loss: they give log-probs forward and take dloss/dlogp per sequence
backward. A loss is a sum of terms (`loss_row.py`), and a variant one entry of `TABLE`.

Letters: `B` pairs, `e` label smoothing, `D = u - v`, `n_w`, `n_l` scored tokens of the completions.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

import torch
from torch import Tensor

from .inputs import checks
from .loss_options import DEFAULTS as _DEFAULTS
from .loss_options import OPTIONS as OPTIONS
from .loss_options import OWN as OWN
from .loss_options import PER_PAIR as PER_PAIR
from .loss_options import LossOptions
from .loss_row import (
    DISCOPOP,
    EXO,
    IDENTITY,
    RELU,
    SIGMOID,
    SOFTPLUS,
    SQUARE,
    Loss,
    Term,
    Terms,
)
from .loss_values import check_applies, check_values


def _logistic(e: float, scaled: bool = True, c: float = 0.0, w_beta: bool = False) -> Terms:
    """(1 - e) softplus(-h + c) + e softplus(h - c), h = s (u - v): the cDPO row."""
    yes = Term(SOFTPLUS, 1 - e, -1, 1, scaled, c=c, c_offset=1, w_beta=w_beta)
    no = Term(SOFTPLUS, e, 1, -1, scaled, c=-c, c_offset=-1, w_beta=w_beta)
    return (yes, no) if e else (yes,)


def _smoothing(o: LossOptions) -> float:
    """`label_smoothing` as terms hold it; one of each pair is mixed in where the loss is made."""
    return 0.0 if isinstance(o.label_smoothing, Tensor) else o.label_smoothing


def _sigmoid(o: LossOptions) -> Terms:
    return _logistic(_smoothing(o))


def _robust(o: LossOptions) -> Terms:
    e = _smoothing(o)
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
    return (Term(EXO, 1, 1, -1, c_offset=-1, p=_smoothing(o)),)


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


def _soft_squares(o: LossOptions) -> Terms:
    """(u - (p - 1/2) / beta)^2 + (v + (p - 1/2) / beta)^2, p = 1 - e; of e [B] by the offset."""
    e = o.label_smoothing
    each, c = (1.0, 0.0) if isinstance(e, Tensor) else (0.0, 0.5 - e)
    return (
        Term(SQUARE, 1, 1, 0, scaled=False, c_inv_beta=-c, c_offset=-each),
        Term(SQUARE, 1, 0, 1, scaled=False, c_inv_beta=c, c_offset=each),
    )


def _half_minus(o: LossOptions, n_w: Tensor | None, n_l: Tensor | None) -> Tensor | None:
    e = o.label_smoothing
    return 0.5 - e.double() if isinstance(e, Tensor) else None


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


def _beta_dpo(margin: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    """beta of the batch [B] and weights [B] of the kept pairs (arXiv 2407.08639, section 4).

    The running mean and deviation of the margin (`beta_dpo_state` [2]; a fresh zero state if none)
    are updated first; pairs near the mean are kept by sampling without replacement (Gumbel top-k,
    which needs no host synchronisation), and beta follows the kept margins.
    """
    D = margin.detach()
    B = D.shape[0]
    state = o.beta_dpo_state
    state = torch.zeros(2, dtype=D.dtype, device=D.device) if state is None else state
    deviation = D.std() if B > 1 else torch.zeros_like(D[0])
    batch = torch.stack([D.mean(), deviation]).to(state.dtype)
    with torch.no_grad():
        state.copy_(o.beta_dpo_momentum * state + (1 - o.beta_dpo_momentum) * batch)
    mean, sd = state.to(D.dtype).unbind()
    z = torch.where(sd > 0, (D - mean) / sd, 0.0)
    keep = torch.ones_like(D)
    kept = max(1, int(B * o.beta_dpo_keep))
    if kept < B:
        gumbel = -torch.log(-torch.log(torch.rand_like(D).clamp(1e-12, 1 - 1e-12)))
        index = (gumbel - 0.5 * z * z).topk(kept).indices
        keep = torch.zeros_like(D).index_fill(0, index, 1.0)
    mean_kept = (D * keep).sum() / kept
    beta = o.beta * (1 + o.beta_dpo_alpha * (mean_kept - mean))
    return beta.clamp(min=1e-3).expand_as(D), keep * (B / kept)


def _cal_dpo(o: LossOptions) -> Terms:
    return (*_logistic(0.0, scaled=False), *_squares(0.5))


def _simpo(o: LossOptions) -> Terms:
    return _logistic(_smoothing(o), c=o.simpo_gamma)


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
        Loss(
            "sigmoid",
            _sigmoid,
            "-(1-e) log s(h) - e log s(-h), h = beta D",
            "2305.18290",
            smoothing=True,
            soft="mix",
            f_divergence=True,
        ),
        Loss("hinge", _hinge, "relu(1 - h)", "2309.06657", f_divergence=True),
        Loss(
            "ipo",
            _ipo,
            "(u/n_w - v/n_l - 1/(2 beta))^2",
            "2310.12036",
            score="mean",
            f_divergence=True,
        ),
        Loss(
            "exo_pair",
            _exo,
            "s(h) [log s(h) - log(1-e)] + s(-h) [log s(-h) - log e], e > 0",
            "2402.00856",
            smoothing=False,
            f_divergence=True,
        ),
        Loss(
            "nca_pair",
            _nca,
            "-log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v)",
            "2402.05369",
        ),
        Loss(
            "robust",
            _robust,
            "[-(1-e) log s(h) + e log s(-h)] / (1 - 2e)",
            "2403.00409",
            smoothing=True,
            f_divergence=True,
        ),
        Loss("bco_pair", _bco, "-log s(beta u) - log s(-beta v)", "2404.04656"),
        Loss(
            "sppo_hard",
            lambda o: _squares(1.0),
            "(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2",
            "2405.00675",
        ),
        Loss(
            "sppo_soft",
            _soft_squares,
            "(u - (p - 1/2)/beta)^2 + (v + (p - 1/2)/beta)^2, p = 1 - e",
            "2405.00675",
            smoothing=True,
            soft="offset",
            offset=_half_minus,
        ),
        Loss(
            "aot",
            _sigmoid,
            "cDPO of sort(pi_w - pi_l) - sort(ref_w - ref_l)",
            "2406.05882",
            score="sort_margin",
            smoothing=True,
        ),
        Loss(
            "aot_unpaired",
            _sigmoid,
            "cDPO of sort(u) - sort(v)",
            "2406.05882",
            score="sort",
            smoothing=True,
        ),
        Loss("apo_zero", _apo_zero, "1 - s(beta u) + s(beta v)", "2408.06266"),
        Loss("apo_down", _apo_down, "s(beta u) + 1 - s(beta D)", "2408.06266"),
        Loss(
            "discopop",
            _discopop,
            "(1-m)(-log s(h)) + m exp(-h), m = s(h/tau)",
            "2406.08414",
            f_divergence=True,
            options=("discopop_tau",),
        ),
        Loss(
            "sft",
            lambda o: (),
            "NLL of the chosen, mean over chosen tokens of the batch",
            "2305.18290",
            reference=False,
            shows_reference=True,
            f_divergence=True,
            sft=1.0,
        ),
        Loss(
            "sigmoid_norm",
            _sigmoid,
            "cDPO of u/n_w - v/n_l",
            "2411.15124",
            score="mean",
            smoothing=True,
            f_divergence=True,
        ),
        Loss("ipo_sum", _ipo, "(D - 1/(2 beta))^2", "2310.12036"),
        Loss(
            "dpop",
            _sigmoid,
            "-log s(beta (D - lambda relu(-u)))",
            "2402.13228",
            score="penalised",
            options=("dpop_lambda",),
        ),
        Loss("odpo", _sigmoid, "-log s(h - offset)", "2402.10571", requires=("offset",)),
        Loss(
            "rdpo",
            _sigmoid,
            "-log s(h + alpha (n_w - n_l))",
            "2403.19159",
            offset=_length_offset,
            options=("rdpo_alpha",),
        ),
        Loss(
            "cal_dpo",
            _cal_dpo,
            "-log s(D) + 1/2 [(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2]",
            "2412.14516",
        ),
        Loss(
            "beta_dpo",
            _sigmoid,
            "-log s(beta_b D) on the kept pairs, beta_b from the batch",
            "2407.08639",
            adapts=_beta_dpo,
            state="beta_dpo_state",
            options=("beta_dpo_alpha", "beta_dpo_momentum", "beta_dpo_keep"),
        ),
        Loss(
            "simpo",
            _simpo,
            "cDPO of m_w - m_l with margin gamma, m = logp per token",
            "2405.14734",
            score="mean",
            reference=False,
            smoothing=True,
            options=("simpo_gamma",),
        ),
        Loss(
            "alphapo",
            _simpo,
            "-log s(beta (r_w - r_l) - gamma), r = (1 - exp(-al m)) / al",
            "2501.03884",
            score="power",
            reference=False,
            options=("alphapo_alpha", "simpo_gamma"),
        ),
        Loss(
            "cpo",
            _sigmoid,
            "cDPO of pi_w - pi_l, + cpo_alpha NLL",
            "2401.08417",
            reference=False,
            smoothing=True,
            sft="cpo_alpha",
            options=("cpo_alpha",),
        ),
        Loss(
            "orpo",
            _orpo,
            "NLL - beta log s(log-odds ratio)",
            "2403.07691",
            score="odds",
            reference=False,
            sft=1.0,
        ),
        Loss(
            "slic",
            _slic,
            "relu(beta - pi_w + pi_l) - lambda pi_w",
            "2305.10425",
            reference=False,
            options=("slic_lambda",),
        ),
        Loss(
            "rpo",
            _sigmoid,
            "sigmoid + rpo_alpha NLL",
            "2404.19733",
            f_divergence=True,
            sft="rpo_alpha",
            options=("rpo_alpha",),
        ),
        Loss(
            "tdpo1",
            _sigmoid,
            "-log s(beta (D - (K_l - K_w))), K = sum_t KL(ref, pi)",
            "2404.11999",
            score="kl",
        ),
        Loss(
            "tdpo2",
            _sigmoid,
            "-log s(beta (D - alpha (K_l - K_w))), K_w without gradient",
            "2404.11999",
            score="kl",
            kl_weight="tdpo_alpha",
            kl_stops_chosen=True,
            options=("tdpo_alpha",),
        ),
    )
}

ALIASES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "aot_pair": "aot_unpaired",
}


# Losses that are of no pairs, and who has them. Of single completions: whether the loss has a z.
_BASELINE = {"kto": True, "apo_zero_unpaired": False}
UNPAIRED = tuple(_BASELINE)
LISTWISE = "plackett_luce"
ELSEWHERE = {
    **dict.fromkeys(UNPAIRED, "is of single completions: use unpaired_loss or fused_unpaired_loss"),
    LISTWISE: "ranks K completions of a prompt: use fused_dpo_loss or "
    "fused_linear_dpo_loss with num_completions=K, and no other loss beside it",
}


def available() -> list[str]:
    """Names that `loss_type` takes of pairs, aliases included (the others: `ELSEWHERE`)."""
    return [*TABLE, *ALIASES]


def rows_for(loss_type: object) -> str:
    """What a loss is of: "pairs", "unpaired" (single completions) or "ranked" (lists of K)."""
    names, apart = names_of(loss_type), of_no_pairs(loss_type)
    if not apart:
        return "pairs"
    if len(names) > 1:
        raise ValueError(f"{apart[0]!r} cannot be mixed with other losses, got {names}")
    return "unpaired" if apart[0] in UNPAIRED else "ranked"


def of_no_pairs(loss_type: object) -> list[str]:
    """The names in `loss_type` of losses that are not of pairs."""
    return [name for name in names_of(loss_type) if name in [*ELSEWHERE]]


def has_baseline(loss_type: object) -> bool:
    """Whether `loss_type` compares single completions with a z of the whole step."""
    return any(_BASELINE.get(name, False) for name in names_of(loss_type))


def is_listwise(options: dict) -> bool:
    """Whether these loss options ask for lists of K; `num_completions=2` of pairs is taken out."""
    name = options.get("loss_type")
    listed = [name] if isinstance(name, str) else name
    listed = list(listed) if isinstance(listed, (list, tuple)) else []
    if LISTWISE in listed and len(listed) > 1:
        raise ValueError(f"{LISTWISE!r} cannot be mixed with other losses, got {listed}")
    if listed == [LISTWISE]:
        return True
    if (K := options.pop("num_completions", 2)) != 2:
        raise ValueError(f"num_completions={K} is of {LISTWISE!r} alone")
    return False


def get(name: str) -> Loss:
    """The row called `name`; `ValueError` with the nearest known name otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"loss_type must be a name or a list of names, got {type(name).__name__}")
    key = ALIASES.get(name, name)
    if key not in TABLE:
        if name in ELSEWHERE:
            raise ValueError(f"loss_type: {name!r} {ELSEWHERE[name]}")
        near = difflib.get_close_matches(name, available(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"loss_type: unknown loss {name!r}{hint} Known: {', '.join(available())}")
    return TABLE[key]


def rows_of(loss_type: object) -> list[Loss]:
    """The rows of `loss_type`, a name or a list of names."""
    return [get(name) for name in names_of(loss_type)]


def requires(loss_type: object) -> set[str]:
    """The options that must be given for `loss_type`, some of them with each batch."""
    return {name for row in rows_of(loss_type) for name in row.requires}


def takes_reference(loss_type: object) -> bool:
    """Whether a reference, where one is given, changes a number of `loss_type`."""
    return any(row.takes_reference for row in rows_of(loss_type))


def fresh_state(loss_type: object) -> dict[str, Tensor]:
    """What `loss_type` keeps from batch to batch, as it begins: options by name. A call updates
    them; give a copy where nothing must be learned (evaluation)."""
    kept = {row.state for row in rows_of(loss_type) if row.state is not None}
    # Running mean and deviation of the margin.
    return {name: torch.zeros(2, dtype=torch.float64) for name in sorted(kept)}


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
    check_values(o)
    check_applies(o, losses, options)
    resolved = [
        (row, float(w), row.terms(row.own(o))) for row, w in zip(losses, weights, strict=True)
    ]
    for row, _, terms in resolved:
        if o.offset is not None and terms and not row.takes_offset(terms):
            raise ValueError(f"offset shifts beta * D; {row.name!r} is not a function of D alone")
        for name in row.requires:
            if getattr(o, name) is None:
                raise ValueError(f"{row.name} needs {name}= of shape [B], got None")
    return o, resolved
