"""What a training step takes of memory, before it is taken, and what there is.

    weights + gradients + optimizer + activations + head   (+ a reference that stays)

The first three are counted, the head's part comes from `memory.estimate`, and activations are what
autograd would keep of the trunk: its forward runs over fake tensors, which have shapes and no
memory. What a backward needs for a moment, and an allocator's rounding, are not in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpo_kernels as dk

from ..data import ScoredBatch
from ..data.segments import Segments
from ..models.layouts import trunk_states
from ..models.references import needs_states
from ..models.structure import base_model_of, text_config, trunk_of
from ..models.versions import dtype_option
from .config import DPOTrainConfig, UserError
from .model import Policy, disable_dropout

# Moments that an optimizer keeps of each weight.
MOMENTS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "sgd": 0,
    "rmsprop": 1,
    "adagrad": 1,
    "adafactor": 0,  # rows and columns of them
}


def step_memory(policy: Policy, batch: ScoredBatch, config: DPOTrainConfig) -> dict[str, int]:
    """Bytes of one step over `batch`, by what takes them."""
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in policy.model.parameters()]
    trained = sum(size for size, grad in sizes if grad)
    parts = {
        "weights": sum(size for size, _ in sizes),
        "gradients": trained,
        "optimizer": trained * MOMENTS.get(config.optim, 2),
        "activations": activations(policy, batch, config.gradient_checkpointing),
        "head": head_memory(policy, batch),
    }
    if config.ema_decay:
        parts["average"] = trained
    if config.sync_ref_model or needs_states(config.loss_options()):
        parts["reference"] = parts["weights"]
    return parts


def head_memory(policy: Policy, batch: ScoredBatch) -> int:
    """Bytes that the linear loss holds above its arguments."""
    weight: Any = policy.head.weight
    V, H = weight.shape
    dtype = policy.dtype if policy.dtype in dk.backends.FUSED_DTYPES else torch.float32
    for strategy in ("streaming", "recompute"):
        try:
            return dk.memory.estimate(
                strategy,
                batch.scored_lengths,
                T=max(max(call.input_ids.shape[1] for call in batch.calls), *batch.scored_lengths),
                V=V,
                H=H,
                dtype=dtype,
                trained=weight.requires_grad,
                device=policy.device,
            ).peak
        except ValueError:
            continue  # a pair that streaming could not take
    return 0


def activations(policy: Policy, batch: ScoredBatch, checkpointed: bool) -> int:
    """Bytes that autograd keeps of the trunk's forward over `batch`."""
    model = base_model_of(policy.model)
    config = text_config(model.config)
    tokens = sum(call.input_ids.numel() for call in batch.calls)
    layers, size = config.num_hidden_layers, policy.dtype.itemsize
    try:
        whole = _kept(model, policy, batch)
    except Exception:  # a forward that looks at values: then a count of a usual layer's parts
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        whole = layers * tokens * (10 * config.hidden_size + 3 * inner) * size
    if checkpointed:  # each layer's input, and one layer at work
        return layers * tokens * config.hidden_size * size + whole // layers
    return whole


def _kept(model: Any, policy: Policy, batch: ScoredBatch) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    options = {
        **dtype_option(model.dtype),
        "attn_implementation": model.config._attn_implementation,
    }
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.device(policy.device):
        twin = AutoModelForCausalLM.from_config(model.config, **options).train()
        disable_dropout(twin)
        trunk = trunk_of(twin)
        own = {x.untyped_storage()._cdata for x in (*twin.parameters(), *twin.buffers())}
        kept: dict[int, Any] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), policy.autocast():
            trunk_states(twin, trunk, _moved(batch, mode.from_tensor))
        return sum(storage.nbytes() for storage in kept.values())


def _moved(batch: ScoredBatch, move: Callable[[Tensor], Tensor]) -> ScoredBatch:
    calls = [
        replace(
            call,
            input_ids=move(call.input_ids),
            position_ids=None if call.position_ids is None else move(call.position_ids),
            # Of their own: what they keep for a device is made of these tensors.
            segments=None if call.segments is None else Segments(call.segments.parts),
        )
        for call in batch.calls
    ]
    return replace(batch, calls=calls, rows=move(batch.rows))


def available(device: torch.device) -> int | None:
    """Bytes of memory that are free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")  # a container's limit; what it caches of files is free
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            cached = int(stat["active_file"]) + int(stat["inactive_file"])
            used = int((group / "memory.current").read_text()) - cached
            found.append(int(limit) - used)
    except (OSError, ValueError, KeyError):
        if not found and hasattr(os, "sysconf"):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(min(found), 0) if found else None


def check_fits(name: str, config: DPOTrainConfig) -> None:
    """`UserError` where the weights, gradients and moments alone are more than the device has.

    From the configuration of the model, before its weights are read. No guess is in it: whatever
    the batches, such a run would break off.
    """
    device = device_of(config)
    room = available(device)
    quantised = config.load_in_4bit or config.load_in_8bit
    if room is None or quantised or config.gguf_file or name.endswith(".gguf"):
        return
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        options = {"trust_remote_code": config.trust_remote_code}
        found = AutoConfig.from_pretrained(name, **options)
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(found, **options)
    except Exception:  # loading it will say what is wrong
        return
    numbers = sum(p.numel() for p in shell.parameters())
    # Of an adapter's gradients and moments there are few.
    copies = 1 if config.use_peft else 2 + MOMENTS.get(config.optim, 2)
    what = "its weights" if config.use_peft else "weights, gradients and optimizer"
    need = numbers * _width(config, found) * copies
    if need > room:
        raise UserError(
            f"{name} has {numbers:,} parameters: {what} take {shown(need)}, and {device} has "
            f"{shown(room)} free ({ADVICE})"
        )


def _width(config: DPOTrainConfig, found: Any) -> int:
    """Bytes of a weight as it will be loaded."""
    if config.bf16:
        return 4
    if config.dtype == "auto":
        dtype = getattr(found, "dtype", None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return getattr(torch, config.dtype).itemsize


def device_of(config: DPOTrainConfig) -> torch.device:
    """The device that the option names."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


ADVICE = (
    "a smaller per_device_train_batch_size or max_length, gradient_checkpointing, a narrower "
    "dtype, optim sgd, or a larger machine"
)


def shown(size: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
