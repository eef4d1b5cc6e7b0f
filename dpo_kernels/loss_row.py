"""What a row of the table of losses says: the terms of a loss, and what it needs.

With `u`, `v` the chosen and rejected scores (log-ratios log pi/pi_ref after a score map) and
`beta` the usual temperature, each loss of this package is

    loss(u, v) = sum_k w_k phi_k(z_k),     z_k = s_k (a_k u + b_k v) + c_k,     K <= 3,

where `s_k` is beta or 1. The scalar functions phi stand once per language (`backends/torch.py`,
`csrc/phi.h`, `backends/triton/pair_loss.py`). Letters: `B` pairs, `D = u - v`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .loss_options import LossOptions

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


Terms = tuple[Term, ...]


@dataclass(frozen=True)
class Loss:
    """A row of the table.

    `score` names the map from (log-ratio, length) to u and v:
    `ratio` the log-ratio; `mean` the log-ratio per scored token; `sort_margin` and `sort` sorted
    over the batch (AOT); `penalised` DPOP's u - lambda relu(-u); `odds` ORPO's log-odds; `power`
    AlphaPO's; `kl` the log-ratio plus `kl_weight` times K, the sum over the completion's scored
    tokens of KL(reference || policy) (TDPO): both models' distributions are needed, log-probs are
    not enough.
    `smoothing`: None if `label_smoothing` has no meaning, else whether 0 is allowed.
    `soft`: how the row takes `label_smoothing` of each pair [B]: `mix` the loss with its mirror
    image, `offset` through its own offset; None: not.
    `kl_weight`: name of the option (or a number) that weighs K; `kl_stops_chosen`: the chosen K
    is taken without its gradient.
    `sft`: name of the option (or a number) that weighs the NLL of the chosen, added to the row.
    `offset`: the offset of each pair [B], where it is more than the option `offset`: of the options
    and the scored tokens of chosen and rejected.
    `reference`: whether the loss is of log-ratios; `shows_reference`: whether its rewards are, all
    the same, where a reference is given.
    `adapts`: beta [B] and weights [B] of the pairs, from their margins u - v and the options.
    `state`: name of the option that holds what the loss keeps from batch to batch (`fresh_state`).
    `options`: the loss's own options; `requires`: options that must be given.
    """

    name: str
    terms: Callable[[LossOptions], Terms]
    formula: str
    paper: str
    score: str = "ratio"
    reference: bool = True
    smoothing: bool | None = None
    soft: str | None = None
    f_divergence: bool = False
    sft: str | float | None = None
    kl_weight: str | float = 1.0
    kl_stops_chosen: bool = False
    shows_reference: bool = False
    offset: Callable[[LossOptions, Tensor | None, Tensor | None], Tensor | None] | None = None
    adapts: Callable[[Tensor, LossOptions], tuple[Tensor, Tensor]] | None = None
    state: str | None = None
    options: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def own(self, o: LossOptions) -> LossOptions:
        """The options as this loss alone takes them: in a list the others' mean nothing to it.

        An f-divergence or an offset is refused for a list in which one loss does not take it, and
        the other options are read by the loss alone whose they are.
        """
        if isinstance(o.label_smoothing, Tensor):  # mixed in where the loss is made
            return o if self.soft == "offset" else o.but(label_smoothing=0.0)
        foreign = self.smoothing is None and o.label_smoothing != 0
        return o.but(label_smoothing=0.0) if foreign else o

    @property
    def needs_kl(self) -> bool:
        """Whether u and v need the KL of reference and policy over the whole vocabulary."""
        return self.score == "kl"

    @property
    def by_length(self) -> bool:
        """Whether u, v or the terms depend on how many tokens were scored."""
        own = self.offset is not None and self.soft != "offset"
        return self.score in ("mean", "odds", "power") or own

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
        return self.score in ("sort", "sort_margin") or self.adapts is not None

    @property
    def takes_reference(self) -> bool:
        """Whether a reference, where one is given, changes anything."""
        return self.reference or self.shows_reference

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
        return margin_only and self.score in ("ratio", "mean") and self.soft != "offset"
