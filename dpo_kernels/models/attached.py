"""A causal LM whose own `forward` can end in the fused head instead of logits.

    attach_head(model)
    out = model(input_ids=..., attention_mask=..., dpo_head=call)     # call(hidden, head) -> result

The head runs inside the model's forward, below whatever wraps the model (DDP, FSDP, ZeRO, PEFT,
autocast), so that hooks which gather weights or reduce gradients see it. Without `dpo_head` the
forward is what it was.

Letters: `B` pairs, `T` positions, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import dpo_kernels as dk

from ..data import ScoredBatch
from .experts import adds_router_loss, router_loss, router_loss_of_calls
from .layout_check import check_first_batch
from .layouts import LaidOut, known, lay_out, pairs_of, run_call, trunk_states
from .lm_head import (
    Form,
    call_head,
    check_head_kind,
    gathered_head,
    has_hooks,
    head_parts,
    head_scaling,
    taken_apart,
)
from .mesh_axes import check_trunk
from .structure import base_model_of, text_config, trunk_of


@dataclass
class HeadOutput(ModelOutput):
    """What a forward with `dpo_head` returns: the call's own fields, all optional."""

    loss: Tensor | None = None  # [] or None
    logps: Tensor | None = None  # [2B, T - 1], 0 where not scored, or [2B] sums
    entropy: Tensor | None = None  # [2B, T - 1], as the other statistics
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    pair_logps: Tensor | None = None  # [2, B] chosen, rejected; LD-weighted if ld_alpha
    rewards: Tensor | None = None  # [2, B]
    aux_loss: Tensor | None = None  # [], a mixture of experts' load-balancing loss
    zero_loss: Tensor | None = None  # [], the loss at zero log-ratios, of the step-0 check
    sft: Tensor | None = None  # [B], `DPOOutput.sft`
    strategy: str | None = None  # `DPOOutput.strategy`
    desirable: Tensor | None = None  # [B] of single completions, whose `rewards` are [B]
    kl: Tensor | None = None  # [], `UnpairedOutput.kl`


@dataclass(frozen=True)
class HeadCall:
    """`function(hidden, head arguments) -> HeadOutput`, for `model(dpo_head=)`.

    `hidden` is [2B, T, H] of the rows that the model was given, or with `batch` [N, H] of the
    states that predict its scored tokens.
    """

    function: Callable[[Tensor, dict[str, Any]], HeadOutput]
    length: int = 0  # T: prompt tuning puts virtual tokens in front, which are cut off again
    layout: str = "padded"
    batch: ScoredBatch | None = None  # in place of input_ids
    check_layout: bool = True
    labels: Tensor | None = None  # [2B, T] of the rows, where they are scored


def attach_head(model: nn.Module) -> Any:
    """Let the causal LM below `model` take `dpo_head=`; returns it. Once is enough.

    Its class becomes a subclass of the same name, signature and module, which copies and pickles
    as such. A `forward` that was set on the model itself (a wrapper's, a patch's) stays the one
    that answers without `dpo_head`.
    """
    base = base_model_of(model)
    if not _takes_head(base):
        trunk_of(base)
        check_trunk(model)
        check_head_kind(base.get_output_embeddings())
        plain = vars(base).pop("forward", None)
        if plain is not None:
            vars(base)[_PLAIN_FORWARD] = plain
        if not hasattr(type(base), _PLAIN_CLASS):
            kind: Any = type(base)
            base.__class__ = _attached(kind)
    return base


def detach_head(model: nn.Module) -> None:
    """Undo `attach_head`."""
    base = base_model_of(model)
    plain = vars(base).pop(_PLAIN_FORWARD, None)
    if plain is not None:
        base.forward = plain
    if _PLAIN_CLASS in vars(type(base)):
        base.__class__ = getattr(type(base), _PLAIN_CLASS)


def head_calls(model: nn.Module) -> int:
    """How often the fused head has run below `model` so that a gradient can come back."""
    return vars(base_model_of(model)).get(_CALLS, 0)


_PLAIN_FORWARD, _PLAIN_CLASS = "_dpo_plain_forward", "_dpo_plain_class"
_CALLS = "_dpo_head_calls"
_PROBE: Any = object()


class _Reached(Exception):
    """The forward of an attached class answers so to `_PROBE`."""


def _takes_head(base: Any) -> bool:
    """Whether `dpo_head` gets through to the attached class, whatever wraps its forward."""
    if not hasattr(type(base), _PLAIN_CLASS):
        return False
    if "forward" not in vars(base):
        return True
    try:
        base.forward(dpo_head=_PROBE)
    except _Reached:
        return True
    except Exception:  # a forward that does not know the argument, in its own way
        return False
    return False


@functools.cache
def _attached(plain: type) -> type:
    """The subclass of a model's class whose forward takes `dpo_head`."""

    def forward(self: Any, *args: Any, dpo_head: Any = None, **kwargs: Any) -> Any:
        if args and args[0] is self:  # accelerate binds a bound method again when it unwraps
            args = args[1:]
        if dpo_head is not None:
            return _forward(self, dpo_head, args, kwargs)
        own = vars(self).pop(_PLAIN_FORWARD, None)
        if own is None:
            return plain.forward(self, *args, **kwargs)  # type: ignore[attr-defined]
        try:  # away while it runs: it may end in this very method
            return own(*args, **kwargs)
        finally:
            vars(self)[_PLAIN_FORWARD] = own

    # No __wrapped__: whoever unwraps a forward (accelerate) must end here. The signature is what
    # generate() and Trainer read.
    forward.__signature__ = inspect.signature(plain.forward)  # type: ignore[attr-defined]
    forward.__doc__ = plain.forward.__doc__  # type: ignore[attr-defined]
    forward.__qualname__ = f"{plain.__qualname__}.forward"

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        made: Any = plain.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
        if made[0] is copyreg.__newobj__ and made[1] == (attached,):  # type: ignore[attr-defined]
            return _new, (plain,), *made[2:]
        return made

    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(plain, name) for name in names}
    body |= {"forward": forward, "__reduce_ex__": __reduce_ex__, _PLAIN_CLASS: plain}
    attached = type(plain)(plain.__name__, (plain,), body)
    return attached


def _new(plain: type) -> Any:
    """An empty model of an attached class, for copy and pickle."""
    attached: Any = _attached(plain)
    return attached.__new__(attached)


def run_head(
    model: nn.Module, inputs: Mapping[str, Any], call: HeadCall, router: bool = False
) -> HeadOutput:
    """`model(**inputs)` with the head, whose answer must have come.

    `router`: whether the load-balancing loss of a mixture of experts is wanted.
    """
    base = base_model_of(model)
    if hasattr(text_config(base.config), "output_router_logits"):
        inputs = {**inputs, "output_router_logits": router}
    out = model(**inputs, dpo_head=call)
    if getattr(out, "loss", None) is None and getattr(out, "logps", None) is None:
        raise RuntimeError(
            f"{type(base).__name__} answered without a loss: no head was attached to it, or its "
            "forward was replaced since by one that drops dpo_head. Call attach(model) after "
            "whatever replaces the forward, before DDP, FSDP or Accelerator.prepare"
        )
    return out


def _forward(self: Any, call: HeadCall, args: tuple, kwargs: dict[str, Any]) -> HeadOutput:
    if call is _PROBE:
        raise _Reached
    kwargs["use_cache"] = False
    router = kwargs.get("output_router_logits")
    if router is None and getattr(text_config(self.config), "output_router_logits", False):
        router = True
    added = bool(router) and adds_router_loss(self)
    if router is not None:
        kwargs["output_router_logits"] = added
    hidden, aux = _states(self, call, args, kwargs, added)
    if router and aux is None:
        aux = hidden.new_zeros(())
    out = _end_in_head(self, hidden, call.function)
    return out if aux is None else replace(out, aux_loss=aux)


def _states(
    model: Any, call: HeadCall, args: tuple, kwargs: dict[str, Any], router: bool
) -> tuple[Tensor, Tensor | None]:
    """Hidden states that the head scores, and the load-balancing loss if `router`."""
    trunk = trunk_of(model)
    if call.batch is not None:
        layers: list[tuple[Tensor, ...]] | None = [] if router else None
        hidden = trunk_states(model, trunk, call.batch, layers)
        if layers is None:
            return hidden, None
        return hidden, router_loss_of_calls(model, layers, call.batch.calls)
    if args:
        kwargs = {"input_ids": args[0], **kwargs}
    laid = lay_out(model, kwargs, call.layout, router, call.labels)
    if laid is not None and call.check_layout and not known(model).checked:
        _check_layout(model, kwargs["input_ids"], laid, call.layout)
        # None, if it did not hold.
        laid = lay_out(model, kwargs, call.layout, router, call.labels)
    aux = None
    if laid is not None:
        extra = {"output_router_logits": True} if router else {}
        states = run_call(model, trunk, laid.call, **extra)
        if router:
            aux = router_loss(model, getattr(states, "router_logits", None), None)
        return laid.put_back(states.last_hidden_state), aux
    states = trunk(**kwargs)
    if router:
        mask = kwargs.get("attention_mask")
        aux = router_loss(model, getattr(states, "router_logits", None), mask)
    return states.last_hidden_state[:, -call.length :], aux


@torch.compiler.disable
def _check_layout(model: Any, ids: Tensor, laid: LaidOut, asked: str) -> None:
    pairs = pairs_of(ids, laid, ids.numel() // 2)
    calls = head_calls(model)
    check_first_batch(model, pairs, laid.mode, functools.partial(score_states, model), asked)
    vars(model)[_CALLS] = calls  # the check is no step


def score_states(model: Any, hidden: Tensor, batch: ScoredBatch) -> Tensor:
    """[N] log-probs of the batch's scored tokens, through the head of an attached model."""

    def score(hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
        logps = dk.linear_sequence_logps(
            hidden,
            labels=batch.labels,
            cu_seqlens=batch.cu_seqlens,
            scored_lengths=batch.scored_lengths,
            shift=False,
            reduction="none",
            **head,
        )
        return HeadOutput(logps=logps)

    logps = _end_in_head(model, hidden, score).logps
    assert logps is not None
    return logps


@torch.compiler.disable
def _end_in_head(model: Any, hidden: Tensor, function: Callable[..., HeadOutput]) -> HeadOutput:
    """`function` of the states, inside the call of the head module.

    Outside of what torch.compile traces: the ops choose their chunks by numbers.
    """
    if torch.is_grad_enabled():
        vars(model)[_CALLS] = vars(model).get(_CALLS, 0) + 1
    head, scaling = model.get_output_embeddings(), head_scaling(model.config)
    rest: dict[str, Any] = {}
    names: list[str] = []
    forms: list[Form] = []

    def forward(hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        with gathered_head(head_parts(head)) as parts:
            hidden = hidden.to(parts.weight.device)
            autocast = torch.is_autocast_enabled(hidden.device.type)
            if not autocast and hidden.dtype != parts.weight.dtype:
                hidden = hidden.to(parts.weight.dtype)  # a norm kept in fp32 below a bf16 head
            out = function(hidden, {**parts._asdict(), **scaling})
        rest.update((k, v) for k, v in out.items() if not isinstance(v, Tensor))
        names[:] = [k for k in out if k not in rest]
        # One tensor, where hooks on the head's output look: they cast it, move it, ...
        tensors = tuple(out[k] for k in names)
        if len(tensors) == 1:
            return tensors[0]
        if not has_hooks(head):
            return tensors
        forms[:] = [(t.shape, t.dtype, t.requires_grad) for t in tensors]
        return torch.cat([t.reshape(-1) for t in tensors])

    values = call_head(head, hidden, forward)
    if forms:
        values = taken_apart(values, forms)
    values = values if isinstance(values, tuple) else (values,)
    return HeadOutput(**dict(zip(names, values, strict=True)), **rest)
