"""The options of each command: what `--help` prints and `load_options` fills in.

Nothing heavy is imported: every command's parser is made at every start.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..train.config_files import UserError
from ..train.run_options import option
from .settings import (
    JUDGES,
    Checked,
    EndpointOptions,
    JudgeOptions,
    PairOptions,
    SamplingOptions,
    at_least,
)


@dataclass
class GenerateConfig(SamplingOptions, EndpointOptions):
    """Options of `generate`."""

    prompts: str = option("", "JSONL file with `prompt` (text or messages) in each row")
    output: str = option("", "file of samples, .jsonl or .parquet")
    model_name_or_path: str | None = option(None, "a model's folder, sampled in this process")
    gguf_file: str | None = option(None, "GGUF file inside model_name_or_path")
    device: str = option("auto", "cpu, cuda, ...; auto: a GPU if there is one")

    def check(self) -> None:
        super().check()
        if not self.prompts or not self.output:
            raise UserError("prompts and output are needed: --prompts FILE --output FILE")
        if (self.model_name_or_path is None) == (self.base_url is None):
            raise UserError("give model_name_or_path (this process) or base_url (a server)")
        if self.base_url and not self.model:
            raise UserError("base_url needs model, the name of the model on that server")


@dataclass
class JudgeConfig(JudgeOptions):
    """Options of `judge`."""

    samples: str = option("", "file of samples, as `generate` writes it")
    output: str = option("", "file of verdicts, .jsonl or .parquet")
    compare: str = option(
        "all", "all: every two samples of a prompt; disjoint: each sample once", ("all", "disjoint")
    )

    def check(self) -> None:
        super().check()
        if not self.samples or not self.output:
            raise UserError("samples and output are needed: --samples FILE --output FILE")


@dataclass
class PairsConfig(PairOptions):
    """Options of `pairs`."""

    samples: str = option("", "file of samples")
    verdicts: str = option("", "file of verdicts on them")
    output: str = option("", "file of pairs, .jsonl or .parquet")
    format: str = option(
        "pairs",
        "pairs; unpaired: prompt, completion, label (kto, apo_zero_unpaired); ranked: prompt, "
        "completions, scores (plackett_luce)",
        ("pairs", "unpaired", "ranked"),
    )
    seed: int = option(42, "seed of what is drawn from mixed files")

    def check(self) -> None:
        super().check()
        if not self.samples or not self.verdicts or not self.output:
            raise UserError("samples, verdicts and output are needed")


@dataclass
class GuardOptions(Checked):
    """Limits; the policy of a round that breaks one is not promoted."""

    max_kl: float | None = option(50.0, "nats a sequence from the starting model, exact")
    max_length_ratio: float | None = option(2.0, "mean length over that of round 0, or its inverse")
    min_diversity: float | None = option(
        0.3, "distinct word pairs among a prompt's samples, as a share of round 0's"
    )
    max_repetition: float | None = option(0.5, "share of words that are part of a repeated 4-gram")
    max_logps_fall: float | None = option(
        2.0, "nats a token by which chosen and rejected both fall in one round"
    )

    def check(self) -> None:
        super().check()
        at_least(self, 0, ("max_kl", "min_diversity", "max_repetition", "max_logps_fall"))
        at_least(self, 1, ("max_length_ratio",))


EMBEDDED_RULE = "dpo_kernels.iterate.tone_rule:tone_score"
# What a loop that goes on may have otherwise than when it began.
MAY_CHANGE = (
    "rounds",
    "concurrency",
    "requests_per_minute",
    "request_timeout",
    "retries",
    "backoff",
    "max_backoff",
    "max_requests",
    "max_cost",
    "cache_dir",
    "api_key_env",
    "stop_at",
)


@dataclass
class IterateConfig(GuardOptions, SamplingOptions, PairOptions, JudgeOptions):
    """Options of the loop; those of `train` go to each round's training."""

    output_dir: str = option("", "folder of the iteration; one that exists is gone on with")
    model_name_or_path: str | None = option(
        None, "policy of round 0; without it the embedded model after its SFT"
    )
    prompts: str | None = option(None, "file of prompts to train on")
    eval_prompts: str | None = option(None, "file of held-out prompts; None: split off by seed")
    eval_fraction: float = option(0.1, "share of the prompts held out without eval_prompts")
    rounds: int = option(3, "rounds at most")
    prompts_per_round: int | None = option(None, "prompts of one round; None: all")
    reference: str = option(
        "previous", "reference of a round's training", ("initial", "previous", "ema")
    )
    ema_decay: float = option(0.5, "ema: share of the old reference that is kept")
    min_pairs: int = option(8, "fewer pairs end the loop by name")
    fallback_judge: list[str] = option(
        [], "asked in place of the judge where it leaves fewer than min_pairs", JUDGES
    )
    compare: str = option("all", "all | disjoint: which samples are compared", ("all", "disjoint"))
    online: int | None = option(
        None, "steps of a round: new pairs from the current policy every so many steps"
    )
    eval_samples: int = option(2, "samples of each held-out prompt")
    win_length_match: float = option(0.2, "texts compared differ in length by this share at most")
    stop_at: float | None = option(None, "stop where the win rate over round 0 reaches it")
    stop_below: float | None = option(
        None, "stop, and keep the old policy, where the win rate over it is below for certain"
    )
    sft_steps: int | None = option(None, "SFT steps of the embedded model; None: its recipe's")
    device: str = option("auto", "cpu, cuda, ...; auto: a GPU if there is one")

    def _comes_later(self, name: str) -> bool:
        return name in ("judge_model_path", "judge_ref_path")

    def check(self) -> None:
        if self.model_name_or_path is None and self.prompts is None:
            if self.judge == ["length"]:
                self.judge, self.judge_callable = ["callable"], EMBEDDED_RULE
        elif self.prompts is None or self.model_name_or_path is None:
            raise UserError("give model_name_or_path and prompts, or neither (the embedded model)")
        super().check()
        if not self.output_dir:
            raise UserError("output_dir is missing: a loop that can be gone on with needs a name")
        counts = ("rounds", "min_pairs", "eval_samples", "online", "prompts_per_round")
        at_least(self, 1, counts)
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
