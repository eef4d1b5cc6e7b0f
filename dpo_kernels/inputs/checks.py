"""Checks of arguments: each raises, naming the argument, what was expected and what came."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


LARGEST = 2**63 - 1  # what the schema of an op takes as an integer
# Numbers reach the kernels as fp32: neither these nor their inverses may leave its range.
FP32 = torch.finfo(torch.float32)


def shown(value: object) -> str:
    """`value` for a message: cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(name: str, value: object, expected: str = "a finite number") -> float:
    """A finite number that is no boolean."""
    if not is_number(value):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    assert isinstance(value, (int, float))
    # An integer may be larger than any float: compared, not converted.
    if not abs(value) <= 1.7976931348623157e308:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return float(value)


def positive(name: str, value: object, expected: str = "a positive finite number") -> float:
    x = number(name, value, expected)
    if not x > 0:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")
    return x


def whole(name: str, value: object, least: int = 0, most: int = LARGEST) -> int:
    """An integer within [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be an integer in [{least}, {most}], got {shown(value)}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def choice(name: str, value: object, known: tuple[str, ...], more: str = "") -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {known}{more}, got {type(value).__name__}")
    if value not in known:
        raise ValueError(f"{name} must be one of {known}{more}, got {shown(value)}")
    return value


def names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """`TypeError` for a name that is not known, with the nearest that is."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"unknown {what} {name!r}{hint}")


def values(name: str, value: Tensor, good: Callable[[Tensor], Tensor], expected: str) -> None:
    """Where values may be looked at, all of them are `good`."""
    if readable(value) and not bool((ok := good(value.detach())).all()):
        raise ValueError(f"{name} must be {expected}, got {value[~ok].flatten()[0].item()}")


def counts(name: str, value: Tensor) -> None:
    """Counts of tokens: whole numbers >= 0 in an integer or a floating dtype."""
    if value.dtype not in FLOATS:
        integer(name, value, (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
    values(name, value, lambda x: x.isfinite() & (x >= 0) & (x == x.floor()), "counts of tokens")


def floating(name: str, value: object) -> Tensor:
    tensor = is_tensor(name, value)
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    return tensor


def integer(name: str, value: object, dtypes: tuple[torch.dtype, ...] = (torch.int64,)) -> Tensor:
    tensor = is_tensor(name, value)
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d) for d in dtypes)
        raise ValueError(f"{name} must be {names}, got {tensor.dtype}")
    return tensor


def shape(name: str, value: Tensor, expected: tuple[int, ...], why: str = "") -> None:
    if tuple(value.shape) != expected:
        because = f" ({why})" if why else ""
        raise ValueError(
            f"{name} must have shape {list(expected)}{because}, got {list(value.shape)}"
        )


def same_device(name: str, value: Tensor, other: str, reference: Tensor) -> None:
    if value.device != reference.device:
        raise ValueError(f"{name} is on {value.device}, but {other} is on {reference.device}")


def plain(*values: Tensor | None) -> bool:
    """Whether these are tensors with values: not traced, no subclass, no transform around them."""
    if torch.compiler.is_compiling():
        return False
    for x in values:  # noqa: SIM110  (a generator takes longer)
        if x is not None and (type(x) not in _PLAIN or _is_wrapped(x)):
            return False
    return True


def readable(value: Tensor) -> bool:
    """Whether values may be looked at here: on the CPU, and not while being traced."""
    return value.device.type == "cpu" and plain(value)


def labels_in_range(labels: Tensor, V: int, ignore_index: int) -> None:
    """A label is `ignore_index` or in [0, V). Where they cannot be read the kernels give NaN."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise ValueError(
            f"labels must be in [0, {V}) or ignore_index={ignore_index}, "
            f"got {int(labels[tuple(where)])} at {where}"
        )


def lengths_of(name: str, value: object, S: int) -> tuple[int, ...] | None:
    """[S] integers >= 0 that the host can read, as numbers; None while they are being traced."""
    if isinstance(value, Tensor):
        integer(name, value, (torch.int32, torch.int64))
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {value.device}")
        shape(name, value, (S,), "one count a sequence")
        if not plain(value):
            return None
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not {int}.issuperset(map(type, value)):
        raise TypeError(f"{name} must be integers, a CPU tensor or a list, got {shown(value)}")
    if len(value) != S or not (min(value, default=0) >= 0 and max(value, default=0) <= LARGEST):
        raise ValueError(f"{name} must be {S} counts of scored tokens, got {shown(value)}")
    return tuple(value)


def cu_seqlens_of(value: object, N: int, labels: Tensor) -> Tensor:
    """Checked boundaries: [S + 1] integers from 0 to N that never fall.

    On the CPU beside labels on a GPU they are checked without waiting, then moved.
    """
    cu = integer("cu_seqlens", value, (torch.int32, torch.int64))
    if cu.dim() != 1 or cu.numel() < 2:
        raise ValueError(f"cu_seqlens must have shape [sequences + 1], got {list(cu.shape)}")
    if cu.device.type != "cpu":
        same_device("cu_seqlens", cu, "labels", labels)
    if readable(cu):
        steps = cu.to(torch.int64).diff()  # a difference of int32 may not be one
        if int(cu[0]) != 0 or int(cu[-1]) != N or bool((steps < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the number of rows {N}, got {cu.tolist()[:8]}"
                f"{'...' if cu.numel() > 8 else ''}"
            )
    return cu.to(labels.device, non_blocking=True)
