"""A causal LM taken apart: the trunk that gives hidden states, and the head that scores them.

The loss never asks the model for logits. It runs the trunk, picks the rows that are scored, and
hands them with the head's weight to the fused ops, so the head's extras (Gemma's soft-capping,
Granite's and Cohere's scales) must be applied there. Once at the start `check_head` compares our
log-probs with the model's own logits, so an architecture with yet another extra is an error, not a
silently different model.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..causal_lm import (
    attention_ratio,
    base_model_of,
    check_causal,
    check_decoder_only,
    deterministic,
    head_parts,
    head_scaling,
    no_sharing,
    router_loss_of_calls,
    router_loss_weight,
    text_config,
    trunk_states,
)
from ..data import ScoredBatch, Sharing, TokenPair, make_batch
from ..data.batches import CPU_CALL_TOKENS
from .config import DPOTrainConfig, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far two ways to the same log-prob (in nats) or hidden state (relative) may lie apart.
_LOGP_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HIDDEN_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_LOGP_TOLERANCE, _HALF_HIDDEN_TOLERANCE = 0.25, 0.05


@dataclass
class Policy:
    """The model being trained, its tokenizer, and what the fused head must know."""

    model: PreTrainedModel
    tokenizer: Any
    trunk: nn.Module
    head: nn.Linear
    scaling: dict[str, float] = field(default_factory=dict)  # logit_scale, logit_softcap
    sharing: Sharing = field(default_factory=Sharing)
    backend: str | None = None
    router_weight: float = 0.0  # of a mixture of experts' load-balancing loss
    bf16: bool = False  # compute in bfloat16 by autocast

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 arithmetic over fp32 weights, where it was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def pad_id(self) -> int:
        """Any id will do: a real token never sees the padding behind it."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id or 0

    def head_arguments(self) -> dict[str, Any]:
        """weight, bias, scales and backend, as the linear front functions take them."""
        return {**head_parts(self.head)._asdict(), "backend": self.backend, **self.scaling}

    def hidden(self, batch: ScoredBatch, router: list[tuple[Tensor, ...]] | None = None) -> Tensor:
        """[N, H] hidden states that predict the scored tokens of `batch`."""
        attention = self.model.config._attn_implementation
        with self.autocast():
            return trunk_states(self.trunk, attention, self.head.weight.dtype, batch, router)

    def hidden_and_router_loss(self, batch: ScoredBatch) -> tuple[Tensor, Tensor | None]:
        """`hidden`, and the load-balancing loss of a mixture of experts with its weight."""
        if not self.router_weight:
            return self.hidden(batch), None
        router: list[tuple[Tensor, ...]] = []
        hidden = self.hidden(batch, router)
        if not router:
            return hidden, None
        loss = router_loss_of_calls(base_model_of(self.model), router, batch)
        return hidden, self.router_weight * loss

    def logps(self, batch: ScoredBatch, reduction: str = "sum") -> Tensor:
        """Log-probs of the scored tokens: [sequences], or [N] with reduction="none"."""
        hidden = self.hidden(batch)
        with self.autocast():
            return dk.linear_sequence_logps(
                hidden,
                labels=batch.labels,
                cu_seqlens=batch.cu_seqlens,
                shift=False,
                reduction=reduction,
                **self.head_arguments(),
            )

    def batch(self, pairs: list[TokenPair]) -> ScoredBatch:
        """The batch of these pairs on the policy's device."""
        return make_batch(pairs, self.sharing, self.pad_id).to(self.device)


def load_policy(config: DPOTrainConfig, say: Callable[[str], None] = print) -> Policy:
    """The model and tokenizer a configuration names, checked and ready to train."""
    model, tokenizer = _load(config, say)
    return prepare_policy(model, tokenizer, config, say)


def prepare_policy(
    model: PreTrainedModel, tokenizer: Any, config: DPOTrainConfig,
    say: Callable[[str], None] = print,
) -> Policy:  # fmt: skip
    """Find trunk and head of a loaded model, switch dropout off, and check both."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)  # type: ignore[arg-type]
        name = dk.backends.choose(config.backend, torch.device(device), model.dtype)
        dk.backends.load(name)
    except (ValueError, RuntimeError) as error:  # no such device; backend absent or unfit for it
        raise UserError(str(error)) from None
    model.config.use_cache = False
    model.train()
    disable_dropout(model)
    if config.gradient_checkpointing:
        # transformers 5.20 and later call it activation checkpointing
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    base = base_model_of(model)
    trunk, head = base.base_model, base.get_output_embeddings()
    if head is None or trunk is base:
        raise UserError(
            f"{type(base).__name__}: no trunk and lm_head found; expected a causal language model"
        )
    try:
        check_decoder_only(model.config, type(base).__name__)
        head_parts(head)
        policy = Policy(
            model, tokenizer, trunk, head, head_scaling(model.config), backend=config.backend,
            router_weight=router_loss_weight(base), bf16=config.bf16,
        )  # fmt: skip
        with deterministic(model):
            check_head(policy)
            policy.sharing = _choose_sharing(policy, config.batch_layout, say)
    except UserError:
        raise
    except ValueError as error:  # what the model is
        raise UserError(str(error)) from None
    return policy


def load_tokenizer(name: str, gguf_file: str | None, chat_template: str | None) -> Any:
    """The tokenizer of a model, folder or GGUF file, with the user's chat template if given."""
    from transformers import AutoTokenizer

    name, source = _source(name, gguf_file)
    adapter = _adapter_config(name)
    if adapter and not any(Path(name).glob("tokenizer*")):
        name = adapter["base_model_name_or_path"]
    tokenizer = _pretrained(AutoTokenizer, name, **source)
    if chat_template:
        file = Path(chat_template)
        if not file.is_file():
            raise UserError(f"chat_template: {file} does not exist")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def _load(config: DPOTrainConfig, say: Callable[[str], None]) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: pass a model's name or folder")
    tokenizer = load_tokenizer(config.model_name_or_path, config.gguf_file, config.chat_template)
    name, source = _source(config.model_name_or_path, config.gguf_file)
    if "gguf_file" in source:
        _require("accelerate")
    adapter = _adapter_config(name)
    folder, name = name, adapter["base_model_name_or_path"] if adapter else name
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.bf16:
        dtype = torch.float32
    if not source:
        read = _pretrained(AutoConfig, name, trust_remote_code=config.trust_remote_code)
        _check_config(read, name)
    options = {**source, **dtype_option(dtype), "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    model, found = _pretrained(AutoModelForCausalLM, name, output_loading_info=True, **options)
    _check_loaded(found, name, say)
    if "gguf_file" in source:
        model = without_quantization(model)
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(_QUANTISED.format(name=name, method="quantised weights"))
    return (_with_adapter(model, folder) if adapter else model), tokenizer


_QUANTISED = (
    "model_name_or_path: {name} has {method}, which can neither be trained here nor be saved as a "
    "trained model; expected one with float weights"
)


def _check_config(config: Any, name: str) -> None:
    """What cannot be trained is known from its configuration, before gigabytes are read."""
    try:
        check_decoder_only(config, f"model_name_or_path: {name}")
    except ValueError as error:
        raise UserError(str(error)) from None
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = quantised.get("quant_method") or "quantised"
        bits = next((f" {n}-bit" for n in (4, 8) if quantised.get(f"load_in_{n}bit")), "")
        if method != "mxfp4":  # transformers widens it where it cannot run it
            raise UserError(_QUANTISED.format(name=name, method=f"{method}{bits} weights"))


def _check_loaded(found: dict[str, Any], name: str, say: Callable[[str], None]) -> None:
    """`UserError` for weights that the checkpoint does not have: they would be random."""
    missing, unused = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing:
        raise UserError(
            f"model_name_or_path: {name} lacks weights of its model, which would be drawn at "
            f"random: {_listed(missing)}"
        )
    if found.get("error_msgs"):
        raise UserError(f"model_name_or_path: {name}: {'; '.join(found['error_msgs'])}")
    if unused:
        say(f"weights of the checkpoint that the model does not use: {_listed(unused)}")


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
        raise UserError(f"{what} that does not name its base model (base_model_name_or_path)")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(
            f"{what} of the base model {base}, which needs peft: pip install peft, or give a "
            "model with the adapter merged into it"
        ) from None
    return adapter


def _with_adapter(model: PreTrainedModel, folder: str) -> Any:
    """The base model with the folder's adapter, which is what will be trained and saved."""
    from peft import PeftModel

    wrapped = _pretrained(PeftModel, model, folder, is_trainable=True)
    if wrapped.active_peft_config.is_prompt_learning:
        raise UserError(
            f"model_name_or_path: {folder} is a {wrapped.active_peft_config.peft_type.value} "
            "adapter, which works outside the model's layers; expected LoRA or one like it"
        )
    return wrapped


def dtype_option(dtype: Any) -> dict[str, Any]:
    """The dtype as `from_pretrained` and `from_config` call it: renamed in transformers 4.56."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


def _source(name: str, gguf_file: str | None) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` needs for a name, a folder, or a GGUF file."""
    path = Path(name)
    if path.suffix == ".gguf" and gguf_file is None:
        if not path.is_file():
            raise UserError(f"model_name_or_path: {path} does not exist")
        name, gguf_file = str(path.parent), path.name
    if gguf_file is None:
        return name, {}
    _require("gguf")
    if Path(name).is_dir() and not (Path(name) / gguf_file).is_file():
        raise UserError(f"gguf_file: {Path(name) / gguf_file} does not exist")
    return name, {"gguf_file": gguf_file}


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"reading GGUF needs {package}: pip install {package}") from None


def _pretrained(kind: Any, *names: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(*names, **options)
    except Exception as error:
        name = names[-1]
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _broken_weights(error):
            raise UserError(
                f"model_name_or_path: the weights of {name} cannot be read: "
                f"{first.partition('. ')[0]} (nothing of them was run)"
            ) from None
        if not isinstance(error, (OSError, ValueError, ImportError, KeyError, RuntimeError)):
            raise
        raise UserError(f"model_name_or_path: {name} cannot be loaded: {first}") from error


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


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: policy and reference must be the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # attention modules keep the rate as a plain attribute (attention_dropout)
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _probe_ids(policy: Policy, n: int) -> list[int]:
    """A fixed spread of valid token ids."""
    V = policy.head.weight.shape[0]
    size = min(V, len(policy.tokenizer)) if len(policy.tokenizer) else V
    return [(7 + 131 * i) % size for i in range(n)]


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Our log-probs against the model's own logits, on a short sequence; else `UserError`."""
    ids = torch.tensor([_probe_ids(policy, 16)], device=policy.device)

    def logits_of(ids: Tensor) -> Tensor:
        return policy.model(input_ids=ids, use_cache=False).logits

    check_causal(logits_of, ids, type(base_model_of(policy.model)).__name__)
    logits = logits_of(ids)
    own = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    hidden = policy.trunk(input_ids=ids, use_cache=False).last_hidden_state
    ours = dk.linear_sequence_logps(hidden, labels=ids, reduction="none", **policy.head_arguments())
    dtype = hidden.dtype
    worst = float((own - ours).abs().max())
    if not worst <= _LOGP_TOLERANCE.get(dtype, _HALF_LOGP_TOLERANCE):
        raise UserError(
            f"{type(policy.model).__name__}: lm_head(trunk) and the model's own logits differ by "
            f"{worst:.3g} nats: this architecture does something to its logits that is not known "
            "here (soft-capping and logit scales are)"
        )


def _choose_sharing(policy: Policy, layout: str, say: Callable[[str], None]) -> Sharing:
    """The layout of pairs that this model can run; refuses "prefix" where it cannot."""
    call_tokens = CPU_CALL_TOKENS if policy.device.type == "cpu" else None
    if layout == "padded":
        return Sharing("padded", call_tokens=call_tokens)
    text = text_config(policy.model.config)
    reason = no_sharing(text)
    if policy.router_weight:
        reason = "the router's load-balancing loss counts every token"
    reason = reason or _sharing_differs(policy)
    if reason:
        if layout == "prefix":
            raise UserError(f"batch_layout=prefix: {reason}; use padded or auto")
        say(f"prompts are not shared between chosen and rejected: {reason}")
        return Sharing("padded", call_tokens=call_tokens)
    ratio = attention_ratio(policy.trunk, policy.model.get_input_embeddings(), text)
    return Sharing(layout, ratio, call_tokens)


@torch.no_grad()
def _sharing_differs(policy: Policy) -> str:
    """Compare both layouts on one short pair (this also finds recurrent and ALiBi models)."""
    ids = tuple(_probe_ids(policy, 14))
    pair = TokenPair(ids[:5], ids[5:8], ids[8:14], "probe")
    states = []
    for mode in ("padded", "prefix"):
        batch = make_batch([pair], Sharing(mode), policy.pad_id).to(policy.device)
        try:
            states.append(policy.hidden(batch))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return f"the model refuses a 4-D mask ({str(error).splitlines()[0]})"
    worst = float((states[0] - states[1]).abs().max() / states[0].abs().max())
    if not worst <= _HIDDEN_TOLERANCE.get(states[0].dtype, _HALF_HIDDEN_TOLERANCE):
        return f"the model's states differ under a shared prompt (relative {worst:.2g})"
    return ""


def save_policy(policy: Policy, folder: Path) -> None:
    """`save_pretrained` of model and tokenizer; a leftover of an earlier run is replaced whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        cache = policy.model.config.use_cache
        policy.model.config.use_cache = True
        policy.model.save_pretrained(part)
        policy.model.config.use_cache = cache
        policy.tokenizer.save_pretrained(part)
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
    finally:
        if part.exists():
            shutil.rmtree(part)


@torch.no_grad()
def complete(policy: Policy, ids: list[int], max_new_tokens: int) -> str:
    """Greedy completion of these prompt ids, as text."""
    tokenizer = policy.tokenizer
    inputs = torch.tensor([ids], device=policy.device)
    generate: Any = policy.model.generate
    with deterministic(policy.model):
        out = generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            pad_token_id=policy.pad_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
