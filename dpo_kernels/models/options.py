"""How the fused head runs: what a framework's own configuration has no name for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import dpo_kernels as dk

from ..data.batches import layout_name
from .nonfinite import CHOICES

# Statistics of the policy's distribution that TRL logs: entropy, logits/*, mean_token_accuracy.
HEAD_STATS = ("entropy", "mean_logits", "is_top1")
_LOSS_OPTIONS = {f.name for f in fields(dk.losses.LossOptions)}


@dataclass(frozen=True)
class FusedOptions:
    """How the fused head runs, and loss options for which the framework has no name.

    Attributes:
        loss_options: options of `dpo_kernels.losses.LossOptions`, over the framework's own:
            `reference_free`, `dpop_lambda`, `sft_weight`, ...
        check_reference: before the first step the policy must equal the reference. Switch it off
            where they differ on purpose (a reference that is another model).
        check_first_step: the first batch's rows are scored and end once, and the first step gives
            every trainable weight a gradient and moves it.
        on_falling_logps: "warn", "stop" or "ignore" where the log-probs of chosen and rejected fall
            together.
        on_nonfinite_loss: the same where a training loss is not finite.
        reference_cache: a folder that keeps the reference's log-probs by content
            (`models.reference_cache`); None: they are not kept.
        ref_adapter_name: the adapter of the policy that is the reference; None: the one called
            `ref`, or none where there is no such.
        layout: how the trunk runs over a batch: "padded" (as it comes), "packed" (one row without
            padding), "shared" (and a prompt that chosen and rejected share once), "auto" (the
            cheapest that the model can take, by counting).
        share_prefix: True is another name of layout="shared", False of "padded".
        check_layout: before a layout is used, up to four pairs of the first batch also run padded
            and must give the same loss, log-probs and gradient.
        head_stats: entropy, mean logits and token accuracy among the metrics, read from the logits
            that the loss forms anyway.
        memory_budget: bytes for logits, as `fused_linear_dpo_loss`.
        backend: "cuda", "triton", "cpu", "torch"; None picks by device.
    """

    loss_options: dict[str, Any] = field(default_factory=dict)
    check_reference: bool = True
    check_first_step: bool = True
    on_falling_logps: str = "warn"
    on_nonfinite_loss: str = "warn"
    reference_cache: str | None = None
    ref_adapter_name: str | None = None
    share_prefix: bool | None = None
    layout: str | None = None  # None: auto
    check_layout: bool = True
    head_stats: bool = True
    memory_budget: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("on_falling_logps", "on_nonfinite_loss"):
            if getattr(self, name) not in CHOICES:
                raise ValueError(
                    f"{name} must be 'warn', 'stop' or 'ignore', got {getattr(self, name)!r}"
                )
        layout = self.layout
        if layout is None:
            layout = {None: "auto", True: "shared", False: "padded"}[self.share_prefix]
        layout = layout_name(layout)
        if self.share_prefix and layout != "shared":
            raise ValueError(
                f"share_prefix=True is another name of layout='shared', got layout={layout!r} "
                "beside it"
            )
        object.__setattr__(self, "layout", layout)
        object.__setattr__(self, "share_prefix", layout == "shared")
        unknown = set(self.loss_options) - _LOSS_OPTIONS
        if unknown:
            raise ValueError(
                f"loss_options: no option called {', '.join(sorted(unknown))}; expected some of "
                f"{', '.join(sorted(_LOSS_OPTIONS))}"
            )

    @staticmethod
    def of(value: FusedOptions | dict[str, Any] | None, default: FusedOptions) -> FusedOptions:
        """From what a user passes as `fused=`."""
        if value is None:
            return default
        if isinstance(value, FusedOptions):
            return value
        if isinstance(value, dict):
            return FusedOptions(**value)
        raise TypeError(f"fused must be a FusedOptions or a dict, got {type(value).__name__}")
