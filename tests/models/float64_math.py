"""transformers' norms, softmax and rotary embeddings in float64, where they would round to float32.

So that a float64 model is one throughout, and two layouts can be compared to 1e-12.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DOUBLE = torch.float64


class Float64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:  # what checkpointing runs again there
            loss = args[0]
            with self:  # not autograd.backward, which would come by here again
                return torch.autograd.graph._engine_run_backward(
                    (loss,),
                    (torch.ones_like(loss),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        if func is torch.Tensor.float:
            return args[0].double()
        if func in (torch.Tensor.to, torch.zeros) or "softmax" in getattr(func, "__name__", ""):
            args = tuple(_DOUBLE if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = _DOUBLE
        return func(*args, **kwargs)
