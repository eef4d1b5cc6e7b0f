"""Overrides of TRL 0.18 to 0.28's DPOTrainer: log-probs without logits, and losses it lacks.

These versions keep prompt and completion apart and join them in `concatenated_forward`; their
`dpo_loss` takes sequence log-probs. A loss that TRL has stays TRL's own (its running mean of
`bco_pair`, its alpha-divergence, `rpo_alpha`), so that results are TRL's; the others are this
package's. Metrics are reduced where TRL reduces them; those of an evaluation's batches are joined
by how many pairs each has.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import dpo_kernels as dk

from ...models.attached import HeadOutput, attach_head
from ...models.forward import scored_tokens
from ...models.options import FusedOptions
from ...models.references import adapters_in_force, reference_adapter
from ...models.step0 import check_step0
from ...models.structure import deterministic
from .. import hf_trainer
from ..announce import announce, opt_out
from ..cached_reference import cache_of
from ..first_step import check_first_loss, check_first_rows, note_loss, watch_first_step
from ..rows import WithRowColumns, check_row_columns, take_row_options

_VISION = ("pixel_values", "pixel_attention_mask", "image_sizes")
# TRL's names. Its losses that all these versions have, and that came with the later ones; that are
# the NLL alone; and what its loss of log-probs over lengths is once it has divided by them.
_LATER = {"sft"}
_NLL = {"sft"}
_DIVIDED = {"ipo": "ipo_sum"}
_OWN = {
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_pair",
    "apo_zero",
    "apo_down",
    "discopop",
}


def overrides(trainer: type) -> dict[str, Callable[[Any], Any]]:
    return {
        "__init__": _init,
        "concatenated_forward": functools.partial(
            _concatenated_forward, module=sys.modules[trainer.__module__]
        ),
        "get_batch_loss_metrics": _get_batch_loss_metrics,
        "evaluation_loop": _evaluation_loop,
        "dpo_loss": _dpo_loss,
        **hf_trainer.overrides(),
    }


def _init(original: Callable) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, fused: Any = None, **kwargs: Any) -> None:
        self.fused = FusedOptions.of(fused, type(self).fused_default)
        self._reference_seen = False
        self._row_options = {}
        self._beta_dpo_state = torch.zeros(2, dtype=torch.float64)
        self._noiseless = []
        self._evaluated = []
        check_row_columns(inspect.signature(original).bind(self, *args, **kwargs).arguments)
        original(self, *args, **kwargs)
        attach_head(self.model)  # now: below what accelerate will wrap it in
        if self.fused.ref_adapter_name is not None:
            _name_adapter(self, self.fused.ref_adapter_name)
        self.data_collator = WithRowColumns(self.data_collator)
        watch_first_step(self)

    return __init__


def _name_adapter(trainer: Any, name: str) -> None:
    """The adapter that is the reference, by TRL's own options of this version."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    with reference_adapter(policy, name):  # which says what is wrong with it
        pass
    trainer.ref_adapter_name = name
    trainer.model_adapter_name = trainer.model_adapter_name or adapters_in_force(policy)[0]


def _refuse(trainer: Any) -> None:
    """What this version's joining of prompt and completion does that is not done here."""
    for given, what in (
        (trainer.is_encoder_decoder, "an encoder-decoder model"),
        (trainer.padding_free, "padding_free=True (share_prefix and short batches save more)"),
        (trainer.args.ld_alpha is not None, "ld_alpha, which it counts from the row's start"),
        (getattr(trainer.args, "use_liger_loss", False), "use_liger_loss=True"),
    ):
        if given:
            raise ValueError(f"the fused head does not take {what} with this version of TRL")


def _names(trainer: Any) -> list[str]:
    return trainer.loss_type if isinstance(trainer.loss_type, list) else [trainer.loss_type]


def _joined(trainer: Any, batch: dict[str, Any], module: Any) -> tuple[dict[str, Any], Tensor]:
    """(inputs of the model, labels [2B, T]): prompt ++ completion, padding behind, truncated."""
    padding = getattr(trainer, "pad_token_id", None)
    padding = trainer.padding_value if padding is None else padding
    parts = trainer.concatenated_inputs(batch, padding_value=padding)
    ids = torch.cat([parts["prompt_input_ids"], parts["completion_input_ids"]], 1)
    prompt, completion = parts["prompt_attention_mask"], parts["completion_attention_mask"]
    rows = {
        "attention_mask": torch.cat([prompt, completion], 1),
        "input_ids": ids,
        "scored": torch.cat([torch.zeros_like(prompt), completion], 1),
    }
    if "token_type_ids" in parts:
        types = parts["token_type_ids"]
        rows["token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
    limit = trainer.max_length
    cut = limit is not None and limit < ids.shape[1]
    if cut and trainer.truncation_mode == "keep_end":
        rows = dict(zip(rows, module.flush_right(*rows.values()), strict=True))
        rows = {k: v[:, -limit:] for k, v in rows.items()}
    rows = dict(zip(rows, module.flush_left(*rows.values()), strict=True))
    if cut:
        rows = {k: v[:, :limit] for k, v in rows.items()}
    labels = rows["input_ids"].masked_fill(rows.pop("scored") == 0, -100)
    return {**rows, **{k: parts[k] for k in _VISION if k in parts}}, labels


def _concatenated_forward(original: Callable, module: Any) -> Callable:
    @functools.wraps(original)
    def concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        _refuse(self)
        batch, row_options = take_row_options(batch)
        inputs, labels = _joined(self, batch, module)
        if not is_ref_model and self.model.training and not self._reference_seen:
            check_first_rows(self, labels)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        attach_head(self.accelerator.unwrap_model(model))
        stats = ("mean_logits", *(("log_sum_sq_probs",) if self.use_weighting else ()))
        # autocast: TRL has wrapped the reference before the head came
        if is_ref_model:
            out = HeadOutput(logps=_reference_logps(self, model, inputs, labels))
            return _summary(self, out, labels, row_options, True)
        with self.accelerator.autocast():
            out = scored_tokens(model, inputs, labels, self.fused, stats)
        return _summary(self, out, labels, row_options, False)

    return concatenated_forward


def _reference_logps(trainer: Any, model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    @contextmanager
    def reference() -> Iterator[Any]:
        with deterministic(model), trainer.accelerator.autocast():
            yield model

    def score(model: Any) -> Tensor:
        logps = scored_tokens(model, inputs, labels, trainer.fused).logps
        assert logps is not None
        return logps

    cache = cache_of(trainer)
    if cache is not None:
        return cache.logps(inputs, labels, reference, score)
    with reference():
        return score(model)


def _summary(
    trainer: Any, out: HeadOutput, labels: Tensor, row_options: dict[str, Tensor], reference: bool
) -> dict[str, Tensor]:
    """What TRL's `concatenated_forward` gives, from log-probs [2B, T - 1]."""
    assert out.logps is not None
    targets = labels[:, 1:]
    scored = targets != -100
    counts = scored.sum(1)
    B = len(labels) // 2
    sums = out.logps.sum(1)
    if not _DIVIDED.keys().isdisjoint(_names(trainer)):
        sums = sums / counts
    result = {"chosen_logps": sums[:B], "rejected_logps": sums[B:]}
    if reference:
        return result
    trainer._row_options = row_options
    trainer._lengths = counts.view(2, B)
    assert out.mean_logits is not None
    for name, half in (("chosen", slice(0, B)), ("rejected", slice(B, None))):
        result[f"mean_{name}_logits"] = out.mean_logits[half].sum() / scored[half].sum()
    if trainer.use_weighting:
        assert out.log_sum_sq_probs is not None
        with torch.no_grad():
            aligned = (out.logps - out.log_sum_sq_probs).sum(1) / counts
            result["policy_weights"] = (aligned[:B] + aligned[B:]).exp().clamp(max=1)
    if trainer.args.rpo_alpha is not None or not _NLL.isdisjoint(_names(trainer)):
        # TRL marks what is not scored with token 0, which so is never counted.
        counted = scored[:B] & (targets[:B] != 0)
        result["nll_loss"] = -(out.logps[:B] * counted).sum() / counted.sum()
    if trainer.aux_loss_enabled:
        assert out.aux_loss is not None
        result["aux_loss"] = out.aux_loss
    return result


def _get_batch_loss_metrics(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_batch_loss_metrics(
        self: Any, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> Any:
        first = train_eval == "train" and not self._reference_seen
        if first and not self.is_vision_model:
            hf_trainer.check_head_of(self)
        if first and self.fused.check_reference and not self.state.global_step:
            inner = model  # DDP's own forward belongs to the step
            while isinstance(inner, (torch.nn.parallel.DistributedDataParallel,)):
                inner = inner.module
            with torch.no_grad(), deterministic(inner):
                out = self.concatenated_forward(inner, batch)
            self._noiseless = [out["chosen_logps"], out["rejected_logps"]]
        loss, metrics = original(self, model, batch, train_eval)
        self._noiseless = []
        if first:
            check_first_loss(self, loss)
        if train_eval == "train":
            note_loss(self, loss)
        if first and hasattr(self, "_lengths"):
            announce(self, hf_trainer.model_dtype(self), None)
        self._reference_seen |= train_eval == "train"
        if train_eval == "eval" and hasattr(self, "_lengths"):
            pairs = torch.ones(self._lengths.shape[1], device=self.accelerator.device)
            self._evaluated.append(float(self.accelerator.gather_for_metrics(pairs).sum()))
        return loss, metrics

    return get_batch_loss_metrics


def _evaluation_loop(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def evaluation_loop(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        prefix = given.arguments["metric_key_prefix"]
        self._evaluated = []
        self._stored_metrics["eval"].clear()
        output = original(self, *args, **kwargs)
        weights = self._evaluated
        for name, values in self._stored_metrics["eval"].items():
            if len(values) == len(weights) and sum(weights):
                mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
                output.metrics[f"{prefix}_{name.removeprefix('eval_')}"] = mean
        if weights:
            self._stored_metrics["eval"].clear()
        return output

    return evaluation_loop


def _dpo_loss(original: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def dpo_loss(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        if not hasattr(self, "_lengths"):  # a subclass that goes past our forward has TRL's loss
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        logps = [given[k] for k in ("chosen_logps", "rejected_logps")]
        ref = [given[k].to(logps[0].device) for k in ("ref_chosen_logps", "ref_rejected_logps")]
        name = given.get("loss_type", _names(self)[0])
        _check_reference(self, logps, ref, name)
        ours = {**self.fused.loss_options, **self._row_options}
        theirs = name in _OWN or (name in _LATER and "loss_type" in signature.parameters)
        if theirs and not ours:
            return original(self, *args, **kwargs)
        return _our_loss(self, name, logps, ref, ours)

    return dpo_loss


def _our_loss(
    trainer: Any, name: str, logps: list[Tensor], ref: list[Tensor], ours: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B] and rewards of a loss or an option that this TRL does not have."""
    options: dict[str, Any] = {
        "loss_type": name,
        "beta": trainer.beta,
        "label_smoothing": trainer.label_smoothing,
        "reference_free": bool(trainer.reference_free),
        "reduction": "none",
        **ours,
    }
    f_divergence = getattr(trainer.f_divergence_type, "value", trainer.f_divergence_type)
    if f_divergence != "reverse_kl":
        raise ValueError(
            f"f_divergence_type={f_divergence!r} of this version of TRL is another function; "
            f"{name!r} with {', '.join(ours) or 'it'} takes reverse_kl alone"
        )
    options["loss_type"] = _DIVIDED.get(name, name)
    options = hf_trainer.loss_state(trainer, options)
    lengths = trainer._lengths
    reference = (None, None) if options["reference_free"] else ref
    out = dk.preference_loss(
        *logps, *reference, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options
    )
    return out.loss, out.chosen_rewards, out.rejected_rewards


def _check_reference(trainer: Any, logps: list[Tensor], ref: list[Tensor], name: str) -> None:
    free = trainer.reference_free or trainer.fused.loss_options.get("reference_free")
    if trainer._reference_seen or not trainer.fused.check_reference or trainer.state.global_step:
        return
    if free or (name in dk.losses.available() and not dk.losses.get(name).reference):
        return
    if not trainer.model.training:
        return
    policy = torch.stack([x.detach() for x in trainer._noiseless or logps])
    dtype = policy.dtype if policy.dtype == torch.float64 else hf_trainer.model_dtype(trainer)
    rewards = policy - torch.stack(ref)
    unless = opt_out(trainer, "check_reference")
    check_step0(rewards, policy, {"beta": 1.0}, dtype, unless)
