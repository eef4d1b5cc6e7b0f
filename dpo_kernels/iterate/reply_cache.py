"""What a server is asked and what it answers, and the answers that are kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..train.ranks import ALONE, Ranks
from .records import Journal


@dataclass(frozen=True)
class Request:
    """`messages` of a chat, or a plain text to complete; `options` are fields of the body."""

    prompt: str | list[dict[str, str]]
    options: dict[str, Any]
    max_tokens: int


@dataclass(frozen=True)
class Reply:
    text: str | None
    error: str | None = None
    finish_reason: str = ""
    logprobs: list[dict[str, Any]] | None = None  # token, logprob, top_logprobs of each token
    cached: bool = False


class ReplyCache:
    """Replies on disk by the hash of everything that was asked."""

    def __init__(self, folder: str | Path | None, ranks: Ranks = ALONE) -> None:
        self._journal = Journal(Path(folder) / "replies.jsonl", ranks) if folder else None
        self._found: dict[str, dict[str, Any]] = {}
        for row in self._journal.rows if self._journal else []:
            self._found[row["key"]] = row

    def get(self, key: str) -> Reply | None:
        row = self._found.get(key)
        if row is None:
            return None
        return Reply(row["text"], None, row["finish_reason"], row["logprobs"], cached=True)

    def put(self, key: str, reply: Reply) -> None:
        row = {
            "key": key,
            "text": reply.text,
            "finish_reason": reply.finish_reason,
            "logprobs": reply.logprobs,
        }
        self._found[key] = row
        if self._journal:
            self._journal.add([row])
