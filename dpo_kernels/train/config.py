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
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor")
# transformers' that need nothing but the steps
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class DPOTrainConfig:
    """Everything a run depends on; saved as `config.yaml` in its folder."""

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

    use_peft: bool = _option(False, "adapter", "train a LoRA adapter alone; needs peft")
    lora_r: int = _option(16, "adapter", "rank")
    lora_alpha: int = _option(32, "adapter", "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = _option(
        0.05, "adapter", "taken for TRL's sake: dropout is always off, as its disable_dropout"
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata=_about(
            "adapter", "layers by name, or all-linear; None: those that peft knows of the model"
        ),
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata=_about("adapter", "parameters by name (experts that are no layers)")
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=_about("adapter", "layers to train whole, beside the adapter")
    )
    use_rslora: bool = _option(False, "adapter", "scale by lora_alpha / sqrt(lora_r)")
    use_dora: bool = _option(False, "adapter", "DoRA: magnitude and direction apart")
    load_in_4bit: bool = _option(False, "adapter", "QLoRA: 4-bit weights; needs bitsandbytes")
    load_in_8bit: bool = _option(False, "adapter", "8-bit weights; needs bitsandbytes")
    bnb_4bit_quant_type: str = _option("nf4", "adapter", "of load_in_4bit", ("nf4", "fp4"))
    use_bnb_nested_quant: bool = _option(False, "adapter", "of load_in_4bit: quantise the scales")
    bnb_4bit_quant_storage: str | None = _option(None, "adapter", "dtype that holds 4-bit weights")

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
        1024, "data", "tokens of prompt + completion; what is longer is cut as truncation_mode says"
    )
    truncation_mode: str = _option(
        "keep_start",
        "data",
        "keep_start: cut the completion's end; keep_end: the prompt's start; drop: leave the pair "
        "out",
        ("keep_start", "keep_end", "drop"),
    )
    max_prompt_length: int | None = _option(
        None, "data", "tokens of the prompt, which keeps its end"
    )
    max_completion_length: int | None = _option(
        None, "data", "tokens of a completion, which keeps its start"
    )
    column_mapping: list[str] | None = field(
        default=None,
        metadata=_about("data", "columns of other names, as prompt=question chosen=good"),
    )
    dataset_streaming: bool | None = _option(
        None,
        "data",
        "read rows as they are asked for, with a copy of the policy as the reference; None: where "
        "the data is larger than 256 MB",
    )
    dataset_num_proc: int | None = _option(None, "data", "processes that tokenise; None: one")
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

    ref_model_name_or_path: str | None = _option(
        None, "reference", "another checkpoint as the reference; None: the policy as it starts"
    )
    reference_cache: str | None = _option(
        "auto",
        "reference",
        "folder that keeps the reference's log-probs for other runs; auto: in the user's cache; "
        "none: do not keep them",
    )
    sync_ref_model: bool = _option(
        False, "reference", "the reference follows the policy (TR-DPO); a copy of it is held"
    )
    ref_model_mixup_alpha: float = _option(
        0.6, "reference", "the policy's share at each sync; 1: a hard copy"
    )
    ref_model_sync_steps: int = _option(512, "reference", "steps between syncs")

    per_device_train_batch_size: int = _option(8, "training", "pairs of one forward and backward")
    per_device_eval_batch_size: int = _option(8, "training", "pairs of one evaluation forward")
    gradient_accumulation_steps: int = _option(
        1, "training", "batches of one optimizer step; the loss is the mean over all their pairs"
    )
    num_train_epochs: float = _option(3.0, "training", "passes over the training pairs")
    max_steps: int = _option(-1, "training", "optimizer steps in place of epochs; -1: epochs")
    optim: str = _option("adamw_torch", "training", "optimizer", OPTIMIZERS)
    learning_rate: float = _option(1e-6, "training", "peak learning rate")
    lr_scheduler_type: str = _option("linear", "training", "schedule after the warm-up", SCHEDULES)
    warmup_steps: float = _option(0, "training", "warm-up steps; below 1: a share of all steps")
    weight_decay: float = _option(0.0, "training", "decay of matrices (not of norms and biases)")
    adam_beta1: float = _option(0.9, "training", "AdamW's beta1")
    adam_beta2: float = _option(0.999, "training", "AdamW's beta2")
    adam_epsilon: float = _option(1e-8, "training", "AdamW's epsilon")
    max_grad_norm: float = _option(1.0, "training", "clip the gradient's norm; 0: do not")
    train_sampling_strategy: str = _option(
        "random", "training", "order of the pairs in each epoch (by seed)", ("random", "sequential")
    )
    check_first_step: bool = _option(
        True,
        "training",
        "end at step 1 where nothing can be learned: masked labels, no gradients, weights that do "
        "not move",
    )
    on_falling_logps: str = _option(
        "warn",
        "training",
        "where the log-probs of chosen and rejected fall together",
        ("warn", "stop", "ignore"),
    )
    ema_decay: float = _option(
        0.0, "training", "keep an average of the weights, which is what is saved (0.999); 0: none"
    )
    skip_nonfinite: int = _option(
        0, "training", "steps that may be left out because their loss or gradient is not finite"
    )
    early_stopping_patience: int | None = _option(
        None, "training", "stop after so many evaluations without a lower eval_loss"
    )
    learn_groups: bool = _option(
        False,
        "training",
        "train an offset and a temperature of each `group` of rows beside the model",
    )
    group_learning_rate: float = _option(1e-2, "training", "learning rate of learn_groups")
    group_l2: float = _option(
        1e-3, "training", "L2 of learn_groups: pulls temperatures to 1 and offsets to 0"
    )
    sft_steps: int | None = _option(
        None,
        "training",
        "supervised steps before, on the embedded default; 0: none; None: its recipe's, fewer as "
        "max_steps is",
    )
    seed: int = _option(42, "training", "seed of the order of pairs, the split and the sampling")

    batch_layout: str = _option(
        "auto",
        "speed",
        "prefix: the prompt of a pair is computed once; padded: twice; auto: "
        "whichever is cheaper, pair by pair",
        ("auto", "prefix", "padded"),
    )
    backend: str | None = _option(None, "speed", "cuda, triton, cpu, torch; None: by device")
    gradient_checkpointing: bool = _option(
        False,
        "speed",
        "recompute activations in the backward: less memory for about a third more "
        "time (TRL's default is on)",
    )
    torch_compile: bool = _option(False, "speed", "compile the model below its head")
    torch_compile_backend: str | None = _option(None, "speed", "of torch_compile; None: inductor")
    torch_compile_mode: str | None = _option(
        None, "speed", "of torch_compile: default, reduce-overhead, max-autotune, ..."
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
    report_to: list[str] = field(
        default_factory=list,
        metadata=_about("output", "trackio, tensorboard, wandb: metrics go there as well"),
    )
    run_name: str | None = _option(None, "output", "name of the run there; None: its folder's")
    project: str = _option("dpo-kernels", "output", "project of the run there")
    eval_steps: int | None = _option(
        None, "output", "steps between evaluations; None: before and after training only"
    )
    save_steps: int = _option(
        500, "output", "steps between checkpoints (the last step has one as well); 0: none"
    )
    save_total_limit: int | None = _option(
        None, "output", "checkpoints to keep, the newest; None: all"
    )
    resume_from_checkpoint: str | None = _option(
        None, "output", "go on from a checkpoint: its folder, or true for output_dir's newest"
    )
    sample_prompt: str | None = _option(
        None, "output", "text to complete before and after; None: a held-out prompt"
    )
    sample_max_new_tokens: int = _option(64, "output", "length of that completion; 0: none")

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if isinstance(self.report_to, list):
            self.report_to = [r for r in self.report_to if str(r).lower() not in ("none", "")]
        resume = str(self.resume_from_checkpoint).lower()
        if resume in ("true", "false", "none"):
            self.resume_from_checkpoint = "true" if resume == "true" else None
        for f in fields(self):
            _check_type(f.name, getattr(self, f.name), _HINTS[f.name])
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise UserError(
                    f"{f.name} must be one of {', '.join(choices)}, got {getattr(self, f.name)!r}"
                )
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "ref_model_sync_steps",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_steps is not None and self.eval_steps < 1:
            raise UserError(f"eval_steps must be at least 1 or null, got {self.eval_steps}")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length must be at least 2 or null, got {self.max_length}")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise UserError(
                f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}"
            )
        for name in ("max_prompt_length", "max_completion_length", "dataset_num_proc"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 or null, got {getattr(self, name)}")
        for entry in self.column_mapping or []:
            ours, equals, theirs = entry.partition("=")
            if not (ours and equals and theirs):
                raise UserError(
                    f"column_mapping: {entry!r}, expected ours=theirs (prompt=question)"
                )
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be in [0, 1), got {self.eval_fraction}")
        if self.max_steps < -1:
            raise UserError(
                f"max_steps must be at least 1, 0 (evaluate only) or -1 (epochs), got "
                f"{self.max_steps}"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.skip_nonfinite < 0:
            raise UserError(f"skip_nonfinite must be at least 0, got {self.skip_nonfinite}")
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise UserError(
                    "early_stopping_patience must be at least 1 or null, got "
                    f"{self.early_stopping_patience}"
                )
            if self.eval_steps is None:
                raise UserError("early_stopping_patience needs eval_steps: evaluations to look at")
        if self.max_steps == -1 and not 0 < self.num_train_epochs < float("inf"):
            raise UserError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        if self.sft_steps is not None and self.sft_steps < 0:
            raise UserError(f"sft_steps must be at least 0 or null, got {self.sft_steps}")
        if self.save_steps < 0:
            raise UserError(f"save_steps must be at least 0, got {self.save_steps}")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise UserError(
                f"save_total_limit must be at least 1 or null, got {self.save_total_limit}"
            )
        if self.dataset_name == self.eval_file == "-":
            raise UserError("dataset_name and eval_file are both standard input (-)")
        for name in (
            "learning_rate",
            "group_learning_rate",
            "group_l2",
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
            if self.uses_offset or self.learn_groups:
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
        """Write the resolved configuration, as YAML or, by the file's name, as JSON."""
        content = {**asdict(self), "resume_from_checkpoint": None}
        if path.suffix == ".json":
            text = json.dumps(content, indent=2) + "\n"
        else:
            import yaml  # transformers brings it

            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        path.write_text(text, encoding="utf-8")


_HINTS = get_type_hints(DPOTrainConfig)
ALIASES = {"torch_dtype": "dtype", "train_file": "dataset_name"}


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
