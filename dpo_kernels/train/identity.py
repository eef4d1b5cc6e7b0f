"""What a checkpoint belongs to: the model, tokenizer, data and options of its run.

Going on with another one of them would not fail. It would train something that nobody asked for,
so a difference is refused by name.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import torch
from torch import nn

from ..data import StreamedPairs, TokenPair, TokenRow, TokenSequence
from ..data.bulk import tokenizer_digest
from .config import DPOTrainConfig

# Options that change what is written or shown, or where, and nothing of what is trained.
FREE = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "eval_steps",
        "report_to",
        "run_name",
        "project",
        "device",
        "strict",
        "compare_plain_torch",
        "sample_prompt",
        "sample_max_new_tokens",
        "gradient_checkpointing",
        "torch_compile",
        "model_name_or_path",  # its weights are compared, wherever they are by now
        "dataset_name",  # likewise its pairs
        "eval_file",
        "trust_remote_code",
        "early_stopping_patience",
        "reference_cache",
        "check_first_step",
        "check_layout",
        "on_falling_logps",
        # what a run that ran out of memory, or met a step that is not finite, goes on with
        "max_tokens_per_batch",
        "per_device_eval_batch_size",
        "skip_nonfinite",
        "dataset_num_proc",
        # how many processes there are, and what each holds, changes rounding alone
        "fsdp",
        "fsdp_shard_size",
        "vocab_parallel",
        "ddp_timeout",
    }
)
_LENGTH = ("max_steps", "num_train_epochs")
_SAMPLE = 1024  # weights looked at in each tensor


def model_digest(model: nn.Module) -> str:
    """sha256 over the names, shapes and dtypes of a model's weights and a sample of each."""
    digest = hashlib.sha256()
    for name, x in model.state_dict().items():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        x = x.full_tensor() if hasattr(x, "full_tensor") else x  # every rank's part
        some = x.detach().reshape(-1)[:: max(x.numel() // _SAMPLE, 1)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes() if some.numel() else b"")
    return digest.hexdigest()


def pairs_digest(pairs: Iterable[TokenRow | TokenSequence]) -> str:
    """sha256 over the token ids and numbers of pairs (or other rows), in their order."""
    if isinstance(pairs, StreamedPairs):  # by its file: its rows are not read yet
        return pairs.digest()
    digest = hashlib.sha256()
    for p in pairs:
        if isinstance(p, TokenSequence):
            digest.update(array("q", [len(p.ids), p.start, *p.ids]).tobytes())
            digest.update(repr(p.unscored).encode())
            continue
        if not isinstance(p, TokenPair):
            digest.update(repr({**vars(p), "source": ""}).encode())
            continue
        for ids in (p.prompt, p.chosen, p.rejected):
            digest.update(array("q", [len(ids), *ids]).tobytes())
        digest.update(
            repr((p.offset, p.weight, p.beta, p.unscored, p.group, p.label_smoothing)).encode()
        )
    return digest.hexdigest()


def identity(
    config: DPOTrainConfig,
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[TokenRow | TokenSequence],
    held_out: Sequence[TokenRow | TokenSequence],
) -> dict[str, Any]:
    """All of it, as a checkpoint keeps it; the model is as it was before training."""
    return {
        "options": {k: v for k, v in asdict(config).items() if k not in FREE},
        "model": {"name": config.model_name_or_path, "digest": model_digest(model)},
        "tokenizer": {"digest": tokenizer_digest(tokenizer)},
        "training pairs": {"count": len(pairs), "digest": pairs_digest(pairs)},
        "held-out pairs": {"count": len(held_out), "digest": pairs_digest(held_out)},
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of a run is not as the checkpoint has it, a text each."""
    found = []
    for part in ("model", "tokenizer", "training pairs", "held-out pairs"):
        old, new = then[part], now[part]
        if old["digest"] == new["digest"]:
            continue
        if part == "model":
            of = f" ({old['name']} there, {new['name']} here)" if old != new else ""
            found.append(f"model: other weights{of}")
        elif part == "tokenizer":
            found.append("tokenizer: another vocabulary, special tokens or chat template")
        else:
            found.append(f"{part}: {old['count']:,} there, {new['count']:,} here, not the same")
    # An option that the release of the checkpoint had not is at its default there.
    after = now["options"]
    before = {**{k: v for k, v in _defaults().items() if k in after}, **then["options"]}
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if name in FREE or old == new or (name in _LENGTH and _any_length(after)):
            continue
        why = " (the schedule depends on it)" if name in _LENGTH else ""
        found.append(f"{name}: {old} there, {new} here{why}")
    return found


def _defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(DPOTrainConfig) if f.default is not MISSING}


def _any_length(options: Mapping[str, Any]) -> bool:
    """Whether the steps so far are the same however many follow."""
    warmup = options.get("warmup_steps") or 0
    constant = str(options.get("lr_scheduler_type", "")).startswith("constant")
    return constant and (warmup == 0 or warmup >= 1)
