"""The settings of a training run: one dataclass, read from JSON, YAML and the command line.

Names are those of TRL's `DPOConfig` and `ScriptArguments` wherever they have one, so a
configuration carries over. An unknown key is an error that names the nearest known one. Where a
default differs from TRL's, the help says so.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from . import trl_options


class UserError(ValueError):
    """A mistake in what the user asked for: one clear line, no traceback."""


def _about(group: str, help: str, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """What `--help` shows of a field."""
    return {"group": group, "help": help, "choices": choices}


def _option(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata=_about(group, help, choices))


# The fused AdamW is AdamW; it is what TRL names by default.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class DPOTrainConfig:
    """Everything a run depends on; saved as `config.json` in its folder."""

    model_name_or_path: str | None = _option(
        None, "model", "model name or folder; without it (and without data) the embedded default"
    )
    gguf_file: str | None = _option(
        None, "model", "GGUF file inside model_name_or_path (which may also be a .gguf itself)"
    )
    chat_template: str | None = _option(
        None, "model", "file with a Jinja chat template, for tokenizers that have none"
    )
    dtype: str = _option("float32", "model", "dtype of the policy's weights", DTYPES)
    bf16: bool = _option(
        False, "model", "compute in bfloat16 over float32 weights (autocast), as TRL's bf16"
    )
    attn_implementation: str | None = _option(
        None, "model", "sdpa, eager, flash_attention_2, ...; None: the model's default"
    )
    device: str = _option("auto", "model", "cpu, cuda, cuda:0, ...; auto: a GPU if there is one")
    trust_remote_code: bool = _option(False, "model", "run modelling code that comes with a model")

    dataset_name: str | None = _option(
        None, "data", "JSONL file of training pairs (alias: --train_file)"
    )
    eval_file: str | None = _option(
        None, "data", "JSONL file of held-out pairs; None: split off eval_fraction"
    )
    eval_fraction: float = _option(
        0.1, "data", "share of the training pairs held out by seed if there is no eval_file"
    )
    max_length: int | None = _option(
        1024, "data", "tokens of prompt + completion; sequences keep their start"
    )
    strict: bool = _option(False, "data", "refuse the first bad row instead of leaving it out")

    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"], metadata=_about("loss", "name or names of losses")
    )
    loss_weights: list[float] | None = field(
        default=None, metadata=_about("loss", "one weight for each loss_type")
    )
    beta: float = _option(0.1, "loss", "how strongly the policy is held to the reference")
    label_smoothing: float = _option(0.0, "loss", "assumed share of flipped preferences (cDPO)")
    f_divergence_type: str = _option(
        "reverse_kl",
        "loss",
        "f-divergence of the scores",
        ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    )
    f_alpha_divergence_coef: float = _option(0.5, "loss", "alpha of alpha_divergence")
    ld_alpha: float | None = _option(None, "loss", "weight of the longer one's tail (LD-DPO)")
    use_weighting: bool = _option(False, "loss", "weigh pairs by policy probability (WPO)")
    sft_weight: float = _option(0.0, "loss", "adds the NLL of the chosen, mean over its tokens")
    reference_free: bool = _option(False, "loss", "leave the reference out of the loss")
    discopop_tau: float | None = _option(None, "loss", "temperature of discopop (0.05)")
    dpop_lambda: float | None = _option(None, "loss", "penalty of dpop (50)")
    rdpo_alpha: float | None = _option(None, "loss", "length penalty of rdpo (0.01)")
    simpo_gamma: float | None = _option(None, "loss", "margin of simpo and alphapo (0.5)")
    alphapo_alpha: float | None = _option(None, "loss", "alpha of alphapo (0.25)")
    cpo_alpha: float | None = _option(None, "loss", "NLL weight of cpo (1.0)")
    slic_lambda: float | None = _option(None, "loss", "NLL weight of slic (0.1)")
    rpo_alpha: float | None = _option(None, "loss", "NLL weight of rpo (1.0)")
    beta_dpo_alpha: float | None = _option(None, "loss", "slope of beta_dpo (0.6)")
    beta_dpo_momentum: float | None = _option(None, "loss", "momentum of beta_dpo (0.9)")
    beta_dpo_keep: float | None = _option(None, "loss", "share of pairs beta_dpo keeps (0.8)")

    per_device_train_batch_size: int = _option(8, "training", "pairs of one forward and backward")
    per_device_eval_batch_size: int = _option(8, "training", "pairs of one evaluation forward")
    gradient_accumulation_steps: int = _option(
        1, "training", "batches of one optimizer step; the loss is the mean over all their pairs"
    )
    num_train_epochs: float = _option(3.0, "training", "passes over the training pairs")
    max_steps: int = _option(-1, "training", "optimizer steps in place of epochs; -1: epochs")
    optim: str = _option("adamw_torch", "training", "optimizer", OPTIMIZERS)
    learning_rate: float = _option(1e-6, "training", "peak learning rate")
    lr_scheduler_type: str = _option(
        "linear", "training", "schedule after the warm-up", ("linear", "cosine", "constant")
    )
    warmup_steps: float = _option(0, "training", "warm-up steps; below 1: a share of all steps")
    weight_decay: float = _option(0.0, "training", "decay of matrices (not of norms and biases)")
    adam_beta1: float = _option(0.9, "training", "AdamW's beta1")
    adam_beta2: float = _option(0.999, "training", "AdamW's beta2")
    adam_epsilon: float = _option(1e-8, "training", "AdamW's epsilon")
    max_grad_norm: float = _option(1.0, "training", "clip the gradient's norm; 0: do not")
    train_sampling_strategy: str = _option(
        "random", "training", "order of the pairs in each epoch (by seed)", ("random", "sequential")
    )
    sft_steps: int | None = _option(
        None,
        "training",
        "supervised steps before, on the embedded default; 0: none; None: its recipe's, fewer as "
        "max_steps is",
    )
    seed: int = _option(42, "training", "seed of the order of pairs, the split and the sampling")

    layout: str = _option(
        "auto",
        "speed",
        "padded: rows of one length; packed: one row without padding; shared: and the prompt of "
        "a pair once (also called prefix); auto: the cheapest that the model can take",
        ("auto", "padded", "packed", "shared", "prefix"),
    )
    max_tokens_per_batch: int | None = _option(
        None,
        "speed",
        "tokens of one forward and backward: the pairs of an optimizer step are put together up "
        "to so many, in place of per_device_train_batch_size; None: by number of pairs",
    )
    check_layout: bool = _option(
        True, "speed", "compare a layout with padded rows on the first batch"
    )
    backend: str | None = _option(None, "speed", "cuda, triton, cpu, torch; None: by device")
    gradient_checkpointing: bool = _option(
        False,
        "speed",
        "recompute activations in the backward: less memory for about a third more "
        "time (TRL's default is on)",
    )
    compare_plain_torch: bool | None = _option(
        None,
        "speed",
        "time one step of plain torch as well; None: on the embedded default only "
        "(it needs the memory for the logits)",
    )

    output_dir: str | None = _option(None, "output", "folder of the run; None: runs/<time>")
    overwrite_output_dir: bool = _option(False, "output", "write into a folder that is not empty")
    logging_steps: int = _option(10, "output", "steps between lines of metrics")
    eval_steps: int | None = _option(
        None, "output", "steps between evaluations; None: before and after training only"
    )
    sample_prompt: str | None = _option(
        None, "output", "text to complete before and after; None: a held-out prompt"
    )
    sample_max_new_tokens: int = _option(64, "output", "length of that completion; 0: none")

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name), _HINTS[f.name])
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise UserError(
                    f"{f.name} must be one of {', '.join(choices)}, got {getattr(self, f.name)!r}"
                )
        self.layout = "shared" if self.layout == "prefix" else self.layout
        budget = self.max_tokens_per_batch
        if budget is not None and budget < 1:
            raise UserError(f"max_tokens_per_batch must be at least 1 or null, got {budget}")
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_steps is not None and self.eval_steps < 1:
            raise UserError(f"eval_steps must be at least 1 or null, got {self.eval_steps}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length must be at least 2 or null, got {self.max_length}")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise UserError(f"max_steps must be at least 1, or -1 (epochs), got {self.max_steps}")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < float("inf"):
            raise UserError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        if self.sft_steps is not None and self.sft_steps < 0:
            raise UserError(f"sft_steps must be at least 0 or null, got {self.sft_steps}")
        if self.dataset_name == self.eval_file == "-":
            raise UserError("dataset_name and eval_file are both standard input (-)")
        for name in (
            "learning_rate",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "sample_max_new_tokens",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "sft_weight"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.adam_epsilon < 1:
            raise UserError(f"adam_epsilon must be in (0, 1), got {self.adam_epsilon}")
        if self.bf16 and self.dtype not in ("auto", "float32"):
            raise UserError(f"bf16 keeps float32 weights; got dtype={self.dtype!r} beside it")
        self._check_loss()

    def _check_loss(self) -> None:
        """The options of the loss against the table of losses, before any model is loaded."""
        import torch

        import dpo_kernels as dk

        if self.backend is not None and self.backend not in dk.backends.NAMES:
            raise UserError(
                f"backend must be one of {', '.join(dk.backends.NAMES)}, got {self.backend!r}"
            )
        options = self.loss_options()
        try:
            if self.uses_offset:
                options["offset"] = torch.zeros(1)
            _, losses = dk.losses.resolve(options)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        for row, _, _ in losses:
            if row.needs_kl:
                raise UserError(
                    f"loss_type {row.name!r} compares whole distributions, and training keeps the "
                    "reference's log-probs alone; use fused_linear_dpo_loss with ref_hidden"
                )
            by_token = "ld_alpha" if self.ld_alpha is not None else "use_weighting"
            several = self.gradient_accumulation_steps > 1 or self.max_tokens_per_batch is not None
            if row.batch_coupled and several and getattr(self, by_token):
                raise UserError(
                    f"loss_type {row.name!r} couples the pairs of a step, which several batches "
                    f"know by their log-probs alone, and {by_token} weighs tokens: use "
                    "gradient_accumulation_steps=1 without max_tokens_per_batch"
                )
        self._check_applies([row for row, _, _ in losses])

    def _check_applies(self, rows: list[Any]) -> None:
        """An option of a loss that was not chosen is an error, even where it is the default."""
        import dpo_kernels as dk

        used = {option for row in rows for option in row.options}
        names = ", ".join(row.name for row in rows)
        for option in dk.losses._OWN_OPTIONS:
            value = getattr(self, option, None)
            if value is None or option in used or (option, value) == ("discopop_tau", 0.05):
                continue  # TRL's configurations all hold discopop_tau=0.05
            hint = "; sft_weight adds the NLL of the chosen to any loss"
            raise UserError(
                f"{option}={value} has no meaning for {names}"
                + (hint if option in ("rpo_alpha", "cpo_alpha") else "")
            )
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

        return "offset" in dk.losses.requires(self.loss_type)

    def loss_options(self) -> dict[str, Any]:
        """The `**loss_options` of the front functions that this configuration sets."""
        import dpo_kernels as dk

        known = {f.name for f in fields(dk.losses.LossOptions)}
        mine = {k: v for k, v in asdict(self).items() if k in known and v is not None}
        # An unchosen loss's own option is none; `_check_applies` says of which that is an error.
        names = (dk.losses.ALIASES.get(name, name) for name in self.loss_type)
        rows = [dk.losses.TABLE[name] for name in names if name in dk.losses.TABLE]
        used = {option for row in rows for option in row.options}
        mine = {k: v for k, v in mine.items() if k in used or k not in dk.losses._OWN_OPTIONS}
        if len(mine["loss_type"]) == 1:
            mine["loss_type"] = mine["loss_type"][0]
        return mine

    def save(self, path: Path) -> None:
        """Write the resolved configuration as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


_HINTS = get_type_hints(DPOTrainConfig)
ALIASES = {"torch_dtype": "dtype", "train_file": "dataset_name", "batch_layout": "layout"}


def _check_type(name: str, value: object, hint: Any) -> None:
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    for kind in kinds:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return
        origin = getattr(kind, "__origin__", None)
        if origin is list:
            inner = get_args(kind)[0]
            if isinstance(value, list) and all(
                isinstance(v, inner) or (inner is float and isinstance(v, int)) for v in value
            ):
                return
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return
    wanted = " or ".join(getattr(k, "__name__", str(k)) for k in kinds).replace("NoneType", "null")
    raise UserError(f"{name} must be {wanted}, got {value!r}")


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
        mine = {ALIASES.get(key, key): v for key, v in layer.items() if _is_ours(key)}
        for key, value in layer.items():
            if _is_ours(key):
                continue
            if key not in trl_options.NAMES:
                raise UserError(f"unknown option {key!r}{nearest(key, known_keys())}")
            try:
                mine |= trl_options.translate(key, value, mine)
            except ValueError as error:
                raise UserError(str(error)) from None
        merged |= mine
    return DPOTrainConfig(**merged)


def _is_ours(key: str) -> bool:
    return key in _HINTS or key in ALIASES


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """`; did you mean ...?` with the nearest of the known names, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {before + near[0]!r}?" if near else ""


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file."""
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise UserError(f"--config: {path} {what}")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix in (".yaml", ".yml"):
            try:
                import yaml
            except ImportError:
                raise UserError(
                    f"--config: {path} is YAML; pip install pyyaml, or write it as JSON"
                ) from None
            # YAML 1.1 reads 1e-6 as a text (it wants 1.0e-6): read such texts as the numbers meant.
            content = _yaml_numbers(yaml.safe_load(text))
        else:
            content = json.loads(text)
    except UserError:
        raise
    except Exception as error:  # either parser's own error type
        raise UserError(f"--config: {path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config: {path} must hold a mapping of options")
    return content


def _yaml_numbers(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    for key, value in content.items():
        if isinstance(value, str) and (
            _HINTS.get(key) in (float, float | None) or key == "warmup_ratio"
        ):
            try:
                content[key] = float(value)
            except ValueError:
                continue
    return content
