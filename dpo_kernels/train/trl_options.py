"""Options that TRL has and this trainer has not: what each is taken for, or why it is refused.

A configuration of TRL's carries over. An option is taken where it says what happens here anyway
(`report_to: none`, `precompute_ref_log_probs: true`), translated where ours has another name
(`warmup_ratio`), and refused by name with the reason otherwise; none is dropped unseen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_AXES = ("tensor", "context", "sequence", "pipeline", "expert")
_OFF: tuple[Any, ...] = (None, False, "", [], {}, 0, "none", "no")

_CHECKPOINTS = "checkpoints hold the whole run, every save_steps; the model is saved at the end"
_PROCESSES = "a process has one device, and torchrun's processes share the model as fsdp says"
_NO_TRUNKS = (
    "the trunk is not split by tensor, context, sequence, pipeline or experts: torchrun's "
    "processes share its weights as fsdp says (full_shard, hybrid_shard), and its head by "
    "vocab_parallel"
)
_NO_WORKERS = "batches are made in the process itself, without a data loader"
_LOCAL_FILE = "data comes from a file (dataset_name, eval_file)"
_NO_HUB = "nothing is uploaded: the trained model is a folder"
_LOGGED = "metrics are written to metrics.jsonl in the run's folder, and to what report_to names"
_PLAIN_OPTIMIZER = "optimizers are set by learning_rate, weight_decay, adam_* and max_grad_norm"
_REFERENCE_ONCE = (
    "the reference (the starting policy, or ref_model_name_or_path) scores every pair once"
)
_PRECISION = "the dtype of the weights is the option dtype"

# reason -> names
_REFUSED: dict[str, str] = {
    _CHECKPOINTS: "save_only_model save_on_each_node enable_jit_checkpoint "
    "load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    _PROCESSES: "fsdp_config deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend accelerator_config "
    "local_rank ignore_bias_buffers log_on_each_node log_level_replica "
    "average_tokens_across_devices",
    _NO_TRUNKS: "parallelism_config tensor_parallel_size context_parallel_size "
    "sequence_parallel_size pipeline_parallel_size expert_parallel_size tp_size cp_size sp_size "
    "pp_size ep_size tp_plan",
    "adapters are those of causal language models": "lora_task_type",
    _NO_WORKERS: "dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
    "dataloader_multiprocessing_context length_column_name group_by_length",
    _LOCAL_FILE: "dataset_config dataset_train_split dataset_test_split "
    "datasets streaming test_split_size dataset_kwargs",
    _NO_HUB: "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
    "hub_revision",
    _LOGGED: "logging_dir trackio_space_id trackio_bucket_id "
    "trackio_static_space_id logging_strategy logging_first_step logging_nan_inf_filter log_level "
    "include_num_input_tokens_seen disable_tqdm",
    _PRECISION: "bf16 fp16 bf16_full_eval fp16_full_eval tf32",
    _PLAIN_OPTIMIZER: "optim_args optim_target_modules",
    "the loss is smoothed by label_smoothing": "label_smoothing_factor",
    "checkpointing is on or off (gradient_checkpointing)": "gradient_checkpointing_kwargs "
    "activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps",
    "the kernels of this package are the ones that run": "use_liger_kernel liger_kernel_config",
    "training looks for no batch size": "auto_find_batch_size",
    "noise on the embeddings would make policy and reference differ": "neftune_noise_alpha",
    "evaluation is the mean over all held-out pairs, in steps of eval_steps": "eval_strategy "
    "evaluation_strategy eval_delay prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics "
    "label_names generate_during_eval",
    "order and sampling follow seed alone": "data_seed full_determinism",
    "the layout is the option layout": "padding_free pad_to_multiple_of use_logits_to_keep",
    _REFERENCE_ONCE: "precompute_ref_log_probs precompute_ref_batch_size model_adapter_name",
    "dropout is always off: policy and reference are one function": "disable_dropout",
    "a router's loss is not added here": "router_aux_loss_coef",
    "model options are dtype, attn_implementation and trust_remote_code": "model_init_kwargs "
    "model_revision use_cache pad_token",
    "columns that are not used are named, and left": "remove_unused_columns",
    "train does both, evaluation where there are held-out pairs": "do_train do_eval do_predict",
    "there is no such report": "debug skip_memory_metrics",
    "every turn of the assistant is scored, of a prompt nothing (assistant_only false: of a "
    "completion the others' turns too)": "assistant_only_loss completion_only_loss",
    "rows are not packed into one sequence": "packing packing_strategy eval_packing",
    "a chat template comes from a file (chat_template)": "chat_template_path",
    "the column is 'text'": "dataset_text_field",
    "the end token is the tokenizer's": "eos_token",
    "the order follows train_sampling_strategy": "shuffle_dataset",
}

# What happens here anyway, beside `_OFF`.
_TAKEN: dict[str, tuple[Any, ...]] = {
    "enable_jit_checkpoint": (True,),
    "local_rank": (-1,),
    "logging_strategy": ("steps",),
    "precompute_ref_log_probs": (True,),
    "disable_dropout": (True,),
    "remove_unused_columns": (True,),
    "eval_on_start": (True,),
    "do_train": (True,),
    "do_eval": (True,),
    "skip_memory_metrics": (True,),
    "average_tokens_across_devices": (True,),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False},),
    "dataset_train_split": ("train",),
    "dataset_test_split": ("test",),
    "assistant_only_loss": (True, None),
    "completion_only_loss": (True, None),
    "dataset_text_field": ("text",),
    "shuffle_dataset": (True,),
    "packing_strategy": ("bfd",),
    # What `DPOConfig().to_dict()` writes of settings that mean nothing here, or nothing alone.
    "label_smoothing_factor": (0.0,),
    "lora_task_type": ("causal_lm",),
    "log_on_each_node": (True,),
    "logging_nan_inf_filter": (True,),
    "log_level": ("passive",),
    "log_level_replica": ("warning",),
    "eval_do_concat_batches": (True,),
    "hub_token": ("<hub_token>",),
    "hub_strategy": ("every_save",),
    "dataloader_in_order": (True,),
    "length_column_name": ("length",),
    "pad_token": ("<pad_token>",),
    **dict.fromkeys(
        [
            *(f"{kind}_parallel_size" for kind in _AXES),
            *(f"{axis}_size" for axis in ("tp", "cp", "sp", "pp", "ep")),
        ],
        (1,),
    ),
    "accelerator_config": (
        {
            "split_batches": False,
            "dispatch_batches": None,
            "even_batches": True,
            "use_seedable_sampler": True,
            "non_blocking": False,
            "gradient_accumulation_kwargs": None,
        },
    ),
}
# Off would change what happens here.
_NOT_OFF = ("disable_dropout", "logging_strategy", "assistant_only_loss", "completion_only_loss")

REASONS = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
TRANSLATED = ("save_strategy", "warmup_ratio", "use_cpu", "activation_checkpointing")
NAMES = (*REASONS, *TRANSLATED)


def translate(name: str, value: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for one of TRL's (empty: nothing to set); `ValueError` with the reason if none.

    `others` are the options given beside it.
    """
    if name in TRANSLATED:
        return _translated(name, value, others)
    if name in ("eval_strategy", "evaluation_strategy"):
        # The strategy says again what eval_steps says; one without the other would not.
        if value == "steps" and others.get("eval_steps") is not None:
            return {}
        if value == "no" and others.get("eval_steps") is not None:
            raise ValueError(f"{name} 'no' contradicts eval_steps={others['eval_steps']}")
    taken = any(_same(value, other) for other in _TAKEN.get(name, ()))
    if name not in _NOT_OFF:
        taken = taken or any(_same(value, other) for other in _OFF)
    if not taken:
        raise ValueError(
            f"{name}={value!r} is an option of TRL's that is not supported here: {REASONS[name]}"
        )
    return {}


def _translated(name: str, value: Any, others: Mapping[str, Any]) -> dict[str, Any]:
    if name == "save_strategy":
        if value not in ("steps", "no"):
            raise ValueError(f"save_strategy must be steps or no, got {value!r}: see save_steps")
        return {} if value == "steps" else {"save_steps": 0}
    if name == "warmup_ratio":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {value!r}")
        if value and others.get("warmup_steps"):
            raise ValueError(
                f"warmup_ratio={value} and warmup_steps={others['warmup_steps']}: give one of them "
                "(warmup_steps below 1 is a share of all steps)"
            )
        return {"warmup_steps": float(value)} if value else {}
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    if name == "use_cpu":
        if value and others.get("device", "cpu") not in ("cpu", "auto"):
            raise ValueError(f"use_cpu contradicts device={others['device']!r}")
        return {"device": "cpu"} if value else {}
    return {"gradient_checkpointing": value}


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, str) and isinstance(other, str):
        return value.lower() == other
    return type(value) is type(other) and value == other
