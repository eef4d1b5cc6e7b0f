"""What the fused backends do not differentiate, they refuse: nothing is dropped without a word.

Their backwards are kernels, of first derivatives in reverse mode. autograd does not know that: a
gradient that such a backward gives under `create_graph=True` would be a constant to it, and a
tangent would be lost. Four tools say it instead, all with the way out, `backend="torch"`:

    refuse_second(op)   the backward of a backward op, where autograd reaches one
    once(...)           gates for inputs whose backward keeps nothing of them
    refuse(...)         the same behind the output, of a function that may save it
    check_mode(...)     at the door of each op: forward mode, and functorch's transforms
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

WAY_OUT = 'use backend="torch"'
NO_SECOND = f"the fused backends have no second derivatives here: {WAY_OUT}"


def check_mode(*tensors: Tensor | None) -> None:
    """`RuntimeError` for a tensor that carries a tangent or is differentiated by functorch."""
    if torch.compiler.is_compiling() or not differentiated():
        return
    for x in tensors:
        if x is None:
            continue
        if _differentiated(x):
            raise RuntimeError(
                f"the fused backends do not run under torch.func.grad, jvp and the like: {WAY_OUT}"
            )
        if forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"the fused backends have no forward-mode derivative: {WAY_OUT}")


def differentiated() -> bool:
    """Whether forward mode or a transform of functorch is in progress."""
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _differentiated(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def refuse_second(op: torch.library.CustomOpDef) -> None:
    """`op` is a backward: a backward through it raises `RuntimeError`."""

    def refuse(ctx, *_):
        raise RuntimeError(NO_SECOND)

    op.register_autograd(refuse)


def refuse_inplace() -> None:
    """In an in-place backward, before it writes: `RuntimeError` under `create_graph=True`."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "inplace=True has no double backward: the logits are overwritten; leave it out and "
            + WAY_OUT
        )


def once(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs, each behind a gate: whatever gradient comes back through one under
    `create_graph=True` depends, for autograd, on all of them, and its backward raises.

    For backwards that keep no input. The gates keep none either, only their place in the graph.
    """
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return inputs
    # Empty and with memory of its own: a view would keep the whole input alive.
    key = torch.cat([x.reshape(-1)[:0] if x.dim() == 0 else _empty(x) for x in wanted])
    return tuple(_Gate.apply(x, key) if x is not None and x.requires_grad else x for x in inputs)


def refuse(grad: Tensor | None, place: Tensor) -> Tensor | None:
    """`grad`, whose own backward raises.

    For a function of autograd that keeps no input: `place` is its output, saved, which stands in
    the graph behind all of them.
    """
    return None if grad is None else _Refuse.apply(grad, place)


def _empty(x: Tensor) -> Tensor:
    return x.narrow(-1, 0, 0).flatten().float()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(key)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        if grad is not None and torch.is_grad_enabled():
            grad = _Refuse.apply(grad, *ctx.saved_tensors)
        return grad, None


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, key):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(NO_SECOND)
