"""Each trap of the layouts: a careless version is noticed, and the GPU's way on a CPU.

A careless version is put in the place of the right one; the test that guards it must then fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_segments as guards
import torch
from float64_math import Float64
from segment_steps import SHAPES, padded_batch, same, step, tiny
from torch import Tensor
from torch.nn import functional as F

import dpo_kernels.data.segments as data_segments
from dpo_kernels.data import Sharing
from dpo_kernels.data.segments import Segment, Segments
from dpo_kernels.models import layout_check, layouts, segment_attention, segment_kernels
from dpo_kernels.models.attached import attach_head
from dpo_kernels.models.layouts import known, unusable
from dpo_kernels.models.segment_attention import NAMES, SegmentForward
from dpo_kernels.models.segment_kernels import AttentionOptions, TorchVarlen

pytestmark = guards.pytestmark
NOTICED = (AssertionError, ValueError, pytest.fail.Exception)
Patch = pytest.MonkeyPatch


# --- careless versions ---


def registered(patch: Patch, interface: Any, function: Callable[..., Any]) -> None:
    patch.setitem(interface._global_mapping, NAMES["sdpa"], function)


def mask_always_empty(patch: Patch) -> None:
    from transformers.masking_utils import AttentionMaskInterface

    registered(patch, AttentionMaskInterface, lambda *args, **kwargs: None)


def attention_never_delegates(patch: Patch) -> None:
    from transformers import AttentionInterface

    def forward(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return out.transpose(1, 2).contiguous(), None

    registered(patch, AttentionInterface, forward)


def calls_are_not_counted(patch: Patch) -> None:
    patch.setattr(SegmentForward, "check", lambda self, model: None)


def masks_are_not_compared(patch: Patch) -> None:
    patch.setattr(segment_attention, "_said", lambda kwargs: None)


def keywords_are_swallowed(patch: Patch) -> None:
    patch.setattr(segment_attention, "_HARMLESS", {*segment_attention._HARMLESS, "position_bias"})


def options_with(patch: Patch, **changed: Any) -> None:
    original = segment_attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: Any) -> Tensor:
        new = {name: change(getattr(options, name)) for name, change in changed.items()}
        return original(q, k, v, segments, options._replace(**new))

    patch.setattr(segment_attention, "attend", attend)


def causal_at_the_top_left(patch: Patch) -> None:
    def sdpa(q: Tensor, k: Tensor, v: Tensor, seen: Any, options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.scale)

    patch.setattr(segment_kernels, "_sdpa", sdpa)


def positions_of_the_row(patch: Patch) -> None:
    original = layouts.run_call

    def run_call(model: Any, trunk: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        if call.position_ids is not None:
            places = torch.arange(call.position_ids.shape[1])[None]
            call = layouts.TrunkCall(call.input_ids, places, call.segments, call.lengths)
        return original(model, trunk, call, *args, **kwargs)

    patch.setattr(layouts, "run_call", run_call)
    patch.setattr(guards.layouts, "run_call", run_call)


def routed_prompts_are_shared(patch: Patch) -> None:
    original = Sharing.shares
    patch.setattr(
        Sharing, "shares", lambda self, *a: original(Sharing("shared") if a[0] else self, *a)
    )


def other_inputs_are_dropped(patch: Patch) -> None:
    patch.setattr(layouts, "_TAKEN", {*layouts._TAKEN, "token_type_ids"})


def nothing_is_compared(patch: Patch) -> None:
    patch.setattr(layout_check, "_problem", lambda *runs: "")


def a_compiled_model_excuses_all(patch: Patch) -> None:
    patch.setattr(segment_attention, "_compiled", lambda model, calls: True)


loss_and_gradients = guards.test_loss_and_gradients_are_those_of_padded_rows
CARELESS: dict[str, tuple[Callable[[Patch], None], Callable[[], Any]]] = {
    "mask always empty": (
        mask_always_empty,
        lambda: guards.test_without_segments_the_model_is_what_it_was("sdpa"),
    ),
    "attention never delegates": (
        attention_never_delegates,
        lambda: guards.test_without_segments_the_model_is_what_it_was("sdpa"),
    ),
    "calls not counted": (
        calls_are_not_counted,
        guards.test_a_layer_that_does_not_call_attention_is_noticed,
    ),
    "calls not counted later on": (
        calls_are_not_counted,
        guards.test_a_lost_layer_later_on_is_an_error,
    ),
    "a compiled model excuses all": (
        a_compiled_model_excuses_all,
        guards.test_a_lost_layer_later_on_is_an_error,
    ),
    "masks not compared": (
        masks_are_not_compared,
        lambda: guards.test_what_a_mask_alone_says_is_refused("Qwen2Moe"),
    ),
    "keywords swallowed": (
        keywords_are_swallowed,
        guards.test_an_unknown_keyword_is_refused_by_name,
    ),
    "softcap ignored": (
        functools.partial(options_with, softcap=lambda cap: None),
        lambda: loss_and_gradients("softcap", "shared"),
    ),
    "sinks ignored": (
        functools.partial(options_with, sinks=lambda sinks: None),
        lambda: loss_and_gradients("sinks", "packed"),
    ),
    "windows of one key more": (
        functools.partial(options_with, window=lambda w: w and w + 1),
        lambda: loss_and_gradients("windows", "packed"),
    ),
    "causal at the top left": (
        causal_at_the_top_left,
        lambda: loss_and_gradients("dense", "shared"),
    ),
    "positions of the row": (
        positions_of_the_row,
        lambda: loss_and_gradients("learned positions", "packed"),
    ),
    "routed prompts shared": (
        routed_prompts_are_shared,
        guards.test_a_routers_loss_is_packed_and_not_shared,
    ),
    "other inputs dropped": (
        other_inputs_are_dropped,
        lambda: other_inputs_stay_padded("token_type_ids"),
    ),
    "first batch not compared": (nothing_is_compared, lambda: differing_attention_is_found()),
}


@pytest.mark.parametrize("name", CARELESS)
def test_a_careless_version_is_noticed(name: str) -> None:
    careless, guard = CARELESS[name]
    with pytest.MonkeyPatch.context() as patch:
        careless(patch)
        with pytest.raises(NOTICED):
            guard()


# --- guards that stand here ---


def other_inputs_stay_padded(name: str) -> None:
    model = tiny()
    attach_head(model)
    batch = padded_batch(SHAPES)
    with pytest.raises(ValueError, match=f"input_ids and attention_mask alone, got {name}"):
        step(model, {**batch, name: torch.zeros_like(batch["labels"])}, "packed")


@pytest.mark.parametrize("name", ["token_type_ids", "pixel_values", "inputs_embeds"])
def test_what_cannot_be_gathered_by_token_stays_padded(name: str) -> None:
    other_inputs_stay_padded(name)


def differing_attention_is_found() -> None:
    model = tiny(dtype=torch.float32)
    attach_head(model)
    assert unusable(model) == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_attention, "attend", guards.leak)
        with pytest.raises(layout_check.LayoutDiffers):
            step(model, padded_batch(SHAPES), "shared")


def test_differing_attention_is_found() -> None:
    differing_attention_is_found()


def test_alibi_stays_padded() -> None:
    model = tiny()
    model.config.alibi = True
    assert unusable(model) == "ALiBi counts positions of the row"


def test_the_probe_of_a_model_is_counted_whatever_was_compiled(monkeypatch: Patch) -> None:
    """Compiled from a function that calls it, a class bears no mark: its next model is probed."""
    model = tiny()
    monkeypatch.setattr(segment_attention, "_TRACED", {type(model)})
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    assert "has 2 layers and called attention 0 times" in unusable(model)


def test_bf16_is_no_difference() -> None:
    """The tolerance is what the same rows differ by between two padded shapes."""
    for autocast in (False, True):
        model = tiny(dtype=torch.float32 if autocast else torch.bfloat16)
        attach_head(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            step(model, padded_batch(SHAPES), "shared")
        state = known(model)
        assert state.checked and not state.unusable and "layout shared" in state.report


MORE = {
    "Qwen2": {},
    "Phi3": {"num_key_value_heads": 4},
    "Olmo2": {},
    "Cohere2": {"sliding_window": 7, "num_hidden_layers": 4, "head_dim": 8},
    "Granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0},
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "router_aux_loss_coef": 0.0,
        "experts_implementation": "eager",
    },
}


@pytest.mark.parametrize("name", MORE)
def test_more_architectures_are_equal_to_padded_rows(name: str) -> None:
    try:
        model = tiny(name, **MORE[name])
    except (AttributeError, TypeError, ValueError) as error:
        pytest.skip(f"{name} is not in this transformers: {error}")
    attach_head(model)
    with Float64():
        same(model, padded_batch(SHAPES), "packed", 1e-12)
        same(model, padded_batch(SHAPES), "shared", 1e-12)
    assert known(model).checked and not known(model).unusable


# --- the GPU's way, on a CPU ---


def varlen(
    q: Tensor,  # [tokens, Hq, D]
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int] = (-1, 0),
) -> Tensor:
    """Variable-length attention as its documentation has it: causal at the bottom right."""
    assert max_q >= int(cu_q.diff().max()) and max_k >= int(cu_k.diff().max())
    assert cu_q.dtype == cu_k.dtype == torch.int32 and window[1] == 0
    out = []
    for i in range(len(cu_q) - 1):
        one_q, one_k, one_v = (
            x[int(cu[i]) : int(cu[i + 1])].transpose(0, 1)
            for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))
        )
        one_k, one_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (one_k, one_v))
        Q, K = one_q.shape[1], one_k.shape[1]
        left = torch.arange(K - Q, K)[:, None] - torch.arange(K)
        seen = (left >= 0) & ((left <= window[0]) if window[0] >= 0 else True)
        out.append(F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=seen, scale=scale))
    return torch.cat(out, 1).transpose(0, 1)


def newest(q: Any, k: Any, v: Any, *a: Any, scale: float, window_size: Any, enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    return varlen(q, k, v, *a, scale, window_size)


def without_windows(q: Any, k: Any, v: Any, *a: Any, scale: float, is_causal: bool):
    assert is_causal and q.shape[1] == k.shape[1]
    return varlen(q, k, v, *a, scale)


def flash(q: Any, k: Any, v: Any, *a: Any, softmax_scale: float, window_size: Any, **rest: Any):
    assert rest == {"dropout_p": 0.0, "causal": True, "softcap": 0.0}
    return varlen(q, k, v, *a, softmax_scale, window_size)


WAYS = {
    "torch": functools.partial(segment_kernels._torch_varlen, TorchVarlen(newest, True, True)),
    "torch, older": functools.partial(
        segment_kernels._torch_varlen, TorchVarlen(without_windows, False, False)
    ),
    "flash-attn": functools.partial(segment_kernels._flash_attn, flash),
}


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("way", WAYS)
def test_boundaries_of_queries_and_keys_differ(way: str, window: int | None) -> None:
    """A rejected completion sees the prompt and itself; a window of w keys is (w - 1, 0)."""
    if way == "torch, older" and window is not None:
        return
    segments = Segments([Segment(7), Segment(3, 0, 4), Segment(5), Segment(2, 2, 1)])
    g = torch.Generator().manual_seed(0)
    T = sum(segments.lengths)
    q, k, v = (torch.randn(1, h, T, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2))
    options = AttentionOptions(0.3, window)
    truth = segment_kernels.each_segment(q, k, v, segments, options)
    for compiled in (False, True):
        found = WAYS[way](q, k, v, segments.bounds("cpu"), options, compiled)[None]
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_by_flash_attention(way: str, monkeypatch: Patch) -> None:
    """As on a GPU: every layer goes by boundaries, which are made once a batch."""
    made = []
    original = Segments._make_bounds
    monkeypatch.setattr(
        data_segments.Segments,
        "_make_bounds",
        lambda self, device: made.append(0) or original(self, device),
    )
    monkeypatch.setattr(segment_kernels, "_varlen", lambda *args: WAYS[way])
    model = tiny(num_hidden_layers=4)
    attach_head(model)
    batch = padded_batch(SHAPES)
    with Float64():
        same(model, batch, "shared", 1e-12)
    made.clear()
    step(model, batch, "shared")
    assert len(made) == 1


def on_gpu(dtype: torch.dtype = torch.bfloat16, D: int = 64) -> Any:
    return SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, 4, 9, D))


def test_what_flash_attention_takes(monkeypatch: Patch) -> None:
    """Half precision without dropout and sinks; soft-capping and old torch go to flash-attn."""

    def way(x: Any, **options: Any) -> str:
        found = segment_kernels._varlen(x, x, x, AttentionOptions(0.1, **options))
        return "" if found is None else found.func.__name__

    newer, older = TorchVarlen(newest, True, True), TorchVarlen(without_windows, False, False)
    for flash_attn in (None, flash):
        other = "_flash_attn" if flash_attn else ""
        monkeypatch.setattr(segment_kernels, "flash_attn", lambda found=flash_attn: found)
        monkeypatch.setattr(segment_kernels, "torch_varlen", lambda: newer)
        assert way(on_gpu()) == way(on_gpu(torch.float16), window=5) == "_torch_varlen"
        assert way(on_gpu(), dropout=0.1) == way(on_gpu(), softcap=3.0) == other
        assert way(on_gpu(torch.float32)) == way(on_gpu(D=264)) == way(on_gpu(D=12)) == ""
        assert way(on_gpu(), sinks=torch.zeros(4)) == ""
        monkeypatch.setattr(segment_kernels, "torch_varlen", lambda: older)
        assert way(on_gpu()) == "_torch_varlen" and way(on_gpu(), window=5) == other
        monkeypatch.setattr(segment_kernels, "torch_varlen", lambda: None)
        assert way(on_gpu()) == other
    assert way(SimpleNamespace(**{**vars(on_gpu()), "device": SimpleNamespace(type="cpu")})) == ""


def test_the_signature_of_this_torch_is_probed(monkeypatch: Patch) -> None:
    found = segment_kernels.torch_varlen.__wrapped__()
    if found is not None:
        assert callable(found.function) and isinstance(found.windows, bool)
    module = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10")
    for function, expected in (
        (lambda q, k, v, cu_q, cu_k, a, b, is_causal=False, return_aux=None: q, None),
        (lambda q, k, v, cu_q, cu_k, a, b, is_causal=False, scale=None: q, (False, False)),
        (lambda q, k, v, a, b, *, scale=None, window_size=(-1, -1): q, (True, False)),
        (lambda q, scale=None, window_size=(-1, -1), enable_gqa=False: q, (True, True)),
    ):
        monkeypatch.setattr(module, "varlen_attn", function)
        found = segment_kernels.torch_varlen.__wrapped__()
        assert (found and found[1:]) == expected
