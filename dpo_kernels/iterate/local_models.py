"""Models of this process that sample and score: batches of plain transformers, in eval mode.

Sampling is a function of the seed, the batch and the weights: nothing of the model's own generation
defaults (top_k, penalties) is left on. Log-probs are kept as the model gives them, before
temperature and nucleus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dpo_kernels as dk

from ..models import loading
from ..train.config_files import UserError
from .records import Turn, as_completion
from .settings import SamplingOptions


@dataclass(frozen=True)
class Drawn:
    """One sampled completion."""

    text: str
    ids: list[int]  # with the end-of-sequence token, if it came
    logps: list[float]  # [ids]
    finish_reason: str


@dataclass
class LocalModel:
    """A causal LM and its tokenizer."""

    model: Any
    tokenizer: Any
    identity: str

    @classmethod
    def load(cls, path: str, device: str = "auto", gguf_file: str | None = None) -> LocalModel:
        """From a folder (or a name of the hub); `UserError` says what is wrong with it."""
        try:
            tokenizer = loading.load_tokenizer(path, gguf_file, None)
            model = loading.load_model(path, gguf_file, dtype=torch.float32, say=lambda _: None)
        except ValueError as error:
            raise UserError(str(error)) from None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls.of(model.to(device), tokenizer, weights_digest(Path(path)) or path)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, identity: str) -> LocalModel:
        from transformers import GenerationConfig

        ends = model.generation_config.eos_token_id if model.generation_config else None
        ends = ends if ends is not None else model.config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        ends = sorted({i for i in (*ends, tokenizer.eos_token_id) if i is not None})
        pad = tokenizer.pad_token_id
        pad = pad if pad is not None else (ends[0] if ends else 0)
        model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
        model.config.use_cache = True
        model.eval()
        return cls(model, tokenizer, identity)

    @property
    def pad_id(self) -> int:
        return int(self.model.generation_config.pad_token_id)

    # --- sampling ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], options: SamplingOptions) -> list[Drawn]:
        """One completion of each row of ids, drawn under torch's current seed."""
        width = max(map(len, prompts))
        rows = [[self.pad_id] * (width - len(p)) + p for p in prompts]
        seen = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        device = self.model.device
        recorder = _Recorder() if options.logps else None
        how: dict[str, Any] = {"do_sample": options.temperature > 0}
        if options.temperature > 0:
            how |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        if options.stop:
            how["stopping_criteria"] = [_Stops(self.tokenizer, options.stop, width)]
        if options.static_cache:
            how["cache_implementation"] = "static"
        out = self.model.generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(seen, device=device),
            max_new_tokens=options.max_new_tokens,
            logits_processor=[recorder] if recorder else None,
            **how,
        )
        new = out[:, width:].cpu()
        logps = recorder.result(out).cpu() if recorder else None
        ends = set(self.model.generation_config.eos_token_id or ())
        return [
            self._drawn(
                new[i].tolist(), None if logps is None else logps[i].tolist(), ends, options
            )
            for i in range(len(rows))
        ]

    def _drawn(
        self, ids: list[int], logps: list[float] | None, ends: set[int], options: SamplingOptions
    ) -> Drawn:
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        reason = "length" if end is None else "stop"
        ids = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        at = min((text.find(s) for s in options.stop if s in text), default=-1)
        if at >= 0:
            # The batch goes on until every row has stopped: what a row drew after is cut.
            text, reason = text[:at], "stop"
            n = next(
                n
                for n in range(1, len(ids) + 1)
                if any(
                    s in self.tokenizer.decode(ids[:n], skip_special_tokens=True)
                    for s in options.stop
                )
            )
            ids = ids[:n]
        return Drawn(text, ids, (logps or [])[: len(ids)], reason)

    # --- scoring ---

    @torch.no_grad()
    def next_logits(self, rows: Sequence[list[int]]) -> Tensor:
        """[rows, V] logits of the token after each row."""
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.pad_id] * (width - len(row)) for row in rows])
        hidden = self._logits(ids.to(self.model.device))
        last = torch.tensor([len(row) - 1 for row in rows], device=hidden.device)
        return hidden[torch.arange(len(rows), device=hidden.device), last].float()

    def _logits(self, ids: Tensor) -> Tensor:
        # Padded on the right: attention is causal, so no token sees it.
        return self.model(ids, use_cache=False).logits

    @torch.no_grad()
    def scored(self, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """(logits [R, T, V], labels [R, T]) of (prompt, completion) rows: completions scored."""
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), -100)
        for i, (prompt, completion) in enumerate(rows):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            start = max(len(prompt), 1)
            labels[i, start : len(prompt) + len(completion)] = torch.tensor(
                (prompt + completion)[start:]
            )
        ids, labels = ids.to(self.model.device), labels.to(self.model.device)
        return self._logits(ids), labels

    def completion_logps(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """[rows] log-prob of each completion."""
        logits, labels = self.scored(rows)
        return dk.sequence_logps(logits, labels).detach().float().cpu()


class _Stops:
    """Ends a row whose new text holds a stop text.

    transformers' own looks back into the prompt: there a stop text may begin.
    """

    def __init__(self, tokenizer: Any, stop: list[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.back = max(len(s.encode()) for s in stop) + 4  # tokens that may hold one

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.back) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        found = [any(s in text for s in self.stop) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class _Recorder:
    """A logits processor that changes nothing and keeps the log-prob of each token drawn.

    What was drawn is known one step later, so one step's [B, V] is held at a time.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._last = scores.float().log_softmax(-1)
        return scores

    def _take(self, ids: Tensor) -> None:
        if self._last is not None:
            self._kept.append(self._last.gather(1, ids[:, -1:])[:, 0])

    def result(self, ids: Tensor) -> Tensor:
        """[B, steps]"""
        self._take(ids)
        return torch.stack(self._kept, 1)


def prompt_ids(tokenizer: Any, prompt: Turn) -> list[int]:
    """What the model reads before it answers."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        # A tokenizer that ends each text would have the model begin after its end.
        if ids and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
            ids.pop()
        if not ids:
            start = tokenizer.bos_token_id
            ids = [tokenizer.eos_token_id if start is None else start]
        return ids
    if not tokenizer.chat_template:
        raise UserError("the prompts are conversations but the tokenizer has no chat template")
    return list(
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    )


def render(tokenizer: Any, prompt: Turn, completion: str) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids): the completion begins where the two renderings part."""
    alone = prompt_ids(tokenizer, prompt)
    if isinstance(prompt, str):
        whole = list(tokenizer(prompt + completion)["input_ids"])
        if tokenizer.eos_token_id is not None and whole[-1:] != [tokenizer.eos_token_id]:
            whole.append(tokenizer.eos_token_id)
    else:
        turn: Any = as_completion(prompt, completion)
        whole = list(
            tokenizer.apply_chat_template([*prompt, *turn], tokenize=True, return_dict=False)
        )
    n = 0
    while n < min(len(alone), len(whole) - 1) and alone[n] == whole[n]:
        n += 1
    return whole[:n], whole[n:]


def weights_digest(folder: Path) -> str:
    """Hash of the weights in a folder; empty for what is no folder."""
    if not folder.is_dir():
        return ""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf"))
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                total.update(block)
    return total.hexdigest() if files else ""
