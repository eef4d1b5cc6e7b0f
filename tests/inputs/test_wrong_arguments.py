"""Every wrong argument of every public function and module is named: C9.

A table says what each argument may be; everything else that could be handed over in its place
raises `ValueError` or `TypeError` whose text holds the argument's name. A generator goes on from
there: 2,000 seeded calls, each with one argument spoiled at random.
"""

import math
import random
import re

import pytest
import torch

import dpo_kernels as dk

S, T, V, H, N = 4, 5, 7, 6, 9
B = S // 2
# What no argument takes, whatever it is.
NEVER = ({}, object(), 1j, torch.zeros(2, 2, dtype=torch.complex64), math.nan, b"x")
NUMBERS = (0, 1, -1, 2.5, math.inf, -math.inf, 10**30, 10**400)
TEXTS = ("", "1", "True", "nil", "sigmoid-")
BOOLS = (True, False)
NOT_NUMBERS = (*TEXTS, *BOOLS, [1.0], (1,), [[1]], torch.ones(1))


def tensor(*shape, least=None, optional=True):
    """Bad values where a floating tensor of `shape` belongs; its values count from `least` on."""
    good = torch.rand(shape) + 0.1
    bad = [*NUMBERS, *TEXTS, *BOOLS, [1.0], good.tolist(), good.long(), good.bool()]
    bad += [good.to(torch.complex64), good[..., None], torch.cat([good, good])[:-1]]
    bad += [good[0], good.to_sparse(), torch.empty(0)]
    if least is not None:
        bad += [torch.full(shape, x) for x in (math.nan, math.inf, -math.inf)]
        bad += [torch.full(shape, x) for x in (-1.0, 0.0) if x < least]
    return bad if optional else [None, *bad]


def head():
    """Bad weights; one of more rows is a larger vocabulary."""
    return [
        x
        for x in tensor(V, H, optional=False)
        if not isinstance(x, torch.Tensor) or x.shape[1:] != (H,) or not x.is_floating_point()
    ]


def labels(*shape):
    good = torch.zeros(shape, dtype=torch.int64)
    bad = [None, *NUMBERS, *TEXTS, *BOOLS, good.tolist(), good.int(), good.float(), good.bool()]
    return [*bad, good[..., None], good[:-1], good[0], good + V, good - 1, good - 2**62]


def boundaries(*values):
    good = torch.tensor(values)
    bad = [*NUMBERS, *TEXTS, list(values), good.double(), good.bool(), good[None], good[:-1]]
    bad += [good + 1, -good, good.flip(0), good[:1], good[:0]]
    return [*bad, torch.tensor([0, 2**31 - 1, -(2**31), -1, N], dtype=torch.int32)]


FLAG = [None, *NUMBERS, *TEXTS, [True], torch.tensor(True)]
FLAG_OR_NONE = FLAG[1:]
NUMBER = [None, math.inf, -math.inf, 10**400, *NOT_NUMBERS]
POSITIVE = [*NUMBER, 0, -1, -0.5, 1e-320]
TRANSFORM = [*NUMBER, 0, -1, 1e-320, 1e-45, 1e39, 10**40]
SCALE = [*NUMBER, 1e-320, 1e39, 10**40]
INDEX = [None, 1.5, math.inf, 10**30, -(10**30), *NOT_NUMBERS]
NAME = [*NUMBERS, *TEXTS, *BOOLS, ["cpu"], torch.ones(1)]
COUNT = [
    0,
    -1,
    0.0,
    -2.5,
    math.inf,
    10**400,
    *TEXTS,
    *BOOLS,
    [2],
    torch.zeros(()),
    torch.ones(2),
    -torch.ones(()),
    torch.tensor(math.nan),
    torch.tensor(True),
]
LENGTHS = [
    *NUMBERS,
    *TEXTS,
    [3, 4],
    torch.tensor([1, -1]),
    torch.tensor([math.nan, 1.0]),
    torch.tensor([True, True]),
    torch.tensor([1, 2, 3]),
    torch.tensor([[1, 2]]),
    torch.tensor([1.5, 2.0]),
    torch.tensor([1j, 1]),
    torch.tensor([math.inf, 1.0]),
]

LOSS = {
    "loss_type": [None, *NUMBERS, *TEXTS, *BOOLS, [], ["sigmoid", 3], ["sigmoyd"], {"sigmoid"}],
    "loss_weights": [
        *NUMBERS,
        *TEXTS,
        *BOOLS,
        [],
        [math.nan],
        [math.inf],
        ["a"],
        [True],
        {0: 1},
        [1.0, 1.0],
        [None],
        torch.ones(1),
    ],
    "beta": [
        None,
        *TEXTS,
        *BOOLS,
        0,
        -1,
        math.inf,
        10**400,
        1e-320,
        [0.1],
        *(x for x in tensor(B, least=1) if isinstance(x, torch.Tensor) and x.dim()),
    ],
    "label_smoothing": [*NUMBER, -0.1, 0.5, 1],
    "f_divergence_type": [None, *NAME],
    "f_alpha_divergence_coef": NUMBER,
    "discopop_tau": [*POSITIVE, 0.5],
    "ld_alpha": NUMBER[1:],
    "use_weighting": FLAG,
    "offset": tensor(B, least=-2),
    "weights": tensor(B, least=-2),
    "sft_weight": NUMBER,
    "reference_free": FLAG,
    "reduction": [None, *NAME, "max"],
    "num_pairs": COUNT,
    "num_chosen_tokens": COUNT,
    "beta_dpo_state": tensor(2),
    **{
        name: [*NUMBER, 0.25]
        for name in (
            "dpop_lambda",
            "rdpo_alpha",
            "beta_dpo_alpha",
            "beta_dpo_momentum",
            "beta_dpo_keep",
            "simpo_gamma",
            "cpo_alpha",
            "slic_lambda",
            "rpo_alpha",
            "tdpo_alpha",
        )
    },
    "alphapo_alpha": [*NUMBER, 0, 0.5],
}
LOGITS = {
    "logits": tensor(S, T, V, optional=False),
    "labels": labels(S, T),
    "shift": FLAG,
    "ignore_index": INDEX,
    "temperature": TRANSFORM,
    "logit_softcap": TRANSFORM[1:],
    "logit_scale": SCALE,
    "backend": NAME,
}
REF_LOGPS = tensor(S)
PAIRED = {
    "ref_logps_per_token": FLAG_OR_NONE,
    "drop_common_prefix": FLAG,
    "cu_seqlens": boundaries(0, 2, 4, 6, N),
    **LOSS,
}
HEAD = {
    "hidden": tensor(S, T, H, optional=False),
    "weight": head(),
    "bias": tensor(V),
    "lora": [
        *NUMBERS,
        *TEXTS,
        [1],
        (torch.ones(2, H), torch.ones(V, 2)),
        (None, None, 1.0),
        (torch.ones(2, H + 1), torch.ones(V, 2), 1.0),
        *((torch.ones(2, H), torch.ones(V, 2), x) for x in NUMBER),
        (torch.ones(2, H), torch.ones(V, 3), 1.0),
        (torch.ones(H), torch.ones(V), 1.0),
    ],
    "memory_budget": [0, -1, 1.5, math.inf, 10**30, *NOT_NUMBERS],
    "batch_invariant": FLAG,
    "strategy": [*NAME, "fastest"],
    "scored_lengths": [
        *NUMBERS,
        *TEXTS,
        [1] * S,
        [4] * B,
        [-1] * S,
        [4.0] * S,
        [10**30] * S,
        torch.ones(S),
        torch.ones(B, dtype=torch.int64),
        torch.tensor(4),
    ],
    **{k: v for k, v in LOGITS.items() if k not in ("logits", "inplace")},
}
ROWS = {
    "reduction": [None, *NAME, "max"],
    "cu_seqlens": boundaries(0, 2, 4, 6, N),
    "stats": [None, *NUMBERS, *TEXTS, *BOOLS, ["entropy", 3], ["entropie"], {"entropy"}],
}


def base():
    """Right calls by name of the function: its arguments and what may stand in their places."""
    y = torch.randint(0, V, (S, T))
    x, h, w = torch.randn(S, T, V), torch.randn(S, T, H), torch.randn(V, H)
    logps = {
        name: torch.randn(B)
        for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    }
    n = torch.full((B,), 3)
    logits = {"logits": x, "labels": y}
    head = {"hidden": h, "weight": w, "labels": y}
    estimate = {"strategy": "streaming", "lengths": [3, 4], "T": 8, "V": 100, "H": 16}
    SIZE = [0, -1, 1.5, math.inf, 10**30, None, *NOT_NUMBERS]
    return {
        "fused_dpo_loss": (
            dk.fused_dpo_loss,
            {**logits, "ref_logps": torch.zeros(S)},
            {**LOGITS, **PAIRED, "ref_logps": REF_LOGPS, "inplace": FLAG},
        ),
        "fused_dpo_loss of two": (
            dk.fused_dpo_loss,
            {**logits, "ref_logits": x},
            {**LOGITS, **PAIRED, "ref_logits": tensor(S, T, V)},
        ),
        "fused_linear_dpo_loss": (
            dk.fused_linear_dpo_loss,
            {**head, "ref_hidden": h, "ref_weight": w, "ref_bias": torch.zeros(V)},
            {
                **HEAD,
                **PAIRED,
                "ref_hidden": tensor(S, T, H),
                "ref_weight": tensor(V, H),
                "ref_bias": tensor(V),
            },
        ),
        "fused_linear_dpo_loss of sums": (
            dk.fused_linear_dpo_loss,
            {**head, "ref_logps": torch.zeros(S)},
            {**HEAD, **PAIRED, "ref_logps": REF_LOGPS},
        ),
        "sequence_logps": (dk.sequence_logps, logits, {**LOGITS, **ROWS, "inplace": FLAG}),
        "linear_sequence_logps": (dk.linear_sequence_logps, head, {**HEAD, **ROWS}),
        "preference_loss": (
            dk.preference_loss,
            {**logps, "chosen_lengths": n, "rejected_lengths": n},
            {
                **{
                    name: tensor(B, optional=not name.endswith("d_logps") or name.startswith("ref"))
                    for name in logps
                },
                "chosen_lengths": LENGTHS,
                "rejected_lengths": LENGTHS,
                "backend": NAME,
                **LOSS,
            },
        ),
        "memory.estimate": (
            dk.memory.estimate,
            estimate,
            {
                "strategy": [None, *NAME],
                "T": SIZE,
                "V": SIZE,
                "H": SIZE,
                "lengths": [
                    None,
                    *NUMBERS,
                    *TEXTS,
                    [1],
                    [1, -1],
                    [1, 9],
                    [1.0, 2.0],
                    ["a", "b"],
                    torch.ones(2),
                ],
                "dtype": [None, torch.float64, torch.int64, *NAME],
                "memory_budget": HEAD["memory_budget"],
                "trained": FLAG_OR_NONE,
                "kl": FLAG,
                "batch_invariant": FLAG,
                "low_rank": [x for x in SIZE if x is not SIZE[0]],
                "ref_H": [x for x in SIZE if x is not SIZE[0]],
            },
        ),
        "losses.get": (dk.losses.get, {"name": "sigmoid"}, {"name": [None, *NAME]}),
    }


# What the text calls it, where that is not the argument's name.
ALSO = {"losses.get": {"name": "loss_type"}}


def refused(where, function, arguments, name, bad):
    """None if the call is refused by name, else what happened."""
    try:
        function(**{**arguments, name: bad})
    except (ValueError, TypeError) as error:
        called = ALSO.get(where, {}).get(name, name)
        text = str(error)
        if re.search(rf"(?<![a-z]){re.escape(called)}(?![a-z])", text):
            return None
        return f"{where}({name}={str(bad)[:60]}): not named: {text[:150]}"
    except Exception as error:
        return f"{where}({name}={str(bad)[:60]}): {type(error).__name__}: {str(error)[:150]}"
    return f"{where}({name}={str(bad)[:60]}): accepted"


@pytest.mark.parametrize("where", base())
def test_every_argument(where):
    function, arguments, table = base()[where]
    function(**arguments)
    found = []
    for name, values in table.items():
        for bad in (*values, *NEVER):
            found.append(refused(where, function, arguments, name, bad))
    assert not any(found), "\n".join(f for f in found if f)
    with pytest.raises(TypeError, match=r"unexpected|unknown"):
        function(**arguments, temprature=2.0)


@pytest.mark.parametrize("name", [None, *(x for x in NAME if not isinstance(x, list))], ids=str)
def test_backends_load(name):
    with pytest.raises(ValueError, match="backend must be one of"):
        dk.backends.load(name)


@pytest.mark.parametrize("module", (dk.FusedDPOLoss, dk.FusedLinearDPOLoss))
def test_modules_at_construction(module):
    function = module.__name__
    tables = base()["fused_dpo_loss" if module is dk.FusedDPOLoss else "fused_linear_dpo_loss"][2]
    per_batch = {
        "logits",
        "labels",
        "hidden",
        "weight",
        "bias",
        "lora",
        "ref_logps",
        "ref_logits",
        "ref_hidden",
        "ref_weight",
        "ref_bias",
        "cu_seqlens",
        "scored_lengths",
    }
    found = []
    for name, values in tables.items():
        if name in per_batch:
            continue
        for bad in (*values, *NEVER):
            if isinstance(bad, torch.Tensor) and name in dk.losses.PER_PAIR:
                continue
            found.append(refused(function, module, {}, name, bad))
    assert not any(found), "\n".join(f for f in found if f)
    for options, words in (
        ({"temprature": 2.0}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"logits": torch.ones(1)}, "unknown option 'logits'"),
        ({"temperature": -1}, "temperature must be a positive"),
        ({"loss_type": "odpo", "label_smoothing": 9.0}, "label_smoothing=9.0 has no meaning"),
        ({"beta": -torch.ones(2)}, "beta must be positive"),
    ):
        with pytest.raises((ValueError, TypeError), match=re.escape(words)):
            module(**options)


def at_random(rng, values):
    """One of the bad values, or one like it with numbers of its own."""
    bad = rng.choice(values)
    if isinstance(bad, torch.Tensor) and bad.dtype.is_floating_point and bad.numel():
        shape = [n + rng.randint(1, 3) for n in bad.shape]
        return rng.choice((bad, torch.rand(shape).to(bad.dtype), torch.rand(shape).long()))
    if isinstance(bad, str):
        return bad + "".join(rng.choice("abz _") for _ in range(rng.randint(0, 4))) + "~"
    return bad


def test_two_thousand_wrong_calls():
    rng = random.Random(20)
    found, calls = [], base()
    for _ in range(2000):
        where = rng.choice(list(calls))
        function, arguments, table = calls[where]
        name = rng.choice(list(table))
        found.append(
            refused(where, function, arguments, name, at_random(rng, (*table[name], *NEVER)))
        )
    assert not any(found), "\n".join(f for f in found if f)
