"""Eager calls of the ops go around their schemas.

A registered op costs tens of microseconds a call, forward and backward each: the dispatcher, a
graph node of `torch.library`, zeros for the outputs that have no gradient. What traces
(`torch.compile`, export, fake tensors, functorch) needs the schema; a plain tensor does not. So
each op is called through `Op`: its body where nothing traces, with an autograd function of the
same `setup_context` and `backward` where a gradient is wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .derivatives import differentiated

_MODES = torch._C._TorchDispatchModeKey
_PLAIN = (Tensor, torch.nn.Parameter)


def eager(*tensors: Tensor | None) -> bool:
    """Whether kernels may be launched on these tensors here: each has values of its own, and
    nothing traces. (A tensor that carries a tangent is none: the schema's path refuses it.)"""
    if torch.compiler.is_compiling() or differentiated() or _traced():
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_meta or x.is_neg()):
            return False
    return True


def _traced() -> bool:
    """Whether a mode stands in for tensors, or writes down what is done to them."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)
    )


class Op:
    """A registered op, and the way around it for eager calls."""

    def __init__(
        self,
        op: Any,  # torch.library.CustomOpDef
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        *,
        writes: int | None = None,  # which argument the body writes
    ) -> None:
        self.op, self.body, self.writes = op, op._init_fn, writes
        parameters = inspect.signature(self.body).parameters.values()
        # One left out at the end is given with its default, None.
        self.nothing: dict[str, Any] = dict.fromkeys(p.name for p in parameters)
        self.function = None
        if backward is not None:
            assert setup_context is not None
            self.function = _function(op._opoverload.name(), self.body, setup_context, backward)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*arguments)
        tensors = []
        for x in arguments:
            if isinstance(x, Tensor):
                tensors.append(x)
            elif isinstance(x, list) and x and isinstance(x[0], Tensor):
                tensors.extend(x)
        if not eager(*tensors):
            return self.op(*arguments)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if not wanted:
            out = self.body(*arguments)
            if self.writes is not None:
                torch.autograd.graph.increment_version(arguments[self.writes])
            return out
        if self.function is None:  # a backward under create_graph=True: its schema refuses a second
            return self.op(*arguments)
        return self.function.apply(*arguments)

    def named(self, arguments: Sequence[Any]) -> SimpleNamespace:
        """The arguments of a call by their names."""
        return SimpleNamespace(**self.nothing | dict(zip(self.nothing, arguments, strict=False)))

    def options(self, arguments: Sequence[Any]) -> SimpleNamespace:
        """Those that are no tensors: what a context may keep."""
        plain = [None if isinstance(x, Tensor) else x for x in arguments]
        return self.named(plain)

    def gradients(self, **found: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the backward returns: these, and None for every other argument."""
        return tuple((self.nothing | found).values())


def _function(name: str, body: Any, setup: Any, differentiate: Any) -> Any:
    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            out = body(*arguments)
            setup(ctx, arguments, out)
            return out

        @staticmethod
        def backward(ctx, *grads):
            return differentiate(ctx, *grads)

    Eager.__name__ = Eager.__qualname__ = name.replace("::", "_")
    return Eager
