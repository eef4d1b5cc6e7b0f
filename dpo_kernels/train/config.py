"""The settings of a training run: one dataclass, read from JSON, YAML and the command line.

An unknown key is an error that names the nearest known one. Where a default differs from TRL's, the
help says so. The options themselves stand in `run_options.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .. import loss_options
from . import trl_options
from .config_files import UserError as UserError
from .config_files import nearest as nearest
from .config_files import read_config_file as read_config_file
from .config_files import typed, yaml_text
from .run_options import (
    GROUPS,
    AdapterOptions,
    DataOptions,
    GuardOptions,
    JudgedOptions,
    LearnedGroupOptions,
    LossPart,
    ModelOptions,
    OutputOptions,
    ProcessOptions,
    ReferenceOptions,
    SpeedOptions,
    SupervisedOptions,
    TrainingOptions,
)


@dataclass
class DPOTrainConfig(
    OutputOptions,
    ProcessOptions,
    SpeedOptions,
    SupervisedOptions,
    JudgedOptions,
    LearnedGroupOptions,
    GuardOptions,
    TrainingOptions,
    ReferenceOptions,
    LossPart,
    DataOptions,
    AdapterOptions,
    ModelOptions,
):
    """Everything a run depends on; saved as `config.yaml` in its folder."""

    @property
    def reference_name(self) -> str | None:
        """The checkpoint that is the reference; None: the policy as it starts."""
        if self.ref_adapter_name is not None:
            return str(Path(str(self.model_name_or_path)) / self.ref_adapter_name)
        return self.ref_model_name_or_path

    def __post_init__(self) -> None:
        if self.ref_adapter_name is not None and self.ref_model_name_or_path is not None:
            raise UserError(
                "ref_adapter_name and ref_model_name_or_path both name the reference: give one"
            )
        if isinstance(self.loss_type, str):
            self.loss_type: Any = [self.loss_type]
        if isinstance(self.report_to, str):
            self.report_to: Any = [self.report_to]
        if isinstance(self.report_to, list):
            self.report_to = [r for r in self.report_to if str(r).lower() not in ("none", "")]
        if self.fsdp in (None, False, "", "no") or self.fsdp == []:  # as TRL writes it
            self.fsdp = "auto"
        resume = str(self.resume_from_checkpoint).lower()
        if resume in ("true", "false", "none"):
            self.resume_from_checkpoint = "true" if resume == "true" else None
        if isinstance(self.column_mapping, dict):  # as YAML would write it
            self.column_mapping: Any = [f"{k}={v}" for k, v in self.column_mapping.items()]
        self.lr_scheduler_kwargs = _mapping("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        check_fields(self)
        self.layout = "shared" if self.layout == "prefix" else self.layout
        self._check_bounds()
        for entry in self.column_mapping or []:
            ours, equals, theirs = entry.partition("=")
            if not (ours and equals and theirs):
                raise UserError(
                    f"column_mapping: {entry!r}, expected ours=theirs (prompt=question)"
                )
        if self.max_steps < -1:
            raise UserError(
                "max_steps must be at least 1, or -1 (epochs), or 0 (evaluate only), got "
                f"{self.max_steps}"
            )
        if self.max_steps == -1 and not 0 < self.num_train_epochs < float("inf"):
            raise UserError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        if [self.dataset_name, self.eval_file, self.sft_file].count("-") > 1:
            raise UserError("of dataset_name, eval_file and sft_file one alone can be - (stdin)")
        if self.sft_rows and self.sft_file is None:
            raise UserError("sft_rows needs sft_file: the file that the rows come from")
        if not abs(self.seed) < 2**32:
            raise UserError(f"seed must be below 2**32, got {self.seed}")
        if self.bf16 and self.dtype not in ("auto", "float32"):
            raise UserError(f"bf16 keeps float32 weights; got dtype={self.dtype!r} beside it")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise UserError("early_stopping_patience needs eval_steps: evaluations to look at")
        self._check_loss()

    def _check_bounds(self) -> None:
        """The bounds of single numbers; null passes where an option may be null."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                null = " or null" if type(None) in get_args(_HINTS[name]) else ""
                raise UserError(f"{name} must be at least {least}{null}, got {value}")
        for name in _FINITE:
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("eval_fraction", "adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise UserError(
                f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}"
            )
        if not 0 < self.adam_epsilon < 1:
            raise UserError(f"adam_epsilon must be in (0, 1), got {self.adam_epsilon}")

    def _check_loss(self) -> None:
        """The options of the loss against the table of losses, before any model is loaded."""
        import torch

        import dpo_kernels as dk

        if self.backend is not None and self.backend not in dk.backends.NAMES:
            raise UserError(
                f"backend must be one of {', '.join(dk.backends.NAMES)}, got {self.backend!r}"
            )
        for name in ("desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name} must be at least 0, got {value}")
        try:
            kind = self.rows
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        if kind != "unpaired":
            for name in ("desirable_weight", "undesirable_weight"):
                if getattr(self, name) is not None:
                    what = ", ".join(dk.losses.UNPAIRED)
                    raise UserError(f"{name}={getattr(self, name)} is an option of {what}")
        if kind != "pairs":
            self._check_not_pairs()
            return
        options = self.loss_options()
        try:
            if self.uses_offset or self.learn_groups:
                options["offset"] = torch.zeros(1)
            _, losses = dk.losses.resolve(options)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        for row, _, _ in losses:
            by_token = "ld_alpha" if self.ld_alpha is not None else "use_weighting"
            several = self.gradient_accumulation_steps > 1 or self.max_tokens_per_batch is not None
            if row.batch_coupled and several and getattr(self, by_token):
                raise UserError(
                    f"loss_type {row.name!r} couples the pairs of a step, which several batches "
                    f"know by their log-probs alone, and {by_token} weighs tokens: use "
                    "gradient_accumulation_steps=1 without max_tokens_per_batch"
                )
        self._check_applies([row for row, _, _ in losses])

    def _check_not_pairs(self) -> None:
        """What belongs to pairs has no meaning for single completions and ranked lists."""
        loss = self.loss_type[0]
        mine = {"loss_type", "beta", "reference_free"}
        for f in fields(LossPart):
            value = getattr(self, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in mine or value == default or (f.name, value) == ("discopop_tau", 0.05):
                continue
            raise UserError(f"{f.name}={value} has no meaning for {loss}")
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta must be a positive finite number, got {self.beta}")
        for name in ("learn_groups", "soft_labels", "dataset_streaming", "compare_plain_torch"):
            if getattr(self, name):
                raise UserError(f"{name} is of pairs; {loss} is not a loss of pairs")
        step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.compares_completions and step < 2:
            raise UserError(
                "kto compares completions with others of their step: per_device_train_batch_size "
                f"times gradient_accumulation_steps must be at least 2, got {step}"
            )

    @property
    def rows(self) -> str:
        """What the loss is of: "pairs", "unpaired" (single completions) or "ranked" (lists)."""
        import dpo_kernels as dk

        return dk.losses.rows_for(self.loss_type)

    @property
    def noun(self) -> str:
        """The same in words."""
        names = {"unpaired": "labelled completions", "ranked": "ranked lists"}
        return names.get(self.rows, self.rows)

    @property
    def compares_completions(self) -> bool:
        """Whether the loss has a z, from completions under prompts that are not theirs."""
        import dpo_kernels as dk

        return dk.losses.has_baseline(self.loss_type) and not self.reference_free

    def _check_applies(self, rows: list[Any]) -> None:
        """An option of a loss that was not chosen is an error, even where it is the default."""
        import dpo_kernels as dk

        used = {option for row in rows for option in row.options}
        names = ", ".join(row.name for row in rows)
        for option in loss_options.OWN:
            value = getattr(self, option, None)
            if value is None or option in used or (option, value) == ("discopop_tau", 0.05):
                continue  # TRL's configurations all hold discopop_tau=0.05
            adds = any(row.sft == option for row in dk.losses.TABLE.values())
            hint = "; sft_weight adds the NLL of the chosen to any loss"
            raise UserError(f"{option}={value} has no meaning for {names}" + (hint if adds else ""))
        alpha = self.f_alpha_divergence_coef
        if self.f_divergence_type != "alpha_divergence" and alpha != 0.5:
            raise UserError(
                f"f_alpha_divergence_coef={alpha} has no meaning for f_divergence_type="
                f"{self.f_divergence_type}; it is of alpha_divergence"
            )

    @property
    def uses_offset(self) -> bool:
        """Whether each pair needs a `margin`."""
        import dpo_kernels as dk

        return self.rows == "pairs" and "offset" in dk.losses.requires(self.loss_type)

    def loss_options(self) -> dict[str, Any]:
        """The `**loss_options` of the front functions that this configuration sets."""
        import dpo_kernels as dk

        if self.rows != "pairs":
            taken = ["beta", "reference_free"]
            if self.rows == "unpaired":
                taken += ["desirable_weight", "undesirable_weight"]
            given = {name: getattr(self, name) for name in taken}
            found: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
            return {"loss_type": self.loss_type[0], **found}
        known = {f.name for f in fields(dk.losses.LossOptions)}
        mine = {k: v for k, v in asdict(self).items() if k in known and v is not None}
        # An unchosen loss's own option is none; `_check_applies` says of which that is an error.
        names = (dk.losses.ALIASES.get(name, name) for name in self.loss_type)
        rows = [dk.losses.TABLE[name] for name in names if name in dk.losses.TABLE]
        used = {option for row in rows for option in row.options}
        mine = {k: v for k, v in mine.items() if k in used or k not in loss_options.OWN}
        if len(mine["loss_type"]) == 1:
            mine["loss_type"] = mine["loss_type"][0]
        return mine

    def save(self, path: Path, groups: Sequence[Any] = GROUPS) -> None:
        """Write the resolved configuration as YAML (or JSON, by the file's ending)."""
        kept = replace(self, resume_from_checkpoint=None)
        if path.suffix == ".json":
            path.write_text(json.dumps(asdict(kept), indent=2) + "\n", encoding="utf-8")
        else:
            path.write_text(yaml_text(kept, groups), encoding="utf-8")


def _mapping(name: str, value: Any) -> Any:
    """Names and values, also where they came as the JSON of them; None for none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{name} must be JSON, got {value!r}") from None
    if value is not None and not isinstance(value, dict):
        raise UserError(f'{name} must be names and values ({{"name": 1}}), got {value!r}')
    return value or None


_HINTS = get_type_hints(DPOTrainConfig)
_LEAST = {
    "max_length": 2,
    **dict.fromkeys(
        (
            "max_tokens_per_batch",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "ref_model_sync_steps",
            "ddp_timeout",
            "vocab_parallel",
            "eval_steps",
            "max_prompt_length",
            "max_completion_length",
            "dataset_num_proc",
            "fsdp_shard_size",
            "save_total_limit",
            "early_stopping_patience",
        ),
        1,
    ),
    **dict.fromkeys(
        (
            "sft_steps",
            "save_steps",
            "skip_nonfinite",
            "learning_rate",
            "group_learning_rate",
            "group_l2",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "sample_max_new_tokens",
            "sft_rows",
            "sft_learning_rate",
            "sft_rows_weight",
        ),
        0,
    ),
}
_FINITE = (
    "learning_rate",
    "sft_learning_rate",
    "sft_rows_weight",
    "warmup_steps",
    "weight_decay",
    "sft_weight",
)
ALIASES = {"torch_dtype": "dtype", "train_file": "dataset_name", "batch_layout": "layout"}


def check_fields(config: Any) -> None:
    """Types and choices of the fields of a configuration."""
    hints = get_type_hints(type(config))
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        typed(f.name, value, hints[f.name])
        if choices and value not in choices:
            raise UserError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")


def known_keys() -> list[str]:
    """Every key a configuration may have, aliases and TRL's translated names included."""
    return [*_HINTS, *ALIASES, *trl_options.TRANSLATED]


def load_config(*layers: Mapping[str, Any]) -> DPOTrainConfig:
    """The configuration of these layers, later ones over earlier ones.

    Raises `UserError` for an unknown key (with the nearest known), an option of TRL's that is not
    supported (with the reason), a wrong type or value.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        mine, refused = _translated(layer)
        if refused:
            raise UserError(refused[0])
        merged |= mine
    return DPOTrainConfig(**merged)


def refusals(*layers: Mapping[str, Any]) -> list[str]:
    """Every option that these layers hold and that is not honoured, with the reason."""
    return [text for layer in layers for text in _translated(layer)[1]]


def _translated(layer: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(options of ours, what is refused) of a layer that may hold TRL's names."""
    mine = {ALIASES.get(key, key): v for key, v in layer.items() if _is_ours(key)}
    refused = [
        f"{other} and {name} are one option, got {layer[other]!r} and {layer[name]!r}"
        for other, name in ALIASES.items()
        if other in layer and name in layer and layer[other] != layer[name]
    ]
    for key, value in layer.items():
        if _is_ours(key):
            continue
        if key not in trl_options.NAMES:
            refused.append(f"unknown option {key!r}{nearest(key, known_keys())}")
            continue
        try:
            mine |= trl_options.translate(key, value, mine)
        except ValueError as error:
            refused.append(str(error))
    return mine, refused


def _is_ours(key: str) -> bool:
    return key in _HINTS or key in ALIASES
