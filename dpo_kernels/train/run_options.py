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
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad", "adafactor")
# transformers' that follow the steps alone
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
)
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
class AdapterOptions:
    """adapter"""

    use_peft: bool = option(False, "train a LoRA adapter alone; needs peft")
    lora_r: int = option(16, "rank")
    lora_alpha: int = option(32, "the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(
        0.05, "taken for TRL's sake: dropout is always off, as its disable_dropout"
    )
    lora_target_modules: list[str] | None = option(
        None, "layers by name, or all-linear; None: those that peft knows of the model"
    )
    lora_target_parameters: list[str] | None = option(
        None, "parameters by name (experts that are no layers)"
    )
    lora_modules_to_save: list[str] | None = option(
        None, "layers to train whole, beside the adapter"
    )
    use_rslora: bool = option(False, "scale by lora_alpha / sqrt(lora_r)")
    use_dora: bool = option(False, "DoRA: magnitude and direction apart")
    load_in_4bit: bool = option(False, "QLoRA: 4-bit weights; needs bitsandbytes")
    load_in_8bit: bool = option(False, "8-bit weights; needs bitsandbytes")
    bnb_4bit_quant_type: str = option("nf4", "of load_in_4bit", ("nf4", "fp4"))
    use_bnb_nested_quant: bool = option(False, "of load_in_4bit: quantise the scales")
    bnb_4bit_quant_storage: str | None = option(None, "dtype that holds 4-bit weights")


@dataclass
class DataOptions:
    """data"""

    dataset_name: str | None = option(
        None,
        "JSONL file of training pairs (kto, apo_zero_unpaired: of completions with a label; "
        "plackett_luce: of ranked lists; sft: of conversations; alias: --train_file)",
    )
    eval_file: str | None = option(None, "JSONL file held out; None: split off eval_fraction")
    eval_fraction: float = option(
        0.1, "share of the training rows held out by seed if there is no eval_file"
    )
    max_length: int | None = option(
        1024, "tokens of prompt + completion; what is longer is cut as truncation_mode says"
    )
    truncation_mode: str = option(
        "keep_start",
        "keep_start: cut the completion's end; keep_end: the prompt's start; drop: leave the pair "
        "out",
        ("keep_start", "keep_end", "drop"),
    )
    max_prompt_length: int | None = option(None, "tokens of the prompt, which keeps its end")
    max_completion_length: int | None = option(
        None, "tokens of a completion, which keeps its start"
    )
    assistant_only: bool = option(
        True, "of a completion of several turns the assistant's alone are scored; false: all of it"
    )
    column_mapping: list[str] | None = option(
        None, "columns of other names, as prompt=question chosen=good"
    )
    dataset_streaming: bool | None = option(
        None,
        "read rows as they are asked for, with a copy of the policy as the reference; None: where "
        "the data is larger than 256 MB, unpacked, or 200,000 rows",
    )
    dataset_num_proc: int | None = option(None, "processes that tokenise; None: one")
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
class RefModel:
    """reference"""

    ref_model_name_or_path: str | None = option(
        None,
        "model name or folder of the reference; None: train takes the policy as it starts, score "
        "has none",
    )


@dataclass
class ReferenceOptions(RefModel):
    """reference"""

    ref_adapter_name: str | None = option(
        None,
        "the reference is the model with this adapter: a folder below model_name_or_path, which is "
        "an adapter's",
    )
    reference_cache: str | None = option(
        "auto",
        "folder that keeps the reference's log-probs for other runs; auto: in the user's cache; "
        "none: do not keep them",
    )
    sync_ref_model: bool = option(
        False, "the reference follows the policy (TR-DPO); a copy of it is held"
    )
    ref_model_mixup_alpha: float = option(0.6, "the policy's share at each sync; 1: a hard copy")
    ref_model_sync_steps: int = option(512, "steps between syncs")


@dataclass
class TrainingOptions:
    """training"""

    per_device_train_batch_size: int = option(8, "pairs of one forward and backward")
    per_device_eval_batch_size: int = option(8, "pairs of one evaluation forward")
    gradient_accumulation_steps: int = option(
        1, "batches of one optimizer step; the loss is the mean over all their pairs"
    )
    num_train_epochs: float = option(3.0, "passes over the training pairs")
    max_steps: int = option(
        -1, "optimizer steps in place of epochs; -1: epochs; 0: evaluate the held-out pairs only"
    )
    optim: str = option("adamw_torch", "optimizer", OPTIMIZERS)
    learning_rate: float = option(1e-6, "peak learning rate")
    lr_scheduler_type: str = option("linear", "schedule after the warm-up", SCHEDULES)
    lr_scheduler_kwargs: dict | str | None = option(
        None, 'what the schedule takes besides, as JSON: {"num_cycles": 2}'
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
    check_first_step: bool = option(
        True,
        "end at step 1 where nothing can be learned: masked labels, no gradients, weights that do "
        "not move",
    )
    seed: int = option(42, "seed of the order of pairs, the split and the sampling")


@dataclass
class GuardOptions:
    """averages and guards"""

    ema_decay: float = option(
        0.0, "keep an average of the weights, which is what is saved (0.999); 0: none"
    )
    skip_nonfinite: int = option(
        0, "steps that may be left out because their loss or gradient is not finite"
    )
    early_stopping_patience: int | None = option(
        None, "stop after so many evaluations without a lower eval_loss"
    )
    on_falling_logps: str = option(
        "warn",
        "where the log-probs of chosen and rejected fall together",
        ("warn", "stop", "ignore"),
    )


@dataclass
class LearnedGroupOptions:
    """learned offsets and temperatures"""

    learn_groups: bool = option(
        False, "train an offset and a temperature of each `group` of rows beside the model"
    )
    group_learning_rate: float = option(1e-2, "learning rate of learn_groups")
    group_l2: float = option(1e-3, "L2 of learn_groups: pulls temperatures to 1 and offsets to 0")


@dataclass
class JudgedOptions:
    """judged rows"""

    soft_labels: bool = option(
        False,
        "a row's p_chosen (a judge's probability) becomes its label_smoothing, 1 - p_chosen: "
        "sigmoid, sppo_soft",
    )
    desirable_weight: float | None = option(
        None, "kto, apo_zero_unpaired: weight of good completions (1)"
    )
    undesirable_weight: float | None = option(
        None, "kto, apo_zero_unpaired: weight of bad completions (1)"
    )


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
    sft_eval_file: str | None = option(
        None, "conversations held out: their NLL a token at every evaluation shows forgetting"
    )
    sft_rows: int = option(
        0, "rows of sft_file in each optimizer step beside the pairs, their NLL added to the loss"
    )
    sft_rows_weight: float = option(1.0, "weight of that NLL, which is a mean over its tokens")


@dataclass
class SpeedOptions:
    """speed"""

    layout: str = option(
        "auto",
        "padded: rows of one length; packed: one row without padding; shared: and the prompt of "
        "a pair once (also called prefix); auto: the cheapest that the model can take",
        ("auto", "padded", "packed", "shared", "prefix"),
    )
    max_tokens_per_batch: int | None = option(
        None,
        "tokens of one forward and backward: the pairs of an optimizer step are put together up "
        "to so many, in place of per_device_train_batch_size; None: by number of pairs",
    )
    check_layout: bool = option(True, "compare a layout with padded rows on the first batch")
    backend: str | None = option(None, "cuda, triton, cpu, torch; None: by device")
    gradient_checkpointing: bool = option(
        False,
        "recompute activations in the backward: less memory for about a third more "
        "time (TRL's default is on)",
    )
    torch_compile: bool = option(False, "compile the model below its head")
    torch_compile_backend: str | None = option(None, "of torch_compile; None: inductor")
    torch_compile_mode: str | None = option(
        None, "of torch_compile: default, reduce-overhead, max-autotune, ..."
    )
    compare_plain_torch: bool | None = option(
        None,
        "time one step of plain torch as well; None: on the embedded default only "
        "(it needs the memory for the logits)",
    )


@dataclass
class ProcessOptions:
    """many processes"""

    fsdp: str = option(
        "auto",
        "of torchrun's processes: full_shard (FSDP2 over all of them), hybrid_shard (over groups "
        "of them, which have copies), none (each has the whole model); auto: full_shard",
        ("auto", "full_shard", "hybrid_shard", "none"),
    )
    fsdp_shard_size: int | None = option(
        None, "processes of a group of hybrid_shard; None: those of a node"
    )
    vocab_parallel: int = option(
        1, "processes that share a head by vocabulary; each such group has the same pairs"
    )
    ddp_timeout: int = option(
        1800, "seconds that a process may be waited for, before the run ends and names it"
    )


@dataclass
class OutputOptions:
    """output"""

    output_dir: str | None = option(None, "folder of the run; None: runs/<time>")
    overwrite_output_dir: bool = option(False, "write into a folder that is not empty")
    logging_steps: int = option(10, "steps between lines of metrics")
    report_to: list[str] = option([], "trackio, tensorboard, wandb: metrics go there as well")
    run_name: str | None = option(None, "name of the run there; None: its folder's")
    project: str = option("dpo-kernels", "project of the run there")
    eval_steps: int | None = option(
        None, "steps between evaluations; None: before and after training only"
    )
    save_steps: int = option(
        500, "steps between checkpoints (the last step has one as well); 0: none"
    )
    save_total_limit: int | None = option(None, "checkpoints to keep, the newest; None: all")
    resume_from_checkpoint: str | None = option(
        None, "go on from a checkpoint: its folder, or true for output_dir's newest"
    )
    sample_prompt: str | None = option(
        None, "text to complete before and after; None: a held-out prompt"
    )
    sample_max_new_tokens: int = option(64, "length of that completion; 0: none")


@dataclass
class ScoreOptions:
    """scores"""

    dataset_name: str | None = option(
        None, "JSONL file of pairs (`chosen`, `rejected`) or completions (as of sft)"
    )
    output_file: str | None = option(None, "file to write: .jsonl, or .parquet (needs pyarrow)")
    overwrite: bool = option(False, "write over a file that exists")
    reference_cache: str | None = option(
        None,
        "folder of a reference's log-probs (train's reference_cache): read, and without "
        "ref_model_name_or_path in its place; with it, what is missing is computed and kept",
    )
    beta: float = option(0.1, "reward of a log-ratio of 1")
    per_token: bool = option(False, "also token ids, log-probs and log-ratios of every token")
    max_length: int | None = option(
        1024, "tokens of prompt + completion; sequences keep their start"
    )
    max_tokens_per_batch: int = option(8192, "tokens of one forward, padding included")
    strict: bool = option(False, "refuse the first bad row instead of leaving it out")
    layout: str = option(
        "auto",
        "of pairs: padded, packed, shared (the prompt once; also called prefix), auto",
        ("auto", "padded", "packed", "shared", "prefix"),
    )
    backend: str | None = option(None, "cuda, triton, cpu, torch; None: by device")


SCORE_GROUPS = (ModelOptions, RefModel, ScoreOptions)
# As `--help` shows them.
GROUPS: tuple[Any, ...] = (
    ModelOptions,
    AdapterOptions,
    DataOptions,
    LossPart,
    ReferenceOptions,
    TrainingOptions,
    GuardOptions,
    LearnedGroupOptions,
    JudgedOptions,
    SupervisedOptions,
    SpeedOptions,
    ProcessOptions,
    OutputOptions,
)
# Of `dpo-kernels sft`, which has no pairs.
_OF_PAIRS = (
    LossPart,
    ReferenceOptions,
    GuardOptions,
    LearnedGroupOptions,
    JudgedOptions,
    SupervisedOptions,
)
SFT_GROUPS = tuple(g for g in GROUPS if g not in _OF_PAIRS)
SFT_DEFAULTS = {"learning_rate": 2e-5}  # TRL's; one of DPO's would learn next to nothing
