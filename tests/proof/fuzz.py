"""Calls drawn at random, held to a float64 oracle that shares no code with the package.

    python tests/proof/fuzz.py --calls 30000 --seed 1        what `make check-full` runs

The oracle is LOSSES.md's formulas in plain torch, over full distributions. A call is drawn from a
seed of its own, so that one that fails is run again by `--only SEED`.
"""

import argparse
import random
import sys
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracle import (
    DEFAULTS,
    DIVERGENT,
    FREE,
    IGNORE,
    KL,
    NAMES,
    OWN,
    SHIFTED,
    SMOOTHED,
    SORTED,
    WIDE,
    distributions,
    ld_sums,
    oracle_loss,
    sequences,
    token_values,
)

import dpo_kernels as dk
from dpo_kernels.ops.products import products_of

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw_options(r, g, B, by_token, kl_possible):
    count = r.choice((1, 1, 1, 2, 3))
    pool = [n for n in NAMES if kl_possible or n not in KL]
    names = r.sample(pool, count)
    if r.random() < 0.4:
        names = [n for n in names if n in SHIFTED] or [r.choice(sorted(SHIFTED))]
    o = {
        "names": names,
        "loss_weights": [1.0] * len(names),
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "sft_weight": 0.0,
        "reduction": "mean",
        "num_pairs": None,
        "num_chosen_tokens": None,
        "ld_alpha": None,
        "use_weighting": False,
    }
    if len(names) > 1 or r.random() < 0.2:
        o["loss_weights"] = [round(r.uniform(-0.5, 1.5), 2) for _ in names]
    smoothed = [n for n in names if n in SMOOTHED]
    if "exo_pair" in names or (smoothed and r.random() < 0.5):
        o["label_smoothing"] = round(r.uniform(0.01, 0.45), 2)
    if all(n in DIVERGENT for n in names) and r.random() < 0.5:
        o["f_divergence_type"] = r.choice(("forward_kl", "js_divergence", "alpha_divergence"))
        o["f_alpha_divergence_coef"] = r.choice((0.5, 0.3, 2.0))
    for name in names:
        o |= {k: v for k, v in OWN.get(name, {}).items() if r.random() < 0.5}
    if r.random() < 0.3:
        o["sft_weight"] = round(r.uniform(-0.3, 1), 2)
    if r.random() < 0.3:
        o["reduction"] = "none"
    if r.random() < 0.2:
        o["num_pairs"] = r.choice((B + 1, 2.5 * B))
    if r.random() < 0.2:
        o["num_chosen_tokens"] = r.choice((7, 12.0))
    if by_token and not set(names) & KL and r.random() < 0.3:
        o["ld_alpha"] = r.choice((0.0, 0.5, 1.0, 1.5))
    if by_token and not set(names) & SORTED and r.random() < 0.2:
        o["use_weighting"] = True
    leaves = {}
    if r.random() < 0.4:
        leaves["beta"] = (
            torch.rand(B, generator=g) + 0.05
            if r.random() < 0.7
            else torch.tensor(r.uniform(0.05, 1))
        )
    o["beta"] = round(r.uniform(0.05, 1.0), 2)
    if r.random() < 0.4:
        leaves["weights"] = torch.rand(B, generator=g) * (torch.rand(B, generator=g) > 0.3)
    offset = all(n in SHIFTED for n in names) and (names != ["sft"])
    if offset and ("odpo" in names or r.random() < 0.3):
        leaves["offset"] = torch.randn(B, generator=g)
    elif "odpo" in names:
        at = [n for n in names if n in SHIFTED]
        o["names"], o["loss_weights"] = at, o["loss_weights"][: len(at)]
        o["f_divergence_type"] = (
            "reverse_kl" if any(n not in DIVERGENT for n in at) else (o["f_divergence_type"])
        )
        if not set(at) & SMOOTHED:
            o["label_smoothing"] = 0.0
        o = {
            k: v for k, v in o.items() if k not in DEFAULTS or any(k in OWN.get(n, {}) for n in at)
        }
        leaves["offset"] = torch.randn(B, generator=g)
    return o, leaves


def draw_labels(r, g, S, T, V):
    y = torch.randint(0, V, (S, T), generator=g)
    for s in range(S):
        y[s, : r.randint(0, T // 2 + 1)] = IGNORE
        if r.random() < 0.4:
            y[s, r.randint(1, T) :] = IGNORE
        if r.random() < 0.2:
            y[s, r.randint(0, T - 1)] = IGNORE
    return y


def call_options(o, leaves):
    """As the package takes them."""
    given = {k: v for k, v in o.items() if k not in ("names", "beta")}
    given = {k: v for k, v in given.items() if v is not None and v is not False}
    if o["f_divergence_type"] != "alpha_divergence":
        del given["f_alpha_divergence_coef"]
    given["loss_type"] = o["names"] if len(o["names"]) > 1 else o["names"][0]
    given["beta"] = o["beta"]
    if "beta_dpo" in o["names"]:
        given["beta_dpo_keep"] = 1.0
    return given | leaves


def oracle_options(o, leaves, B):
    zero, one = torch.zeros(B, dtype=WIDE), torch.ones(B, dtype=WIDE)
    return {
        **o,
        "offset": leaves.get("offset", zero),
        "weights": leaves.get("weights", one),
        "beta": leaves.get("beta", torch.tensor(o["beta"], dtype=WIDE)),
    }


def leaf(x, wide):
    return x.detach().to(WIDE if wide else x.dtype).clone().requires_grad_()


def close(what, got, want, dtype, tolerance, least=0.1):
    got, want = got.detach().to(WIDE), want.detach().to(WIDE)
    size = want.abs().max().item() if want.numel() else 0.0
    if not size < min(1e30, torch.finfo(dtype).max / 4):
        return  # what overflows is the business of other tests
    limit = tolerance * max(size, least) + 2 * torch.finfo(dtype).eps * want.abs()
    limit = limit + (6e-8 if dtype == torch.float16 else 0)
    bad = ~((got - want).abs() <= limit)
    if got.shape != want.shape or bool(bad.any()):
        raise AssertionError(f"{what}: {(got - want).abs().max():.3g} of {size:.3g}")


def compare(out, loss, rewards, leaves, wide_leaves, tolerance, least=1e-2):
    names = list(leaves)
    close("loss", out.loss, loss, torch.float32, tolerance)
    for field, want in rewards.items():
        close(field, getattr(out, field), want, torch.float32, tolerance)
    if not loss.requires_grad or not out.loss.requires_grad:
        return
    probe = torch.linspace(0.5, 1.5, loss.numel(), dtype=WIDE).view(loss.shape)
    mine = torch.autograd.grad(
        (out.loss.to(WIDE) * probe).sum(), list(leaves.values()), allow_unused=True
    )
    right = torch.autograd.grad((loss * probe).sum(), list(wide_leaves.values()), allow_unused=True)
    for name, x, a, b in zip(names, leaves.values(), mine, right, strict=True):
        zero = torch.zeros(x.shape, dtype=WIDE)
        a, b = zero if a is None else a, zero if b is None else b
        close(f"d {name}", a, b, x.dtype, 5 * tolerance, least)


def one(seed, backend):
    """One call; AssertionError where it is not what the oracle says."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    small = backend in ("triton", "cuda")
    B, T = r.randint(1, 2 if small else 4), r.randint(2, 4 if small else 7)
    V = r.choice((3, 9) if small else (2, 5, 17, 70))
    kind = r.choice(("logits", "logits", "linear", "linear", "linear", "preference", "tokens"))
    run = {"logits": pairs, "linear": pairs, "preference": preference, "tokens": tokens}[kind]
    run(r, g, backend, B, T, V, kind == "linear" or (kind == "tokens" and r.random() < 0.5))


def preference(r, g, backend, B, T, V, _):
    o, options = draw_options(r, g, B, False, False)
    reference = any(n not in FREE for n in o["names"]) and r.random() < 0.7
    names = ["chosen_logps", "rejected_logps"]
    x = {n: -torch.rand(B, generator=g) * 12 for n in names}
    ref = {f"ref_{n}": x[n] + torch.randn(B, generator=g) for n in names} if reference else {}
    counts = [torch.randint(1, 9, (B,), generator=g) for _ in "wl"]
    mine = {k: leaf(v, False) for k, v in (x | options).items()}
    wide = {k: leaf(v, True) for k, v in (x | options).items()}
    out = dk.preference_loss(
        mine["chosen_logps"],
        mine["rejected_logps"],
        **ref,
        chosen_lengths=counts[0],
        rejected_lengths=counts[1],
        backend=backend,
        **call_options(o, {k: mine[k] for k in options}),
    )
    rw, rl = (t.to(WIDE) for t in ref.values()) if reference else (None, None)
    w, l = wide["chosen_logps"], wide["rejected_logps"]
    loss, r_w, r_l = oracle_loss(oracle_options(o, wide, B), w, l, rw, rl, counts, w)
    compare(out, loss, {"chosen_rewards": r_w, "rejected_rewards": r_l}, mine, wide, 2e-5)


def draw_dtype(r, backend):
    wide = backend == "torch" and r.random() < 0.2
    return WIDE if wide else r.choice((torch.float32, *DTYPES))


def scene(r, g, B, T, V, linear, dtype):
    """Tensors of a batch, padded or packed: given to the package, and as [S, T, ...]."""
    S, shift = 2 * B, r.random() < 0.6
    y = draw_labels(r, g, S, T, V)
    packed = r.random() < 0.4
    lengths = [r.randint(0, T) for _ in range(S)] if packed else [T] * S
    H, R = r.choice((1, 4, 9)), 2

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, generator=g) * scale).to(dtype)

    tensors = (
        {"hidden": randn(S, T, H), "weight": randn(V, H)}
        if linear
        else {"logits": randn(S, T, V, scale=r.choice((0.3, 3.0)))}
    )
    if linear and r.random() < 0.4:
        tensors["bias"] = randn(V)
    if linear and r.random() < 0.3:
        tensors |= {"down": randn(R, H), "up": randn(V, R)}
    t = {
        "temperature": r.choice((1.0, 0.7, 2.0)),
        "logit_softcap": r.choice((None, None, 4.0)),
        "logit_scale": r.choice((1.0, 0.5, -1.2)),
    }

    def pack(x):
        return torch.cat([x[s, :n] for s, n in enumerate(lengths)]) if packed else x

    where = {"labels": pack(y), "shift": shift}
    if packed:
        where["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    return tensors, t, sequences(y, lengths, shift), where, pack


def oracle_logits(x):
    if "logits" in x:
        return x["logits"]
    weight = x["weight"]
    if "down" in x:
        weight = weight + 0.5 * x["up"] @ x["down"]
    z = x["hidden"] @ weight.T
    return z if x.get("bias") is None else z + x["bias"]


def head(x, pack):
    """Arguments of the package from tensors by name."""
    given = {
        k: pack(v) if k in ("hidden", "logits") else v
        for k, v in x.items()
        if k not in ("down", "up")
    }
    return given | ({"lora": (x["down"], x["up"], 0.5)} if "down" in x else {})


def pairs(r, g, backend, B, T, V, linear):
    dtype = draw_dtype(r, backend)
    tensors, t, scored, where, pack = scene(r, g, B, T, V, linear, dtype)
    o, options = draw_options(r, g, B, True, backend != "cuda")
    kinds = ["own"] * 2 if set(o["names"]) & KL else ["own", "sums", "tokens", "free"]
    kind = r.choice(kinds)
    main = "hidden" if linear else "logits"
    ref = tensors[main] + (torch.randn(tensors[main].shape, generator=g) * 0.3).to(dtype)
    wide = {k: leaf(v, True) for k, v in (tensors | options).items()}
    mine = {k: leaf(v, False) for k, v in (tensors | options).items()}
    ref_x = {k: v for k, v in tensors.items() if k in ("weight", "bias")} | {main: ref}
    _, ref_logp = distributions(oracle_logits({k: v.to(WIDE) for k, v in ref_x.items()}), t)
    ref_values = token_values(ref_logp, scored)
    given = {}
    if kind == "own":
        given[f"ref_{main}"] = pack(ref)
    elif kind == "sums":
        given["ref_logps"] = ld_sums(ref_values, o["ld_alpha"]).float()
        given["ref_logps_per_token"] = False
    elif kind == "tokens":
        shift = where["shift"]
        rows = torch.zeros(2 * B, T, dtype=WIDE)
        for s, found in enumerate(scored):
            for (p, _), value in zip(found, ref_values[s], strict=True):
                rows[s, p] = value
        given["ref_logps"] = (
            pack(rows.float())
            if "cu_seqlens" in where
            else (rows[:, : T - 1].float() if shift else rows.float())
        )
        given["ref_logps_per_token"] = True
    else:
        given["reference_free"] = True
    call = {
        **where,
        **given,
        **t,
        "backend": backend,
        **call_options(o, {k: mine[k] for k in options}),
    }
    x = head({k: mine[k] for k in tensors}, pack)
    if linear:
        if backend != "torch":
            call["memory_budget"] = r.choice((None, None, 1, 20000))
            call["batch_invariant"] = r.random() < 0.2
            call["strategy"] = r.choice((None, None, "recompute"))
        out = dk.fused_linear_dpo_loss(**x, **call)
    else:
        if r.random() < 0.3:
            x["logits"], call["inplace"] = x["logits"] * 1, True
        out = dk.fused_dpo_loss(**x, **call)
    _, logp = distributions(oracle_logits(wide), t)
    values = token_values(logp, scored)
    sums, plain = ld_sums(values, o["ld_alpha"]), ld_sums(values, None)
    counts = torch.tensor([len(rows) for rows in scored]).chunk(2)
    rw = rl = kl = wpo = None
    if kind != "free":
        rw, rl = ld_sums(ref_values, o["ld_alpha"]).chunk(2)
    if set(o["names"]) & KL:
        each = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
        none = each.sum() * 0
        kl = torch.stack(
            [sum((each[s, p] for p, _ in rows), none) for s, rows in enumerate(scored)]
        ).chunk(2)
    if o["use_weighting"]:
        squares = torch.logsumexp(2 * logp.detach(), -1)
        aligned = [
            x.detach().sum() - sum(float(squares[s, p]) for p, _ in scored[s])
            for s, x in enumerate(values)
        ]
        mean = torch.stack(aligned) / torch.cat(counts).clamp(min=1)
        wpo = (mean[:B] + mean[B:]).exp()
    w, l = sums.chunk(2)
    loss, r_w, r_l = oracle_loss(
        oracle_options(o, wide, B), w, l, rw, rl, counts, plain[:B], wpo, kl
    )
    fields = {
        "chosen_logps": w,
        "rejected_logps": l,
        "chosen_rewards": r_w,
        "rejected_rewards": r_l,
    }
    # Where narrow operands are multiplied the gradient of a logit is rounded once: 2^-9 of each
    # term of a gradient's sum, and terms of about 0.1 may cancel.
    rounded = linear and dtype == torch.bfloat16 and products_of(CPU, dtype).narrow
    compare(
        out,
        loss,
        fields,
        mine,
        wide,
        5e-5 if dtype in (torch.float32, WIDE) or not linear else 4e-3,
        0.1 if rounded else 1e-2,
    )


def tokens(r, g, backend, B, T, V, linear):
    dtype = draw_dtype(r, backend)
    tensors, t, scored, where, pack = scene(r, g, B, T, V, linear, dtype)
    wide, mine = ({k: leaf(v, w) for k, v in tensors.items()} for w in (True, False))
    reduction = r.choice(("sum", "mean"))
    stats = r.sample(("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"), r.randint(0, 4))
    function = dk.linear_sequence_logps if linear else dk.sequence_logps
    out = function(
        **head(mine, pack), **where, **t, reduction=reduction, stats=stats, backend=backend
    )
    got, found = out if stats else (out, {})
    z, logp = distributions(oracle_logits(wide), t)
    values = token_values(logp, scored)
    want = torch.stack([x.sum() / (max(len(x), 1) if reduction == "mean" else 1) for x in values])
    compare(
        dk.DPOOutput(got, *[None] * 6),
        want,
        {},
        mine,
        wide,
        5e-5 if dtype in (torch.float32, WIDE) or not linear else 4e-3,
    )
    exact = {
        "entropy": -(logp.exp() * logp).sum(-1),
        "mean_logits": z.mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * logp, -1),
    }
    for name in set(stats) & set(exact):
        full = torch.zeros(exact[name].shape, dtype=WIDE)
        for s, rows in enumerate(scored):
            for p, _ in rows:
                full[s, p] = exact[name][s, p].detach()
        full = pack(full)
        if "cu_seqlens" not in where and where["shift"]:
            full = full[:, :-1]
        close(name, found[name], full, torch.float32, 5e-5)


def failures(calls, seed, backends, first_only=False):
    """What went wrong, a line a call: its seed and backend, and the error."""
    wrong = []
    for i in range(calls):
        backend = backends[i % len(backends)]
        try:
            one(seed * 1_000_000 + i, backend)
        except Exception as error:
            wrong.append(
                f"--only {seed * 1_000_000 + i} --backends {backend}: "
                f"{type(error).__name__}: {str(error)[:200]}"
            )
            if first_only:
                traceback.print_exc()
                break
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["torch", "cpu"])
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    if arguments.only is not None:
        one(arguments.only, arguments.backends[0])
        return 0
    wrong = failures(arguments.calls, arguments.seed, arguments.backends)
    print("\n".join(wrong[:40]))
    print(f"{arguments.calls} calls, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
