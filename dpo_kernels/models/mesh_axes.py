"""What splits the trunk itself over processes: refused by name, whoever asks for it.

    check_trunk(model)                  # a model whose layers are split (torch, transformers)
    check_parallelism(accelerator)      # accelerate's ParallelismConfig

The trunk runs whole on each rank, its weights sharded by FSDP2 or HSDP; of tensors that are split
over a sequence or a hidden size the sums that a preference loss is made of are not whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_AXES = {
    "tp": "tensor",
    "cp": "context",
    "sp": "sequence",
    "pp": "pipeline",
    "ep": "expert",
}
SUPPORTED = (
    "FSDP2 or HSDP (fully_shard) shards the weights, and vocab_parallel splits the head by "
    "vocabulary"
)


def check_trunk(model: nn.Module) -> None:
    """`ValueError` where weights of the model are split by anything but FSDP."""
    for part in model.modules():
        size = getattr(part, "_tp_size", None)
        if isinstance(size, int) and size > 1:  # transformers' own plans
            raise _refused(f"{type(part).__name__} is split over {size} ranks", "tensor")
        if getattr(part, "_distribute_module_applied", False):  # torch's parallelize_module
            raise _refused(f"its {type(part).__name__} is split by a plan of torch", "tensor")
    for name, p in model.named_parameters():
        mesh = getattr(p, "device_mesh", None)
        for axis in getattr(mesh, "mesh_dim_names", None) or ():
            if axis in _AXES:
                raise _refused(f"{name} is on a mesh with the axis {axis!r}", _AXES[axis])


def check_parallelism(accelerator: Any) -> None:
    """`ValueError` where accelerate was asked to split the trunk."""
    config = getattr(accelerator, "parallelism_config", None)
    for axis, kind in _AXES.items():
        size = getattr(config, f"{axis}_size", None)
        if isinstance(size, int) and size > 1:
            raise _refused(f"parallelism_config has {axis}_size={size}", kind)


def _refused(what: str, kind: str) -> ValueError:
    return ValueError(f"{what}: {kind}-parallel trunks are not supported; {SUPPORTED}")
