"""Compute `cases.json.gz`: DPO losses as the peers' own code computes them.

Run it in an environment of its own, with torch first so that no accelerator build is drawn in:

    python -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/pip install trl==1.16.0 liger-kernel==0.8.5 peft
    peers/bin/python tests/peers/make_cases.py

Nothing of this package is imported. What is called, by the `peer` field of a case:

trl         DPOTrainer._compute_loss (and compute_ref_log_probs for precomputed references) in
            float64, on a stand-in model that returns per-token log-probs of given logits.
trl-head    the same through TRL's fused LM head on given hidden states; the head is float32 inside.
trl-cpo     CPOTrainer.get_batch_loss_metrics on given logits, float64 (cpo, simpo, alphapo).
trl-orpo    ORPOTrainer.get_batch_loss_metrics on given logits (odds ratio in float32 inside).
liger       LigerFusedLinear{DPO,CPO,SimPO,ORPO}Loss on given hidden states, float32 inside.

Gradients are of the loss with respect to logits, hidden states, weight and bias, stored as random
projections (`peer_recipes.probe`); a few also in full.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import tempfile
import types
import warnings
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_recipes import build, probe, save
from trl_stand_ins import HiddenModel, LogitsModel, Trl

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

RPO = ["sigmoid", "sft"]
MPO = ["sigmoid", "bco_pair", "sft"]
PAIR = ["sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero"]
PAIR += ["apo_down", "discopop", "sigmoid_norm", "exo_pair"]
TRL = [*PAIR, "aot", "aot_unpaired", "sft"]
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
F_LOSSES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]

RECIPES: dict[str, dict[str, Any]] = {
    # pairs, T, V: size; real[row]: non-padding span; spans[row]: scored positions
    "padded": dict(
        seed=1,
        pairs=4,
        T=14,
        V=37,
        scale=2.0,
        ref_noise=0.7,
        real=[[0, 14], [0, 9], [0, 12], [0, 6], [0, 10], [0, 14], [0, 7], [0, 13]],
        spans=[[[4, 14]], [[3, 9]], [[5, 12]], [[2, 6]], [[4, 10]], [[3, 14]], [[5, 7]], [[2, 13]]],
    ),
    "left_padded": dict(
        seed=2,
        pairs=3,
        T=12,
        V=41,
        scale=1.5,
        ref_noise=0.5,
        real=[[0, 12], [5, 12], [2, 12], [4, 12], [1, 12], [6, 12]],
        spans=[[[3, 12]], [[8, 12]], [[5, 12]], [[6, 12]], [[2, 12]], [[11, 12]]],
    ),
    "one_empty": dict(
        seed=3,
        pairs=3,
        T=10,
        V=37,
        scale=2.0,
        ref_noise=0.6,
        real=[[0, 10], [0, 5], [0, 8], [0, 9], [0, 10], [0, 4]],
        spans=[[[2, 10]], [], [[3, 8]], [[2, 9]], [[4, 10]], []],
    ),
    "extreme": dict(
        seed=4,
        pairs=4,
        T=26,
        V=37,
        scale=40.0,
        ref_noise=45.0,
        real=[[0, 26]] * 8,
        spans=[
            [[2, 26]],
            [[4, 20]],
            [[3, 25]],
            [[1, 22]],
            [[2, 24]],
            [[4, 26]],
            [[3, 9]],
            [[1, 26]],
        ],
    ),
    "extreme_low": dict(  # a reference far flatter than the policy: log-ratios down to -1000
        seed=14,
        pairs=4,
        T=26,
        V=37,
        scale=40.0,
        ref_noise=1.0,
        ref_scale=0.2,
        real=[[0, 26]] * 8,
        spans=[
            [[2, 26]],
            [[4, 20]],
            [[23, 25]],
            [[1, 22]],
            [[21, 24]],
            [[4, 26]],
            [[3, 9]],
            [[1, 26]],
        ],
    ),
    "equal": dict(
        seed=5,
        pairs=3,
        T=9,
        V=37,
        scale=2.0,
        ref_noise=0.0,
        real=[[0, 9]] * 6,
        spans=[[[2, 9]], [[3, 8]], [[1, 9]], [[2, 6]], [[3, 9]], [[1, 5]]],
    ),
    "turns": dict(  # several answers in one conversation: holes in the mask
        seed=6,
        pairs=3,
        T=16,
        V=64,
        scale=2.0,
        ref_noise=0.8,
        real=[[0, 16], [0, 13], [0, 15], [0, 16], [0, 11], [0, 14]],
        spans=[
            [[3, 6], [9, 16]],
            [[2, 5], [8, 13]],
            [[4, 8], [12, 15]],
            [[3, 9], [11, 12]],
            [[2, 5]],
            [[4, 6], [8, 14]],
        ],
    ),
    "single": dict(
        seed=7,
        pairs=1,
        T=8,
        V=37,
        scale=3.0,
        ref_noise=1.0,
        real=[[0, 8], [0, 6]],
        spans=[[[1, 8]], [[1, 6]]],
    ),
    "long": dict(
        seed=8,
        pairs=2,
        T=96,
        V=48,
        scale=2.5,
        ref_noise=0.4,
        real=[[0, 96], [0, 40], [0, 31], [0, 96]],
        spans=[[[11, 96]], [[7, 40]], [[11, 31]], [[7, 96]]],
    ),
    "whole": dict(  # a prompt of one token, so that ORPO's NLL, which includes it, is ours
        seed=9,
        pairs=3,
        T=11,
        V=37,
        scale=2.0,
        ref_noise=0.5,
        real=[[0, 11], [0, 7], [0, 10], [0, 9], [0, 11], [0, 5]],
        spans=[[[1, 11]], [[1, 7]], [[1, 10]], [[1, 9]], [[1, 11]], [[1, 5]]],
    ),
    "hidden": dict(
        seed=10,
        pairs=3,
        T=12,
        V=53,
        H=16,
        scale=2.0,
        ref_noise=0.3,
        real=[[0, 12], [0, 9], [0, 11], [0, 8], [0, 12], [0, 7]],
        spans=[[[3, 12]], [[2, 9]], [[4, 11]], [[3, 8]], [[2, 12]], [[4, 7]]],
    ),
}


def leaf(array: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(array).to(dtype).requires_grad_()


def grads_of(loss: torch.Tensor, leaves: dict[str, torch.Tensor], full: bool) -> dict[str, Any]:
    """Projections of the gradients (and the whole of them if `full`), with their largest entry."""
    got = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    out: dict[str, Any] = {}
    for name, x, g in zip(leaves, leaves.values(), got, strict=True):
        g = (torch.zeros_like(x) if g is None else g).double().numpy()
        out[name] = {"probe": probe(g), "max": float(np.abs(g).max())}
        if full:
            out[name]["full"] = g.ravel().tolist()
    return out


def expectation(got: dict[str, Any], leaves, full: bool) -> dict[str, Any]:
    """What a case stores of TRL's DPO result."""
    parts = torch.autograd.grad(got["loss"], got["logps"], retain_graph=True, allow_unused=True)
    dlogps = [
        torch.zeros_like(x) if g is None else g for x, g in zip(got["logps"], parts, strict=True)
    ]
    return {
        "loss": got["loss"].item(),
        "logps": torch.cat(got["logps"]).tolist(),
        "rewards": got["rewards"].tolist(),
        "ref_logps": got["ref_logps"].tolist(),
        "dlogps": torch.cat(dlogps).tolist(),
        "grads": grads_of(got["loss"], leaves, full),
    }


def trl_grid() -> list[tuple[str, dict[str, Any], str]]:
    """(recipe, options, "logits" or "logps") of every float64 TRL case."""
    grid: list[tuple[str, dict[str, Any], str]] = []

    def add(recipe: str, *, ref: str = "logits", **options: Any) -> None:
        names = options["loss_type"]
        names = [names] if isinstance(names, str) else names
        if "exo_pair" in names:
            options.setdefault("label_smoothing", 1e-3)
        grid.append((recipe, options, ref))

    shapes = ["padded", "left_padded", "one_empty", "extreme", "equal", "turns", "single"]
    shapes += ["extreme_low"]
    for recipe, name, beta in product(shapes, TRL, (0.05, 0.1, 0.5)):
        if beta == 0.1 or recipe in ("padded", "extreme"):
            add(recipe, loss_type=name, beta=beta)
    for name, e, recipe in product(SMOOTHED, (0.1, 0.3), ("padded", "extreme")):
        add(recipe, loss_type=name, label_smoothing=e)
    for name, recipe in product(F_LOSSES, ("padded", "turns")):
        for div in ("forward_kl", "js_divergence"):
            add(recipe, loss_type=name, f_divergence_type=div)
        for coef in (0.5, 1.0) if recipe == "padded" else (0.2, 1.5):
            add(
                recipe,
                loss_type=name,
                f_divergence_type="alpha_divergence",
                f_alpha_divergence_coef=coef,
            )
    for name, div in product(F_LOSSES, ("forward_kl", "js_divergence")):
        add("extreme", loss_type=name, f_divergence_type=div, beta=0.5)
        add("extreme_low", loss_type=name, f_divergence_type=div)
    add("padded", loss_type="robust", f_divergence_type="js_divergence", label_smoothing=0.2)
    for name, (recipe, alpha) in product(
        TRL, (("padded", 0.5), ("turns", 0.3), ("one_empty", 0.5), ("long", 0.0), ("padded", 1.0))
    ):
        add(recipe, loss_type=name, ld_alpha=alpha)
    for name in ("sigmoid", "ipo", "apo_zero", "aot"):
        add("padded", loss_type=name, ld_alpha=0.5, ref="logps")
    for name, recipe in product([*PAIR, "sft"], ("padded", "one_empty", "long")):
        add(recipe, loss_type=name, use_weighting=True)
    add("turns", loss_type="sigmoid", use_weighting=True, ld_alpha=0.4, beta=0.3)
    add("padded", loss_type="ipo", use_weighting=True, ld_alpha=0.4, ref="logps")
    add("padded", loss_type="sigmoid", use_weighting=True, f_divergence_type="js_divergence")
    for recipe in ("padded", "one_empty", "long"):
        add(recipe, loss_type=RPO)
        add(recipe, loss_type=RPO, loss_weights=[1.0, 0.3], beta=0.5)
        add(recipe, loss_type=MPO, loss_weights=[0.8, 0.2, 1.0])
        add(recipe, loss_type=MPO, loss_weights=[0.8, 0.2, 1.0], ld_alpha=0.5)
        add(recipe, loss_type=["ipo", "sppo_hard", "nca_pair"], loss_weights=[0.5, 0.01, 2.0])
        add(recipe, loss_type=["aot", "aot_unpaired"], label_smoothing=0.1)
        add(recipe, loss_type=["robust", "exo_pair"], label_smoothing=0.1, loss_weights=[1.0, 0.5])
        add(recipe, loss_type=["apo_zero", "sigmoid"], use_weighting=True, loss_weights=[1.0, 0.5])
        add(recipe, loss_type=["sigmoid", "ipo"], f_divergence_type="js_divergence")
    for recipe, name in product(("padded", "turns"), ("sigmoid_norm",)):
        for beta in (2.0, 5.0):
            add(recipe, loss_type=name, beta=beta)
    for tau in (0.01, 0.5):
        add("padded", loss_type="discopop", discopop_tau=tau)
    for name in TRL:
        add("turns", loss_type=name, beta=0.2, ref="logps")
        add("long", loss_type=name, beta=0.1)
    return grid


def make_trl(trl: Trl) -> tuple[list[dict], list[dict]]:
    cases, left_out = [], []
    for index, (recipe, options, ref) in enumerate(trl_grid()):
        arrays = build(RECIPES[recipe])
        # TRL's alpha-divergence knows no float64 (its clamp table has three dtypes): the log-probs
        # are rounded to float32 there and the case says so.
        alpha = options.get("f_divergence_type") == "alpha_divergence"
        single = alpha and abs(options["f_alpha_divergence_coef"] - 1) > 1e-6
        case = {
            "peer": "trl",
            "recipe": recipe,
            "ref": ref,
            "options": options,
            "precision": "float32" if single else "float64",
        }
        cast = torch.float32 if single else torch.float64
        results = {}
        try:
            for dtype in (torch.float64, torch.float32):
                logits = leaf(arrays["logits"], dtype)
                ref_logits = leaf(arrays["ref_logits"], dtype).detach()
                policy = LogitsModel(logits, min(cast, dtype, key=lambda d: d.itemsize))
                refm = LogitsModel(ref_logits, policy.cast)
                got = trl.loss(options, policy, refm, arrays, ref == "logps")
                results[dtype] = expectation(got, {"logits": logits}, full=index % 60 == 0)
        except RuntimeError as error:
            left_out.append(case | {"reason": f"TRL raises: {str(error).splitlines()[0][:160]}"})
            continue
        expect = results[torch.float64]
        if not finite(expect):
            left_out.append(case | {"reason": "TRL's loss or gradient is not finite"})
            continue
        expect["float32_ok"] = close32(results[torch.float32], expect)
        cases.append(case | {"expect": expect})
    return cases, left_out


def finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return math.isfinite(value)


def close32(single: dict[str, Any], double: dict[str, Any]) -> bool:
    """Whether TRL's own float32 arithmetic comes near its float64 result on this input."""
    g1, g2 = single["grads"]["logits"], double["grads"]["logits"]
    near = abs(single["loss"] - double["loss"]) <= 1e-3 * max(1, abs(double["loss"]))
    return finite(single) and near and abs(g1["max"] - g2["max"]) <= 1e-3 * max(1e-6, g2["max"])


def make_head(trl: Trl) -> list[dict]:
    """TRL's fused LM head end to end, with the logit transforms it knows."""
    grid: list[tuple[dict, dict, bool]] = []
    for name in TRL:
        e = {"label_smoothing": 0.1} if name in SMOOTHED else {}
        grid.append(({"loss_type": name, **e}, {}, False))
    heads = [
        {"logit_softcap": 3.0},
        {"logit_scale": 0.25},
        {"temperature": 1.7},
        {"logit_softcap": 2.0, "logit_scale": 0.5, "temperature": 0.8},
    ]
    for head, bias in product(heads, (False, True)):
        grid.append(({"loss_type": "sigmoid"}, head, bias))
        grid.append(({"loss_type": RPO, "use_weighting": False}, head, bias))
    grid.append(({"loss_type": "sigmoid", "use_weighting": True, "ld_alpha": 0.5}, heads[3], True))
    grid.append(({"loss_type": "ipo", "use_weighting": True}, {}, True))
    cases = []
    for options, head, with_bias in grid:
        a = build(RECIPES["hidden"])
        leaves = {k: leaf(a[k], torch.float32) for k in ("hidden", "weight", "bias")}
        if not with_bias:
            del leaves["bias"]
        policy = HiddenModel(leaves["hidden"], leaves["weight"], leaves.get("bias"), head)
        ref_bias = torch.from_numpy(a["ref_bias"]) if with_bias else None
        refs = [torch.from_numpy(a[k]) for k in ("ref_hidden", "ref_weight")]
        got = trl.loss(options, policy, HiddenModel(*refs, ref_bias, head), a, False)
        expect = expectation(got, leaves, full=False)
        if head or with_bias:
            stats = policy(labels=torch.from_numpy(a["labels"]), fused_lm_head=True)
            names = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
            expect["stats"] = {k: getattr(stats, k).double().tolist() for k in names}
        cases.append(
            {
                "peer": "trl-head",
                "recipe": "hidden",
                "options": options,
                "head": head,
                "bias": with_bias,
                "precision": "float32",
                "expect": expect,
            }
        )
    return cases


def make_cpo() -> list[dict]:
    """TRL's experimental CPO and ORPO trainers, without their construction."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    device = types.SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x)

    def bare(kind: type, **settings: Any) -> Any:
        trainer = kind.__new__(kind)
        common = dict(is_encoder_decoder=False, aux_loss_enabled=False, accelerator=device)
        trainer.__dict__.update(common, pad_token_id=0, padding_value=0, **settings)
        return trainer

    grid: list[tuple[str, str, dict[str, Any], Any]] = []
    recipes = ("padded", "whole", "turns", "long")
    for recipe, beta, e in product(recipes, (0.1, 2.0), (0.0, 0.1)):
        common = {"beta": beta, "label_smoothing": e}
        smooth = {"label_smoothing": e} if e else {}
        for nll in (1.0, 0.3):
            trainer = bare(CPOTrainer, loss_type="sigmoid", alpha=0.0, cpo_alpha=nll, **common)
            grid.append((recipe, "cpo", {"beta": beta, "cpo_alpha": nll, **smooth}, trainer))
        for gamma in (0.5, 1.2):
            own = {"beta": beta, "simpo_gamma": gamma}
            trainer = bare(
                CPOTrainer, loss_type="simpo", alpha=0.0, cpo_alpha=0, simpo_gamma=gamma, **common
            )
            grid.append((recipe, "simpo", own | smooth, trainer))
            if e == 0:
                for alpha in (0.25, -0.3):
                    trainer = bare(
                        CPOTrainer,
                        loss_type="simpo",
                        alpha=alpha,
                        cpo_alpha=0,
                        simpo_gamma=gamma,
                        **common,
                    )
                    grid.append((recipe, "alphapo", own | {"alphapo_alpha": alpha}, trainer))
    for beta in (0.1, 0.5):  # ORPO's NLL covers the prompt too: only where the two coincide
        grid.append(("whole", "orpo", {"beta": beta}, bare(ORPOTrainer, beta=beta)))

    cases = []
    for recipe, name, options, trainer in grid:
        a = build(RECIPES[recipe])
        logits = leaf(a["logits"])
        batch = {}
        for key, own in (
            ("input_ids", "ids"),
            ("labels", "labels"),
            ("attention_mask", "attention"),
        ):
            chosen, rejected = torch.from_numpy(a[own]).chunk(2)
            batch |= {f"chosen_{key}": chosen, f"rejected_{key}": rejected}
        rewards: list[torch.Tensor] = []
        method = "odds_ratio_loss" if name == "orpo" else "cpo_loss"
        original = getattr(trainer, method)

        def spy(*args: Any, original: Any = original, rewards: Any = rewards) -> Any:
            out = original(*args)
            rewards.extend(out[1:3])
            return out

        setattr(trainer, method, spy)
        model = lambda *_, x=logits, **__: types.SimpleNamespace(logits=x)  # noqa: E731
        loss, _ = trainer.get_batch_loss_metrics(model, batch)
        expect = {
            "loss": loss.item(),
            "rewards": torch.cat(rewards).tolist(),
            "grads": grads_of(loss, {"logits": logits}, full=False),
        }
        cases.append(
            {
                "peer": "trl-orpo" if name == "orpo" else "trl-cpo",
                "recipe": recipe,
                "options": {"loss_type": name, **options},
                "expect": expect,
                "precision": "float32" if name == "orpo" else "float64",
            }
        )
    return cases


def make_liger() -> list[dict]:
    from liger_kernel.chunked_loss import (
        LigerFusedLinearCPOLoss,
        LigerFusedLinearDPOLoss,
        LigerFusedLinearORPOLoss,
        LigerFusedLinearSimPOLoss,
    )

    types_ = ["sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
    types_ += ["apo_zero", "apo_down", "discopop"]
    grid: list[tuple[dict[str, Any], Any, bool]] = []
    for name, beta, use_ref in product(types_, (0.1, 0.5), (True, False)):
        e = {"label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
        loss = LigerFusedLinearDPOLoss(
            beta=beta, loss_type=name, use_ref_model=use_ref, compiled=False, **e
        )
        own = {} if use_ref else {"reference_free": True}
        grid.append(({"loss_type": name, "beta": beta, **e, **own}, loss, use_ref))
    loss = LigerFusedLinearDPOLoss(beta=0.1, compute_nll_loss=True, alpha=0.7, compiled=False)
    grid.append(({"loss_type": "sigmoid", "sft_weight": 0.7}, loss, True))
    for beta, e in product((0.1, 2.0), (0.0, 0.2)):
        smooth = {"label_smoothing": e} if e else {}
        loss = LigerFusedLinearCPOLoss(beta=beta, alpha=0.5, label_smoothing=e, compiled=False)
        grid.append(({"loss_type": "cpo", "beta": beta, "cpo_alpha": 0.5, **smooth}, loss, False))
        loss = LigerFusedLinearSimPOLoss(
            beta=beta, gamma=0.7, label_smoothing=e, compute_nll_loss=False, compiled=False
        )
        own = {"beta": beta, "simpo_gamma": 0.7, **smooth}
        grid.append(({"loss_type": "simpo", **own}, loss, False))
    for beta in (0.1, 0.5):
        loss = LigerFusedLinearORPOLoss(beta=beta, compiled=False)
        grid.append(({"loss_type": "orpo", "beta": beta}, loss, False))

    cases = []
    for options, loss_module, use_ref in grid:
        a = build(RECIPES["hidden"])
        leaves = {k: leaf(a[k], torch.float32) for k in ("hidden", "weight", "bias")}
        extra = {}
        if use_ref:
            names = {"ref_input": "ref_hidden", "ref_weight": "ref_weight", "ref_bias": "ref_bias"}
            extra = {k: torch.from_numpy(a[v]) for k, v in names.items()}
        # Liger does not shift: position t scores target t
        target = torch.from_numpy(a["labels"])
        loss, aux = loss_module(leaves["weight"], leaves["hidden"], target, leaves["bias"], **extra)
        expect = {"loss": loss.item(), "grads": grads_of(loss, leaves, full=False)}
        if options["loss_type"] not in ("cpo", "simpo", "orpo"):
            expect["logps"] = torch.cat(aux[:2]).tolist()
        expect["rewards"] = torch.cat(aux[5:7]).tolist()
        cases.append(
            {
                "peer": "liger",
                "recipe": "hidden",
                "options": options,
                "bias": True,
                "reference": use_ref,
                "precision": "float32",
                "expect": expect,
            }
        )
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("cases.json.gz"))
    out = parser.parse_args().out
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trl(folder)
        heads = make_head(trainer)
        liger = make_liger()
        # exo_pair makes its epsilon a tensor of the default dtype: float32 would round it
        torch.set_default_dtype(torch.float64)
        cases, left_out = make_trl(trainer)
        cases += make_cpo()
    torch.set_default_dtype(torch.float32)
    versions = {name: version(name) for name in ("trl", "liger-kernel", "torch", "transformers")}
    cases += heads + liger
    for number, case in enumerate(cases):
        case["id"] = f"{number:03d}"
    save(out, {"versions": versions, "recipes": RECIPES, "cases": cases, "left_out": left_out})
    print(f"{len(cases)} cases, {len(left_out)} left out, {out.stat().st_size} bytes")
    for case in left_out:
        print("left out:", case["recipe"], case["options"], "-", case["reason"])


if __name__ == "__main__":
    main()
