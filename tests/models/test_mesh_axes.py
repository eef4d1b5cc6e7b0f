"""Trunks that something else than FSDP splits are refused by name, however they are asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpo_kernels.train.config import UserError, load_config

transformers = pytest.importorskip("transformers", reason="models are transformers'")

from dpo_kernels.models.attached import attach_head  # noqa: E402
from dpo_kernels.models.mesh_axes import check_parallelism  # noqa: E402


def small_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("axis", "kind"), [("tp", "tensor"), ("cp", "context"), ("sp", "sequence"), ("pp", "pipeline")]
)
def test_accelerates_meshes(axis: str, kind: str) -> None:
    sizes = {"dp_shard_size": 4, "dp_replicate_size": 2, "tp_size": 1, "cp_size": 1}
    check_parallelism(SimpleNamespace(parallelism_config=SimpleNamespace(**sizes)))
    check_parallelism(SimpleNamespace(parallelism_config=None))
    check_parallelism(SimpleNamespace())
    asked = SimpleNamespace(**{**sizes, f"{axis}_size": 2})
    with pytest.raises(ValueError, match=f"{axis}_size=2: {kind}-parallel trunks are not") as error:
        check_parallelism(SimpleNamespace(parallelism_config=asked))
    assert "FSDP2 or HSDP" in str(error.value) and "vocab_parallel" in str(error.value)


def test_accelerates_own_configuration() -> None:
    accelerate = pytest.importorskip("accelerate")
    if not hasattr(accelerate, "ParallelismConfig"):
        pytest.skip("an older accelerate")
    for name in ("tp_size", "cp_size"):
        made = accelerate.ParallelismConfig(**{name: 2})
        with pytest.raises(ValueError, match=f"{name}=2"):
            check_parallelism(SimpleNamespace(parallelism_config=made))
    check_parallelism(
        SimpleNamespace(parallelism_config=accelerate.ParallelismConfig(dp_shard_size=2))
    )


def test_a_model_that_transformers_has_split() -> None:
    model = small_model()
    model._tp_size = 2
    with pytest.raises(ValueError, match="LlamaForCausalLM is split over 2 ranks: tensor-parallel"):
        attach_head(model)
    model._tp_size = 1
    attach_head(model)


@pytest.fixture
def alone() -> Any:
    """A process group of this process."""
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("torch.distributed is not there, or in use")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_model_that_torch_has_split(alone: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, mesh = small_model(), init_device_mesh("cpu", (1,))
    parallelize_module(model, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match="its Linear is split by a plan of torch"):
        attach_head(model)
    model, mesh = small_model(), init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"model.norm.weight is on a mesh with the axis 'cp'"):
        attach_head(model)


NAMES = ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_size", "tp_size")


@pytest.mark.parametrize("name", [*NAMES, "cp_size", "sp_size", "pp_size"])
def test_options_of_train(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=2 .*not split by tensor, context.*vocab_parallel"):
        load_config({name: 2})
    assert load_config({name: 1}) == load_config({})


def test_the_option_that_holds_all_sizes() -> None:
    with pytest.raises(UserError, match=r"parallelism_config=.*fsdp says .full_shard"):
        load_config({"parallelism_config": {"tp_size": 2}})
