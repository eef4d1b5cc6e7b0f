"""A causal LM whose own `forward` can end in the fused head instead of logits.

    attach_head(model)
    out = model(input_ids=..., attention_mask=..., dpo_head=call)     # call(hidden, head) -> result

The head runs inside the model's forward, below whatever wraps the model (DDP, FSDP, ZeRO, PEFT,
autocast), so that hooks which gather weights or reduce gradients see it. Without `dpo_head` the
forward is what it was.

Letters: `B` pairs, `T` positions, `H` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import dpo_kernels as dk

from ..causal_lm import HeadParts, head_parts, head_scaling, text_config
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


def base_model_of(model: nn.Module) -> Any:
    """The causal LM below PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def trunk_of(model: Any) -> nn.Module:
    """The model without its head."""
    trunk = model.base_model
    if text_config(model.config) is not model.config and _before_transformers_5():
        trunk = model.model  # vision-language models named their trunk so
    if trunk is model or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no trunk and lm_head; expected a causal language model"
        )
    return trunk


@functools.cache
def _before_transformers_5() -> bool:
    from .frameworks import check_version

    return check_version("transformers", allow_untested=True) < (5,)


def attach_head(model: nn.Module) -> Any:
    """Let the causal LM below `model` take `dpo_head=`; returns it. Once is enough."""
    base = base_model_of(model)
    if "_dpo_plain_forward" not in vars(base):
        trunk_of(base)
        base._dpo_plain_forward = base.forward
        # The signature stays: generate() and Trainer read it.
        forward = functools.wraps(type(base).forward)(_forward)
        base.forward = types.MethodType(forward, base)
    return base


def detach_head(model: nn.Module) -> None:
    """Undo `attach_head`."""
    base = base_model_of(model)
    plain = vars(base).pop("_dpo_plain_forward", None)
    if plain is not None:
        base.forward = plain


def _forward(self: Any, *args: Any, dpo_head: HeadCall | None = None, **kwargs: Any) -> Any:
    if dpo_head is None:
        return self._dpo_plain_forward(*args, **kwargs)
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
        aux = _aux_loss(self, states, kwargs.get("attention_mask")) if router else None
    head = self.get_output_embeddings()
    with gathered_head(head_parts(head)) as parts:
        hidden = hidden.to(parts.weight.device)
        if not torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != parts.weight.dtype:
            hidden = hidden.to(parts.weight.dtype)  # a norm kept in fp32 below a bf16 head
        arguments = {**parts._asdict(), **head_scaling(self.config)}
        out = dpo_head.function(hidden, arguments)
    if aux is not None:
        out.aux_loss = aux
    return out


def _aux_loss(model: Any, states: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss as the model's own forward adds it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    text = text_config(model.config)
    experts = getattr(model, "num_experts", None)
    if experts is None:
        experts = getattr(text, "num_experts", None) or text.num_local_experts
    top_k = getattr(model, "num_experts_per_tok", None) or text.num_experts_per_tok
    loss: Any = load_balancing_loss_func(states.router_logits, experts, top_k, attention_mask)
    return loss


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
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)


@torch.no_grad()
def check_head(model: nn.Module, backend: str | None = None) -> None:
    """Our log-probs against the model's own logits on twelve tokens; `ValueError` if they differ.

    It finds an architecture that does something to its logits which is not known here.
    """
    base = attach_head(model)
    training = [m for m in base.modules() if m.training]
    base.eval()
    try:
        parts = head_parts(base.get_output_embeddings())
        ids = torch.arange(7, 7 + 131 * 12, 131, device=parts.weight.device)[None]
        ids = ids % parts.weight.shape[0]
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        own = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        call = HeadCall(functools.partial(_token_logps, labels=ids, backend=backend), ids.shape[1])
        ours = base(input_ids=ids, attention_mask=torch.ones_like(ids), dpo_head=call).logps
    finally:
        for module in training:
            module.training = True
    worst = float((own - ours).abs().max())
    allowed = _LOGP_TOLERANCE.get(logits.dtype, _HALF_LOGP_TOLERANCE)
    if torch.is_autocast_enabled(ids.device.type):  # a wrapper may have widened the logits again
        allowed = _HALF_LOGP_TOLERANCE
    if not worst <= allowed:
        raise ValueError(
            f"{type(base).__name__}: lm_head(trunk) and the model's own logits differ by "
            f"{worst:.3g} nats: this architecture does something to its logits that is not known "
            "here (soft-capping and logit scales are)"
        )


def _token_logps(
    hidden: Tensor, head: dict[str, Any], labels: Tensor, backend: str | None
) -> HeadOutput:
    logps = dk.linear_sequence_logps(
        hidden, labels=labels, reduction="none", backend=backend, **head
    )
    return HeadOutput(logps=logps)
