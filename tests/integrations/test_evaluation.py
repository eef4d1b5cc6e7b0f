"""Metrics of an evaluation are means over its pairs, and a checkpoint holds what training needs."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("accelerate", reason="pip install accelerate")

from test_transformers import arguments, examples, trainer

from dpo_kernels.integrations.plain import PreferenceCollator, dpo_step, reference_logps
from dpo_kernels.integrations.transformers import FusedDPOTrainer

LOSSES = ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "entropy", "logits/chosen")


def evaluated(folder, batch=8, data=None, prefix="eval", **options):
    """Metrics of a policy that is not its reference."""
    made = trainer(
        folder,
        ref_model=tiny.model(seed=1),
        per_device_eval_batch_size=batch,
        eval_dataset=examples(5) if data is None else data,
        **options,
    )
    return made.evaluate(metric_key_prefix=prefix)


def test_the_batch_size_does_not_matter(tmp_path):
    """OpenRLHF#1336, OpenRLHF#1332: the last batch of an evaluation is smaller."""
    whole, *parts = (evaluated(tmp_path, batch) for batch in (5, 1, 2, 3, 8))
    for part in parts:
        for name in LOSSES:
            assert part[f"eval_{name}"] == pytest.approx(whole[f"eval_{name}"], abs=1e-5), name
    alone = [evaluated(tmp_path, data=[e])["eval_rewards/margins"] for e in examples(5)]
    assert whole["eval_rewards/margins"] == pytest.approx(sum(alone) / 5, abs=1e-5)


SFT_TERMS = (
    {"sft_weight": 0.5},
    {"loss_type": "sft"},
    {"loss_type": "rpo", "rpo_alpha": 0.5},
    {"loss_type": "cpo"},
    {"loss_type": "orpo"},
    {"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0, 0.5)},
    {"sft_weight": 0.5, "ld_alpha": 0.5},
)


@pytest.mark.parametrize("options", SFT_TERMS, ids=str)
def test_an_sft_term_is_divided_by_the_tokens_of_all_batches(tmp_path, options):
    losses = [evaluated(tmp_path, b, loss_options=options)["eval_loss"] for b in (5, 1, 2, 3)]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    # one batch: the loss as the front functions have it
    made = trainer(tmp_path, ref_model=tiny.model(seed=1), loss_options=options)
    batch = PreferenceCollator(0)(examples(5))
    with torch.no_grad():
        one = whole_loss(made, batch, options)
    assert losses[0] == pytest.approx(float(one), abs=1e-5)


def whole_loss(made, batch, options):
    ref = None
    if options.get("loss_type") not in ("cpo", "orpo"):
        ref = reference_logps(made.ref_model, batch)
    return dpo_step(made.model.eval(), batch, ref_logps=ref, **options).loss


def nudged(n):
    """Examples whose reference is the policy but for rounding in the chosen's favour."""
    found = examples(n)
    batch = PreferenceCollator(0)(found)
    logps = reference_logps(tiny.model(), batch).sum(1)
    for i, example in enumerate(found):
        example["ref_chosen_logps"] = float(logps[i]) * (1 + 3e-7)
        example["ref_rejected_logps"] = float(logps[n + i])
    return found


def test_margins_of_rounding_are_ties(tmp_path):
    made = trainer(tmp_path, ref_model=None, eval_dataset=nudged(5))
    found = made.evaluate()
    assert found["eval_rewards/margins"] > 0 and found["eval_rewards/accuracies"] == 0
    assert evaluated(tmp_path)["eval_rewards/accuracies"] > 0


def test_margins_of_rounding_are_ties_under_lightning():
    found = lightning_run(nudged(5), 5, ref_model=None)
    assert found["eval_rewards/margins"] > 0 and found["eval_rewards/accuracies"] == 0


def test_names_follow_the_trainers(tmp_path):
    """transformers#19158, trl#5811: several sets, another prefix, predict()."""
    sets = {"a": examples(4), "b": examples(6, seed=1)}
    made = trainer(
        tmp_path,
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_b_rewards/margins",
    )
    made.train()
    rows = [r for r in made.state.log_history if "eval_b_rewards/margins" in r]
    assert len(rows) == 2 and made.state.best_metric == max(
        r["eval_b_rewards/margins"] for r in rows
    )
    assert any("eval_a_rewards/margins" in r for r in made.state.log_history)
    test = made.evaluate(sets["a"], metric_key_prefix="test")
    assert {f"test_{name}" for name in LOSSES} <= test.keys()
    assert not any(name.startswith("eval_") for name in test)
    assert {f"x_{name}" for name in LOSSES} <= made.predict(
        sets["b"], metric_key_prefix="x"
    ).metrics.keys()


@pytest.mark.parametrize(
    "name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"]
)
def test_what_would_not_be_called_is_refused(tmp_path, name):
    """trl#822"""
    with pytest.raises(ValueError, match=name):
        FusedDPOTrainer(model=tiny.model(), args=arguments(tmp_path), **{name: lambda *_: None})
    made = trainer(tmp_path, eval_dataset=examples(2))
    if name != "compute_loss_func":
        setattr(made, name, lambda *_: None)
        with pytest.raises(ValueError, match=name):
            made.evaluate()


def test_label_smoothing_of_a_cross_entropy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(tmp_path, label_smoothing_factor=0.1)


def test_beta_dpo_resumes_as_it_left(tmp_path):
    """trl#6123"""
    options = {"loss_type": "beta_dpo", "beta_dpo_keep": 1.0, "beta_dpo_alpha": 3.0}
    losses = []
    for resume in (False, True):
        made = trainer(
            tmp_path, loss_options=options, max_steps=4, save_strategy="steps", save_steps=2
        )
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        losses.append({r["step"]: r["loss"] for r in made.state.log_history if "loss" in r})
    # The history before step 2 comes from the checkpoint.
    assert losses[0].keys() == losses[1].keys() == {1, 2, 3, 4}
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert (tmp_path / "checkpoint-2" / "beta_dpo_state.json").is_file()


# --- two ranks ---


def one_rank(rank: int, port: int, folder: str, kinds: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    metrics = {kind: MAKERS[kind](f"{folder}/{rank}", ddp_backend="gloo") for kind in kinds}
    if rank == 0:
        torch.save(metrics, f"{folder}/metrics.pt")
    dist.barrier()
    dist.destroy_process_group()


def by_trainer(folder, batch=1, **options):
    return evaluated(folder, batch, examples(3), **options)


def by_big_batches(folder, **options):
    return evaluated(folder, 4, examples(5), **options)


def by_trl(folder, batch=1, **options):
    from datasets import Dataset
    from trl_runs import make

    from dpo_kernels.integrations.trl import DPOTrainer

    made = make(
        DPOTrainer,
        ref_model=tiny.model(seed=1),
        folder=folder,
        per_device_eval_batch_size=batch,
        trainer_options={"eval_dataset": Dataset.from_list(tiny.rows(3, seed=5))},
        **options,
    )
    return made.evaluate()


MAKERS = {"trainer": by_trainer, "batches of 4": by_big_batches, "trl": by_trl}


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
@pytest.mark.parametrize("kinds", [("trainer", "batches of 4"), ("trl",)])
def test_rows_that_a_sampler_repeats_are_not_counted(tmp_path, kinds):
    """OpenRLHF#1332: three pairs on two ranks, one of them twice."""
    if "trl" in kinds:
        pytest.importorskip("trl", reason="pip install trl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(tmp_path), kinds), nprocs=2)
    for kind, got in torch.load(tmp_path / "metrics.pt").items():
        same_metrics(got, MAKERS[kind](str(tmp_path / "alone")))


def same_metrics(got, wanted):
    names = [n for n in wanted if "rewards/" in n or "logps/" in n]
    if "eval_entropy" in wanted:  # TRL 0.x has no such metrics, and its loss is a mean of batches
        names += ["eval_loss", "eval_entropy", "eval_logits/chosen"]
    assert len(names) > 5
    for name in names:
        assert got[name] == pytest.approx(wanted[name], abs=1e-5), name


# --- TRL and Lightning ---


def test_trls_evaluation_is_a_mean_over_pairs(tmp_path):
    pytest.importorskip("trl", reason="pip install trl")
    one, two = (by_trl(str(tmp_path), batch) for batch in (1, 2))
    for name in one:
        if "rewards/" in name or "logps/" in name or name == "eval_loss":
            assert two[name] == pytest.approx(one[name], abs=1e-5), name


def test_trls_sft_term_is_divided_by_the_tokens_of_all_batches(tmp_path):
    pytest.importorskip("trl", minversion="1.0", reason="TRL 0.x has a loss of its own")
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    losses = [by_trl(str(tmp_path), batch, **options)["eval_loss"] for batch in (3, 1, 2)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_trl_with_several_sets_and_a_prefix(tmp_path):
    """trl#5811"""
    pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset
    from trl_runs import make

    from dpo_kernels.integrations.trl import DPOTrainer

    sets = {k: Dataset.from_list(tiny.rows(3, seed=i)) for i, k in enumerate("ab")}
    made = make(
        DPOTrainer,
        folder=str(tmp_path),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        trainer_options={"eval_dataset": sets},
        save_strategy="best",
        metric_for_best_model="eval_b_rewards/margins",
    )
    made.train()
    assert made.state.best_metric is not None
    assert "test_rewards/margins" in made.evaluate(made.eval_dataset["a"], metric_key_prefix="test")


def test_trl_resumes_beta_dpo(tmp_path):
    """trl#6123"""
    pytest.importorskip("trl", reason="pip install trl")
    from trl_runs import make

    from dpo_kernels.integrations.trl import DPOTrainer

    losses = []
    for resume in (False, True):
        made = make(
            DPOTrainer,
            folder=str(tmp_path),
            loss_type="beta_dpo",
            max_steps=4,
            save_steps=2,
            save_strategy="steps",
            fused={"loss_options": {"beta_dpo_keep": 1.0, "beta_dpo_alpha": 3.0}},
        )
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        losses.append([r["loss"] for r in made.state.log_history if "loss" in r])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def lightning_run(data, batch, sampler=None, loaders=1, **options):
    pytest.importorskip("lightning", reason="pip install lightning")
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from dpo_kernels.integrations.lightning import DPOModule

    loader = DataLoader(data, batch, collate_fn=PreferenceCollator(0), sampler=sampler)
    module = DPOModule(tiny.model(), **{"ref_model": tiny.model(seed=1), **options})
    made = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    given = [loader] * loaders if loaders > 1 else loader
    rows = made.validate(module, given, verbose=False)
    return {k: v for row in rows for k, v in row.items()}


def test_lightning_counts_pairs():
    """OpenRLHF#1336, OpenRLHF#1332"""
    data = examples(3)
    whole = lightning_run(data, 3)
    assert lightning_run(data, 2) == pytest.approx(whole, abs=1e-5)
    # rank 1 of 2 sees pairs 1 and, repeated, 0: the first alone counts
    from torch.utils.data import DistributedSampler

    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    assert list(sampler) == [1, 0]
    for batch in (1, 2):
        got = lightning_run(data, batch, sampler)
        assert got == pytest.approx(lightning_run(data[1:2], 1), abs=1e-5)


@pytest.mark.parametrize("options", SFT_TERMS, ids=str)
def test_lightnings_sft_term_is_divided_by_the_tokens_of_all_batches(options):
    data = examples(5)
    losses = [lightning_run(data, b, **options)["eval_loss"] for b in (5, 1, 2, 3)]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)


def test_lightning_with_several_sets():
    names = lightning_run(examples(3), 2, loaders=2)
    assert {f"eval_rewards/margins/dataloader_idx_{i}" for i in (0, 1)} <= names.keys()


def test_lightning_resumes_beta_dpo(tmp_path):
    """trl#6123"""
    pytest.importorskip("lightning", reason="pip install lightning")
    from lightning.pytorch import Trainer
    from torch.utils.data import DataLoader

    from dpo_kernels.integrations.lightning import DPOModule

    loader = DataLoader(examples(12), 4, collate_fn=PreferenceCollator(0))
    states = []
    for resume in (None, str(tmp_path / "two.ckpt")):
        start = tiny.model()
        module = DPOModule(
            start, ref_model=copy.deepcopy(start), loss_type="beta_dpo", beta_dpo_keep=1.0
        )
        made = Trainer(
            max_steps=3 if resume else 2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        made.fit(module, loader, ckpt_path=resume, weights_only=False)
        states.append(module.beta_dpo_state.clone())
        if resume is None:
            made.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(saved["beta_dpo_state"], states[0]) and not torch.equal(*states)
