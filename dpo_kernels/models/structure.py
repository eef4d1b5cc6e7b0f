"""Finding one's way in a causal LM of transformers: what wraps it, its text model, its trunk.

The trunk is the model without its head (lm_head), which gives hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .versions import transformers_before


def unwrapped(model: Any) -> Any:
    """The model below DDP, DataParallel, FSDP1, DeepSpeed and torch.compile; PEFT stays."""
    while not hasattr(type(model), "get_output_embeddings"):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            break
        model = inner
    return model


def base_model_of(model: nn.Module) -> Any:
    """The causal LM below PEFT and below what wraps it."""
    model = unwrapped(model)
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # type: ignore[operator]
    if "base_model" in model._modules and hasattr(model, "peft_config"):  # PeftMixedModel
        return model.base_model.model  # type: ignore[union-attr]
    return model


def text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode, so without any of its noise; every module's mode is put back.

    The mode is what all noise asks for (dropout, NEFTune's hook, router jitter, layerdrop, LoRA's
    dropout), whatever the attribute that holds its rate is called.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield
        return
    model.eval()
    try:
        yield
    finally:
        # A module with a train() of its own may do more than set the flag, or set others' flags.
        for module, training in modes:
            if type(module).train is not nn.Module.train:
                module.train(training)
        for module, training in modes:
            module.training = training


def check_decoder_only(config: Any, name: str) -> None:
    """`ValueError` for an encoder-decoder, whose answers do not follow the prompt in one row."""
    text = None if config is None else text_config(config)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text)):
        raise ValueError(
            f"{name} is an encoder-decoder (config.is_encoder_decoder); expected a decoder-only "
            "causal language model"
        )


def trunk_of(model: Any) -> nn.Module:
    """The model without its head; `ValueError` for what is no causal LM."""
    config = getattr(model, "config", None)
    check_decoder_only(config, type(model).__name__)
    trunk = getattr(model, "base_model", model)
    if config is not None and text_config(config) is not config and transformers_before(5):
        trunk = model.model  # vision-language models named their trunk so
    if trunk is model:  # a prefix that no attribute has (Llama 4's text model)
        trunk = getattr(model, "model", model)
    if config is None or trunk is model or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no trunk and lm_head; expected a causal language model"
        )
    return trunk


def probe_ids(V: int, n: int) -> list[int]:
    """A fixed spread of `n` token ids below V."""
    return [(7 + 131 * i) % V for i in range(n)]
