"""TRL's DPOTrainer driven batch by batch, and models that return given logits or hidden states."""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import (
    FusedCausalLMOutput,
    add_fused_lm_head,
    entropy_from_logits,
    selective_log_softmax,
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: w0 .. w61, <pad>, <eos>."""
    vocab = {t: i for i, t in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(62))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


class Trl:
    """One real DPOTrainer, whose settings are exchanged from case to case."""

    def __init__(self, folder: str) -> None:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.trainer = DPOTrainer(
            model=LlamaForCausalLM(config),
            ref_model=LlamaForCausalLM(config),
            args=DPOConfig(folder, use_cpu=True, report_to=[], bf16=False),
            train_dataset=Dataset.from_list([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}]),
            processing_class=word_tokenizer(),
        )
        self.defaults = dict(vars(self.trainer.args))
        self.gathered: list[torch.Tensor] = []
        self.trainer.accelerator.gather = lambda x: (self.gathered.append(x), x)[1]

    def set(self, options: dict[str, Any], precomputed: bool) -> None:
        """Give the trainer the settings that `DPOTrainer.__init__` takes from its config."""
        t, known = self.trainer, self.defaults
        unknown = set(options) - set(known)
        if unknown:
            raise KeyError(f"not options of DPOConfig: {unknown}")
        get = {k: options.get(k, known[k]) for k in known}
        names = get["loss_type"]
        t.loss_types = [names] if isinstance(names, str) else list(names)
        t.loss_weights = get["loss_weights"] or [1.0] * len(t.loss_types)
        for name in (
            "beta",
            "ld_alpha",
            "f_divergence_type",
            "f_alpha_divergence_coef",
            "label_smoothing",
            "use_weighting",
        ):
            setattr(t, name, get[name])
        t.args.discopop_tau = get["discopop_tau"]
        t.precompute_ref_logps = precomputed
        t._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}

    def loss(self, options, policy, ref, arrays, precomputed) -> dict[str, Any]:
        """Loss, sequence log-probs and rewards of one batch, as tensors that keep their graph."""
        self.set(options, precomputed)
        t = self.trainer
        inputs = {
            "input_ids": torch.from_numpy(arrays["ids"]),
            "attention_mask": torch.from_numpy(arrays["attention"]),
            "completion_mask": torch.from_numpy((arrays["labels"] != -100).astype(np.int64)),
        }
        ref_logps = torch.cat(t.compute_ref_log_probs(ref, inputs))
        if precomputed:
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref_logps.chunk(2)
        t.ref_model = ref
        self.gathered.clear()
        loss = t._compute_loss(policy, inputs, False)
        chosen_rewards, rejected_rewards, _, _, chosen, rejected = self.gathered[-6:]
        return {
            "loss": loss,
            "logps": (chosen, rejected),
            "rewards": torch.cat([chosen_rewards, rejected_rewards]),
            "ref_logps": ref_logps,
        }


class LogitsModel:
    """Stands in for a model with TRL's fused head: per-token values of given logits, any dtype."""

    def __init__(self, logits: torch.Tensor, cast: torch.dtype) -> None:
        self.logits, self.cast = logits, cast

    def __call__(self, labels: torch.Tensor, **_: Any) -> Any:

        z, y = self.logits[:, :-1], labels[:, 1:]
        mask = y != -100
        lse = torch.logsumexp(z.detach(), -1)
        values = {
            "log_probs": selective_log_softmax(z, y.clamp(min=0)),
            "entropy": entropy_from_logits(z.detach()),
            "log_sum_sq_probs": torch.logsumexp(2 * z.detach(), -1) - 2 * lse,
            "mean_logits": z.detach().mean(-1),
            "is_top1": z.argmax(-1) == y,
        }
        return FusedCausalLMOutput(
            **{
                k: v.masked_fill(~mask, 0) if v.dtype == torch.bool else (v * mask).to(self.cast)
                for k, v in values.items()
            }
        )


class HiddenModel(torch.nn.Module):
    """Given hidden states below an LM head, to be patched by TRL's `add_fused_lm_head`."""

    def __init__(self, hidden, weight, bias, head: dict[str, Any]) -> None:

        super().__init__()
        self.config = LlamaConfig()
        if head.get("logit_softcap") is not None:
            self.config.final_logit_softcapping = head["logit_softcap"]
        if "logit_scale" in head:
            self.config.logit_scale = head["logit_scale"]
        self.hidden = hidden
        self.head = types.SimpleNamespace(weight=weight, bias=bias)
        stats = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        add_fused_lm_head(self, temperature=head.get("temperature", 1.0), outputs=stats)

    def base_model(self, *_: Any, **__: Any) -> Any:
        return types.SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self) -> None:
        raise RuntimeError("only the fused head is used")
