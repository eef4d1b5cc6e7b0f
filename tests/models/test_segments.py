"""Layouts by segments: equal to padded rows, and each way to be silently wrong."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from float64_math import Float64
from segment_steps import (
    MOE,
    NO_AUX,
    NO_DROPOUT,
    SHAPES,
    needs_segments,
    padded_batch,
    same,
    step,
    tiny,
)

from dpo_kernels.data.segments import Segment, Segments
from dpo_kernels.integrations import plain
from dpo_kernels.models import layout_check, layouts, segment_attention, segment_kernels
from dpo_kernels.models.attached import attach_head
from dpo_kernels.models.forward import scored_tokens
from dpo_kernels.models.layout_check import LayoutDiffers
from dpo_kernels.models.layouts import known, layout_report, unusable
from dpo_kernels.models.options import FusedOptions
from dpo_kernels.models.segment_attention import NAMES, install, installed, segment_forward

pytestmark = needs_segments


def lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="pip install peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).double()


def checkpointed(reentrant: bool) -> Any:
    def change(model: Any) -> Any:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    return change


ARCHITECTURES = {
    "dense": ("Llama", {"num_key_value_heads": 4}, None),
    "grouped heads": ("Qwen3", {"head_dim": 8}, None),
    "windows": ("Mistral", {"sliding_window": 7}, None),
    "some windows": (
        "Gemma3Text",
        {"head_dim": 8, "sliding_window": 7, "num_hidden_layers": 6},
        None,
    ),
    "softcap": (
        "Gemma2",
        {"head_dim": 8, "sliding_window": 7, "attn_logit_softcapping": 3.0},
        None,
    ),
    "experts": ("Mixtral", {**MOE, **NO_AUX}, None),
    "sinks": ("GptOss", {**MOE, **NO_AUX, "head_dim": 8, "sliding_window": 7}, None),
    "tied": ("Llama", {"tie_word_embeddings": True}, None),
    "learned positions": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT},
        None,
    ),
    "eager": ("Llama", {"attn_implementation": "eager"}, None),
    "LoRA": ("Llama", {}, lora),
    "checkpointing": ("Llama", {}, checkpointed(False)),
    "reentrant checkpointing": ("Mistral", {"sliding_window": 7}, checkpointed(True)),
}


@pytest.mark.parametrize("layout", ["packed", "shared", "auto"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_padded_rows(kind: str, layout: str) -> None:
    name, options, change = ARCHITECTURES[kind]
    try:
        model = tiny(name, **options)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"{name} is not in this transformers: {error}")
    model = change(model) if change else model
    attach_head(model)
    with Float64():
        same(model, padded_batch(SHAPES), layout, 1e-12)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if layout == "auto":  # which leaves float64 as it is under a trainer
        return
    assert known(base).unusable == "" and known(base).checked
    assert f"layout {'packed' if layout == 'packed' else 'shared'}" in layout_report(model)


@pytest.mark.parametrize("left", [False, True])
def test_ragged_rows_on_either_side(left: bool) -> None:
    """Padding on the left, as OnlineDPO's prompts have it, keeps its columns for positions."""
    model = tiny("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=256, **NO_DROPOUT)
    attach_head(model)
    with Float64():
        same(model, padded_batch([(9, 5, 5), (4, 5, 5)], left=left), "shared", 1e-12)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_models_that_count_positions_by_their_mask(layout: str) -> None:
    """OPT and BioGPT begin at 0 behind padding on the left; columns gave other numbers."""
    options = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
    model = tiny("OPT", **options)
    attach_head(model)
    batch = padded_batch([(9, 5, 5), (4, 5, 5), (3, 1, 7)], left=True)
    with Float64():
        right, theirs = step(model, batch, "padded")
        out, grads = step(model, batch, layout)
    assert known(model).positions == "tokens"
    torch.testing.assert_close(out.pair_logps, right.pair_logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, theirs, rtol=1e-9, atol=1e-12)  # of keys' biases it is 0


def test_positions_that_are_neither_columns_nor_tokens(caplog) -> None:
    """A model of its own ideas takes padded rows where they show: behind padding on the left."""
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT}
    model = tiny("GPT2", dtype=torch.float32, **options)
    forward = model.transformer.forward

    def odd(*args: Any, attention_mask: Any = None, position_ids: Any = None, **kw: Any) -> Any:
        if position_ids is None and attention_mask is not None:
            position_ids = attention_mask.cumsum(-1) * 3
        return forward(*args, attention_mask=attention_mask, position_ids=position_ids, **kw)

    model.transformer.forward = odd
    attach_head(model)
    left = padded_batch([(9, 5, 5), (4, 5, 5)], left=True)
    with pytest.raises(ValueError, match="padded on the left, and which positions"):
        step(model, left, "shared")
    expected = step(model, left, "padded")[0].pair_logps
    assert torch.equal(step(model, left, "auto")[0].pair_logps, expected)
    assert "padded on the left" in caplog.text


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_what_padding_on_the_left_predicts_is_not_scored(layout: str) -> None:
    """Padded rows scored it by states of padding, the others by states of 0, without a word."""
    shapes = [(0, 5, 3), (4, 2, 6)]
    batch = padded_batch(shapes, left=True)
    expected = padded_batch(shapes)  # where no row has a place before its first token
    model = tiny("Llama", pad_token_id=None)
    attach_head(model)
    with Float64():
        right, theirs = step(model, expected, "padded")
        out, grads = step(model, batch, layout)
    torch.testing.assert_close(out.pair_logps, right.pair_logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.loss, right.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, theirs, rtol=1e-9, atol=1e-12)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    logps = scored_tokens(model, inputs, labels, FusedOptions(layout=layout)).logps
    torch.testing.assert_close(logps.sum(-1), right.pair_logps.flatten(), rtol=1e-6, atol=1e-6)


def test_labels_elsewhere_whose_padding_predicts_them_are_refused() -> None:
    """The host does not wait for the mask; a layout does, for the rows."""
    batch = padded_batch([(0, 5, 3), (4, 2, 6)], left=True)
    model = tiny()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    assert layouts.lay_out(model, inputs, "shared", False) is not None
    with pytest.raises(ValueError, match="padding predicts a scored token"):
        layouts.lay_out(model, inputs, "shared", False, batch["labels"])


def test_states_go_back_where_they_were() -> None:
    """Log-probs of tokens [2B, T - 1], prompts among the labels, an odd number of rows."""
    model = tiny()
    attach_head(model)
    batch = padded_batch(SHAPES)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for rows in (8, 5, 1):
        inputs = {k: batch[k][:rows] for k in ("input_ids", "attention_mask")}
        found = [
            scored_tokens(model, inputs, labels[:rows], FusedOptions(layout=layout)).logps
            for layout in ("padded", "packed", "shared")
        ]
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-6)


# --- traps, each silent if missed ---


def test_the_implementation_stays_set() -> None:
    """Checkpointing runs attention again in the backward: under sdpa the keyword is swallowed."""
    model = tiny()
    attach_head(model)
    step(model, padded_batch(SHAPES), "shared")
    assert model.config._attn_implementation == NAMES["sdpa"] and installed(model) == "sdpa"
    copied = copy.deepcopy(model)
    assert installed(copied) == "sdpa" and unusable(copied) == ""
    assert "dpo_segments" not in str(model.config.to_dict())


def test_a_checkpointed_backward_under_another_implementation_is_found(monkeypatch) -> None:
    """A careless version sets its implementation for the forward alone."""
    model = checkpointed(False)(tiny())
    attach_head(model)
    original = layouts.run_call

    def careless(model: Any, trunk: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        install(model)
        out = original(model, trunk, call, *args, **kwargs)
        if torch.is_grad_enabled():
            model.set_attn_implementation("sdpa")
        return out

    assert unusable(model) == ""
    monkeypatch.setattr(layouts, "run_call", careless)
    with pytest.raises(LayoutDiffers, match=r"(the gradient differs|the step fails)"):
        step(model, padded_batch(SHAPES), "shared")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_without_segments_the_model_is_what_it_was(attention: str) -> None:
    """Generation from prompts padded on the left: a mask that were always empty would break it."""
    model = tiny(attn_implementation=attention).eval()
    batch = padded_batch([(9, 3, 2), (3, 2, 1)], left=True)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            return ids, model(**inputs).logits

    before = outputs()
    assert install(model) == "" and installed(model) == attention
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:1])
    for a, b in zip(before, outputs(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_layer_that_loses_the_keyword_is_named() -> None:
    model = tiny()
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, segments=None, **kwargs: forward(*args, **kwargs)
    assert "LlamaAttention of layer 1 lost the keyword `segments`" in unusable(model)
    assert model.config._attn_implementation == "sdpa"  # put back


def test_a_layer_that_does_not_call_attention_is_noticed() -> None:
    model = tiny()
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert "has 2 layers and called attention 1 times" in unusable(model)


def test_a_lost_layer_later_on_is_an_error() -> None:
    """Each forward counts, not the first alone."""
    model = tiny()
    attach_head(model)
    batch = padded_batch(SHAPES)
    step(model, batch, "shared")
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(ValueError, match="has 2 layers and called attention 1 times"):
        step(model, batch, "shared")


def test_a_compiled_model_excuses_no_other() -> None:
    """A model that is not compiled is counted, whatever was compiled before it."""
    compiled = tiny(dtype=torch.float32)
    attach_head(compiled)
    compiled.model.compile(backend="eager")
    step(compiled, padded_batch(SHAPES), "shared")
    torch._dynamo.reset()
    test_a_layer_that_does_not_call_attention_is_noticed()
    test_a_lost_layer_later_on_is_an_error()


def test_layers_that_are_dropped_at_random_are_no_lost_ones() -> None:
    model = tiny("OPT", dtype=torch.float32, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.5)
    attach_head(model)
    model.train()
    torch.manual_seed(0)
    for _ in range(6):
        step(model, padded_batch(SHAPES), "shared")
    model.eval()  # where none is
    model.model.decoder.layers[0].self_attn.forward = lambda hidden_states, **_: (
        hidden_states,
        None,
    )
    with pytest.raises(ValueError, match="has 2 layers and called attention 1 times"):
        step(model, padded_batch(SHAPES), "shared")


BYPASSING = {
    "Falcon": {},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "GPTNeo": {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "XGLM": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64},
}


@pytest.mark.parametrize("name", BYPASSING)
def test_models_that_bypass_the_interface_take_padded_rows(name: str, caplog) -> None:
    model = tiny(name, dtype=torch.float32, **BYPASSING[name])
    attach_head(model)
    before = model.config._attn_implementation
    batch = padded_batch(SHAPES)
    for _ in range(2):
        step(model, batch, "auto")
    assert model.config._attn_implementation == before
    told = [r.getMessage() for r in caplog.records if r.name == "dpo_kernels.layouts"]
    assert len(told) == 1 and "padded rows, because" in told[0] and "AttentionInterface" in told[0]
    with pytest.raises(ValueError, match=r"layout=shared.*AttentionInterface"):
        step(model, batch, "shared")


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BY_MASK = {
    "Llama4Text": {
        "head_dim": 8,
        "attention_chunk_size": 8,
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
    },
    "Qwen2Moe": {
        **EXPERTS,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "shared_expert_intermediate_size": 16,
    },
    "Phimoe": {"sliding_window": 8, "num_local_experts": 4},
    "Doge": {"sliding_window": 8},
}


def test_embeddings_that_are_scaled_in_place_are_checked() -> None:
    model = tiny("CTRL", n_embd=32, n_layer=2, n_head=4, dff=48, n_positions=64, **NO_DROPOUT)
    attach_head(model)
    step(model, padded_batch(SHAPES), "packed")
    assert known(model).checked


@pytest.mark.parametrize("name", BY_MASK)
def test_what_a_mask_alone_says_is_refused(name: str) -> None:
    """Chunks of Llama 4, windows of Qwen2-MoE, PhiMoE and Doge never reach attention."""
    try:
        model = tiny(name, **BY_MASK[name], experts_implementation="eager")
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"{name} is not in this transformers: {error}")
    reason = unusable(model)
    assert "its mask says" in reason and "of layer" in reason, reason


def test_an_unknown_keyword_is_refused_by_name() -> None:
    model = tiny()
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, position_bias=torch.ones(1), **kwargs)
    assert "layer 1 gives attention position_bias, unknown to segments" in unusable(model)


def test_bidirectional_attention_is_refused() -> None:
    model = tiny()
    model.model.layers[0].self_attn.is_causal = False
    assert "layer 0 does not attend causally" in unusable(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mamba", {"state_size": 4}),
        (
            "FalconH1",
            {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4},
        ),
    ],
)
def test_a_state_that_cannot_fork_is_refused(name: str, options: dict[str, Any]) -> None:
    try:
        model = tiny(name, dtype=torch.float32, **options)
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"{name} is not in this transformers: {error}")
    assert unusable(model)


def test_an_older_transformers_takes_padded_rows(monkeypatch) -> None:
    monkeypatch.setattr(segment_attention, "transformers_before", lambda *release: True)
    assert "before 4.55" in unusable(tiny())


def test_a_routers_loss_is_packed_and_not_shared() -> None:
    """A shared prompt would be routed once; padding counts for nothing either way."""
    model = tiny("Mixtral", **MOE, router_aux_loss_coef=0.5, output_router_logits=True)
    attach_head(model)
    batch = padded_batch(SHAPES)
    with Float64():
        same(model, batch, "packed", 1e-12)
    single = tiny("Mixtral", torch.float32, **MOE, router_aux_loss_coef=0.5)
    attach_head(single)
    step(single, batch, "auto")
    assert "layout packed" in layout_report(single)
    with pytest.raises(ValueError, match=r"layout=shared.*auxiliary loss"):
        step(model, batch, "shared")


def test_images_and_other_inputs_stay_padded(caplog) -> None:
    model = tiny()
    attach_head(model)
    batch = padded_batch(SHAPES)
    with pytest.raises(ValueError, match="token_type_ids"):
        step(model, {**batch, "token_type_ids": torch.zeros_like(batch["labels"])}, "packed")
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][0, 2] = 0
    with pytest.raises(ValueError, match="not in one piece"):
        step(model, holes, "shared")
    single = tiny(dtype=torch.float32)
    attach_head(single)
    step(single, holes, "auto")
    assert "padding between tokens" in caplog.text


def test_boundaries_are_made_once_a_batch(monkeypatch) -> None:
    """Not once a layer, where each copy to a GPU would be waited for."""
    made = []
    original = Segments._make_bounds
    monkeypatch.setattr(
        Segments, "_make_bounds", lambda self, device: made.append(0) or original(self, device)
    )
    model = tiny(num_hidden_layers=4)
    attach_head(model)
    batch = padded_batch(SHAPES)
    step(model, batch, "shared")
    made.clear()
    step(model, batch, "shared")
    assert len(made) == 1


# --- the first-batch check ---


def leak(query: Any, key: Any, value: Any, segments: Segments, options: Any) -> torch.Tensor:
    """A careless attention: `is_causal` over the whole row."""
    whole = Segments([Segment(sum(segments.lengths))])
    return segment_kernels.each_segment(query, key, value, whole, options)


def test_a_layout_that_differs_falls_back_or_stops(monkeypatch, caplog) -> None:
    batch = padded_batch(SHAPES)
    for layout in ("auto", "shared", "packed"):
        model = tiny(dtype=torch.float32)
        attach_head(model)
        assert unusable(model) == ""  # the probe of the model is passed
        monkeypatch.setattr(segment_attention, "attend", leak)
        if layout == "auto":
            out, _ = step(model, batch, layout)
            monkeypatch.undo()
            assert out.loss == step(model, batch, "padded")[0].loss
            assert "padded rows, because on the first batch log-probs differ" in caplog.text
        else:
            with pytest.raises(LayoutDiffers, match=rf"layout={layout}: log-probs.*layer 0"):
                step(model, batch, layout)
            step(model, batch, layout, check_layout=False) if layout == "packed" else None
            monkeypatch.undo()


def test_the_check_can_be_left_out_and_runs_once(monkeypatch) -> None:
    runs = []
    original = layout_check._compare
    monkeypatch.setattr(layout_check, "_compare", lambda *a: runs.append(0) or original(*a))
    model = tiny(dtype=torch.float32)
    attach_head(model)
    batch = padded_batch(SHAPES)
    step(model, batch, "shared", check_layout=False)
    assert not runs
    for _ in range(2):
        step(model, batch, "shared")
    assert len(runs) == 1
    assert all(p.requires_grad for p in model.parameters()) and model.training


def test_the_check_leaves_no_gradient_behind() -> None:
    model = tiny()
    attach_head(model)
    batch = padded_batch(SHAPES)
    with Float64():
        _, first = step(model, batch, "shared")
        _, second = step(model, batch, "shared")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_check_is_of_few_pairs_within_half_the_batch(monkeypatch) -> None:
    seen = []
    original = layout_check.check_first_batch
    from dpo_kernels.models import attached

    monkeypatch.setattr(
        attached,
        "check_first_batch",
        lambda model, pairs, *rest: seen.append(len(pairs)) or original(model, pairs, *rest),
    )
    for count, expected in ((1, 1), (4, 2), (12, 4)):
        model = tiny(dtype=torch.float32)
        attach_head(model)
        step(model, padded_batch([(6, 4, 5)] * count), "shared")
        assert seen.pop() == expected


def test_old_names_of_the_layout() -> None:
    assert FusedOptions().layout == "auto" and not FusedOptions().share_prefix
    assert FusedOptions(share_prefix=True).layout == "shared"
    assert FusedOptions(layout="prefix").share_prefix
    assert FusedOptions(share_prefix=False).layout == "padded"
    with pytest.raises(ValueError, match="share_prefix=True is another name"):
        FusedOptions(share_prefix=True, layout="packed")
    with pytest.raises(ValueError, match="layout must be one of"):
        FusedOptions(layout="rows")


def test_the_step_0_loss_is_log_2_in_every_layout() -> None:
    model = tiny(dtype=torch.float32)
    plain.attach(model)
    batch = padded_batch(SHAPES)
    for layout in ("padded", "packed", "shared", "auto"):
        ref = plain.reference_logps(model, batch, fused={"layout": layout})
        out = plain.dpo_step(model, batch, ref_logps=ref, fused={"layout": layout})
        assert float(out.loss) == pytest.approx(math.log(2), abs=1e-6)


def test_no_segments_outside_a_segment_forward() -> None:
    with segment_forward() as seen:
        assert segment_attention._inside() and seen.calls == 0
    assert not segment_attention._inside()
