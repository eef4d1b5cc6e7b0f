"""Inputs of the peer comparison, rebuilt from a few numbers.

A recipe is a small dict stored in `cases.json.gz`; `build` turns it into numpy arrays. The only
randomness is the raw 64-bit stream of PCG64, which numpy promises not to change, followed by
additions and multiplications: the same bits on every machine, whatever torch or numpy is there.

R = 2B rows (chosen; rejected), T positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

PROBES = 2  # random projections that stand for a whole gradient


class Stream:
    """Uniform and bell-shaped numbers from the raw PCG64 stream."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def integers(self, high: int, *shape: int) -> np.ndarray:
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (raw % np.uint64(high)).astype(np.int64).reshape(shape)

    def uniform(self, *shape: int) -> np.ndarray:
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-53

    def bell(self, *shape: int) -> np.ndarray:
        """Zero mean, unit variance: a scaled sum of three uniforms."""
        return (self.uniform(*shape) + self.uniform(*shape) + self.uniform(*shape) - 1.5) * 2.0


def build(recipe: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a recipe.

    Always: `ids [R, T]`, `labels [R, T]` (-100 off the spans), `attention [R, T]`.
    With `H` in the recipe: `hidden`, `ref_hidden [R, T, H]`, `weight`, `ref_weight [V, H]`, `bias`,
    `ref_bias [V]`, all rounded to float32; otherwise `logits`, `ref_logits [R, T, V]` in float64.
    """
    s = Stream(recipe["seed"])
    R, T, V = 2 * recipe["pairs"], recipe["T"], recipe["V"]
    scale, noise = recipe["scale"], recipe["ref_noise"]
    ids = s.integers(V, R, T)
    scored = np.zeros((R, T), dtype=bool)
    attention = np.zeros((R, T), dtype=np.int64)
    for row, (real, spans) in enumerate(zip(recipe["real"], recipe["spans"], strict=True)):
        attention[row, real[0] : real[1]] = 1
        for start, end in spans:
            scored[row, start:end] = True
    out = {"ids": ids, "labels": np.where(scored, ids, -100), "attention": attention}
    if "H" not in recipe:
        logits = scale * s.bell(R, T, V)
        ref_logits = recipe.get("ref_scale", 1.0) * logits + noise * s.bell(R, T, V)
        return out | {"logits": logits, "ref_logits": ref_logits}
    H = recipe["H"]
    hidden, weight, bias = s.bell(R, T, H), scale * s.bell(V, H) / H**0.5, s.bell(V)
    arrays = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "ref_hidden": hidden + noise * s.bell(R, T, H),
        "ref_weight": weight + noise * s.bell(V, H) / H**0.5,
        "ref_bias": bias + noise * s.bell(V),
    }
    return out | {k: v.astype(np.float32) for k, v in arrays.items()}


def probe(grad: np.ndarray) -> list[list[float]]:
    """`[PROBES][R]` random projections of a `[R, T, *]` gradient; one "row" for fewer axes."""
    g = np.asarray(grad, dtype=np.float64)
    g = g.reshape(g.shape[0], -1) if g.ndim == 3 else g.reshape(1, -1)
    s = Stream(20240)
    return [(g @ (2.0 * s.uniform(g.shape[1]) - 1.0)).tolist() for _ in range(PROBES)]


def load(name: str) -> dict[str, Any]:
    """The contents of a `.json.gz` beside this file."""
    with gzip.open(Path(__file__).with_name(name), "rt") as f:
        return json.load(f)


def save(path: Path, data: dict[str, Any]) -> None:
    """Write `.json.gz` without a time stamp, so equal contents are equal files."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    path.write_bytes(gzip.compress(text, compresslevel=9, mtime=0))
