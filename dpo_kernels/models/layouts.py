"""Layouts under a causal LM: padded batches in, segments inside, states back where they were.

Our own batches (`data.batches`) are laid out already; `trunk_states` runs them. Under a trainer
that knows nothing of layouts a padded batch [chosen; rejected] comes in: `lay_out` finds the real
tokens of its rows and the common start of rows i and B + i from the ids, the trunk runs over one
packed row, and `put_back` gives states [2B, T, H].

A model that cannot take segments (`unusable`) gets padded rows: `auto` says why once, a layout
asked for by name is a `ValueError`.

Letters: `B` pairs, `R` rows, `T` positions, `H` hidden size, `n` real tokens.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import ScoredBatch, Sharing, TokenPair, TrunkCall, make_batch
from ..data.batches import CPU_CALL_TOKENS, WORTH, layout_name
from ..data.segments import Segment, Segments
from ..inputs.transfer import to_device
from .experts import router_loss_weight
from .segment_attention import SegmentError, install, segment_forward, uninstall
from .structure import base_model_of, deterministic, probe_ids, text_config, trunk_of
from .versions import transformers_before

logger = logging.getLogger("dpo_kernels.layouts")


@dataclass
class Known:
    """What has been found out about one model."""

    unusable: str | None = None  # why it takes padded rows; empty: it does not; None: not asked
    positions: str = ""  # `_positions_behind_padding`
    ratio: float | None = None  # `attention_ratio`
    checked: bool = False  # the first batch has been compared
    report: str = ""  # expected and measured saving of that batch
    told: set[str] = field(default_factory=set)

    def tell(self, text: str, say: Callable[[str], None] | None = None) -> None:
        """Once: to `say`, or as a warning of the logger."""
        if text not in self.told:
            self.told.add(text)
            (say or logger.warning)(text)


_KNOWN: weakref.WeakKeyDictionary[Any, Known] = weakref.WeakKeyDictionary()


def known(model: Any) -> Known:
    return _KNOWN.setdefault(model, Known())


def layout_report(model: nn.Module) -> str:
    """Expected and measured saving of the first batch that `model` was given; empty before it."""
    return known(base_model_of(model)).report


def attention_ratio(model: Any) -> float:
    """Cost of one attention entry over that of one token, as `data.Sharing` wants it."""
    state = known(model)
    if state.ratio is not None:
        return state.ratio
    trunk, embedding = trunk_of(model), model.get_input_embeddings()
    body = sum(p.numel() for p in trunk.parameters() if p.dim() == 2)
    if embedding is not None:
        body -= embedding.weight.numel()
    config = text_config(model.config)
    state.ratio = 2 * config.hidden_size * config.num_hidden_layers / max(body, 1)
    return state.ratio


# --- which models ---

_RECURRENT = ("linear_attention", "recurrent", "mamba", "conv", "hybrid")
_PROBE_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError)
# How far, relative to the largest, a hidden state may lie from that of the other layout.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF_TOLERANCE = 0.05


def unusable(model: Any) -> str:
    """Why a causal LM cannot take segments; empty if it can, and then it has been prepared.

    Its own attention is compared on one short pair: what a mask says with what attention receives,
    the number of calls, and the states. That also finds recurrent and ALiBi models.
    """
    state = known(model)
    if state.unusable is None:
        state.unusable = _why_not(model)
        if state.unusable:
            uninstall(model)
    return state.unusable


def _why_not(model: Any) -> str:
    kinds = getattr(text_config(model.config), "layer_types", None) or ()
    states = [kind for kind in sorted(set(kinds)) if any(name in kind for name in _RECURRENT)]
    if states:
        return f"layers of type {', '.join(states)} keep a state that cannot fork"
    if getattr(text_config(model.config), "alibi", False):
        return "ALiBi counts positions of the row"
    return install(model) or _differs(model) or _positions_behind_padding(model)


@torch.no_grad()
def _positions_behind_padding(model: Any) -> str:
    """Notes what the model takes for positions of a row that is padded on the left, if it is told
    none: "columns", or the "tokens" that its mask counts (OPT, BioGPT); "" if neither. Asked with
    the rest of the model, by all ranks at once. Never a reason to stay padded."""
    trunk, weight = trunk_of(model), model.get_input_embeddings().weight
    n, pads = 9, 4
    ids = torch.tensor([probe_ids(weight.shape[0], n)], device=weight.device)
    columns = torch.arange(n, device=ids.device)[None]
    apart = {}
    with deterministic(model), torch.compiler.set_stance("force_eager"):
        try:
            mask = (torch.arange(n + pads, device=ids.device) >= pads).long()[None]
            row = torch.cat([ids[:, :1].expand(1, pads), ids], 1)
            asked = trunk(input_ids=row, attention_mask=mask, use_cache=False)
            states = asked.last_hidden_state[:, pads:]
            for name, positions in (("columns", columns + pads), ("tokens", columns)):
                call = TrunkCall(ids, positions, _one(n), [n])
                apart[name] = _apart(states, run_call(model, trunk, call).last_hidden_state)
        except _PROBE_ERRORS:
            return ""
    near = min(apart, key=lambda name: apart[name])
    if apart[near] <= _TOLERANCE.get(states.dtype, _HALF_TOLERANCE):
        known(model).positions = near
    return ""


def _apart(states: Tensor, others: Tensor) -> float:
    """How far they are apart, relative to the largest."""
    return float((states - others).abs().max() / states.abs().max())


@torch.no_grad()
def _differs(model: Any) -> str:
    trunk, weight = trunk_of(model), model.get_input_embeddings().weight
    ids = tuple(probe_ids(weight.shape[0], 14))
    pair = TokenPair(ids[:5], ids[5:8], ids[8:14], "probe")
    states = []
    # Traced, a mask could not be compared, and shapes of a probe would be compiled for nothing.
    with deterministic(model), torch.compiler.set_stance("force_eager"):
        try:
            row = torch.tensor([ids], device=weight.device)
            alone = TrunkCall(row, torch.arange(14, device=row.device)[None], _one(14), [14])
            # transformers before 5 takes every row without a 2-D mask for a packed one, whose mask
            # cannot be asked beyond it.
            whole = {"attention_mask": torch.ones_like(row)} if transformers_before(5) else {}
            run_call(model, trunk, alone, comparing=True, **whole)
            for mode in ("padded", "shared"):
                batch = make_batch([pair], Sharing(mode), 0).to(weight.device)
                states.append(trunk_states(model, trunk, batch))
        except SegmentError as error:
            return str(error)
        except _PROBE_ERRORS as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            return f"{type(model).__name__} does not take segments ({first})"
    worst = _apart(*states)
    if not worst <= _TOLERANCE.get(states[0].dtype, _HALF_TOLERANCE):
        return f"the model's states differ under segments (relative {worst:.2g})"
    return ""


def _one(length: int) -> Segments:
    return Segments([Segment(length)])


def choose_sharing(model: Any, layout: str, say: Callable[[str], None]) -> Sharing:
    """How pairs are laid out for this model; `ValueError` where the layout named cannot be.

    "auto" says why a model stays with padded rows, or with prompts that are not shared.
    """
    weight = model.get_input_embeddings().weight
    calls = CPU_CALL_TOKENS if weight.device.type == "cpu" else None
    padded = Sharing("padded", call_tokens=calls)
    mode = layout_name(layout)
    if mode == "padded":
        return padded
    named = "layout=shared (batch_layout=prefix)" if mode == "shared" else f"layout={mode}"
    reason = unusable(model)
    if reason and mode != "auto":
        raise ValueError(f"{named}: {reason}; use padded or auto")
    if reason:
        known(model).tell(f"layout: padded rows, because {reason}", say)
        return padded
    router = bool(router_loss_weight(model))
    if router and mode == "shared":
        raise ValueError(f"{named}: {_ROUTED_ONCE}; use packed or auto")
    if router and mode == "auto":
        known(model).tell(f"layout: prompts are not shared, because {_ROUTED_ONCE}", say)
    return Sharing(mode, attention_ratio(model), calls, may_share=not router)


_ROUTED_ONCE = (
    "a shared prompt is routed once, which changes the load-balancing (auxiliary loss) of a "
    "mixture of experts"
)


# --- batches of our own ---


def run_call(model: Any, trunk: Any, call: TrunkCall, comparing: bool = False, **extra: Any) -> Any:
    """The trunk's output for one call; `SegmentError` if attention was not by segment."""
    if call.segments is None:
        # Without position_ids and mask a plain row is causal: right padding changes nothing.
        return trunk(input_ids=call.input_ids, use_cache=False, **extra)
    with segment_forward(comparing) as seen:
        output = trunk(
            input_ids=call.input_ids,
            position_ids=call.position_ids,
            segments=call.segments,
            use_cache=False,
            **extra,
        )
    seen.check(model)
    return output


def trunk_states(
    model: Any,
    trunk: nn.Module,
    batch: ScoredBatch,
    router: list[tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """[N, H] hidden states that predict the scored tokens of `batch`.

    `router` gets each call's router logits, a tensor [tokens, experts] for each layer of experts.
    """
    states = []
    for call in batch.calls:
        extra = {} if router is None else {"output_router_logits": True}
        output = run_call(model, trunk, call, **extra)
        if router is not None and (layers := getattr(output, "router_logits", None)):
            router.append(tuple(layer.flatten(0, -2) for layer in layers))
        states.append(output.last_hidden_state.flatten(0, 1))
    return (states[0] if len(states) == 1 else torch.cat(states)).index_select(0, batch.rows)


# --- padded batches of a trainer ---

_TAKEN = {"input_ids", "attention_mask", "position_ids", "use_cache", "output_router_logits"}
_TAKEN |= {"return_dict"}


class LaidOut(NamedTuple):
    """A padded batch as one packed row, and the way back."""

    call: TrunkCall
    mode: str  # "packed" or "shared"
    real: Tensor  # [n] flat places of the real tokens in the padded batch
    places: Tensor  # [n] their places in the packed row
    shape: tuple[int, int]  # [R, T]
    shared: list[int]  # common start of rows i and B + i; empty for an odd number of rows

    def put_back(self, states: Tensor) -> Tensor:
        """[R, T, H], 0 at padding, from [1, tokens, H]."""
        R, T = self.shape
        out = states.new_zeros(R * T, states.shape[-1])
        out = out.index_copy(0, self.real, states[0].index_select(0, self.places))
        return out.view(R, T, -1)


class _Stays(Exception):
    """Why a batch stays padded."""


@torch.compiler.disable
def lay_out(
    model: Any, kwargs: dict[str, Any], layout: str, router: bool, labels: Tensor | None = None
) -> LaidOut | None:
    """The batch that a trainer's `kwargs` of the model hold, laid out; None: as it is.

    `labels` [R, T], where they are scored. `ValueError` for a layout asked for by name that this
    model or batch cannot have.
    """
    if layout == "padded":
        return None
    try:
        _look_at(kwargs)
        if layout == "auto" and model.get_input_embeddings().weight.dtype == torch.float64:
            # Norms and softmax go through float32 there, and show in which order sums are taken.
            raise _Stays("float64 is for comparing with other programs to the last digits")
        if _has_neftune(model):
            raise _Stays("NEFTune scales its noise by the length of the row that it is given")
        reason = unusable(model)
        if reason:
            raise _Stays(reason)
        if router and layout == "shared":
            raise _Stays(_ROUTED_ONCE)
        return _laid_out(model, kwargs, layout, router, labels)
    except _Stays as error:
        if layout != "auto":
            raise ValueError(
                f"layout={layout} (share_prefix): {error}; use layout='padded' or 'auto'"
            ) from None
        known(model).tell(f"layout: padded rows, because {error}")
        return None


def _has_neftune(model: Any) -> bool:
    """Whether transformers' hook, or one of its kind, puts noise on the embeddings."""
    embedding = model.get_input_embeddings()
    return embedding.training and bool(getattr(embedding, "neftune_noise_alpha", None))


def _look_at(kwargs: dict[str, Any]) -> None:
    """`_Stays` for what cannot be gathered token by token: images, embeddings, a cache."""
    ids = kwargs.get("input_ids")
    extra = {k for k, v in kwargs.items() if v is not None and v is not False} - _TAKEN
    if ids is None or ids.dim() != 2 or extra:
        got = ", ".join(sorted(extra)) or "no input_ids"
        raise _Stays(f"layouts take input_ids and attention_mask alone, got {got}")
    positions = kwargs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise _Stays(f"position_ids have {positions.dim()} dimensions")


def _laid_out(
    model: Any, kwargs: dict[str, Any], layout: str, router: bool, labels: Tensor | None
) -> LaidOut | None:
    ids: Tensor = kwargs["input_ids"]
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    R, T = ids.shape
    starts, lengths, common = _rows(ids, mask, positions, labels)
    counted = known(model).positions == "tokens"
    if positions is None and any(starts) and not known(model).positions:
        raise _Stays("it is padded on the left, and which positions the model takes is not known")
    ratio = attention_ratio(model)
    sharing = Sharing(layout, ratio, None, may_share=not router)
    B = R // 2 if common else 0
    shared = [L if sharing.shares(L, lengths[B + i]) else 0 for i, L in enumerate(common)]
    order = [r for i in range(B) for r in (i, B + i)] if B else list(range(R))
    parts = []
    for at, r in enumerate(order):
        L = shared[r - B] if B and r >= B else 0
        parts.append(Segment(lengths[r] - L, at - 1 if L else -1, L))
    segments = Segments(parts)
    if layout == "auto":
        # A padded row under a mask pays for all of its entries, hidden or not.
        padded = sharing.cost(R * T, R * T * T * (0.5 if mask is None else 1.0))
        if sharing.cost(sum(segments.lengths), segments.entries()) > (1 - WORTH) * padded:
            return None
    source: list[Tensor] = []
    real: list[Tensor] = []
    places: list[Tensor] = []
    began: dict[int, int] = {}
    at = 0
    for r, part in zip(order, parts, strict=True):
        begin = r * T + starts[r]
        row = torch.arange(begin, begin + lengths[r])
        source.append(row[part.prefix :])
        real.append(row)
        own = torch.arange(at, at + part.length)
        if part.prefix:
            first = began[r - B]
            places += [torch.arange(first, first + part.prefix), own]
        else:
            places.append(own)
        began[r] = at
        at += part.length
    taken = to_device(torch.cat(source), ids.device)
    row_ids = ids.reshape(-1)[taken][None]
    # What the model would have taken for positions.
    if positions is None:
        behind = torch.tensor(starts) if counted else torch.zeros(R, dtype=torch.int64)
        row_positions = (taken % T - to_device(behind, ids.device)[taken // T])[None]
    else:
        row_positions = positions.expand(R, T).reshape(-1)[taken][None]
    segments.bounds(ids.device)
    return LaidOut(
        TrunkCall(row_ids, row_positions, segments, [at]),
        "shared" if any(part.prefix for part in parts) else "packed",
        to_device(torch.cat(real), ids.device),
        to_device(torch.cat(places), ids.device),
        (R, T),
        common,
    )


def _rows(
    ids: Tensor, mask: Tensor | None, positions: Tensor | None, labels: Tensor | None
) -> tuple[list[int], list[int], list[int]]:
    """(first column, tokens) of each row, and the common start of rows i and B + i: one wait."""
    R, T = ids.shape
    columns = torch.arange(T, device=ids.device)
    if mask is not None and mask.shape != ids.shape:
        raise _Stays(f"an attention_mask of shape {list(mask.shape)}")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = real.sum(-1)
    starts = real.int().argmax(-1)
    inside = (columns >= starts[:, None]) & (columns < (starts + lengths)[:, None])
    bad = (inside != real).any() | (lengths == 0).any()
    if positions is not None:
        positions = positions.expand(R, T)
        bad |= ((positions.diff(dim=-1) != 1) & real[:, 1:] & real[:, :-1]).any()
    blind = torch.zeros_like(bad)
    if labels is not None and labels.shape == ids.shape:
        scored = labels.to(ids.device, non_blocking=True) != -100
        blind = (scored[:, 1:] & (columns[:-1] < starts[:, None])).any()
    stats = [bad.long()[None], blind.long()[None], starts, lengths]
    B = R // 2
    if R % 2 == 0:
        same = (ids[:B] == ids[B:]) & real[:B] & real[B:]
        if positions is not None:
            same &= positions[:B] == positions[B:]
        begun = columns < starts[:B, None]
        run = (same | begun).long().cumprod(-1).sum(-1) - starts[:B]
        run = run.masked_fill(starts[:B] != starts[B:], 0).clamp(min=0)
        stats.append(run.minimum(torch.minimum(lengths[:B], lengths[B:]) - 1))
    wrong, blinded, *numbers = torch.cat(stats).tolist()
    if wrong:
        raise _Stays(
            "rows whose tokens are not in one piece (an empty row, padding between tokens, or "
            "position_ids that restart)"
        )
    if blinded:
        raise _Stays(
            "padding predicts a scored token (the first of a row behind padding), and has no state"
        )
    return numbers[:R], numbers[R : 2 * R], numbers[2 * R :]


def pairs_of(ids: Tensor, laid: LaidOut, budget: int) -> list[TokenPair]:
    """Up to four pairs of the padded batch, at least one, of `budget` padded tokens."""
    R, T = laid.shape
    real = torch.zeros(R * T, dtype=torch.bool, device=ids.device)
    real[laid.real] = True
    B = max(R // 2, 1)
    count = min(4, B, max(1, budget // (2 * T)))
    pairs = []
    for i in range(count):
        a = ids[i][real.view(R, T)[i]].tolist()
        b = ids[B + i][real.view(R, T)[B + i]].tolist() if R > 1 else a[:-1] or a
        L = laid.shared[i] if laid.shared else 0
        pairs.append(TokenPair(tuple(a[:L]), tuple(a[L:]), tuple(b[L:]), f"pair {i} of the batch"))
    return pairs
