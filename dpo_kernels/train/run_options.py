"""The options of a run, by group: names, defaults and help, one dataclass for each group.

`config.DPOTrainConfig` is their sum. Names are those of TRL's `DPOConfig`, `ModelConfig` and
`ScriptArguments` wherever they have one. The fields carry argparse's keywords alone, so that
transformers' `HfArgumentParser` reads these classes as well. The group of the loss is drawn from
the table of the losses' options; nothing of it is said again here.

Nothing heavy is imported: `dpo-kernels train --help` reads this.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from .. import loss_options


def option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field, with what `--help` shows of it."""
    about: dict[str, Any] = {"help": help}
    if choices:
        about["choices"] = choices
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


# The fused AdamW is AdamW; it is what TRL names by default.
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class ModelOptions:
    """model"""

    model_name_or_path: str | None = option(
        None, "model name or folder; without it (and without data) the embedded default"
    )
    gguf_file: str | None = option(
        None, "GGUF file inside model_name_or_path (which may also be a .gguf itself)"
    )
    chat_template: str | None = option(
        None, "file with a Jinja chat template, for tokenizers that have none"
    )
    dtype: str = option("float32", "dtype of the policy's weights", DTYPES)
    bf16: bool = option(False, "compute in bfloat16 over float32 weights (autocast), as TRL's bf16")
    attn_implementation: str | None = option(
        None, "sdpa, eager, flash_attention_2, ...; None: the model's default"
    )
    device: str = option("auto", "cpu, cuda, cuda:0, ...; auto: a GPU if there is one")
    trust_remote_code: bool = option(False, "run modelling code that comes with a model")


@dataclass
class DataOptions:
    """data"""

    dataset_name: str | None = option(
        None, "JSONL file of training pairs (sft: of conversations; alias: --train_file)"
    )
    eval_file: str | None = option(None, "JSONL file held out; None: split off eval_fraction")
    eval_fraction: float = option(
        0.1, "share of the training rows held out by seed if there is no eval_file"
    )
    max_length: int | None = option(
        1024, "tokens of prompt + completion; sequences keep their start"
    )
    strict: bool = option(False, "refuse the first bad row instead of leaving it out")


# Options of a loss that come with a batch, or that the loop itself sets.
_WITH_A_BATCH = ("reduction", "num_pairs", "num_chosen_tokens")
_LISTS = {"str": list[str], "float": list[float]}


def _of_the_loss() -> list[tuple[str, Any, Any]]:
    """(name, type, field) of each option of the losses that a run can set.

    A loss's own option is None until it is given: given beside another loss it is an error.
    """
    found = []
    for f in fields(loss_options.LossOptions):
        kinds = [kind.strip() for kind in str(f.type).split("|")]
        tuples = [kind[len("tuple[") :].split(",")[0] for kind in kinds if "tuple[" in kind]
        plain = [kind for kind in kinds if kind in ("str", "float", "bool")]
        if f.name in _WITH_A_BATCH or not (tuples or plain):
            continue
        text, _, _ = loss_options.OPTIONS[f.name].partition(";")
        kind: Any = (
            _LISTS[tuples[0]] if tuples else {"str": str, "float": float}.get(plain[0], bool)
        )
        default = f.default
        if f.name in loss_options.OWN:
            text, default = f"{text} ({default:g})", None
        elif tuples and plain:  # a name, or a list of names
            default = [default]
        if default is None:
            kind = kind | None
        choices = loss_options.CHOICES.get(f.name)
        found.append((f.name, kind, option(default, text, choices)))
    return found


LossPart: Any = make_dataclass("LossPart", _of_the_loss())
LossPart.__doc__ = "loss"


@dataclass
class TrainingOptions:
    """training"""

    per_device_train_batch_size: int = option(8, "pairs of one forward and backward")
    per_device_eval_batch_size: int = option(8, "pairs of one evaluation forward")
    gradient_accumulation_steps: int = option(
        1, "batches of one optimizer step; the loss is the mean over all their pairs"
    )
    num_train_epochs: float = option(3.0, "passes over the training pairs")
    max_steps: int = option(-1, "optimizer steps in place of epochs; -1: epochs")
    optim: str = option("adamw_torch", "optimizer", OPTIMIZERS)
    learning_rate: float = option(1e-6, "peak learning rate")
    lr_scheduler_type: str = option(
        "linear", "schedule after the warm-up", ("linear", "cosine", "constant")
    )
    warmup_steps: float = option(0, "warm-up steps; below 1: a share of all steps")
    weight_decay: float = option(0.0, "decay of matrices (not of norms and biases)")
    adam_beta1: float = option(0.9, "AdamW's beta1")
    adam_beta2: float = option(0.999, "AdamW's beta2")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = option(1.0, "clip the gradient's norm; 0: do not")
    train_sampling_strategy: str = option(
        "random", "order of the pairs in each epoch (by seed)", ("random", "sequential")
    )
    seed: int = option(42, "seed of the order of pairs, the split and the sampling")


@dataclass
class SupervisedOptions:
    """supervised data beside the pairs"""

    sft_file: str | None = option(
        None, "JSONL file of conversations: fine-tune on it before the pairs, or beside them"
    )
    sft_steps: int | None = option(
        None,
        "supervised steps before the pairs; 0: none; None: one pass over sft_file (none where "
        "sft_rows is set), or the embedded default's recipe, fewer as max_steps is",
    )
    sft_learning_rate: float = option(2e-5, "peak learning rate of those steps (sft_file)")
    sft_rows: int = option(
        0, "rows of sft_file in each optimizer step beside the pairs, their NLL added to the loss"
    )
    sft_rows_weight: float = option(1.0, "weight of that NLL, which is a mean over its tokens")


@dataclass
class SpeedOptions:
    """speed"""

    batch_layout: str = option(
        "auto",
        "prefix: the prompt of a pair is computed once; padded: twice; auto: "
        "whichever is cheaper, pair by pair",
        ("auto", "prefix", "padded"),
    )
    backend: str | None = option(None, "cuda, triton, cpu, torch; None: by device")
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward: less memory for about a third more "
        "time (TRL's default is on)",
    )
    compare_plain_torch: bool | None = option(
        None,
        "time one step of plain torch as well; None: on the embedded default only "
        "(it needs the memory for the logits)",
    )


@dataclass
class OutputOptions:
    """output"""

    output_dir: str | None = option(None, "folder of the run; None: runs/<time>")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    logging_steps: int = option(10, "steps between lines of metrics")
    eval_steps: int | None = option(
        None, "steps between evaluations; None: before and after training only"
    )
    sample_prompt: str | None = option(
        None, "text to complete before and after; None: a held-out prompt"
    )
    sample_max_new_tokens: int = option(64, "length of that completion; 0: none")


# As `--help` shows them.
GROUPS: tuple[Any, ...] = (
    ModelOptions,
    DataOptions,
    LossPart,
    TrainingOptions,
    SupervisedOptions,
    SpeedOptions,
    OutputOptions,
)
# Of `dpo-kernels sft`, which has no pairs.
SFT_GROUPS = tuple(g for g in GROUPS if g not in (LossPart, SupervisedOptions))
SFT_DEFAULTS = {"learning_rate": 2e-5}  # TRL's; one of DPO's would learn next to nothing
