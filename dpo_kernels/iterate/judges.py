"""Judges: `compare(items) -> list[Verdict]`, a verdict for each item, in order.

A judge that scores texts alone has `score(prompt, completion)` lists too; its verdict is the
comparison of two scores. Pairwise judges are asked in both orders: where the orders disagree the
verdict is a tie, whatever the judge prefers about a position. What cannot be read is an error of
its verdict, and never a label.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..train.config_files import UserError
from ..train.ranks import ALONE, Ranks
from .endpoint import Endpoint
from .judge_replies import Read, Template, load_template, read_pairwise, read_score
from .records import Journal, PairItem, Turn, Verdict, digest, file_digest, prompt_text
from .reply_cache import Reply, Request
from .settings import JudgeOptions


class Judge(Protocol):
    """What judges. `name` and `identity` (a hash of all that changes its verdicts) are kept."""

    name: str
    identity: str
    batch: int  # items it likes at once: what a stage asks and writes together

    def compare(self, items: Sequence[PairItem]) -> list[Verdict]: ...


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def combine_orders(forward: Read, backward: Read, raw: str) -> Verdict:
    """The verdict of both orders; `backward` showed the second text first."""
    if forward.error or backward.error:
        return Verdict(None, False, forward.error or backward.error, raw, "both")
    assert forward.side is not None and backward.side is not None
    first, second = forward.side, -backward.side  # both: +1 the item's first text
    # Where the orders disagree: the position preferred both times, or 0.
    position = None if first == second else forward.side if forward.side == backward.side else 0
    p: float | None = None
    if forward.p is not None and backward.p is not None:
        p = (forward.p + 1 - backward.p) / 2
    if first != second or first == 0:
        return Verdict(0.5 if p is None else p, True, None, raw, "both", position=position)
    return Verdict((1 + first) / 2 if p is None else p, False, None, raw, "both")


class PairwiseJudge:
    """An LLM behind an endpoint, asked A or B (or a tie) in both orders."""

    def __init__(
        self,
        endpoint: Endpoint,
        template: Template,
        *,
        principles: str = "",
        max_tokens: int | None = None,
        logprobs: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
        name: str = "llm",
    ) -> None:
        self.endpoint, self.template, self.principles = endpoint, template, principles
        self.max_tokens = max_tokens or (512 if template.explains else 8)
        self.options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        if logprobs and not template.explains:
            self.options |= {"logprobs": True, "top_logprobs": 20}
        self.name = f"{name}:{endpoint.options.model}"
        self.batch = max(64, 4 * endpoint.options.concurrency)
        self.identity = endpoint.key_of(self._question("prompt", "first", "second"))

    def compare(self, items: Sequence[PairItem]) -> list[Verdict]:
        requests = []
        for item in items:
            prompt = prompt_text(item.prompt)
            requests.append(self._question(prompt, item.first, item.second))
            requests.append(self._question(prompt, item.second, item.first))
        replies = self.endpoint.ask(requests)
        return [self._verdict(*replies[i : i + 2]) for i in range(0, len(replies), 2)]

    def _question(self, prompt: str, first: str, second: str) -> Request:
        messages = self.template.messages(
            prompt=prompt, first=first, second=second, principles=self.principles
        )
        return Request(messages, self.options, self.max_tokens)

    def _verdict(self, forward: Reply, backward: Reply) -> Verdict:
        explained = self.template.explains
        reads = read_pairwise(forward, explained), read_pairwise(backward, explained)
        raw = json.dumps([forward.text, backward.text], ensure_ascii=False)
        return combine_orders(*reads, raw)


class ScoreJudge:
    """Compares the scores that `scores(prompt, completion)` gives to each text alone.

    A text is scored once, also by later processes where there is a `store`: scores are written
    there as they come, `chunk` texts at a time. `scale` turns a difference into a probability;
    None: 1, 0 or 1/2.
    """

    def __init__(
        self,
        name: str,
        identity: Any,
        scores: Callable[[list[tuple[Turn, str]]], list[tuple[float | None, str | None, str]]],
        *,
        scale: float | None = None,
        batch: int = 1,
        chunk: int | None = None,
    ) -> None:
        self.name, self.identity, self.batch = name, digest(identity), batch
        self._chunk = chunk
        self._store: Journal | None = None
        self._scores, self._scale = scores, scale
        self._known: dict[str, tuple[float | None, str | None, str]] = {}

    def keep_in(self, folder: str | Path, ranks: Ranks = ALONE) -> None:
        """Keep scores in a folder, and know those that are there."""
        store = self._store = Journal(Path(folder) / f"scores-{self.identity[:16]}.jsonl", ranks)
        self._known.update({r["key"]: (r["score"], None, r["raw"]) for r in store.rows})

    def compare(self, items: Sequence[PairItem]) -> list[Verdict]:
        keys: dict[str, tuple[Turn, str]] = {}
        for item in items:
            for text in (item.first, item.second):
                keys.setdefault(digest([item.prompt, text]), (item.prompt, text))
        new = [key for key in keys if key not in self._known]
        size = self._chunk or max(len(new), 1)
        for start in range(0, len(new), size):
            part = new[start : start + size]
            found = self._scores([keys[key] for key in part])
            self._known.update(zip(part, found, strict=True))
            if self._store is not None:  # an error is not kept: it may not come again
                pairs = zip(part, found, strict=True)
                self._store.add(
                    [{"key": k, "score": f[0], "raw": f[2]} for k, f in pairs if not f[1]]
                )
        return [self._verdict(item) for item in items]

    def _verdict(self, item: PairItem) -> Verdict:
        first, second = (self._known[digest([item.prompt, t])] for t in (item.first, item.second))
        raw = json.dumps([first[2], second[2]], ensure_ascii=False)
        error = first[1] or second[1]
        if error or first[0] is None or second[0] is None:
            return Verdict(None, False, error or "no score", raw)
        gap = first[0] - second[0]
        if self._scale is None or gap == 0:
            p = 0.5 if gap == 0 else float(gap > 0)
        else:
            p = sigmoid(gap * self._scale)
        return Verdict(p, gap == 0, None, raw, "single", first[0], second[0])


def rule_judge(name: str, identity: Any, function: Callable[[Turn, str], float]) -> ScoreJudge:
    """A rule of this process: a number for a prompt and a completion, more is better."""

    def scores(texts: list[tuple[Turn, str]]) -> list[tuple[float | None, str | None, str]]:
        found: list[tuple[float | None, str | None, str]] = []
        for prompt, completion in texts:
            try:
                value = float(function(prompt, completion))
            except Exception as error:  # of the user's function
                found.append((None, f"{type(error).__name__}: {error}", ""))
                continue
            if math.isfinite(value):
                found.append((value, None, f"{value:g}"))
            else:
                found.append((None, f"the rule gave {value}", f"{value}"))
        return found

    return ScoreJudge(name, [name, identity], scores, chunk=1)


def length_judge(wanted: int = 0) -> ScoreJudge:
    """Nearer to `wanted` characters is better; 0: shorter is."""
    return rule_judge("length", wanted, lambda _, text: -abs(len(text) - wanted))


def regex_judge(pattern: str) -> ScoreJudge:
    """More matches are better."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"judge_pattern: {pattern!r}: {error}") from None
    return rule_judge("regex", pattern, lambda _, text: sum(1 for _ in compiled.finditer(text)))


def load_callable(where: str) -> Callable[[Turn, str], float]:
    """The function that `module:name` or `file.py:name` names."""
    source, _, name = where.rpartition(":")
    if not source:
        raise UserError(f"judge_callable must be module:function or file.py:function, got {where}")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"_judge_{Path(source).stem}", source)
            if spec is None or spec.loader is None or not Path(source).is_file():
                raise ImportError(f"{source} does not exist")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # of the user's file
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"judge_callable: {where} cannot be loaded: {what}") from None
    if not callable(function):
        raise UserError(f"judge_callable: {where} is {function!r}, expected a function")
    return function


def _source_of(where: str, function: Any) -> list[str]:
    """Hashes of the files that a rule is in: an edited rule is another judge."""
    source = where.rpartition(":")[0]
    found = []
    if source.endswith(".py"):  # run anew for each judge
        found.append(file_digest(Path(source)))
    with contextlib.suppress(TypeError, OSError):
        file = inspect.getfile(function)
        if not found or Path(file).resolve() != Path(source).resolve():
            found.append(_as_imported(file))
    return found


@functools.cache
def _as_imported(file: str) -> str:
    """Hash of a module's file when it was first asked for: it is not loaded again."""
    return file_digest(Path(file))


def rubric_judge(endpoint: Endpoint, template: Template, options: JudgeOptions) -> ScoreJudge:
    """An LLM that gives each text a number."""
    lowest, highest = options.judge_lowest, options.judge_highest
    fields = {"temperature": options.judge_temperature, "seed": options.judge_seed}
    limits = {"lowest": f"{lowest:g}", "highest": f"{highest:g}"}

    def question(prompt: str, text: str) -> Request:
        messages = template.messages(prompt=prompt, completion=text, **limits)
        return Request(messages, fields, options.judge_max_tokens or 16)

    def scores(texts: list[tuple[Turn, str]]) -> list[tuple[float | None, str | None, str]]:
        replies = endpoint.ask([question(prompt_text(p), text) for p, text in texts])
        return [(*read_score(r, lowest, highest), r.text or "") for r in replies]

    identity = [endpoint.key_of(question("prompt", "completion")), limits]
    batch = max(64, 4 * options.concurrency)
    return ScoreJudge(f"rubric:{options.model}", identity, scores, batch=batch)


class EnsembleJudge:
    """The mean of several judges; one that errs is left out, and a split vote is a tie.

    An error where more than half of the judges err.
    """

    def __init__(self, judges: Sequence[Judge]) -> None:
        if not judges:
            raise ValueError("an ensemble needs at least one judge")
        self.judges = list(judges)
        self.name = "ensemble(" + ", ".join(j.name for j in judges) + ")"
        self.identity = digest([j.identity for j in judges])
        self.batch = max(j.batch for j in judges)

    def compare(self, items: Sequence[PairItem]) -> list[Verdict]:
        each = [judge.compare(items) for judge in self.judges]
        return [self._verdict(verdicts) for verdicts in zip(*each, strict=True)]

    def _verdict(self, verdicts: Sequence[Verdict]) -> Verdict:
        raw = json.dumps([v.raw for v in verdicts], ensure_ascii=False)
        good = [v for v in verdicts if v.p_first is not None]
        order = "both" if any(v.order == "both" for v in verdicts) else "single"
        if 2 * len(good) < len(verdicts) or not good:
            errors = "; ".join(v.error for v in verdicts if v.error)
            return Verdict(None, False, errors, raw, order)
        p = sum(v.p_first or 0.0 for v in good) / len(good)
        votes = sum(0 if v.tie else 1 if (v.p_first or 0) > 0.5 else -1 for v in good)
        return Verdict(p, votes == 0, None, raw, order)


def make_judge(options: JudgeOptions, ledger: Path | None = None, ranks: Ranks = ALONE) -> Judge:
    """The judge that the options describe; of many `ranks`, this one's."""
    endpoint: Endpoint | None = None
    if set(options.judge) & {"llm", "rubric", "constitution"}:
        endpoint = Endpoint(options, ledger, ranks)
    judges = [_one(name, options, endpoint) for name in options.judge]
    for one in judges:
        # What an endpoint said is in its own cache.
        if options.cache_dir and isinstance(one, ScoreJudge) and not one.name.startswith("rubric"):
            one.keep_in(options.cache_dir, ranks)
    judge: Any = judges[0] if len(judges) == 1 else EnsembleJudge(judges)
    judge.endpoint = endpoint
    return judge


def _one(name: str, options: JudgeOptions, endpoint: Endpoint | None) -> Any:
    path = options.judge_template
    if name == "length":
        return length_judge(options.judge_length)
    if name == "regex":
        return regex_judge(str(options.judge_pattern))
    if name == "callable":
        where = str(options.judge_callable)
        function = load_callable(where)
        return rule_judge(f"callable:{where}", [where, *_source_of(where, function)], function)
    if name == "rubric":
        assert endpoint is not None
        return rubric_judge(
            endpoint, load_template(path, "rubric", ("prompt", "completion")), options
        )
    if name in ("llm", "constitution"):
        assert endpoint is not None
        needs: tuple[str, ...] = ("prompt", "first", "second")
        principles, shipped = "", "pairwise"
        if name == "constitution":
            principles = read_principles(str(options.judge_principles))
            needs, shipped = (*needs, "principles"), "constitution"
        return PairwiseJudge(
            endpoint,
            load_template(path, shipped, needs),
            principles=principles,
            max_tokens=options.judge_max_tokens,
            logprobs=options.judge_logprobs,
            temperature=options.judge_temperature,
            seed=options.judge_seed,
            name=name,
        )
    from . import model_judges

    return model_judges.make(name, options)


def read_principles(path: str) -> str:
    """The principles of a file, one a line, numbered; lines that begin with # are remarks."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"judge_principles: {path} does not exist")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    if not kept:
        raise UserError(f"judge_principles: {path} holds no principle")
    return "\n".join(f"{i}. {line}" for i, line in enumerate(kept, start=1))
