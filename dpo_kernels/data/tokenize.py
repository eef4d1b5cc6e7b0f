"""From texts to token ids, by TRL's rule.

The prompt (with the template's generation prompt) and prompt + completion are tokenised separately;
the completion starts at the first divergence of the two, because a template may render a prompt
alone differently, and a tokenizer may merge the last characters of the prompt with the first of the
completion. Plain texts get one end-of-sequence token. What is longer than `max_length` is cut by
the truncation policy, and counted (`Truncation`).

Beyond that rule: special tokens that a text carries already are not put in a second time, and of a
completion of several turns the assistant's alone are scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .left_out import DataError, LeftOut, Problem, Refused
from .pairs import PreferencePair
from .sequences import Ids, Limits, Spans, TokenPair, TokenSequence
from .template import names_in, turn_marks
from .truncation import Truncation, shortened
from .turns import Message

LONG = 2000  # pairs; fewer are tokenised before a bar would be of use


Progress = Callable[[Iterable[Any], str, int, str], Iterator[Any]]


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: Any,
    max_length: Truncation | int | None,
    left_out: LeftOut,
    warn: Callable[[str], None] = print,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[TokenPair]:
    """Token ids of each pair; pairs that `max_length` makes useless go to `left_out`.

    So do pairs that the model cannot be fed (`limits`) or the chat template cannot render.
    `progress` wraps a long list. Raises `DataError` for conversational pairs and a tokenizer
    without a chat template.
    """
    maker = PairTokenizer(tokenizer, max_length, left_out, warn, limits)
    wrapped: Iterable[PreferencePair] = pairs
    if progress is not None and len(pairs) >= LONG:
        wrapped = progress(pairs, "tokenising", len(pairs), "pairs")
    found = (maker.usable(pair) for pair in wrapped)
    return [pair for pair in found if pair is not None]


def _require_template(tokenizer: Any, conversational: bool) -> None:
    if conversational and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the data is conversational (message lists) but the tokenizer has no chat template: "
            "pass one with --chat_template FILE (a Jinja template), or use data with plain texts"
        )


NO_END = "conversations that do not end with the end token (EOS)"
NO_BEGIN = (
    "conversations that do not begin with the begin token (BOS), which the tokenizer puts before a "
    "text"
)
MERGED = "prompts whose end is tokenised otherwise before the completion (it starts there)"
ALL_TURNS = "completions of several turns, all of them scored"
DOUBLED_END = "completions that end with the end token (EOS) twice"


class PairTokenizer:
    """One tokenizer at work on many pairs."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: Truncation | int | None,
        left_out: LeftOut,
        warn: Callable[[str], None] = print,
        limits: Limits | None = None,
    ) -> None:
        self.tokenizer, self.limits = tokenizer, limits or Limits()
        self.truncation = Truncation.of(max_length)
        self.left_out, self.warn, self.warned = left_out, warn, False
        self._marks: tuple[str, tuple[str, ...]] | None = None
        self._templates: dict[bool, str] = {}
        self._has_template = False
        self._begins: bool | None = None
        # Looked up once: each is a search in the tokenizer.
        self.bos, self.bos_id = tokenizer.bos_token or "", tokenizer.bos_token_id
        self.eos, self.eos_id = tokenizer.eos_token or "", tokenizer.eos_token_id

    def usable(self, pair: PreferencePair) -> TokenPair | None:
        """The pair's ids, or None: it is in `left_out` then."""
        if pair.conversational and not self._has_template:
            _require_template(self.tokenizer, True)
            self._has_template = True
        notes = self.left_out.notes.copy()
        try:
            return self.tokenize(pair)
        except Refused as refused:
            self.left_out.notes = notes  # they count what is in the rows that are used
            self.left_out.add(Problem(pair.source, *refused.args))
            return None

    def tokenize(self, pair: PreferencePair) -> TokenPair:
        """The pair's ids; `Refused` where there are none to train on."""
        if pair.conversational:
            alone, sides, spans = self._chat(pair)
        else:
            alone, sides = self._texts(pair)
            spans = [None, None]
        start = min(_common(alone, ids) for ids in sides)
        if start < len(alone) and spans == [None, None]:
            self.left_out.notes[MERGED] += 1
        if start < len(alone) and not self.warned and spans == [None, None]:
            self.warned = True
            self.warn(
                f"{pair.source}: the tokenised prompt is not a prefix of prompt + completion "
                f"(its end {self.tokenizer.decode(list(alone[start:]))!r} tokenises differently "
                "there); the completion starts where they diverge. Said once; other rows may be "
                "alike."
            )
        return self._cut(pair, sides, start, spans)

    # --- plain texts ---

    def _texts(self, pair: PreferencePair) -> tuple[Ids, list[Ids]]:
        prompt, chosen, rejected = str(pair.prompt), str(pair.chosen), str(pair.rejected)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            for token in filter(None, (self.bos, self.eos)):
                text = text.replace(token, "")
            self._words(name, text)
        return self._plain(prompt, ""), [self._plain(prompt, c) for c in (chosen, rejected)]

    def _plain(self, prompt: str, completion: str) -> Ids:
        """Ids of prompt ++ completion, one BOS if the tokenizer adds any, one EOS at the end."""
        eos, bos, notes = self.eos, self.bos, self.left_out.notes
        if prompt and bos and completion.startswith(bos):
            completion = completion[len(bos) :]
            notes["plain completions with a begin token (BOS) in their text, taken out"] += 1
        text = prompt + completion
        carried = bool(eos and eos.strip() and text.rstrip().endswith(eos))
        if completion and carried:
            text = text.rstrip()
            notes["plain completions with the end token (EOS) in their text"] += 1
        elif completion and eos:
            text += eos
            notes["plain completions given an end token (EOS)"] += 1
        elif completion:
            notes["plain completions without an end token (the tokenizer has none)"] += 1
        ids = self._begun_once(tuple(self.tokenizer(text)["input_ids"]))
        end = self.eos_id
        if end is None:
            return ids
        while completion and ids[-2:] == (end, end):
            ids = ids[:-1]  # the tokenizer appended its own
        if not completion and ids[-1:] == (end,) and not carried:
            ids = ids[:-1]  # the same, behind a prompt: nothing ends there
        return ids

    def _begun_once(self, ids: Ids) -> Ids:
        """The ids with one BOS at most: a text may carry the one that the tokenizer adds."""
        bos = self.bos_id
        if bos is not None and ids[:2] == (bos, bos):
            self.left_out.notes["sequences with a second begin token (BOS), taken out"] += 1
            while ids[:2] == (bos, bos):
                ids = ids[1:]
        return ids

    # --- conversations ---

    def _chat(self, pair: PreferencePair) -> tuple[Ids, list[Ids], list[Spans | None]]:
        """(prompt, [chosen, rejected], their scored spans where others speak in them)."""
        template = self._template(pair)
        self._check_read(pair, template)
        prompt, *completions = (
            self._marked_once(name, list(getattr(pair, name)))
            for name in ("prompt", "chosen", "rejected")
        )

        def render(messages: list[Message], generation_prompt: bool) -> Ids:
            return self._render(messages, generation_prompt, pair)

        alone = render(prompt, True) if prompt else ()
        sides, spans = [], []
        for name, completion in zip(("chosen", "rejected"), completions, strict=True):
            ids = render(prompt + completion, False)
            sides.append(ids)
            others = any(m["role"] != "assistant" for m in completion)
            if others and not self.truncation.assistant_only:
                self.left_out.notes[ALL_TURNS] += 1
                others = False
            spans.append(
                self._spans(name, prompt, completion, ids, render, template, pair)
                if others
                else None
            )
        if sides[0][:1] == (self.bos_id,):
            self.left_out.notes["conversations that begin with the begin token (BOS)"] += 1
        elif self._adds_begin():
            self.left_out.notes[NO_BEGIN] += 1
        # Templates end a turn with it, or with it and a line break.
        if self.eos_id not in sides[0][-2:]:
            self.left_out.notes[NO_END] += 1
        return alone, sides, spans

    def _adds_begin(self) -> bool:
        """Whether the tokenizer puts BOS before a text of its own accord."""
        if self._begins is None:
            ids = self.tokenizer("a")["input_ids"]
            self._begins = self.bos_id is not None and list(ids[:1]) == [self.bos_id]
        return self._begins

    def _template(self, pair: PreferencePair) -> str:
        """The text of the chat template that this pair is rendered with."""
        tools = pair.tools is not None
        if tools not in self._templates:
            choose = getattr(self.tokenizer, "get_chat_template", None)
            try:
                chosen = choose(None, tools=pair.tools) if choose else self.tokenizer.chat_template
            except Exception as error:  # several templates, and none that fits
                raise _template_refuses(error) from None
            self._templates[tools] = str(chosen)
        return self._templates[tools]

    def _check_read(self, pair: PreferencePair, template: str) -> None:
        """What a row hands to the template must be read there, or it would be dropped unseen."""

        variables, keys = names_in(template)
        for name, values in (
            ("tools", ["tools"] if pair.tools else []),
            ("chat_template_kwargs", pair.template_kwargs or {}),
        ):
            for value in values:
                if value not in variables:
                    raise Refused(
                        name,
                        f"{value!r}, which the chat template does not read",
                        "a variable that it reads (--chat_template FILE gives another)",
                        "not read by the chat template",
                    )
        for messages in (pair.prompt, pair.chosen, pair.rejected):
            for message in messages:
                assert isinstance(message, dict)
                for key in message.keys() - {"role", "content"}:
                    if message[key] in (None, "", [], {}) or key in keys:
                        continue
                    if key in ("tool_calls", "function_call"):
                        raise Refused(
                            key,
                            "calls, which the chat template does not read",
                            "a chat template for tools (--chat_template FILE)",
                            "not read by the chat template",
                        )
                    self.left_out.once(
                        f"the chat template does not read {key!r} of a message; it is not used"
                    )

    def _render(
        self, messages: list[Message], generation_prompt: bool, pair: PreferencePair
    ) -> Ids:
        try:
            ids = _apply(
                self.tokenizer,
                messages,
                generation_prompt,
                tools=pair.tools,
                **(pair.template_kwargs or {}),
            )
        except Exception as error:  # jinja2's, and whatever an expression of the template raises
            raise _template_refuses(error) from None
        return self._begun_once(ids)

    def _marked_once(self, name: str, messages: list[Message]) -> list[Message]:
        """The messages without the special tokens that the template puts around them anyway."""
        if self._marks is None:
            self._marks = turn_marks(self.tokenizer)
        begin, ends = self._marks
        result = []
        for message in messages:
            text = message["content"]
            if begin and text.startswith(begin):
                self.left_out.notes[
                    "messages that begin with the begin token (BOS), which the chat template adds "
                    "(kept once)"
                ] += 1
                while text.startswith(begin):
                    text = text[len(begin) :]
            found = next((end for end in ends if text.rstrip().endswith(end)), None)
            if found:
                self.left_out.notes[
                    f"messages that end with {found}, which the chat template adds (kept once)"
                ] += 1
                while (text := text.rstrip()).endswith(ends):
                    text = next(text[: -len(end)] for end in ends if text.endswith(end))
            if text is not message["content"]:
                if message["role"] == "assistant" and not text.strip():
                    self._words(name, text, bool(message.get("tool_calls")))
                message = {**message, "content": text}
            result.append(message)
        return result

    def _words(self, name: str, text: str, calls: bool = False) -> None:
        if not text.strip() and not calls:
            raise Refused(name, "special tokens alone", "a completion", "empty completion")

    def _spans(
        self,
        name: str,
        prompt: list[Message],
        completion: list[Message],
        ids: Ids,
        render: Callable[[list[Message], bool], Ids],
        template: str,
        pair: PreferencePair,
    ) -> Spans:
        """(begin, end) of the assistant's turns in a completion where others speak as well.

        A turn lies between the conversation cut short before it and behind it, if both are what
        the whole begins with. Templates that rewrite earlier turns fail that; some mark the
        assistant's words themselves (`{% generation %}`).
        """
        found = []
        for j, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            before = render(prompt + completion[:j], True)
            behind = ids
            if j + 1 < len(completion):
                behind = render(prompt + completion[: j + 1], False)
            if ids[: len(before)] != before or ids[: len(behind)] != behind:
                return self._marked(name, prompt, completion, ids, template, pair)
            found.append((len(before), len(behind)))
        self.left_out.notes["completions of several turns, the assistant's alone scored"] += 1
        return tuple(found)

    def _marked(
        self,
        name: str,
        prompt: list[Message],
        completion: list[Message],
        ids: Ids,
        template: str,
        pair: PreferencePair,
    ) -> Spans:
        mask: list[int] = []
        if re.search(r"\{%-?\s*generation\b", template) and self.tokenizer.is_fast:
            out = self.tokenizer.apply_chat_template(
                prompt + completion,
                tokenize=True,
                return_dict=True,
                tools=pair.tools,
                return_assistant_tokens_mask=True,
                **(pair.template_kwargs or {}),
            )
            mask = out["assistant_masks"] if tuple(out["input_ids"]) == ids else []
        if not any(mask):
            raise Refused(
                name,
                "turns of several speakers that this chat template does not keep apart",
                "one turn of the assistant (or a template with "
                "{% generation %} around the assistant's words)",
                "turns cannot be told apart",
            )
        turns = sum(m["role"] == "assistant" for m in completion)
        spans = [(m.start(), m.end()) for m in re.finditer("1+", "".join(map(str, mask)))]
        self.left_out.notes["completions of several turns, the assistant's alone scored"] += 1
        return tuple(spans[-turns:])  # the prompt's own turns come first

    # --- both ---

    def _cut(
        self,
        pair: PreferencePair,
        sides: Sequence[Ids],
        start: int,
        spans: Sequence[Spans | None],
    ) -> TokenPair:
        limit = self.truncation.max_length
        notes = self.left_out.notes
        kept, start, spans, cut = shortened(self.truncation, sides, start, spans, notes)
        unscored = tuple(
            () if found is None else _between(start, found, len(ids))
            for found, ids in zip(spans, kept, strict=True)
        )
        for name, ids, skip in zip(("chosen", "rejected"), kept, unscored, strict=True):
            if TokenSequence(ids, start, "", skip).num_scored == 0:
                raise Refused(
                    name,
                    "no token left to score",
                    "at least one token of completion",
                    "completion too short",
                )
            self._check_limits(name, ids)
            end = self.eos_id
            if end is not None and ids[-2:] == (end, end) and len(ids) - start > 1:
                notes[DOUBLED_END] += 1
        if kept[0] == kept[1]:
            if not cut:
                raise Refused(
                    "rejected",
                    "the same tokens as chosen",
                    "a different completion",
                    "chosen equals rejected",
                )
            raise Refused(
                "rejected",
                f"the same as chosen within max_length={limit}",
                "a difference within the limit",
                "same after truncation",
            )
        return TokenPair(
            kept[0][:start],
            kept[0][start:],
            kept[1][start:],
            pair.source,
            pair.offset,
            pair.weight,
            pair.beta,
            (unscored[0], unscored[1]),
            pair.label_smoothing,
            pair.group,
        )

    def _check_limits(self, name: str, ids: Ids) -> None:
        V, S, trained = (
            self.limits.vocabulary,
            self.limits.positions,
            self.limits.trained_positions,
        )
        largest = max(ids)
        if V is not None and largest >= V:
            raise Refused(
                name,
                f"token id {largest} ({self.tokenizer.decode([largest])!r})",
                f"ids below {V}, the rows of the model's embedding (it was not resized "
                "for added tokens)",
                "token id beyond the embedding",
            )
        if S is not None and len(ids) > S:
            raise Refused(
                name,
                f"{len(ids)} tokens with the prompt",
                f"at most {S}, the positions of the model (--max_length {S})",
                "longer than the model's positions",
            )
        if trained is not None and len(ids) > trained:
            self.left_out.notes[
                f"sequences longer than the {trained} positions that the model's "
                "configuration names"
            ] += 1


def _template_refuses(error: Exception) -> Refused:
    said = str(error).strip() or type(error).__name__
    return Refused(
        "messages",
        f"refused by the chat template ({said})",
        "messages it can render",
        "chat template refuses",
    )


def _apply(
    tokenizer: Any, messages: list[Message], generation_prompt: bool, **variables: Any
) -> Ids:
    return tuple(
        tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=generation_prompt,
            tokenize=True,
            return_dict=False,
            **variables,
        )
    )


def _between(start: int, spans: Spans, length: int) -> Spans:
    """What lies from `start` to `length` outside of `spans`."""
    gaps, at = [], start
    for begin, end in spans:
        if begin > at:
            gaps.append((at, min(begin, length)))
        at = max(at, end)
    if at < length:
        gaps.append((at, length))
    return tuple(gap for gap in gaps if gap[0] < gap[1])


def _common(a: Ids, b: Ids) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
