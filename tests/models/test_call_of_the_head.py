"""The head module itself is called: what hangs on it sees its states, and gives it its weights."""

from __future__ import annotations

import pytest
import tiny
import torch

pytest.importorskip("transformers", reason="pip install transformers")

import transformers

from dpo_kernels.data import TokenPair
from dpo_kernels.integrations import plain
from dpo_kernels.models.forward import pair_step
from dpo_kernels.models.options import FusedOptions
from dpo_kernels.train.config import load_config
from dpo_kernels.train.model import prepare_policy
from dpo_kernels.train.reference import PairData
from dpo_kernels.train.step_loss import PairLoss

IDS = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [8, 11]}
BATCH = plain.PreferenceCollator(0)([IDS, {**IDS, "chosen_ids": [12, 13]}])


def by_integration(model):
    plain.attach(model)
    return lambda: plain.dpo_step(model, BATCH, reference_free=True).loss


def by_trainer(model):
    config = load_config({"device": "cpu", "reference_free": True})
    policy = prepare_policy(model, tiny.tokenizer(), config, lambda _: None)
    data = PairData([TokenPair((5, 6, 7), (8, 9, 10), (8, 11), "a")])
    loss = PairLoss(policy, config)
    return lambda: loss(data, [0], 1, 3)[0].loss


WAYS = pytest.mark.parametrize("way", [by_integration, by_trainer])


@WAYS
def test_hooks_on_the_head_see_its_call(way):
    """TRL PR#3260: a head that is read and not called loses what its hooks do."""
    model = tiny.model()
    loss, seen = way(model), []
    wanted = loss()
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append("after"))
    model.lm_head.register_full_backward_hook(lambda m, *grads: seen.append("backward"))
    again = loss()
    assert torch.equal(wanted, again) and seen == [16, "after"]
    again.backward()
    assert seen == [16, "after", "backward"]
    assert "forward" not in vars(model.lm_head)


@WAYS
def test_states_that_a_hook_changes_are_scored(way):
    model = tiny.model()
    loss = way(model)
    wanted = loss()
    model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,))
    assert loss() != wanted
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert torch.equal(loss(), wanted)


def test_a_head_whose_weights_are_elsewhere():
    """accelerate's offload: on the meta device until the head is called."""
    accelerate = pytest.importorskip("accelerate", reason="pip install accelerate")
    model = tiny.model()
    loss = by_integration(model)
    wanted = loss()
    accelerate.cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        assert torch.equal(loss(), wanted)


@WAYS
def test_a_failure_leaves_the_heads_own_forward(way):
    model = tiny.model()
    loss = way(model)
    hook = model.lm_head.register_forward_pre_hook(lambda m, args: (args[0][..., :3],))
    with pytest.raises(ValueError, match=r"hidden|weight"):
        loss()
    hook.remove()
    assert model.lm_head(torch.ones(1, 16)).shape == (1, 64) and loss().isfinite()


@WAYS
def test_experts_in_no_layer_have_no_routers_loss(way):
    """The configuration has a weight for it, and nothing is routed."""
    options = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    model = tiny.model("Qwen3Moe", mlp_only_layers=[0, 1], head_dim=8, **options)
    assert way(model)().isfinite()


def with_router_weight(model):
    """The loss as TRL asks for it: of each mixture of experts."""
    plain.attach(model)
    inputs = {k: BATCH[k] for k in ("input_ids", "attention_mask")}
    fused = FusedOptions(head_stats=False)
    return pair_step(model, inputs, BATCH["labels"], None, {"reference_free": True}, fused, 0.5)


@pytest.mark.parametrize("kind", ["Glm4Moe", "DeepseekV3"])
def test_router_logits_of_a_model_that_adds_no_loss(kind):
    """transformers takes `output_router_logits` of these, and their own forward adds nothing."""
    options = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    options |= {"head_dim": 8, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2}
    if kind == "DeepseekV3":
        options |= {"q_lora_rank": None, "kv_lora_rank": 8, "v_head_dim": 8}
        options |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
    try:
        model = tiny.model(kind, **options)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"{kind} is not in this transformers: {error}")
    out = with_router_weight(model)
    assert out.loss == by_integration(model)() and out.aux_loss == 0


def test_a_strangers_router_logits_are_refused():
    """A class of the hub may name its loss in another way: it would be left out unseen."""
    kind = type("Stranger", (transformers.LlamaForCausalLM,), {"__module__": "hub.of.somebody"})
    config = tiny.model().config
    config.output_router_logits = True
    with pytest.raises(ValueError, match="no load_balancing_loss_func"):
        with_router_weight(kind(config))
