"""The options about data, as the readers take them; and training pairs that are streamed."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import dpo_kernels as dk

from ..data import (
    LeftOut,
    Limits,
    PairReader,
    PairTokenizer,
    PreferencePair,
    StreamedPairs,
    TokenPair,
    Truncation,
    is_large,
    row_file,
)
from ..data.left_out import BadField
from .config import DPOTrainConfig
from .model import Policy
from .ranks import ALONE, Ranks

HELD_OUT = 512  # pairs of a stream; a share of millions would be evaluated for hours
_LOOKED_AT = 64  # rows that tell what columns there are


def truncation(config: Any) -> Truncation:
    """What becomes of pairs that are too long, by the options of these names."""
    return Truncation(
        config.max_length,
        config.truncation_mode,
        config.max_prompt_length,
        config.max_completion_length,
        config.assistant_only,
    )


def columns(config: Any) -> dict[str, str]:
    """Our column -> the data's, by the option column_mapping."""
    return dict(entry.split("=", 1) for entry in config.column_mapping or [])


def is_streamed(config: DPOTrainConfig, file: str, ranks: Ranks = ALONE) -> bool:
    """Whether the data is read as it is asked for: if it is large, or by the user's word."""
    if config.dataset_streaming is not None:
        return config.dataset_streaming
    return not ranks.many and is_large(file)


def streamed_pairs(
    file: str,
    policy: Policy,
    config: DPOTrainConfig,
    left_out: LeftOut,
    say: Callable[[str], None],
    split: bool,
) -> tuple[StreamedPairs, list[TokenPair], dict[str, PreferencePair]]:
    """(pairs that are read as they are asked for, held-out pairs if `split`, texts of some)."""
    left_out.keep = 1000  # the run may meet millions
    rows = row_file(file, left_out, columns(config))
    atexit.register(rows.close)
    if not len(rows):
        raise left_out.nothing(file, "no usable preference pair")
    held = 0
    if split and config.eval_fraction > 0 and len(rows) > 1:
        held = min(max(round(config.eval_fraction * len(rows)), 1), HELD_OUT)
    # Held-out rows are from all over the file, by seed.
    draw = np.random.default_rng(config.seed)
    apart = np.sort(draw.choice(len(rows), held, replace=False))
    rest = np.setdiff1d(np.arange(len(rows)), apart, assume_unique=True)
    say(f"{file}: {len(rows):,} rows, read as they are asked for; {held:,} of them held out")
    reader = PairReader(left_out, soft_labels=config.soft_labels)
    limits = Limits.of(policy.model.config)
    maker = PairTokenizer(policy.tokenizer, truncation(config), left_out, say, limits)

    try:
        dk.losses.resolve({**config.loss_options(), "label_smoothing": torch.full((1,), 0.1)})
        soft = True
    except ValueError:
        soft = False

    def fits(pair: PreferencePair) -> None:
        if config.uses_offset and pair.offset is None:
            raise BadField("margin", "missing", "a margin in every row (odpo)", "missing field")
        if pair.label_smoothing is not None and not soft:
            raise BadField(
                "label_smoothing", "a value of the row", "none beside this loss", "not supported"
            )

    pairs = StreamedPairs(rows, rest, reader, maker, fits)
    texts = {}
    for number in rest[:_LOOKED_AT].tolist():
        if (text := pairs.text(number)) is not None:
            texts[text.source] = text
    for remark in reader.remarks(file):
        left_out.once(f"{remark} (of the first {_LOOKED_AT})")
    others = StreamedPairs(rows, apart, reader, maker, fits)
    found = {p.source: p for p in others} if held else {}
    return pairs, list(found.values()), texts
