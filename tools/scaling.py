"""Draw docs/scaling.md: time, memory and traffic per GPU of a step, on paper.

    python tools/scaling.py

A model of a few lines, not a measurement: bytes over bandwidth, operations over speed. `ASSUMED`
has every number it rests on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs/scaling.md"


@dataclass(frozen=True)
class Model:
    name: str
    H: int
    layers: int
    ffn: int
    kv: int  # width of keys, of values
    V: int = 128256

    @property
    def layer(self) -> int:
        """Weights of a layer."""
        return self.H * (2 * self.H + 2 * self.kv + 3 * self.ffn)

    @property
    def trunk(self) -> int:
        """Weights outside the head: the layers and the embedding."""
        return self.layers * self.layer + self.V * self.H

    @property
    def head(self) -> int:
        return self.V * self.H


MODELS = (
    Model("8B", 4096, 32, 14336, 1024),
    Model("70B", 8192, 80, 28672, 1024),
)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8
TOKENS = 8192  # of a GPU in a step
SCORED = 0.6  # of them
FLOPS = 989e12 * 0.4
INSIDE, BETWEEN = 450e9 * 0.8, 50e9 * 0.8  # bytes/s of a GPU, one way
HOP = 3e-6  # seconds
SHARDED = "vocabulary"
CHUNK = 2 << 30  # bytes of logits held at once
GB = 1e9

ASSUMED = f"""\
- Llama-3 shapes: {", ".join(f"{m.name} H = {m.H}, {m.layers} layers" for m in MODELS)}, \
V = {MODELS[0].V}, the head untied.
- H100: 989 TFLOP/s in bf16, of which 40 % are reached. {NODE} GPUs a node; 450 GB/s a GPU and \
direction inside a node, 50 GB/s a GPU between nodes, 80 % of each reached; {HOP * 1e6:.0f} us a \
hop of a ring.
- {TOKENS} tokens a GPU in a step (4 pairs of 2 x 1024), {SCORED:.0%} of them scored; the \
reference's log-probs are kept, not computed.
- bf16 weights and activations; fp32 master weights, gradients and two moments of Adam (16 bytes a \
weight, sharded). Layers are recomputed in the backward (8 operations a weight and token; the \
attention's own products are left out); a layer's input is what is kept of it.
- FSDP2: everything is sharded over all GPUs; weights are gathered twice (bf16), the head once; \
gradients are reduced and scattered once (fp32). HSDP: sharded in a node, gradients summed between \
nodes. A ring over N GPUs moves (N - 1) / N of the bytes past each; between nodes they are spread \
over the {NODE} links of a node. The slower of both links counts.
- Vocabulary-parallel: the trunk as under FSDP2; the head's rows are sharded over the {NODE} GPUs \
of a node, which gather each other's scored hidden states (bf16) and sum their gradients (fp32). \
Across nodes a shard is an FSDP unit of its own.
- Traffic is hidden behind computing as far as that lasts: a step takes the longer of the two."""


@dataclass(frozen=True)
class Cost:
    compute: float  # seconds
    traffic: float  # seconds
    inside: float  # bytes past a GPU inside its node
    between: float  # bytes past a GPU between nodes
    memory: float  # bytes

    @property
    def step(self) -> float:
        return max(self.compute, self.traffic)


class Traffic:
    """Collectives one after the other, each as fast as the slower of its links."""

    def __init__(self) -> None:
        self.inside = self.between = self.seconds = 0.0

    def ring(self, size: float, gpus: int, *, calls: int = 1) -> Traffic:
        """`size` bytes gathered, or reduced and scattered, over `gpus` that fill whole nodes."""
        nodes = gpus // NODE
        between = size * (nodes - 1) / nodes / NODE
        return self._add(size * (gpus - 1) / gpus, between, calls * (gpus - 1))

    def across(self, size: float, nodes: int, *, calls: int = 1) -> Traffic:
        """The same over one GPU of each node."""
        return self._add(0.0, size * (nodes - 1) / nodes, calls * (nodes - 1))

    def _add(self, inside: float, between: float, hops: int) -> Traffic:
        self.inside += inside
        self.between += between
        self.seconds += max(inside / INSIDE, between / BETWEEN) + hops * HOP
        return self


def exchange(traffic: Traffic, model: Model, scored: float) -> Traffic:
    """Hidden states of a node's `scored` tokens a GPU, what combines the ranks, gradients."""
    tokens = NODE * scored
    traffic.ring(2 * tokens * model.H, NODE)
    traffic.ring(2 * 24 * tokens, NODE, calls=4)  # two all-reduces
    return traffic.ring(4 * tokens * model.H, NODE)


def head_traffic(model: Model, gpus: int, scored: float | None) -> Traffic:
    """Of the head alone: gathered, or sharded by vocabulary with `scored` tokens a GPU."""
    if scored is None:
        return Traffic().ring(2 * model.head, gpus).ring(4 * model.head, gpus)
    traffic, nodes, shard = Traffic(), gpus // NODE, model.head / NODE
    return exchange(traffic.across(2 * shard, nodes).across(4 * shard, nodes), model, scored)


def cost(model: Model, gpus: int, how: str) -> Cost:
    trunk, head, nodes = model.trunk, model.head, gpus // NODE
    layers = 8 * (model.layers * model.layer) * TOKENS
    compute = (layers + 6 * head * TOKENS * SCORED) / FLOPS
    shards, units = NODE if how == "HSDP" else gpus, model.layers + 1
    traffic = Traffic().ring(4 * trunk, shards, calls=2 * units)
    traffic.ring(4 * trunk, shards, calls=units)
    parts = [traffic, head_traffic(model, shards, TOKENS * SCORED if how == SHARDED else None)]
    if how == "HSDP":  # an all-reduce is a reduction and a gather
        parts.append(Traffic().across(2 * 4 * (trunk + head) / NODE, nodes, calls=2 * units))
    unsharded = 6 * head / (NODE if how == SHARDED else 1)
    # Two layers are whole at once, in bf16 and with the fp32 gradient of one.
    working = model.layer * (2 * 2 + 4) + unsharded + CHUNK
    # One layer's activations (about 34 H a token in bf16), the others' inputs.
    activations = TOKENS * model.H * (2 * model.layers + 34)
    if how == SHARDED:
        activations += NODE * TOKENS * SCORED * model.H * (2 + 4)
    memory = 16 * (trunk + head) / shards + working + activations
    return Cost(
        compute,
        sum(t.seconds for t in parts),
        sum(t.inside for t in parts),
        sum(t.between for t in parts),
        memory,
    )


def table(model: Model) -> str:
    lines = [
        "| GPUs | | memory, GB | in the node, GB | between nodes, GB | computing, s | traffic, s | "
        "step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        for how in ("FSDP2", "HSDP", SHARDED):
            c = cost(model, gpus, how)
            memory = f"{c.memory / GB:.0f}" + (" (too much)" if c.memory > 76 * GB else "")
            lines.append(
                f"| {gpus if how == 'FSDP2' else ''} | {how} | {memory} | {c.inside / GB:.1f} | "
                f"{c.between / GB:.1f} | {c.compute:.2f} | {c.traffic:.2f} | {c.step:.2f} |"
            )
    return "\n".join(lines)


def break_even(model: Model, gpus: int) -> float:
    """Scored tokens of a GPU up to which the sharded head's traffic takes less time."""
    none = head_traffic(model, gpus, 0).seconds
    a_token = (head_traffic(model, gpus, 1e6).seconds - none) / 1e6
    return (head_traffic(model, gpus, None).seconds - none) / a_token


def break_even_table() -> str:
    lines = [
        "| | GPUs | by time, tokens a GPU | by bytes in the node | memory saved, GB |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        for gpus in (8, 64, 1024):
            tokens = break_even(model, gpus)
            saved = 6 * model.head * (1 - 1 / NODE) - NODE * TOKENS * SCORED * model.H * 6
            one = exchange(Traffic(), model, 1.0).inside
            level = head_traffic(model, gpus, None).inside / one
            lines.append(
                f"| {model.name} | {gpus} | {f'{tokens:,.0f}' if tokens > 0 else 'none'} | "
                f"{level:,.0f} | {saved / GB:.1f} |"
            )
    return "\n".join(lines)


def page() -> str:
    tables = "\n\n".join(f"## {model.name}\n\n{table(model)}" for model in MODELS)
    return f"""\
# Scaling, on paper

Written by `tools/scaling.py`. **Nothing here is measured**: it is bytes over bandwidth and \
operations over speed, to tell which layout is worth a try and where the wall is.

## Assumed

{ASSUMED}

{tables}

## A sharded head against a gathered one

Gathered, the head's bytes grow with V and not with the batch; sharded by vocabulary \
([parallel.md](parallel.md)), with the scored tokens and not with V. Below so many scored tokens a \
GPU the sharded head costs less:

{break_even_table()}

Inside one node both go over the same links, and the sharded head moves fewer bytes up to about \
V / {NODE} scored tokens a GPU. Between nodes it has no fewer to move: each rank's shard is \
gathered and reduced over the nodes as its share of the whole would be, on the same link. What is \
saved there is memory (the hidden states of the node are taken off) and the links of the node; the \
little time comes from rings of nodes, which are shorter than those of all GPUs. It gains more \
where the trunk is tensor-parallel: the hidden states are on all ranks then, and the sum of their \
gradients is all that is sent.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
