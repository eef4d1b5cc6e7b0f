"""Segments in a model of transformers: an attention function under its public interfaces.

    reason = install(model)                       # once, for the trainer's life
    with segment_forward() as seen:
        trunk(input_ids=row, position_ids=positions, segments=segments)
    seen.check(model)

`AttentionInterface` and `AttentionMaskInterface` know a name for each implementation that ours
stands in front of. With the keyword `segments`, which a model hands on to its attention, a packed
row is attended to by segment; without it, attention and mask are those of the implementation that
was replaced, as `generate` and other callers had them.

Hazards, each silent if missed:

- The name stays set. Activation checkpointing runs the attention again in the backward; under a
  plain sdpa the keyword would be swallowed and tokens attend across the row.
- The mask is empty only inside `segment_forward`, else generation would attend to padding.
- A layer that loses the keyword, or attention that does not come through the interface, would
  attend across the row: calls are counted, and one without segments is an error.
- What only a mask says (chunks, some windows) would be lost with it: `compare_masks`.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.segments import Segments
from .segment_kernels import AttentionOptions, attend
from .structure import text_config
from .versions import transformers_before

# The implementation that is replaced -> our name. The names hold none of "sdpa", "flash", "flex":
# transformers looks for these.
NAMES = {
    "sdpa": "dpo_segments_1",
    "eager": "dpo_segments_2",
    "flash_attention_2": "dpo_segments_3",
    "flash_attention_3": "dpo_segments_4",
    "flash_attention_4": "dpo_segments_5",
    "flex_attention": "dpo_segments_6",
}
REPLACED = {name: base for base, name in NAMES.items()}

# What reaches attention beside what it computes with, and changes nothing of it.
_HARMLESS = {
    "cache_position",
    "layer_idx",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}


class SegmentError(ValueError):
    """A model whose attention cannot be given segments; the message names the layer."""


@dataclass
class SegmentForward:
    """What one forward with segments has seen of attention."""

    comparing: bool = False
    calls: int = 0
    traced: bool = False  # torch.compile traced attention in this forward

    def check(self, model: Any) -> None:
        """`SegmentError` unless each layer attended once, by segment."""
        if torch.compiler.is_compiling():
            return
        if self.traced:
            _TRACED.add(type(model))
        layers = number_of_layers(model)
        if self.calls < layers and (_drops_layers(model) or _compiled(model, self.calls)):
            return  # attention does not come by here each time
        if self.calls != layers:
            raise SegmentError(
                f"{type(model).__name__} has {layers} layers and called attention {self.calls} "
                "times through transformers' AttentionInterface: a layer keeps a state of its own, "
                "bypasses the interface or calls it more than once"
            )


_active: contextvars.ContextVar[SegmentForward | None] = contextvars.ContextVar(
    "dpo_segments", default=None
)


# Classes of which torch.compile has traced a forward; another model may run the same graph.
_TRACED: set[type] = set()


def _drops_layers(model: nn.Module) -> bool:
    """Whether this model leaves layers out at random as it trains (LayerDrop: OPT and others)."""
    return any(m.training and getattr(m, "layerdrop", 0) for m in model.modules())


def _compiled(model: nn.Module, calls: int) -> bool:
    """Whether this model may run attention as a graph, where calls are not counted."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable"):
            return True
    # Called from a compiled function it bears no mark, and no layer of it is counted.
    return calls == 0 and type(model) in _TRACED


@torch._dynamo.assume_constant_result
def _note_tracing() -> bool:
    seen = _active.get()
    if seen is not None:
        seen.traced = True
    return True


@torch._dynamo.assume_constant_result
def _inside() -> bool:
    """Traced, a constant: a forward with the keyword is compiled apart from one without."""
    return _active.get() is not None


def _comparing() -> bool:
    seen = _active.get()
    return seen is not None and seen.comparing


@contextmanager
def segment_forward(comparing: bool = False) -> Iterator[SegmentForward]:
    """A forward whose attention must be by segment; `comparing`: and must know what masks say."""
    seen = SegmentForward(comparing)
    token = _active.set(seen)
    try:
        yield seen
    finally:
        _active.reset(token)


def number_of_layers(model: Any) -> int:
    return int(text_config(model.config).num_hidden_layers)


# --- the attention function and the mask function of a name ---


def _attention(base: str) -> Callable[..., Any]:
    def forward(
        module: nn.Module,
        query: Tensor,  # [1, Hq, T, D]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        segments: Segments | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if segments is None:
            if _inside():
                raise SegmentError(
                    f"{_layer(module)} lost the keyword `segments` on its way to attention"
                )
            function, module = _replaced(base, module)
            return function(module, query, key, value, attention_mask, *args, **kwargs)
        options = _options(module, query, args, kwargs, base == "eager")
        if torch.compiler.is_compiling():
            _note_tracing()
        else:
            _look(module, attention_mask, options)
        return attend(query, key, value, segments, options), None

    return forward


def _layer(module: Any) -> str:
    at = getattr(module, "layer_idx", None)
    return f"{type(module).__name__}" + ("" if at is None else f" of layer {at}")


def _options(
    module: Any, query: Tensor, args: tuple, kwargs: dict[str, Any], explicit: bool
) -> AttentionOptions:
    """What attention was given, each keyword known; `SegmentError` for one that is not."""
    known = dict(kwargs)
    scale, window, softcap, sinks, dropout, causal = (
        known.pop(name, None)
        for name in ("scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal")
    )
    unknown = [
        name
        for name, value in known.items()
        if name not in _HARMLESS and value is not None and value is not False
    ]
    if unknown or args:
        what = ", ".join(sorted(unknown)) or "arguments by place"
        raise SegmentError(f"{_layer(module)} gives attention {what}, unknown to segments")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if not causal:
        raise SegmentError(f"{_layer(module)} does not attend causally (is_causal=False)")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    return AttentionOptions(scale, window, softcap, sinks, dropout or 0.0, explicit)


def _look(module: Any, mask: Tensor | None, options: AttentionOptions) -> None:
    """Count a call; `SegmentError` for a mask that is not ours or says more than attention got."""
    seen = _active.get()
    if seen is None:  # a backward that runs the layer again
        return
    seen.calls += 1
    if seen.comparing and (mask is None or mask.dim() == 4):
        said = 0.0 if mask is None else float(mask[0, 0, 0, 0])
        received = float(options.window or 0)
        if said != received:
            by_mask = "something else than a window" if said < 0 else f"a window of {int(said)}"
            by_mask = by_mask if said else "no window"
            raise SegmentError(
                f"{_layer(module)}: its mask says {by_mask}, attention receives "
                f"sliding_window={options.window}"
            )
    elif mask is not None:
        raise SegmentError(f"{_layer(module)} makes an attention mask of its own")


class _Instead:
    """An object seen with other values of some attributes."""

    def __init__(self, of: Any, **values: Any) -> None:
        self.__dict__.update(values, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)


def _modules_of(module: Any) -> Iterator[Any]:
    """Source modules of a layer's classes, its own before those of its bases."""
    for kind in type(module).__mro__:
        if kind.__module__ in sys.modules:
            yield sys.modules[kind.__module__]


def _replaced(base: str, module: Any) -> tuple[Callable[..., Any], Any]:
    """The function that a layer would call without us, and the layer as that function reads it."""
    if base == "eager":
        for source in _modules_of(module):
            if hasattr(source, "eager_attention_forward"):
                return source.eager_attention_forward, module
        raise SegmentError(f"{_layer(module)} has no eager_attention_forward beside its class")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as everyones

    functions: Any = everyones
    for source in _modules_of(module):  # some models keep an interface of their own
        if hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            functions = source.ALL_ATTENTION_FUNCTIONS
            break
    if base.startswith("flash"):  # which reads its name once more from the configuration
        module = _Instead(module, config=_Instead(module.config, _attn_implementation=base))
    return functions[base], module


def _mask(base: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        if _inside():
            return _said(kwargs) if _comparing() else None
        from transformers.masking_utils import AttentionMaskInterface

        return AttentionMaskInterface()[base](*args, **kwargs)

    return mask


def _said(kwargs: dict[str, Any]) -> Tensor:
    """[1, 1, Q, K] all of one value: 0 for a causal mask, w for a window of w keys, -1 for others.

    The mask's function is asked for a few queries far out, where every window or chunk shows.
    """
    function, config = kwargs["mask_function"], kwargs.get("config")
    text = text_config(config)
    limits = [
        value
        for name in ("sliding_window", "attention_chunk_size", "attention_window_size")
        if isinstance(value := getattr(text, name, None), int)
    ]
    far = 2 * max([*limits, 64]) + 7
    device = kwargs.get("device")
    zero = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.arange(far + 2, device=device)
    values = set()
    for at in (far, far - max([*limits, 64]) // 2 - 3, far - 1):
        try:
            visible = function(zero, zero, torch.tensor(at, device=device), keys)
        except Exception:  # one that indexes what the batch holds
            values.add(-1)
            break
        visible = torch.as_tensor(visible, device=device).expand(len(keys))
        count = int(visible.sum())
        window = keys > at - count
        if not torch.equal(visible, window & (keys <= at)):
            values.add(-1)
        else:
            values.add(0 if count == at + 1 else count)
    value = float(values.pop()) if len(values) == 1 else -1.0
    K = int(kwargs["kv_length"])
    # transformers before 5 gives the queries' places
    Q = int(kwargs["q_length"]) if "q_length" in kwargs else len(kwargs["cache_position"])
    return torch.full((1, 1, 1, 1), value, device=device).expand(1, 1, Q, K)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for base, name in NAMES.items():
        AttentionInterface.register(name, _attention(base))
        AttentionMaskInterface.register(name, _mask(base))


# When this is imported: a copy or a pickle of a model carries the name.
if not transformers_before(4, 55):
    _register()


# --- on a model ---


def _owner(model: Any) -> Any:
    """The module whose `set_attn_implementation` reaches the layers of the language model."""
    text = text_config(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is text and hasattr(module, "set_attn_implementation"):
            return module
    return model


def installed(model: Any) -> str:
    """The implementation that ours stands in front of in this model; empty if in none."""
    return REPLACED.get(text_config(model.config)._attn_implementation, "")


def install(model: Any) -> str:
    """Set our implementation on a causal LM; why it cannot be, or empty. Once is enough."""
    if transformers_before(4, 55):
        return (
            "transformers before 4.55 cannot change a model's attention (set_attn_implementation)"
        )
    name, owner = type(model).__name__, _owner(model)
    bypasses = f"{name} does not go through transformers' AttentionInterface"
    settable = getattr(type(owner), "_can_set_attn_implementation", None)
    if settable is not None and not settable():
        return bypasses
    text = text_config(model.config)
    base = text._attn_implementation
    if base in REPLACED:
        return ""
    if base not in NAMES:
        return f"attn_implementation={base!r} is not known (known: {', '.join(NAMES)})"
    owner.set_attn_implementation(NAMES[base])
    return "" if installed(model) else bypasses


def uninstall(model: Any) -> None:
    """Put the implementation back that was there before `install`."""
    base = installed(model)
    if base:
        _owner(model).set_attn_implementation(base)
