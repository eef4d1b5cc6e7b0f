"""Judges that are models of this process: the policy itself, a reward model, a DPO model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..train.config_files import UserError
from .judge_replies import SIDES, Read, Template, load_template
from .judges import ScoreJudge, combine_orders
from .local_models import LocalModel, render, weights_digest
from .records import PairItem, Turn, Verdict, digest, prompt_text
from .settings import JudgeOptions

Scores = list[tuple[float | None, str | None, str]]
NO_REFERENCE = "none"


def make(name: str, options: JudgeOptions) -> Any:
    """The judge of that name: policy, reward_model or implicit."""
    path = str(options.judge_model_path)
    if name == "policy":
        template = load_template(options.judge_template, "pairwise", ("prompt", "first", "second"))
        return PolicyJudge(LocalModel.load(path), template, options.judge_batch_size)
    if name == "reward_model":
        return reward_model_judge(path, options.judge_batch_size)
    policy, ref = LocalModel.load(path), None
    if options.judge_ref_path != NO_REFERENCE:
        ref = LocalModel.load(str(options.judge_ref_path))
        if ref.identity == policy.identity:
            raise UserError(
                f"judge implicit: judge_model_path and judge_ref_path are one model ({path}), so "
                "every reward is 0; give a model that DPO has trained, or "
                f"--judge_ref_path {NO_REFERENCE} (the mean log-prob, as SimPO's reward)"
            )
    return implicit_judge(policy, ref, options.judge_beta, options.judge_batch_size)


class PolicyJudge:
    """A causal LM asked as an endpoint is: which letter does it say next? (Self-rewarding.)

    Its distribution over A, B and C is read, so there is no reply that could be unreadable.
    """

    def __init__(self, model: LocalModel, template: Template, batch: int = 16) -> None:
        if template.explains:
            raise UserError("judge policy reads the next token: its template must ask for a letter")
        self.model, self.template, self.batch = model, template, batch
        self.name = "policy"
        self.identity = digest(["policy", model.identity, template.system, template.user])
        self.letters: dict[str, list[int]] = {
            word: sorted(_ids_of(model.tokenizer, word)) for word in SIDES
        }
        if not self.letters["A"] or not self.letters["B"]:
            raise UserError("judge policy: the tokenizer has no token for A and B")

    def compare(self, items: Sequence[PairItem]) -> list[Verdict]:
        chats = [
            self.template.messages(prompt=prompt_text(i.prompt), first=a, second=b)
            for i in items
            for a, b in ((i.first, i.second), (i.second, i.first))
        ]
        ids = [_chat_ids(self.model.tokenizer, chat) for chat in chats]
        reads = []
        for start in range(0, len(ids), self.batch):
            last = self.model.next_logits(ids[start : start + self.batch])
            reads += [self._read(row) for row in last]
        return [self._verdict(*reads[i : i + 2]) for i in range(0, len(reads), 2)]

    def _read(self, logits: torch.Tensor) -> Read:
        every = torch.stack(
            [
                logits[ids].double().logsumexp(0) if ids else torch.tensor(-torch.inf).double()
                for ids in self.letters.values()
            ]
        )
        mass = dict(zip(self.letters, every.softmax(0).tolist(), strict=True))
        said = max(mass, key=lambda word: mass[word])
        return Read(SIDES[said], None, mass["A"] + mass["C"] / 2)

    def _verdict(self, forward: Read, backward: Read) -> Verdict:
        raw = json.dumps([forward.p, backward.p])
        return combine_orders(forward, backward, raw)


def _ids_of(tokenizer: Any, word: str) -> set[int]:
    found = set()
    for text in (word, " " + word):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            found.add(ids[0])
    return found


def _chat_ids(tokenizer: Any, chat: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    return tokenizer("\n\n".join(m["content"] for m in chat) + "\n")["input_ids"]


def reward_model_judge(path: str, batch: int = 16) -> ScoreJudge:
    """A sequence classifier with one output; P(first) is the sigmoid of the difference."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model = AutoModelForSequenceClassification.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or ["?"])[0]
        raise UserError(f"judge_model_path: {path} cannot be loaded: {first}") from None
    if model.config.num_labels != 1:
        raise UserError(
            f"judge_model_path: {path} has {model.config.num_labels} outputs, expected one reward"
        )
    model.eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0

    @torch.no_grad()
    def scores(texts: list[tuple[Turn, str]]) -> Scores:
        found: Scores = []
        for start in range(0, len(texts), batch):
            halves = [render(tokenizer, p, c) for p, c in texts[start : start + batch]]
            rows = [alone + answer for alone, answer in halves]
            width = max(map(len, rows))
            pad = model.config.pad_token_id
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
            values = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits
            found += [_score(v) for v in values[:, 0].float().tolist()]
        return found

    name = f"reward_model:{path}"
    identity = ["reward_model", weights_digest(Path(path)) or path]
    return ScoreJudge(name, identity, scores, scale=1.0, batch=max(batch, 64))


def _score(value: float) -> tuple[float | None, str | None, str]:
    if value == value and abs(value) != float("inf"):
        return value, None, f"{value:.6g}"
    return None, f"the model's score is {value}", f"{value}"


def implicit_judge(
    policy: LocalModel, reference: LocalModel | None, beta: float, batch: int = 16
) -> ScoreJudge:
    """The reward that a DPO model has learnt: beta (log pi - log ref) of a completion.

    Without a reference it is SimPO's (2405.14734): beta times the mean log-prob of its tokens.
    """

    def scores(texts: list[tuple[Turn, str]]) -> Scores:
        found: Scores = []
        for start in range(0, len(texts), batch):
            rows = [render(policy.tokenizer, p, c) for p, c in texts[start : start + batch]]
            logps = policy.completion_logps(rows)
            if reference is not None:
                logps = logps - reference.completion_logps(rows)
            else:
                logps = logps / torch.tensor([max(len(answer), 1) for _, answer in rows])
            found += [_score(v) for v in (beta * logps).tolist()]
        return found

    identity = ["implicit", policy.identity, reference and reference.identity, beta]
    name = "implicit" if reference is not None else "implicit (no reference)"
    return ScoreJudge(name, identity, scores, scale=1.0, batch=max(batch, 64))
