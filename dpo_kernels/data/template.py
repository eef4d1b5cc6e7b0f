"""What a chat template reads of a row, and which special tokens it puts."""

from __future__ import annotations

import functools
import re
from typing import Any


@functools.lru_cache(maxsize=8)
def names_in(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """(variables, variables and keys) in a template's code; its texts and comments name nothing."""
    from jinja2 import Environment

    variables: set[str] = set()
    keys: set[str] = set()
    before = ""
    try:
        for _, kind, value in Environment().lex(template):
            if kind == "name":
                keys.add(value)
                if before != ".":
                    variables.add(value)
            elif kind == "string":
                keys.add(value[1:-1])
            if kind != "whitespace":
                before = value
    except Exception:  # a template that is none: said for each row that is rendered
        variables = keys = set(re.findall(r"\w+", template))
    return frozenset(variables), frozenset(keys)


def turn_marks(tokenizer: Any) -> tuple[str, tuple[str, ...]]:
    """BOS if the template begins with it, else ""; the special tokens behind the last turn."""
    words = "Zq7words"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}],
            tokenize=False,
        )
    except Exception:  # said for each row that is rendered
        return "", ()
    bos = tokenizer.bos_token or ""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""}
    rest, ends = text.rpartition(words)[2].lstrip(), []
    # Several may stand there, with or without a line break between them.
    while mark := max((t for t in special if rest.startswith(t)), key=len, default=""):
        ends.append(mark)
        rest = rest[len(mark) :].lstrip()
    return bos if text.startswith(bos) else "", tuple(dict.fromkeys(ends))
