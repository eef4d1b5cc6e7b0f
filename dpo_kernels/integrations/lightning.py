"""A LightningModule for DPO.

    module = DPOModule(model, ref_model=reference, beta=0.1, optimizer=lambda p: AdamW(p, lr=1e-6))
    Trainer(max_steps=100).fit(module, DataLoader(examples, 8, collate_fn=PreferenceCollator(0)))

`lightning` or, where that is absent, `pytorch_lightning`. The reference is `ref_model`, the batch's
`ref_logps`, or below PEFT the adapter called `ref` or no adapter. Metrics have TRL's names.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from ..losses import fresh_state
from ..models.attached import HeadOutput, attach_head
from ..models.forward import Reference
from ..models.head_check import check_head
from ..models.options import FusedOptions
from ..models.references import needs_reference
from ..models.step0 import WrongReference, tied
from ..models.step1 import FirstStep, FirstStepError, check_connected, check_rows, eos_ids_of
from .cached_reference import CachedReference
from .frameworks import check_version, require
from .plain import PreferenceCollator, check_reference, find_reference, step_of
from .trainer_metrics import LOSS_SUMS, ONE_BY_ONE, loss_sums, mean_loss
from .watched import Later

__all__ = [
    "DPOModule",
    "FirstStepError",
    "FusedOptions",
    "PreferenceCollator",
    "WrongReference",
]

OPT_OUT = "DPOModule(..., fused={'check_first_step': False})"

if importlib.util.find_spec("lightning") is None and importlib.util.find_spec("pytorch_lightning"):
    check_version("pytorch-lightning")
    L = require("pytorch_lightning", "pytorch-lightning")
else:
    L = require("lightning")
    check_version("lightning")
    L = require("lightning.pytorch", "lightning")
torchmetrics = require("torchmetrics")  # comes with either


class _MeanLoss(torchmetrics.Metric):  # type: ignore[name-defined, misc]
    """`loss_sums` of an evaluation's batches and ranks; none of it is saved."""

    def __init__(self) -> None:
        super().__init__()
        for name in LOSS_SUMS:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: dict[str, Tensor]) -> None:
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + value)

    def compute(self) -> Tensor:
        return mean_loss({name: getattr(self, name) for name in LOSS_SUMS}).float()


class DPOModule(L.LightningModule):  # type: ignore[name-defined, misc]
    """Policy, reference, loss and optimizer of one DPO run.

    Args:
        model: a causal LM of transformers, PEFT or not.
        ref_model: its reference; kept out of the checkpoint and never trained.
        optimizer: makes the optimizer from the trained parameters; AdamW at 1e-6 if None.
        fused: `FusedOptions` or its fields as a dict.
        **loss_options: `dpo_kernels.losses.LossOptions`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ref_model: nn.Module | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        fused: FusedOptions | dict[str, Any] | None = None,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self.fused = FusedOptions.of(fused, FusedOptions())
        self.loss_options = {**loss_options, **self.fused.loss_options}
        self.uses_reference = needs_reference(self.loss_options)
        self.make_optimizer = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-6))
        # In a list: not a submodule, so neither trained, nor moved, nor saved with the policy.
        self._ref_model = [] if ref_model is None else [ref_model.eval().requires_grad_(False)]
        folder = self.fused.reference_cache
        self._cache = None if folder is None else CachedReference(str(folder))
        self._first_step: FirstStep | None = None
        self._first_loss: Tensor | None = None
        self._later: Later | None = None
        self._reference_seen = False
        self._evaluated, self._loader, self._index = 0, None, 0
        state = fresh_state(self.loss_options.get("loss_type", "sigmoid"))
        self.register_buffer("beta_dpo_state", state.get("beta_dpo_state"))
        attach_head(model)
        check_head(model, self.fused.backend)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer([p for p in self.model.parameters() if p.requires_grad])

    def on_fit_start(self) -> None:
        for model in self._ref_model:
            model.to(self.device)

    on_validate_start = on_test_start = on_fit_start

    def on_train_start(self) -> None:
        if self.fused.check_first_step and not self.global_step:
            self._first_step = FirstStep(self.model, OPT_OUT)
        self._later = Later(self.fused, self.trainer.log_every_n_steps)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self._first_step is not None:
            self._first_step.after_backward(self._first_loss)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *args: Any) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, *args)
        if self._first_step is None:
            return
        schedules = [c.scheduler for c in self.trainer.lr_scheduler_configs]
        self._first_step.after_step(optimizer, schedule=schedules[0] if schedules else None)
        for text in self._first_step.warnings:
            warnings.warn(text, stacklevel=2)
        self._first_step.warnings.clear()
        if self._first_step.done:
            self._first_step = None

    def _reference(self, batch: Mapping[str, Any]) -> Reference | None:
        if not self.uses_reference:
            return None
        ref_model = self._ref_model[0] if self._ref_model else None
        return find_reference(
            batch,
            self.model,
            ref_model,
            self.fused,
            self.loss_options,
            "reference_free=True",
            self._cache,
        )

    def _step(self, batch: Mapping[str, Any], prefix: str) -> Tensor:
        first = self.training and self._first_step is not None and self._first_loss is None
        if first:
            check_rows(batch["labels"], eos_ids_of(self.model), opt_out=OPT_OUT)
        ref = self._reference(batch)
        options = dict(self.loss_options)
        if not self.training:
            options |= ONE_BY_ONE
        if self.beta_dpo_state is not None:
            state = self.beta_dpo_state
            options["beta_dpo_state"] = state if self.training else state.clone()
        out = step_of(self.model, batch, ref_logps=ref, fused=self.fused, **options)
        assert out.loss is not None and out.rewards is not None and out.pair_logps is not None
        if first:
            check_connected(self.model, out.loss)
            self._first_loss = out.loss.detach()
        if self.training and self._later is not None:
            known = batch.get("beta", options.get("beta", 0.1))
            self._later.add(out, None if ref is None else known, batch["input_ids"])
        if self.training and not self._reference_seen:
            self._reference_seen = True
            if ref is not None and self.fused.check_reference and not self.global_step:
                self._check_reference(out, batch, ref, options)
        real = len(out.rewards[0]) if self.training else self._real_pairs(len(out.rewards[0]))
        if not self.training:
            # Its parts are divided at the end, each by its own count.
            sums = loss_sums(out, batch["labels"], real)
            self._log_loss(f"{prefix}loss", sums, real)
            out.loss = mean_loss(loss_sums(out, batch["labels"], real or len(out.loss)))
        some = slice(real or None)  # with a weight of 0 where none is real
        chosen, rejected = out.rewards[:, some]
        beta = None if ref is None else batch.get("beta", options.get("beta", 0.1))
        tie = tied(out.rewards, out.pair_logps, beta)[some]
        values = {
            "rewards/chosen": chosen.mean(),
            "rewards/rejected": rejected.mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "rewards/accuracies": ((chosen > rejected) & ~tie).float().mean(),
            "logps/chosen": out.pair_logps[0, some].mean(),
            "logps/rejected": out.pair_logps[1, some].mean(),
        }
        if self.training:
            values["loss"] = out.loss.detach()
        if out.aux_loss is not None:
            values["aux_loss"] = out.aux_loss.detach()
        self.log_dict(
            {f"{prefix}{k}": v for k, v in values.items()},
            batch_size=real,
            sync_dist=not self.training,
        )
        return out.loss

    def _check_reference(
        self, out: HeadOutput, batch: Mapping[str, Any], ref: Reference, options: dict[str, Any]
    ) -> None:
        """What is logged of the first step is the policy as it was checked: rewards of 0."""
        opt_out = "DPOModule(..., fused={'check_reference': False})"
        given: dict[str, Any] = {"ref_logps": ref, "fused": self.fused, **options}
        seen = check_reference(self.model, out, batch, opt_out=opt_out, **given)
        out.rewards, out.pair_logps = seen.rewards, seen.pair_logps

    def _log_loss(self, name: str, sums: dict[str, Tensor], real: int) -> None:
        key = f"_mean_{name}_{self._index}"
        if not hasattr(self, key):
            self.add_module(key, _MeanLoss().to(self.device))
        metric = getattr(self, key)
        metric.update(sums)
        self.log(name, metric, metric_attribute=key, batch_size=real)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self._step(batch, "")

    def _real_pairs(self, B: int) -> int:
        """How many of an evaluation's next B pairs are none that a DistributedSampler repeats.

        It fills the ranks' shares up with the first indices; a rank's i-th pair is number
        rank + i * ranks of all.
        """
        loader = self._loader
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return B
        places = range(self._evaluated, self._evaluated + B)
        self._evaluated += B
        total = len(sampler.dataset)  # type: ignore[arg-type]
        return sum(sampler.rank + i * sampler.num_replicas < total for i in places)

    def _evaluate(
        self, batch: Mapping[str, Any], batch_idx: int, loaders: Any, index: int
    ) -> Tensor:
        if batch_idx == 0:
            self._evaluated = 0
        if isinstance(loaders, dict):
            loaders = list(loaders.values())
        self._index = index
        self._loader = loaders[index] if isinstance(loaders, (list, tuple)) else loaders
        return self._step(batch, "eval_")

    def validation_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        return self._evaluate(batch, batch_idx, self.trainer.val_dataloaders, dataloader_idx)

    def test_step(
        self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> Tensor:
        return self._evaluate(batch, batch_idx, self.trainer.test_dataloaders, dataloader_idx)
