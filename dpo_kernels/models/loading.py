"""Checkpoints to models that can be trained: names, folders, adapters, GGUF files.

What cannot be trained is an error before gigabytes are read, where that can be known.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .structure import check_decoder_only
from .versions import dtype_option

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModelError(ValueError):
    """A model that cannot be loaded or trained; the message says why and what to do."""


def load_tokenizer(name: str, gguf_file: str | None, chat_template: str | None) -> Any:
    """The tokenizer of a model, folder or GGUF file, with the user's chat template if given."""
    from transformers import AutoTokenizer

    name, source = _source(name, gguf_file)
    adapter = _adapter_config(name)
    if adapter and not any(Path(name).glob("tokenizer*")):
        name = adapter["base_model_name_or_path"]
    if not source:
        _check_folder(Path(name))
    tokenizer = _pretrained(AutoTokenizer, name, **source)
    if chat_template:
        file = Path(chat_template)
        if not file.is_file():
            raise ModelError(f"chat_template: {file} does not exist")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


_OF_A_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def _check_folder(folder: Path) -> None:
    """`ModelError` for a folder that has no tokenizer; transformers' own error names no file."""
    if not folder.is_dir() or any(any(folder.glob(name)) for name in _OF_A_TOKENIZER):
        return
    if (folder / "config.json").is_file():
        raise ModelError(
            f"model_name_or_path: {folder} has no tokenizer (tokenizer.json or the like): save it "
            "beside the model, with its save_pretrained"
        )
    raise ModelError(
        f"model_name_or_path: {folder} is no model's folder: it has neither config.json nor a "
        "tokenizer"
    )


def load_model(
    name: str,
    gguf_file: str | None = None,
    *,
    dtype: Any = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantisation: Any = None,
    say: Callable[[str], None] = print,
) -> Any:
    """A causal LM that can be trained and saved: of the hub, a folder, an adapter's, a GGUF file.

    `quantisation`: transformers' configuration of it, for weights below an adapter.

    Raises `ModelError` (a ValueError) for what cannot be: an encoder-decoder, quantised weights, a
    checkpoint that lacks weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name, source = _source(name, gguf_file)
    if "gguf_file" in source:
        _require("accelerate")
    adapter = _adapter_config(name)
    folder, name = name, adapter["base_model_name_or_path"] if adapter else name
    if not source:
        _check_config(_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code), name)
    options = {**source, **dtype_option(dtype), "trust_remote_code": trust_remote_code}
    if quantisation is not None:
        options["quantization_config"] = quantisation
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    # Weights of another shape come back by name; transformers' own error names none.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = _pretrained(AutoModelForCausalLM, name, **told, **options)
    _check_loaded(found, name, say)
    _check_finite(model, name)
    if "gguf_file" in source:
        model = without_quantization(model)
    if quantisation is None and getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(_QUANTISED.format(name=name, method="quantised weights"))
    return _with_adapter(model, folder) if adapter else model


_QUANTISED = (
    "model_name_or_path: {name} has {method}, which can neither be trained here nor be saved as a "
    "trained model; expected one with float weights"
)


def _check_config(config: Any, name: str) -> None:
    """What cannot be trained is known from its configuration, before gigabytes are read."""
    try:
        check_decoder_only(config, f"model_name_or_path: {name}")
    except ValueError as error:
        raise ModelError(str(error)) from None
    _check_words(config, name)
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = quantised.get("quant_method") or "quantised"
        bits = next((f" {n}-bit" for n in (4, 8) if quantised.get(f"load_in_{n}bit")), "")
        if method != "mxfp4":  # transformers widens it where it cannot run it
            raise ModelError(_QUANTISED.format(name=name, method=f"{method}{bits} weights"))


def _check_words(config: Any, name: str) -> None:
    """`ModelError` for a model of images or sounds that transformers knows as no causal LM."""
    from transformers import AutoModelForCausalLM

    parts = [k for k in ("vision_config", "audio_config") if getattr(config, k, None) is not None]
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if parts and not causal and not getattr(config, "auto_map", None):
        raise ModelError(
            f"model_name_or_path: {name} is a model of images or sounds ({config.model_type}, "
            f"{parts[0]}), expected one of text alone; TRL's DPOTrainer takes it, with the fused "
            "head as well (dpo_kernels.integrations.trl)"
        )


def _check_loaded(found: dict[str, Any], name: str, say: Callable[[str], None]) -> None:
    """`ModelError` for weights that the checkpoint does not have: they would be random."""
    shapes = sorted(found.get("mismatched_keys", ()))
    if shapes:
        listed = _listed(f"{key} {list(a)}, the model has {list(b)}" for key, a, b in shapes)
        raise ModelError(f"model_name_or_path: {name} has weights of another shape: {listed}")
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise ModelError(
            f"model_name_or_path: {name} lacks weights of its model, which would be drawn at "
            f"random: {_listed(missing)}"
        )
    if found.get("error_msgs"):
        raise ModelError(f"model_name_or_path: {name}: {'; '.join(found['error_msgs'])}")
    if unused:
        say(f"weights of the checkpoint that the model does not use: {_listed(unused)}")


def _check_finite(model: Any, name: str) -> None:
    """`ModelError` for weights that are no numbers: nothing that is trained on them would be."""
    bad = []
    for key, weight in model.named_parameters():
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        if hasattr(weight, "quant_state"):  # bitsandbytes' codes in float storage are no numbers
            continue
        least, most = (float(x) for x in weight.detach().aminmax())
        # A bias of -inf takes a token out of a vocabulary.
        if math.isnan(least) or (weight.dim() > 1 and math.isinf(least - most)):
            bad.append(key)
    if bad:
        raise ModelError(
            f"model_name_or_path: {name} has weights that are NaN or infinite: {_listed(bad)}"
        )


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _adapter_config(name: str) -> dict[str, Any] | None:
    """What the folder of an adapter says of itself; None for a model's."""
    file = Path(name) / "adapter_config.json"
    if not file.is_file():
        return None
    adapter: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path")
    what = f"model_name_or_path: {name} is a {adapter.get('peft_type', 'PEFT')} adapter"
    if not base:
        raise ModelError(f"{what} that does not name its base model (base_model_name_or_path)")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ModelError(
            f"{what} of the base model {base}, which needs peft: pip install peft, or give a "
            "model with the adapter merged into it"
        ) from None
    return adapter


def _with_adapter(model: PreTrainedModel, folder: str) -> Any:
    """The base model with the folder's adapter, which is what will be trained and saved."""
    from peft import PeftModel

    wrapped = _pretrained(PeftModel, model, folder, is_trainable=True)
    if wrapped.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"model_name_or_path: {folder} is a {wrapped.active_peft_config.peft_type.value} "
            "adapter, which works outside the model's layers; expected LoRA or one like it"
        )
    return wrapped


def _source(name: str, gguf_file: str | None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` needs for a name, a folder, or a GGUF file."""
    path = Path(name)
    if path.suffix == ".gguf" and gguf_file is None:
        if not path.is_file():
            raise ModelError(f"model_name_or_path: {path} does not exist")
        name, gguf_file = str(path.parent), path.name
    if gguf_file is None:
        return name, {}
    _require("gguf")
    if Path(name).is_dir() and not (Path(name) / gguf_file).is_file():
        raise ModelError(f"gguf_file: {Path(name) / gguf_file} does not exist")
    return name, {"gguf_file": gguf_file}


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise ModelError(f"reading GGUF needs {package}: pip install {package}") from None


def _pretrained(kind: Any, *names: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(*names, **options)
    except Exception as error:
        name = names[-1]
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _broken_weights(error):
            raise ModelError(
                f"model_name_or_path: the weights of {name} cannot be read: "
                f"{first.partition('. ')[0]} (nothing of them was run)"
            ) from None
        if not isinstance(error, (OSError, ValueError, ImportError, KeyError, RuntimeError)):
            raise
        raise ModelError(f"model_name_or_path: {name} cannot be loaded: {first}") from error


def _broken_weights(error: Exception) -> bool:
    """Whether reading a file of weights raised this: pickle's refusals, zip's, safetensors'."""
    kinds = (pickle.UnpicklingError, EOFError, zipfile.BadZipFile)
    return (
        isinstance(error, kinds)
        or type(error).__name__ == "SafetensorError"
        or (isinstance(error, RuntimeError) and "PytorchStreamReader" in str(error))
    )


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved.

    transformers marks a model read from GGUF as quantized and refuses to save it, although its
    weights have been widened; a fresh model of the same configuration takes them over.
    """
    import copy

    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = model.config._attn_implementation
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, **dtype_option(model.dtype)
        )
    state = model.state_dict()
    # Buffers that are not in the state dict (rotary frequencies) are taken from the old model.
    buffers = dict(model.named_buffers())
    fresh.load_state_dict(state, assign=True)
    for name, _ in list(fresh.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(fresh.get_submodule(owner), leaf, buffers[name])
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    return fresh
