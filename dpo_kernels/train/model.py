"""The policy that is trained: a model that ends in the fused head, its tokenizer, its layout."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import dpo_kernels as dk

from ..data import ScoredBatch, Sharing, TokenRow, make_batch
from ..data.batches import padded_tokens
from ..models import loading
from ..models.attached import HeadCall, attach_head, run_head, score_states
from ..models.experts import router_loss_weight
from ..models.forward import score_tokens
from ..models.head_check import check_head
from ..models.layout_check import check_first_batch
from ..models.layouts import choose_sharing, known, trunk_states
from ..models.lm_head import head_parts, head_scaling
from ..models.options import FusedOptions
from ..models.structure import base_model_of, deterministic, trunk_of
from .adapters import quantisation, with_adapter
from .config import DPOTrainConfig, UserError
from .ranks import ALONE, Ranks
from .sharded import Sharded, shard
from .start import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Policy:
    """The model being trained, its tokenizer, and how its batches are laid out."""

    model: PreTrainedModel
    tokenizer: Any
    head: nn.Linear
    sharing: Sharing = field(default_factory=Sharing)
    fused: FusedOptions = field(default_factory=FusedOptions)
    router_weight: float = 0.0  # of a mixture of experts' load-balancing loss
    bf16: bool = False  # compute in bfloat16 by autocast
    asked: str = "padded"  # the layout as it was asked for
    check_layout: bool = False  # the first batch in a layout is compared with padded rows
    say: Callable[[str], None] = print
    ranks: Ranks = ALONE
    sharded: Sharded = field(default_factory=Sharded)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return torch.bfloat16 if self.bf16 else self.head.weight.dtype

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
        scaling = head_scaling(self.model.config)
        return {**head_parts(self.head)._asdict(), "backend": self.fused.backend, **scaling}

    def hidden(self, batch: ScoredBatch) -> Tensor:
        """[N, H] hidden states that predict the scored tokens of `batch`."""
        base = base_model_of(self.model)
        with self.autocast():
            return trunk_states(base, trunk_of(base), batch)

    def logps(self, batch: ScoredBatch, reduction: str = "sum") -> Tensor:
        """Log-probs of the scored tokens: [sequences], or [N] with reduction="none"."""
        function = functools.partial(
            score_tokens, labels=batch.labels, fused=self.fused, batch=batch, reduction=reduction
        )
        with self.autocast():
            out = run_head(self.model, {}, HeadCall(function, batch=batch))
        assert out.logps is not None
        return out.logps

    def batch(self, pairs: Sequence[TokenRow]) -> ScoredBatch:
        """The batch of these pairs; what the trunk reads is on the policy's device."""
        batch = make_batch(pairs, self.sharing, self.pad_id)
        segments = any(call.segments is not None for call in batch.calls)
        if segments and self.check_layout and len(batch.scored_lengths) > 1:
            self.check_layout = False
            self._check_layout(pairs, batch)
            batch = make_batch(pairs, self.sharing, self.pad_id)
        return batch.to(self.device)

    def _check_layout(self, pairs: Sequence[TokenRow], batch: ScoredBatch) -> None:
        """Up to four of the pairs also run padded; under "auto" a layout that differs is left."""
        base = base_model_of(self.model)
        some = [pairs[0]]
        for pair in pairs[1:4]:
            enough = len(some) * len(pair.sequences) > 1
            if enough and padded_tokens([*some, pair]) > padded_tokens(pairs) // 2:
                break
            some.append(pair)
        shared = batch.trunk_tokens < batch.num_tokens
        mode = "shared" if shared else "packed"
        with _what_the_user_gave(), self.autocast():
            check_first_batch(base, some, mode, functools.partial(score_states, base), self.asked)
        state = known(base)
        if state.unusable:
            self.sharing = replace(self.sharing, mode="padded")
            self.say(f"layout: padded rows, because {state.unusable}")
        else:
            self.say(state.report)


@contextmanager
def _what_the_user_gave() -> Iterator[None]:
    """What a model is and cannot be is the user's to change."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error.__cause__


def load_policy(config: DPOTrainConfig, say: Callable[[str], None] = print) -> Policy:
    """The model and tokenizer a configuration names, checked and ready to train."""
    if config.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: pass a model's name or folder")
    name = config.model_name_or_path
    tokenizer = load_tokenizer(name, config.gguf_file, config.chat_template)
    model = with_adapter(_load(name, config.gguf_file, config, say), config)
    return prepare_policy(model, tokenizer, config, say)


def load_reference(
    config: DPOTrainConfig, policy: Policy, say: Callable[[str], None] = print
) -> Policy:
    """The reference that a configuration names (`ref_model_name_or_path`), frozen.

    It scores the policy's token ids: `UserError` if its own tokenizer or vocabulary is another.
    """
    name = find_model(str(config.reference_name), "ref_model_name_or_path")
    model = _load(name, None, config, say)
    rows, others = (len(embedding_of(m).weight) for m in (model, policy.model))
    if rows < min(others, len(policy.tokenizer)):
        raise UserError(
            f"ref_model_name_or_path: {name} knows {rows} token ids, the policy {others}: the two "
            "must share a tokenizer"
        )
    try:
        own = loading.load_tokenizer(name, None, None)
    except ValueError:
        own = None  # a folder of weights alone
    if own is not None and own.get_vocab() != policy.tokenizer.get_vocab():
        mine, theirs = policy.tokenizer.get_vocab(), own.get_vocab()
        differ = sorted(set(mine.items()) ^ set(theirs.items()))[:3]
        raise UserError(
            f"ref_model_name_or_path: {name} has another tokenizer than the model (for one, "
            f"{', '.join(repr(token) for token, _ in differ)}): its log-probs would be of other "
            "texts"
        )
    config = replace(config, gradient_checkpointing=False)
    reference = prepare_policy(model, policy.tokenizer, config, say)
    reference.model.requires_grad_(False)
    return reference


def embedding_of(model: Any) -> Any:
    """The embedding of a model's token ids."""
    return model.get_input_embeddings()


def frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, as a reference of its own."""
    model = copy.deepcopy(policy.model).requires_grad_(False)
    return replace(policy, model=model, head=base_model_of(model).get_output_embeddings())


def _load(
    name: str, gguf_file: str | None, config: DPOTrainConfig, say: Callable[[str], None]
) -> PreTrainedModel:
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with _what_the_user_gave():
        return loading.load_model(
            name,
            gguf_file,
            dtype=torch.float32 if config.bf16 else dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            quantisation=quantisation(config),
            say=say,
        )


def load_tokenizer(name: str, gguf_file: str | None, chat_template: str | None) -> Any:
    """`models.loading.load_tokenizer`, its errors the user's."""
    with _what_the_user_gave():
        return loading.load_tokenizer(name, gguf_file, chat_template)


def prepare_policy(
    model: PreTrainedModel,
    tokenizer: Any,
    config: DPOTrainConfig,
    say: Callable[[str], None] = print,
) -> Policy:
    """Attach the head to a loaded model, switch dropout off, and check both."""
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
    with _what_the_user_gave():
        base = attach_head(model)
        head = base.get_output_embeddings()
        head_parts(head)  # an adapter that is not known
        check_head(model, config.backend)
        fused = FusedOptions(head_stats=False, backend=config.backend)
        policy = Policy(
            model,
            tokenizer,
            head,
            fused=fused,
            router_weight=router_loss_weight(base),
            bf16=config.bf16,
        )
        with policy.autocast():
            policy.sharing = choose_sharing(base, config.layout, say)
        policy.asked, policy.check_layout, policy.say = config.layout, config.check_layout, say
        if policy.router_weight and config.max_tokens_per_batch is not None:
            raise UserError(
                "max_tokens_per_batch: the load-balancing loss of a mixture of experts depends on "
                "which pairs are in a batch; set the model's router_aux_loss_coef to 0"
            )
    return policy


def over_ranks(policy: Policy, config: DPOTrainConfig, ranks: Ranks) -> None:
    """Spread a policy that is whole on each rank over all of them."""
    if not ranks.many:
        return
    if policy.router_weight:
        raise UserError(
            f"{ranks.world} processes: the load-balancing loss of a mixture of experts depends on "
            "which pairs are in a batch; set the model's router_aux_loss_coef to 0"
        )
    policy.check_layout = False  # it runs the trunk alone, which shards do not take
    policy.ranks = ranks
    policy.sharded = shard(policy.model, config, ranks)
    if policy.sharded.is_sharded:  # as many calls of the trunk on every rank
        policy.sharing = replace(policy.sharing, call_tokens=None)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: policy and reference must be the same function."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            # attention modules keep the rate as a plain attribute (attention_dropout)
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def save_policy(policy: Policy, folder: Path) -> None:
    """`save_pretrained` of model and tokenizer; a leftover of an earlier run is replaced whole.

    Every rank calls it; the first one writes.
    """
    whole = policy.sharded.whole_state() if policy.sharded.in_parts else None
    if policy.ranks.first:
        _save(policy, folder, whole)


def _save(policy: Policy, folder: Path, whole: dict[str, Tensor] | None) -> None:
    given: dict[str, Any] = {} if whole is None else {"state_dict": whole}
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        cache = policy.model.config.use_cache
        policy.model.config.use_cache = True
        policy.model.save_pretrained(part, **given)
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
    if policy.sharded.cut:  # the model's own forward knows no head in parts
        return ""
    tokenizer = policy.tokenizer
    inputs = torch.tensor([ids], device=policy.device)
    generate: Any = policy.model.generate
    policy.sharded.gather()
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
    policy.sharded.rest()
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()
