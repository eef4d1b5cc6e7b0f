"""An lm_head as the linear functions take it: weight, bias, adapter, scales, whole on this rank.

Letters: `H` hidden size, `V` vocabulary, `r` rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from .structure import text_config

# What the ops take; a head of another dtype (int8, uint8, float8) is a quantised one.
_HEAD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HeadParts(NamedTuple):
    """An lm_head as the linear front functions take it."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora: tuple[Tensor, Tensor, float] | None  # A [r, H], B [V, r], scaling


def head_scaling(config: Any) -> dict[str, float]:
    """logit_scale and logit_softcap by the names of the model's configuration."""
    text = text_config(config)
    scaling = {}
    if getattr(text, "final_logit_softcapping", None):  # Gemma
        scaling["logit_softcap"] = float(text.final_logit_softcapping)
    # Cohere; Muse Glimmer; Falcon-H1
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            scaling["logit_scale"] = float(getattr(text, name))
            return scaling
    if getattr(text, "logits_scaling", None):
        value = float(text.logits_scaling)
        # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
        scaling["logit_scale"] = value if text.model_type == "hyperclovax" else 1.0 / value
    return scaling


def head_parts(head: nn.Module) -> HeadParts:
    """Weight, bias and active LoRA adapters of an lm_head; `ValueError` for other adapters.

    Several active adapters are one: their A stacked, scaled, their B side by side.
    """
    if not hasattr(head, "get_base_layer"):  # a plain layer, or PEFT's fully trained copy of one
        return HeadParts(*_linear_parts(head), None)
    tuner: Any = head
    weight, bias = _linear_parts(tuner.get_base_layer())
    if tuner.disable_adapters or tuner.merged:
        return HeadParts(weight, bias, None)
    name = type(tuner).__name__
    if not hasattr(tuner, "lora_A"):
        raise ValueError(f"lm_head carries an adapter of type {name}; only LoRA is known here")
    active = [a for a in tuner.active_adapters if a in tuner.lora_A]
    for adapter in active:
        if getattr(tuner, "lora_variant", {}).get(adapter) or tuner.use_dora.get(adapter):
            raise ValueError(
                f"lm_head: adapter {adapter!r} is a variant of LoRA (DoRA or the like)"
            )
        if getattr(tuner, "lora_bias", {}).get(adapter):
            raise ValueError(f"lm_head: adapter {adapter!r} has lora_bias=True, which is not known")
        dropout = getattr(tuner.lora_dropout[adapter], "p", 0.0)
        if dropout and tuner.training:
            raise ValueError(
                f"lm_head: adapter {adapter!r} has lora_dropout={dropout}; set it to 0"
            )
    if not active:
        return HeadParts(weight, bias, None)
    downs = [tuner.lora_A[a].weight for a in active]
    ups = [tuner.lora_B[a].weight for a in active]
    scales = [float(tuner.scaling[a]) for a in active]
    if len(active) == 1:
        return HeadParts(weight, bias, (downs[0], ups[0], scales[0]))
    down = torch.cat([d * s for d, s in zip(downs, scales, strict=True)])
    return HeadParts(weight, bias, (down, torch.cat(ups, 1), 1.0))


def check_head_kind(head: Any) -> None:
    """`ValueError` for a head that is no linear layer or is quantised, before anything runs."""
    _linear_parts(head.get_base_layer() if hasattr(head, "get_base_layer") else head, whole=False)


def _is_packed(head: Any, weight: Tensor) -> bool:
    """Whether a float weight holds codes, as bitsandbytes' 4 bits do in float storage."""
    H = getattr(head, "in_features", None)
    return hasattr(weight, "quant_state") or (
        weight.dim() == 2 and H is not None and weight.shape[1] != H
    )


def _linear_parts(head: Any, whole: bool = True) -> tuple[Tensor, Tensor | None]:
    """weight [V, H] and bias of a linear layer; `ValueError` for what is none or is quantised.

    `whole`: no framework has cut the weight up, so its shape must be right.
    """
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    found = ""
    if not isinstance(weight, Tensor):
        found = "which has no weight"
    elif weight.dtype not in _HEAD_DTYPES:
        found = f"whose weight is {weight.dtype}: it is quantised"
    elif is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor"):
        found = f"whose weight is a {type(weight).__name__}: it is quantised"
    elif isinstance(head, Conv1D):
        found = f"whose weight has shape {list(weight.shape)}, which is [H, V]"
    elif _is_packed(head, weight):
        found = f"whose weight is a {type(weight).__name__} {list(weight.shape)}: it is quantised"
    elif weight.dim() > 2 or (whole and weight.dim() != 2 and not hasattr(weight, "ds_id")):
        found = f"whose weight has shape {list(weight.shape)}"
    elif bias is not None and not isinstance(bias, Tensor):
        found = f"whose bias is a {type(bias).__name__}"
    if found:
        raise ValueError(
            f"the head (lm_head, get_output_embeddings()) is a {type(head).__name__}, {found}; "
            "expected a linear layer with a weight [V, H] in float32, bfloat16, float16 or "
            "float64 (LoRA on it is fine; leave it out of quantisation)"
        )
    return weight, bias  # type: ignore[return-value]


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
    if "vocab" in names:  # in parts by vocabulary, as the linear functions take it
        return x
    if "tp" in names:
        raise ValueError("lm_head is split over the vocabulary (tensor parallel), expected FSDP2")
    return x.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)


def call_head(head: Any, hidden: Tensor, function: Callable[[Tensor], Any]) -> Any:
    """`head(hidden)` with `function` for its forward, so that hooks on the module see the call.

    They gather its weights (FSDP2), move them (accelerate), or are a user's. DeepSpeed's ZeRO-3 is
    left out: its hooks let go of the weights that the backward reads again, see `gathered_head`.
    """
    if any(hasattr(p, "ds_id") for p in head.parameters(recurse=True)):
        return function(hidden)
    inner = getattr(head, "_fsdp_wrapped_module", head)  # FSDP1 gathers in a forward around it
    name = "_old_forward" if hasattr(inner, "_hf_hook") else "forward"
    own = vars(inner).get(name)
    vars(inner)[name] = function
    try:
        return head(hidden)
    finally:
        if own is None:
            del vars(inner)[name]
        else:
            vars(inner)[name] = own


Form = tuple[torch.Size, torch.dtype, bool]  # shape, dtype, requires_grad


def has_hooks(head: Any) -> bool:
    """Whether something looks at what the head gives (LLaMA-Factory's `upcast_lmhead_output`)."""
    return bool(getattr(head, "_fsdp_wrapped_module", head)._forward_hooks)


def taken_apart(flat: Tensor, forms: list[Form]) -> tuple[Tensor, ...]:
    """The tensors that were laid end to end, as they were; a hook may have cast them since."""
    parts = flat.split([shape.numel() for shape, *_ in forms])
    tensors = []
    for part, (shape, dtype, differentiable) in zip(parts, forms, strict=True):
        part = part.view(shape).to(dtype)
        tensors.append(part if differentiable else part.detach())
    return tuple(tensors)
