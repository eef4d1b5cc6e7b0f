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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import dpo_kernels as dk

from ..causal_lm import (
    HeadParts,
    base_model_of,
    check_causal,
    check_decoder_only,
    check_head_kind,
    deterministic,
    head_parts,
    head_scaling,
    router_loss,
    text_config,
)
from .prefix import shared_states

# Nats a token by which two ways to the same log-prob may differ.
_LOGP_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_LOGP_TOLERANCE = 0.25


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


@dataclass(frozen=True)
class HeadCall:
    """`function(hidden [2B, T, H], head arguments) -> HeadOutput`, for `model(dpo_head=)`."""

    function: Callable[[Tensor, dict[str, Any]], HeadOutput]
    length: int  # T: prompt tuning puts virtual tokens in front, which are cut off again
    share_prefix: bool = False


def trunk_of(model: Any) -> nn.Module:
    """The model without its head; `ValueError` for what is no causal LM."""
    config = getattr(model, "config", None)
    check_decoder_only(config, type(model).__name__)
    trunk = getattr(model, "base_model", model)
    if config is not None and text_config(config) is not config and _before_transformers_5():
        trunk = model.model  # vision-language models named their trunk so
    if config is None or trunk is model or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no trunk and lm_head; expected a causal language model"
        )
    return trunk


@functools.cache
def _before_transformers_5() -> bool:
    from .frameworks import check_version

    return check_version("transformers", allow_untested=True) < (5,)


def attach_head(model: nn.Module) -> Any:
    """Let the causal LM below `model` take `dpo_head=`; returns it. Once is enough.

    Its class becomes a subclass of the same name, signature and module, which copies and pickles
    as such. A `forward` that was set on the model itself (a wrapper's, a patch's) stays the one
    that answers without `dpo_head`.
    """
    base = base_model_of(model)
    if not _takes_head(base):
        trunk_of(base)
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


_PLAIN_FORWARD, _PLAIN_CLASS = "_dpo_plain_forward", "_dpo_plain_class"
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


def _forward(self: Any, dpo_head: HeadCall, args: tuple, kwargs: dict[str, Any]) -> Any:
    if dpo_head is _PROBE:
        raise _Reached
    kwargs["use_cache"] = False
    trunk = trunk_of(self)
    router = kwargs.get("output_router_logits")
    if router is None and getattr(text_config(self.config), "output_router_logits", False):
        router = kwargs["output_router_logits"] = True
    if dpo_head.share_prefix:
        if router:
            raise ValueError(
                "share_prefix: a shared prompt is routed once, which changes the auxiliary loss of "
                "a mixture of experts; set share_prefix=False"
            )
        hidden = shared_states(self, trunk, args, kwargs)
        aux = None
    else:
        states = trunk(*args, **kwargs)
        hidden = states.last_hidden_state[:, -dpo_head.length :]
        aux = None
        if router:
            mask = kwargs.get("attention_mask")
            aux = router_loss(self, getattr(states, "router_logits", None), mask)
    head = self.get_output_embeddings()
    with gathered_head(head_parts(head)) as parts:
        hidden = hidden.to(parts.weight.device)
        if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != parts.weight.dtype:
            hidden = hidden.to(parts.weight.dtype)  # a norm kept in fp32 below a bf16 head
        arguments = {**parts._asdict(), **head_scaling(self.config)}
        out = _run_head(dpo_head.function, hidden, arguments)
    return out if aux is None else replace(out, aux_loss=aux)


@torch.compiler.disable
def _run_head(function: Any, hidden: Tensor, head: dict[str, Any]) -> HeadOutput:
    """Outside of what torch.compile traces: the ops choose their chunks by numbers."""
    return function(hidden, head)


@contextmanager
def gathered_head(parts: HeadParts) -> Iterator[HeadParts]:
    """The whole head on this rank, where FSDP2 or ZeRO-3 has cut it up.

    The gradient of an FSDP2 head must be averaged over ranks: `full_tensor()` alone takes it for
    replicated and each rank would keep its own. Under ZeRO-3 the copy outlives the context, for the
    backward that projects again.
    """
    tensors = [parts.weight, parts.bias, *(parts.lora[:2] if parts.lora else ())]
    zero3 = [x for x in tensors if hasattr(x, "ds_id")]
    context = nullcontext()
    if zero3:
        import deepspeed

        context = deepspeed.zero.GatheredParameters(zero3)
    with context:
        whole = [None if x is None else _whole(x) for x in tensors]
        lora = None if parts.lora is None else (whole[2], whole[3], parts.lora[2])
        yield HeadParts(whole[0], whole[1], lora)  # type: ignore[arg-type]


def _whole(x: Tensor) -> Tensor:
    if hasattr(x, "ds_id"):
        return x.clone()
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mesh = x.device_mesh  # type: ignore[attr-defined]
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        raise ValueError("lm_head is split over the vocabulary (tensor parallel), expected FSDP2")
    return x.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """The reference below a PEFT model: its adapter called `ref` if it has one, else no adapter."""
    own = not hasattr(model, "disable_adapter")  # adapters that transformers itself has loaded
    if "ref" not in model.peft_config:
        if own:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
            return
        with model.disable_adapter():
            yield
        return
    active = model.active_adapters() if own else model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)


@torch.no_grad()
def check_head(model: nn.Module, backend: str | None = None) -> None:
    """Our log-probs against the model's own logits on twelve tokens; `ValueError` if they differ.

    It finds an architecture that does something to its logits which is not known here, and one
    whose tokens see those behind them.
    """
    base = attach_head(model)
    name = type(base).__name__
    head = base.get_output_embeddings()
    parts = head_parts(head)
    ids = torch.arange(7, 7 + 131 * 12, 131, device=parts.weight.device)[None]
    ids = ids % parts.weight.shape[0]
    mask = torch.ones_like(ids)

    known = inspect.signature(base.forward).parameters
    no_cache = {"use_cache": False} if {"use_cache", "kwargs"} & known.keys() else {}

    def logits_of(ids: Tensor) -> Tensor:
        return base(input_ids=ids, attention_mask=mask, **no_cache).logits

    autocast = []  # whether the model's forward, which may be wrapped, computes in half

    def look(*_: Any) -> None:
        autocast.append(torch.is_autocast_enabled(ids.device.type))

    with deterministic(base):
        with head.register_forward_pre_hook(look):
            logits = logits_of(ids)
        own = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        call = HeadCall(functools.partial(_token_logps, labels=ids, backend=backend), ids.shape[1])
        ours = base(input_ids=ids, attention_mask=mask, dpo_head=call).logps
        again = logits_of(ids)
        if bool(torch.equal(again, logits)):
            check_causal(logits_of, ids, name)
    worst = float((own - ours).abs().max())
    allowed = _LOGP_TOLERANCE.get(logits.dtype, _HALF_LOGP_TOLERANCE)
    if any(autocast):  # a wrapper may have widened the logits again
        allowed = _HALF_LOGP_TOLERANCE
    if not worst <= allowed:
        noise = float((again - logits).abs().max())
        why = (
            f"the model draws noise in eval mode too (logits differ by {noise:.3g} from call to "
            "call)"
            if noise
            else "this architecture does something to its logits that is not known here "
            "(soft-capping and logit scales are)"
        )
        raise ValueError(
            f"{name}: lm_head(trunk) and the model's own logits differ by {worst:.3g} nats: {why}"
        )


def _token_logps(
    hidden: Tensor, head: dict[str, Any], labels: Tensor, backend: str | None
) -> HeadOutput:
    logps = dk.linear_sequence_logps(
        hidden, labels=labels, reduction="none", backend=backend, **head
    )
    return HeadOutput(logps=logps)
