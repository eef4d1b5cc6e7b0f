"""The options of sampling, judging, pairing and rounds: dataclasses that the commands print.

One option has one name in every command and in the function behind it, so a file of options for
`iterate` holds what `generate`, `judge` and `pairs` would take alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from ..train.config_files import UserError, nearest, typed
from ..train.run_options import option


class Checked:
    """Options that are looked at together once all are known."""

    def check(self) -> None:
        """`UserError` for what does not go together or has no meaning."""


T = TypeVar("T", bound=Checked)


def load_options(kind: type[T], *layers: Mapping[str, Any]) -> T:
    """The options of these layers, later ones over earlier ones; `UserError` names a wrong one."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            if name not in hints:
                raise UserError(f"unknown option {name!r}{nearest(name, hints)}")
            values[name] = typed(name, value, hints[name], one=True)
    made = kind(**values)
    for f in fields(made):  # type: ignore[arg-type]
        allowed, value = f.metadata.get("choices"), getattr(made, f.name)
        found = value if isinstance(value, list) else [value]
        if allowed and value is not None and not set(found) <= set(allowed):
            raise UserError(f"{f.name} must be one of {', '.join(allowed)}, got {value!r}")
    made.check()
    return made


def at_least(made: object, least: float, names: Iterable[str]) -> None:
    """`UserError` for an option that is below `least` (or no number)."""
    for name in names:
        value = getattr(made, name)
        if value is not None and not (least <= value < float("inf")):
            raise UserError(f"{name} must be at least {least:g}, got {value}")


@dataclass
class EndpointOptions(Checked):
    """An OpenAI-compatible server, and what may be asked of it."""

    base_url: str | None = option(
        None, "OpenAI-compatible server, up to and with /v1 (vLLM, SGLang, llama.cpp, ...)"
    )
    model: str | None = option(None, "name of the model on that server")
    api_key_env: str = option(
        "OPENAI_API_KEY", "environment variable that holds the key; it is written nowhere"
    )
    concurrency: int = option(32, "requests under way at once")
    requests_per_minute: float | None = option(None, "requests sent a minute at most")
    request_timeout: float = option(120.0, "seconds that one request may take, whole")
    retries: int = option(6, "times a request is sent again after a fault of the server's")
    backoff: float = option(0.5, "seconds before the first retry; doubled each time, with jitter")
    max_backoff: float = option(30.0, "seconds between two tries at most")
    max_requests: int | None = option(None, "requests sent at most, retries counted")
    max_cost: float | None = option(None, "cost at most, in the currency of the prices")
    price_in: float = option(0.0, "price of a million tokens sent")
    price_out: float = option(0.0, "price of a million tokens received")
    max_tokens_field: str = option(
        "max_tokens", "the server's name of that field", ("max_tokens", "max_completion_tokens")
    )
    cache_dir: str | None = option(None, "folder of replies that are not asked for again")
    extra_body: dict[str, Any] | None = option(None, "fields added to each request (YAML only)")

    def check(self) -> None:
        at_least(self, 1, ("concurrency",))
        at_least(self, 0, ("retries", "backoff", "max_backoff", "price_in", "price_out"))
        at_least(self, 0, ("max_requests", "max_cost"))
        at_least(self, 0.001, ("request_timeout", "requests_per_minute"))
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise UserError("max_cost needs price_in and price_out")


JUDGES = (
    "length",
    "regex",
    "callable",
    "llm",
    "rubric",
    "constitution",
    "policy",
    "reward_model",
    "implicit",
)


@dataclass
class JudgeOptions(EndpointOptions):
    """Who judges. Several names make an ensemble."""

    judge: list[str] = option(
        ["length"],
        "length | regex | callable (rules); llm (pairwise), rubric, constitution (a server); "
        "policy (a model here, asked as llm is), reward_model, implicit (a DPO model)",
        JUDGES,
    )
    judge_length: int = option(0, "length: the number of characters wanted; 0: the shorter one")
    judge_pattern: str | None = option(None, "regex: more matches are better")
    judge_callable: str | None = option(
        None, "callable: module:function or file.py:function of (prompt, completion) -> number"
    )
    judge_template: str | None = option(None, "file of the judge's prompt; None: the shipped one")
    judge_principles: str | None = option(None, "constitution: file of principles, one a line")
    judge_model_path: str | None = option(None, "policy, reward_model, implicit: a model's folder")
    judge_ref_path: str | None = option(
        None, "implicit: the reference model's folder; none: the mean log-prob (SimPO's reward)"
    )
    judge_beta: float = option(0.1, "implicit: beta of the reward")
    judge_batch_size: int = option(16, "models here: texts of one forward")
    judge_max_tokens: int | None = option(None, "length of a reply; None: by the kind of judge")
    judge_logprobs: bool = option(True, "ask the server for log-probs: probabilities, not labels")
    judge_lowest: float = option(1.0, "rubric: lowest score")
    judge_highest: float = option(10.0, "rubric: highest score")
    judge_temperature: float = option(0.0, "temperature of the judge")
    judge_seed: int = option(0, "seed sent to the judge's server")

    def check(self) -> None:
        super().check()
        if not self.judge:
            raise UserError("judge needs at least one name")
        at_least(self, 1, ("judge_batch_size", "judge_max_tokens"))
        at_least(self, 0, ("judge_temperature", "judge_length"))
        needs = {
            "regex": ("judge_pattern",),
            "callable": ("judge_callable",),
            "llm": ("base_url", "model"),
            "rubric": ("base_url", "model"),
            "constitution": ("base_url", "model", "judge_principles"),
            "policy": ("judge_model_path",),
            "reward_model": ("judge_model_path",),
            "implicit": ("judge_model_path", "judge_ref_path"),
        }
        for name in self.judge:
            for wanted in needs.get(name, ()):
                if getattr(self, wanted) is None and not self._comes_later(wanted):
                    raise UserError(f"judge {name} needs --{wanted}")

    def _comes_later(self, name: str) -> bool:
        """An option that a loop fills in by itself."""
        return False


@dataclass
class SamplingOptions(Checked):
    """How a policy is sampled."""

    num_samples: int = option(4, "samples a prompt")
    temperature: float = option(1.0, "temperature; 0: greedy")
    top_p: float = option(1.0, "nucleus of the distribution that is sampled")
    max_new_tokens: int = option(128, "length of a sample")
    stop: list[str] = option([], "texts that end a sample")
    sample_batch_size: int = option(64, "sequences of one batch, in process")
    logps: bool = option(True, "keep the log-prob of each sampled token, where offered")
    static_cache: bool = option(False, "a static key-value cache, in process")
    seed: int = option(42, "seed of all draws")

    def check(self) -> None:
        super().check()
        at_least(self, 1, ("num_samples", "max_new_tokens", "sample_batch_size"))
        at_least(self, 0, ("temperature",))
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass
class PairOptions(Checked):
    """Which pairs are made of verdicts."""

    select: str = option(
        "best_worst", "best sample against worst, or every judged pair", ("best_worst", "all")
    )
    min_margin: float = option(0.0, "pairs with a margin below it are dropped")
    length_penalty: float = option(
        0.0, "taken off the margin for each character by which the chosen is longer"
    )
    length_matched: float | None = option(
        None, "only pairs whose longer text is at most this share longer (0.2: a fifth)"
    )
    ties: str = option("drop", "what becomes of ties: soft gives p_chosen 0.5", ("drop", "soft"))
    keep_fraction: float = option(1.0, "share of the pairs kept, largest margins first")
    mix: list[str] = option([], "FILE=WEIGHT: pairs of a file, WEIGHT for each judged pair")
    mix_sft: list[str] = option(
        [], "FILE=WEIGHT: rows {messages}; the row's answer is chosen over a sample (SPIN)"
    )

    def check(self) -> None:
        super().check()
        at_least(self, 0, ("min_margin", "length_matched"))
        if not 0 < self.keep_fraction <= 1:
            raise UserError(f"keep_fraction must be in (0, 1], got {self.keep_fraction}")
