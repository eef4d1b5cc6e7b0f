"""Attention within the segments of a packed row (`data.segments`), by what runs fastest here.

    varlen     fp16 / bf16 on a GPU: variable-length flash attention with different boundaries of
               queries and keys, causal at the bottom right; torch's own, else flash-attn's
    sdpa       scaled_dot_product_attention of each segment. Its `is_causal` aligns at the top left,
               so a segment that sees a parent goes through a mask
    explicit   scores, softmax, product, as transformers' eager functions write them: for a model
               that was loaded so, soft-capped scores (Gemma 2) and attention sinks (gpt-oss)

Under torch.compile `varlen` is traced with boundaries as tensors, and the others stand behind one
operator, so that new lengths do not compile again.

Letters: `Hq`, `Hk` heads of queries and of keys, `T` tokens, `D` head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.segments import Segment, Segments


class AttentionOptions(NamedTuple):
    """What attention receives beside queries, keys and values."""

    scale: float
    window: int | None = None  # keys that a query sees, itself among them
    softcap: float | None = None
    sinks: Tensor | None = None  # [Hq] a logit that takes part in the softmax and is left out
    dropout: float = 0.0
    explicit: bool = False  # the model was loaded with eager attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions
) -> Tensor:
    """[1, T, Hq, D] from query [1, Hq, T, D], key and value [1, Hk, T, D]."""
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    fast = _varlen(query, key, value, options)
    if fast is not None:
        bounds = segments.bounds(query.device)
        compiled = torch.compiler.is_compiling()
        return fast(query, key, value, bounds, options, compiled)[None]
    if torch.compiler.is_compiling():
        if options.dropout:
            raise ValueError("attention dropout under torch.compile: set attention_dropout to 0")
        return _operator(
            query,
            key,
            value,
            segments.table,
            options.sinks,
            options.scale,
            options.window or 0,
            options.softcap or 0.0,
            options.explicit,
        )
    return each_segment(query, key, value, segments, options)


# --- one segment at a time ---


def each_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: AttentionOptions
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    # Splits, whose backward is one concatenation: a slice's would be a row of zeros each.
    q, k, v = (x.split(segments.lengths, 2) for x in (query, key, value))
    eager = options.explicit or options.softcap is not None or options.sinks is not None
    one = _explicit if eager else _sdpa
    out = []
    for i, part in enumerate(segments.parts):
        keys, values = _seen(part, k, i), _seen(part, v, i)
        seen = segments.seen(part, options.window, query.device)
        out.append(one(q[i], keys, values, seen, options))
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _seen(part: Segment, x: tuple[Tensor, ...], own: int) -> Tensor:
    if not part.prefix:
        return x[own]
    return torch.cat([x[part.parent][:, :, : part.prefix], x[own]], 2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: AttentionOptions
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        dropout_p=options.dropout,
        is_causal=seen is None and q.shape[2] > 1,
        scale=options.scale,
    )


def _weights(
    q: Tensor, k: Tensor, seen: Tensor | None, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """(probabilities, soft-capped scores) of a segment, in the steps of transformers' eager."""
    scores = torch.matmul(q, k.transpose(2, 3)) * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if seen is None:
        Q, K = q.shape[2], k.shape[2]
        seen = torch.ones(Q, K, dtype=torch.bool, device=q.device).tril()
    masked = scores + torch.zeros_like(scores[0, 0]).masked_fill(
        ~seen, torch.finfo(scores.dtype).min
    )
    if options.sinks is not None:
        sinks = options.sinks.reshape(1, -1, 1, 1).expand(*masked.shape[:3], 1).to(masked.dtype)
        masked = torch.cat([masked, sinks], -1)
        masked = masked - masked.max(-1, keepdim=True).values
        return F.softmax(masked, -1, dtype=masked.dtype)[..., :-1], scores
    eager = options.explicit or options.softcap is not None  # in fp32 there, even of float64
    wide = torch.float32 if eager else torch.promote_types(q.dtype, torch.float32)
    return F.softmax(masked, -1, dtype=wide).to(q.dtype), scores


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, options: AttentionOptions
) -> Tensor:
    weights, _ = _weights(q, k, seen, options)
    if options.dropout:
        weights = F.dropout(weights, options.dropout)
    return torch.matmul(weights.to(v.dtype), v)


# --- flash attention over the whole row ---

_LARGEST_HEAD = 256


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Callable[..., Tensor] | None:
    """The variable-length function that takes this; None: each segment alone."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type != "cuda" or not half or options.sinks is not None:
        return None
    D = query.shape[-1]
    if D > _LARGEST_HEAD or D % 8 or value.shape[-1] != D or key.dtype != query.dtype:
        return None
    windows, softcaps, dropout = options.window is not None, options.softcap, options.dropout
    own = torch_varlen()
    if own is not None and not dropout and softcaps is None and (own.windows or not windows):
        return functools.partial(_torch_varlen, own)
    other = flash_attn()
    return functools.partial(_flash_attn, other) if other is not None else None


class TorchVarlen(NamedTuple):
    """torch's varlen_attn, and what this release of it takes."""

    function: Callable[..., Any]
    windows: bool
    heads: bool  # fewer heads of keys than of queries


@functools.cache
def torch_varlen() -> TorchVarlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    if "scale" not in names or not {"window_size", "is_causal"} & set(names):
        return None
    return TorchVarlen(varlen_attn, "window_size" in names, "enable_gqa" in names)


@functools.cache
def flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's function, where it is installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def _rows(x: Tensor, keys: Tensor | None = None) -> Tensor:
    """[T, H, D] of [1, H, T, D], or of the places `keys` of it."""
    row = x[0].transpose(0, 1)
    return row if keys is None else row.index_select(0, keys)


def _most(bounds: Any, q: Tensor, k: Tensor, compiled: bool) -> tuple[int, int]:
    # Traced, all tokens stand for the longest: no number of the batch is compiled in.
    return (q.shape[0], k.shape[0]) if compiled else (bounds.max_q, bounds.max_k)


def _torch_varlen(
    own: TorchVarlen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Any,
    options: AttentionOptions,
    compiled: bool,
) -> Tensor:
    q, k, v = _rows(query), _rows(key, bounds.keys), _rows(value, bounds.keys)
    groups = q.shape[1] // k.shape[1]
    extra: dict[str, Any] = {}
    if groups > 1 and own.heads:
        extra["enable_gqa"] = True
    elif groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    if own.windows:  # a window of w keys is w - 1 to the left and the query's own
        extra["window_size"] = (-1 if options.window is None else options.window - 1, 0)
    else:
        extra["is_causal"] = True
    most = _most(bounds, q, k, compiled)
    return own.function(q, k, v, bounds.cu_q, bounds.cu_k, *most, scale=options.scale, **extra)


def _flash_attn(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Any,
    options: AttentionOptions,
    compiled: bool,
) -> Tensor:
    q, k, v = _rows(query), _rows(key, bounds.keys), _rows(value, bounds.keys)
    return function(
        q,
        k,
        v,
        bounds.cu_q,
        bounds.cu_k,
        *_most(bounds, q, k, compiled),
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=True,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )


# --- one operator, for torch.compile ---


def _arguments(
    table: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float, explicit: bool
) -> tuple[Segments, AttentionOptions]:
    segments = Segments([Segment(*row) for row in table.tolist()])
    return segments, AttentionOptions(
        scale, window or None, softcap or None, sinks, explicit=explicit
    )


@torch.library.custom_op("dpo_kernels::segment_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    explicit: bool,
) -> Tensor:
    segments, options = _arguments(table, sinks, scale, window, softcap, explicit)
    return each_segment(query, key, value, segments, options)


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    Hq, T = query.shape[1:3]
    return value.new_empty(1, T, Hq, value.shape[-1])


@torch.library.custom_op("dpo_kernels::segment_attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    explicit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    segments, options = _arguments(table, sinks, scale, window, softcap, explicit)
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    dsinks = torch.zeros(query.shape[1], dtype=query.dtype, device=query.device)
    groups = query.shape[1] // key.shape[1]
    starts = [0]
    for part in segments.parts:
        starts.append(starts[-1] + part.length)
    for part, start in zip(segments.parts, starts, strict=False):
        own = slice(start, start + part.length)
        places = torch.arange(own.start, own.stop, device=query.device)
        if part.prefix:
            before = torch.arange(part.prefix, device=query.device) + starts[part.parent]
            places = torch.cat([before, places])
        q, dout = query[:, :, own], grad.transpose(1, 2)[:, :, own].to(query.dtype)
        k, v = (x[:, :, places].repeat_interleave(groups, 1) for x in (key, value))
        weights, scores = _weights(q, k, segments.seen(part, options.window, q.device), options)
        dweights = dout @ v.transpose(2, 3)
        mean = (dweights * weights).sum(-1, keepdim=True)
        dscores = weights * (dweights - mean)
        if sinks is not None:
            dsinks += (-(1 - weights.sum(-1, keepdim=True)) * mean).sum((0, 2, 3))
        if options.softcap is not None:
            dscores = dscores * (1 - (scores / options.softcap) ** 2)
        dscores = dscores * scale
        dq[:, :, own] += dscores @ k
        for out, x in ((dk, dscores.transpose(2, 3) @ q), (dv, weights.transpose(2, 3) @ dout)):
            out.index_add_(2, places, x.unflatten(1, (-1, groups)).sum(2))
    return dq, dk, dv, dsinks


@_operator_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    empty = torch.empty_like
    return empty(query), empty(key), empty(value), query.new_empty(query.shape[1])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(ctx: Any, grad: Tensor) -> tuple:
    tensors = ctx.saved_tensors
    dq, dk, dv, dsinks = _operator_backward(grad, *tensors, *ctx.rest)
    sinks = tensors[4]
    return dq, dk, dv, None, None if sinks is None else dsinks.to(sinks.dtype), *[None] * 4


_operator.register_autograd(_backward, setup_context=_setup)
