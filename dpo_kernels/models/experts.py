"""The load-balancing loss of a mixture of experts, as the model's own forward adds it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..data import TrunkCall
from .structure import text_config

# Names under which configurations (and DBRX's model) keep the weight of the router's loss.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")


def router_loss_weight(model: Any) -> float:
    """Weight of a mixture of experts' load-balancing loss; 0 where the model has none.

    As TRL: by the configuration's coefficient, whether or not `output_router_logits` is on.
    """
    text = text_config(model.config)
    if not hasattr(text, "output_router_logits") or _load_balancing_loss(model) is None:
        return 0.0
    for place in (text, model):
        for name in _ROUTER_WEIGHTS:
            value = getattr(place, name, None)
            if isinstance(value, (int, float)):
                return float(value)
    return 0.0


def adds_router_loss(model: Any) -> bool:
    """Whether the model's own forward adds a load-balancing loss, or may do.

    Many mixtures of experts of transformers give router logits and add nothing. Of a class from
    elsewhere that is not known: `router_loss` refuses it.
    """
    own = type(model).__module__.startswith("transformers.")
    return _load_balancing_loss(model) is not None or not own


def router_loss(
    model: Any, router_logits: tuple[Tensor, ...] | None, attention_mask: Tensor | None
) -> Tensor:
    """[] the load-balancing loss as the model's own forward adds it (without its weight)."""
    function = _load_balancing_loss(model)
    if function is None:
        raise ValueError(
            f"{type(model).__name__}: output_router_logits is on, but no load_balancing_loss_func "
            "is found beside its class; set the configuration's output_router_logits=False"
        )
    text = text_config(model.config)
    experts = getattr(model, "num_experts", None)
    if experts is None:
        experts = getattr(text, "num_experts", None) or text.num_local_experts
    top_k = getattr(model, "num_experts_per_tok", None) or text.num_experts_per_tok
    # 0 for a model that has no layer of experts, as in its own forward.
    loss = function(router_logits or None, experts, top_k, attention_mask)
    return torch.as_tensor(loss)


def _load_balancing_loss(model: Any) -> Callable[..., Any] | None:
    """The function of that name beside the model's class."""
    for kind in type(model).__mro__:
        module = sys.modules.get(kind.__module__)
        if hasattr(module, "load_balancing_loss_func"):
            return module.load_balancing_loss_func  # type: ignore[union-attr]
    return None


def router_loss_of_calls(
    model: Any, router: list[tuple[Tensor, ...]], calls: list[TrunkCall]
) -> Tensor:
    """[] the load-balancing loss over the real tokens of all calls; no row may be a shared one."""
    if not router:
        return router_loss(model, None, None)
    layers = tuple(torch.cat(parts) for parts in zip(*router, strict=True))
    masks = []
    for call in calls:
        S, device = call.input_ids.shape[1], call.input_ids.device
        lengths = torch.tensor(call.lengths, device=device)[:, None]
        masks.append((torch.arange(S, device=device) < lengths).flatten())
    return router_loss(model, layers, torch.cat(masks)[None].long())
