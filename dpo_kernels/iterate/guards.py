"""What tells that a round has gone wrong, measured on fresh samples of the new policy.

Rewards on given pairs say nothing about KL: those texts are not the policy's. So KL to the starting
model is measured on what the policy writes: k1 (mean of log pi - log ref), k3 (r - 1 - log r with
r = ref / pi: never negative, less noise), and exactly, summed over the vocabulary at each position.
All are nats a sequence; the samples must be drawn at temperature 1 for k1 and k3 to be unbiased.
Each limit stops the loop and names itself; None switches it off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .command_options import GuardOptions
from .local_models import LocalModel, prompt_ids, render
from .records import Sample, by_prompt, completion_text

_ELEMENTS = 2**25  # of logits held at once, for each model


@torch.no_grad()
def kl_of_samples(
    policy: LocalModel, reference: LocalModel, samples: Sequence[Sample]
) -> dict[str, float]:
    """kl/k1, kl/k3, kl/exact (nats a sequence) and kl/tokens (mean tokens of a sequence)."""
    rows = []
    for s in samples:
        if s.token_ids is not None:
            rows.append((prompt_ids(policy.tokenizer, s.prompt), list(s.token_ids)))
        else:
            rows.append(render(policy.tokenizer, s.prompt, s.completion))
    rows = [row for row in rows if row[1]]
    if not rows:
        return {}
    width = max(len(p) + len(c) for p, c in rows)
    size = max(1, _ELEMENTS // (width * int(policy.model.config.vocab_size)))
    sums = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        (logits, labels), (other, _) = policy.scored(group), reference.scored(group)
        keep = labels[:, 1:] != -100
        log_p = logits[:, :-1][keep].double().log_softmax(-1)  # [N, V]
        log_q = other[:, :-1][keep].double().log_softmax(-1)
        at = labels[:, 1:][keep][:, None]
        gap = (log_q.gather(1, at) - log_p.gather(1, at))[:, 0]
        exact = (log_p.exp() * (log_p - log_q)).sum(-1)
        sums += torch.stack([-gap.sum(), (gap.expm1() - gap).sum(), exact.sum()]).cpu()
        tokens += int(keep.sum())
    k1, k3, exact_kl = (sums / len(rows)).tolist()
    return {"kl/k1": k1, "kl/k3": k3, "kl/exact": exact_kl, "kl/tokens": tokens / len(rows)}


def text_statistics(samples: Sequence[Sample]) -> dict[str, float]:
    """length (characters), diversity (distinct word pairs of a prompt's samples), repetition."""
    length = sum(len(s.completion) for s in samples) / len(samples)
    shares = []
    for group in by_prompt(samples).values():
        pairs = [pair for s in group for pair in _grams(s.completion, 2)]
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    repeated = [_repeated(s.completion) for s in samples]
    return {
        "length": length,
        "diversity": sum(shares) / len(shares) if shares else 0.0,
        "repetition": sum(repeated) / len(repeated),
    }


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _repeated(text: str) -> float:
    """Share of the 4-grams of a text that occurred in it before."""
    grams = _grams(text, 4)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def logps_moved(
    after: LocalModel, before: LocalModel, pairs: Sequence[dict[str, Any]], most: int = 64
) -> dict[str, float]:
    """How far a round moved the log-probs of its pairs, nats a token."""
    pairs = pairs[:: max(1, len(pairs) // most)][:most]
    moved = {}
    for side in ("chosen", "rejected"):
        texts = [(p["prompt"], _on_side(p, side)) for p in pairs]
        rows = [render(after.tokenizer, p, completion_text(c)) for p, c in texts if c is not None]
        total, tokens = 0.0, 0
        for start in range(0, len(rows), 8):
            group = rows[start : start + 8]
            gap = after.completion_logps(group) - before.completion_logps(group)
            total += float(gap.sum())
            tokens += sum(len(c) for _, c in group)
        moved[f"logps_moved/{side}"] = total / max(tokens, 1)
    return moved


def _on_side(row: dict[str, Any], side: str) -> Any:
    """The completion of a row that is chosen or rejected: of a pair, of a list the first or last,
    of a single one itself if it was found so (else None)."""
    if "completions" in row:
        return row["completions"][0 if side == "chosen" else -1]
    if "label" in row:
        return row["completion"] if row["label"] == (side == "chosen") else None
    return row[side]


def broken_limit(
    options: GuardOptions, now: dict[str, float], at_start: dict[str, float]
) -> str | None:
    """The first limit that these measures break, with both numbers; None if all hold."""
    kl = now.get("kl/exact")
    if options.max_kl is not None and kl is not None and not kl <= options.max_kl:
        return f"max_kl: {kl:.2f} nats a sequence from the starting model, limit {options.max_kl:g}"
    if options.max_length_ratio is not None:
        ratio = now["length"] / max(at_start["length"], 1e-9)
        if not 1 / options.max_length_ratio <= ratio <= options.max_length_ratio:
            return (
                f"max_length_ratio: samples are {ratio:.2f} times as long as those of round 0, "
                f"limit {options.max_length_ratio:g} (or its inverse)"
            )
    if options.min_diversity is not None and at_start["diversity"] > 0:
        share = now["diversity"] / at_start["diversity"]
        if share < options.min_diversity:
            return (
                f"min_diversity: {share:.2f} of round 0's distinct word pairs, limit "
                f"{options.min_diversity:g}"
            )
    if options.max_repetition is not None and now["repetition"] > options.max_repetition:
        return (
            f"max_repetition: {now['repetition']:.2f} of the 4-grams are repetitions, limit "
            f"{options.max_repetition:g}"
        )
    fall = options.max_logps_fall
    moved = [now.get(f"logps_moved/{side}") for side in ("chosen", "rejected")]
    if fall is not None and all(m is not None and m < -fall for m in moved):
        return (
            f"max_logps_fall: the log-probs of chosen and rejected both fell, by "
            f"{-moved[0]:.2f} and {-moved[1]:.2f} nats a token, limit {fall:g}"  # type: ignore[operator]
        )
    return None
