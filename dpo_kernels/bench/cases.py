"""What is measured: shapes of named models, in suites.

Letters: `N` tokens of the batch, `V` vocabulary, `H` hidden size, `B` pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FRACTIONS = (0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Model:
    hidden: int
    vocabulary: int
    softcap: float | None = None


MODELS = {
    "GPT-2": Model(768, 50257),  # odd: rows are not 16-byte aligned
    "SmolLM2-135M": Model(576, 49152),
    "Qwen2.5-0.5B": Model(896, 151936),
    "Qwen2.5-7B": Model(3584, 152064),
    "Llama-3-8B": Model(4096, 128256),
    "Gemma-2-2B": Model(2304, 256000, softcap=30.0),
}


@dataclass(frozen=True)
class Case:
    """One thing to compute: every provider of its suite does it on the same inputs."""

    suite: str
    model: str
    dtype: str
    tokens: int  # N, of all sequences
    fraction: float  # of tokens that are scored
    pairs: int = 2

    @property
    def name(self) -> str:
        """Stable across commits: results are compared by it."""
        return (
            f"{self.suite} {self.model} {self.dtype} {self.tokens} tokens in {self.pairs} pairs, "
            f"{self.fraction:.0%} scored"
        )

    @property
    def shape(self) -> Model:
        return MODELS[self.model]

    @property
    def length(self) -> int:
        return self.tokens // (2 * self.pairs)

    @property
    def scored(self) -> int:
        """Rows that are scored: the tail of each sequence."""
        return 2 * self.pairs * max(1, round(self.length * self.fraction))


# suite -> what a call of it does; the floor is in `measure.floor_of`.
SUITES = {
    "logits forward": "sequence log-probs from logits",
    "logits fwd+bwd": "DPO loss from logits and its gradient",
    "linear trained": "DPO loss from hidden states, gradients of hidden states and weight",
    "linear frozen": "DPO loss from hidden states, gradient of hidden states (LoRA)",
    "linear reference": "sequence log-probs from hidden states",
    "pair loss": "loss and gradient from sequence log-probs: what launches and calls cost",
    "small batch": "DPO loss from few logits and its gradient: launch-bound on GPUs",
    "training step": "forward, DPO loss, backward and AdamW of a small Llama",
}


def quick(device: str) -> list[Case]:
    """Ends within three minutes on two cores with every peer installed."""
    if device == "cuda":
        return [*_on_gpu(("Llama-3-8B", "GPT-2"), (0.6,))]
    return [
        Case("logits forward", "SmolLM2-135M", "fp32", 512, 0.6),
        Case("logits forward", "SmolLM2-135M", "bf16", 512, 0.6),
        Case("logits fwd+bwd", "SmolLM2-135M", "fp32", 512, 0.6),
        Case("logits fwd+bwd", "GPT-2", "bf16", 512, 0.6),
        Case("linear trained", "SmolLM2-135M", "fp32", 256, 0.5),
        Case("linear frozen", "SmolLM2-135M", "fp32", 256, 0.5),
        Case("linear reference", "SmolLM2-135M", "fp32", 256, 0.5),
        Case("pair loss", "-", "fp32", 0, 1.0, pairs=256),
        Case("small batch", "GPT-2", "fp32", 32, 1.0),
        Case("training step", "SmolLM2-135M", "fp32", 128, 0.6),
    ]


def full(device: str) -> list[Case]:
    """All models and scored fractions that fit."""
    if device == "cuda":
        return [*_on_gpu(tuple(MODELS), FRACTIONS)]
    cases = quick(device)
    for model in MODELS:
        # What a laptop holds: 256k x 512 fp32 logits are 0.5 GB, with eager's copies 3 GB.
        tokens = 1024 if MODELS[model].vocabulary < 100_000 else 512
        for dtype in ("fp32", "bf16"):
            for fraction in FRACTIONS if model == "SmolLM2-135M" else (0.6,):
                for suite in ("logits forward", "logits fwd+bwd"):
                    cases.append(Case(suite, model, dtype, tokens, fraction))
    for model in ("SmolLM2-135M", "Qwen2.5-0.5B"):
        for fraction in (0.5, *FRACTIONS):
            for suite in ("linear trained", "linear frozen", "linear reference"):
                cases.append(Case(suite, model, "fp32", 1024, fraction))
    for suite in ("linear trained", "linear frozen", "linear reference"):
        cases.append(Case(suite, "SmolLM2-135M", "bf16", 1024, 0.5))
    return list(dict.fromkeys(cases))


def _on_gpu(models: tuple[str, ...], fractions: tuple[float, ...]):
    for model in models:
        for fraction in fractions:
            for suite in ("logits forward", "logits fwd+bwd"):
                yield Case(suite, model, "bf16", 4096, fraction, pairs=4)
            for suite in ("linear trained", "linear frozen", "linear reference"):
                yield Case(suite, model, "bf16", 8192, fraction, pairs=4)
    yield Case("pair loss", "-", "fp32", 0, 1.0, pairs=256)
    for model in ("GPT-2", "Llama-3-8B"):
        yield Case("small batch", model, "bf16", 128, 1.0)
    yield Case("training step", "SmolLM2-135M", "bf16", 4096, 0.6, pairs=4)


# What grows in each series; the rest stays as in the first case.
SCALING_BASE = {
    "cpu": (
        Case("logits fwd+bwd", "SmolLM2-135M", "fp32", 256, 0.6),
        Case("linear trained", "SmolLM2-135M", "fp32", 256, 0.6),
    ),
    "cuda": (
        Case("logits fwd+bwd", "Llama-3-8B", "bf16", 2048, 0.6, pairs=4),
        Case("linear trained", "Llama-3-8B", "bf16", 2048, 0.6, pairs=4),
    ),
}


def scaling(device: str) -> dict[str, list[Case]]:
    """Series of cases by what grows: tokens, vocabulary, hidden size, scored fraction, pairs."""
    series = {}
    for base in SCALING_BASE[device]:
        grown = {
            "tokens": [replace(base, tokens=base.tokens * k) for k in (1, 2, 4, 8)],
            "scored fraction": [replace(base, fraction=f) for f in (0.1, 0.3, 0.6, 1.0)],
            "pairs": [replace(base, tokens=base.tokens * 4, pairs=p) for p in (1, 2, 4, 8, 16)],
            "vocabulary": [_with(base, vocabulary=v) for v in (8192, 16384, 32768, 65536, 131072)],
        }
        if base.suite.startswith("linear"):
            grown["hidden size"] = [_with(base, hidden=h) for h in (256, 512, 1024, 2048)]
        series.update({f"{base.suite} by {name}": cases for name, cases in grown.items()})
    return series


def grown_in(series: str) -> str:
    """What grows along a series: "tokens" of "linear trained by tokens"."""
    return series.partition(" by ")[2]


def _with(base: Case, **changes: int) -> Case:
    """The case with a model that differs in one size, entered among `MODELS`."""
    model = replace(base.shape, **changes)
    name = f"H {model.hidden} V {model.vocabulary}"
    MODELS.setdefault(name, model)
    return replace(base, model=name)
