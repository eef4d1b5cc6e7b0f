"""Overrides of TRL 0.29's and 1.x's DPOTrainer: its loss, reference log-probs, reduced metrics.

They collate [chosen; rejected] into `input_ids`, `attention_mask`, `completion_mask`; what a
batch holds besides (images, token types) goes to the model as TRL passes it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ... import losses
from ...models.attached import attach_head
from ...models.forward import (
    Reference,
    completion_sums,
    labels_of,
    pair_logps,
    pair_step,
    reference_states,
    scored_tokens,
)
from ...models.options import FusedOptions
from ...models.references import needs_reference, needs_states, reference_adapter
from ...models.step0 import check_first_step
from ...models.structure import deterministic
from .. import hf_trainer, shapes
from ..announce import announce, opt_out
from ..cached_reference import OF_STATES, cache_of
from ..first_step import check_first_loss, check_first_rows, note_loss, watch_first_step
from ..rows import WithRowColumns, check_row_columns, take_row_options
from ..trainer_metrics import (
    ONE_BY_ONE,
    PackedMetrics,
    evaluation_metrics,
    loss_sums,
    mean_loss,
    real_pairs,
)

_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}
# What is read of the config and of the trainer; a release without it is another shape.
_OF_THE_CONFIG = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "max_length",
)
_OF_THE_TRAINER = ("ref_model", "precompute_ref_logps", "_metrics", "_total_train_tokens")
_OF_THE_BATCH = ("input_ids", "attention_mask", "completion_mask")


def overrides(trainer: type) -> dict[str, Callable[[Any], Any]]:
    module = sys.modules[trainer.__module__]
    shapes.part_of(shapes.TRL, "trl.models.utils", "disable_gradient_checkpointing")
    names: dict[str, Callable[[Any], Any]] = {
        "__init__": functools.partial(_init, module=module),
        "_compute_loss": _compute_loss,
        "compute_ref_log_probs": _compute_ref_log_probs,
        "_precompute_ref_logps": _precompute,
        "get_batch_samples": _get_batch_samples,
        "evaluation_loop": _evaluation_loop,
        "log": _log,
        **hf_trainer.overrides(),
    }
    if hasattr(trainer, "_compute_loss_liger"):  # TRL 1.0 to 1.9: the fused head is in its place
        names["_compute_loss_liger"] = _compute_loss
    return names


def loss_options(trainer: Any) -> dict[str, Any]:
    """The options of `dpo_kernels.losses` that the trainer's config and `fused` ask for."""
    return _options(trainer.args, trainer.fused)


def _options(args: Any, fused: FusedOptions) -> dict[str, Any]:
    shapes.check_has(args, _OF_THE_CONFIG, shapes.TRL)
    names = args.loss_type
    options = {
        "loss_type": (names,) if isinstance(names, str) else tuple(names),
        "beta": args.beta,
        "label_smoothing": args.label_smoothing,
        "f_divergence_type": getattr(args.f_divergence_type, "value", args.f_divergence_type),
        "f_alpha_divergence_coef": args.f_alpha_divergence_coef,
        "ld_alpha": args.ld_alpha,
        "use_weighting": args.use_weighting,
    }
    if args.loss_weights:
        options["loss_weights"] = tuple(args.loss_weights)
    for row in losses.rows_of(options["loss_type"]):
        # What a loss alone takes, where TRL has it under the same name.
        options |= {n: x for n in row.options if (x := getattr(args, n, None)) is not None}
    return {**options, **fused.loss_options}


def _init(original: Callable, module: Any) -> Callable:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, fused: Any = None, **kwargs: Any) -> None:
        self.fused = FusedOptions.of(fused, type(self).fused_default)
        self._packed = {"train": PackedMetrics(), "eval": PackedMetrics()}
        self._beta_dpo_state = torch.zeros(2, dtype=torch.float64)
        self._reference_seen = False
        names = list(inspect.signature(original).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        named = isinstance(given.get("model"), str)
        config = given.get("args")
        free = config is not None and not needs_reference(_options(config, self.fused))
        check_row_columns(given)
        with _adapter_on_head(module), _no_reference(module, named) if free else nullcontext():
            original(self, *args, **kwargs)
        shapes.check_has(self, _OF_THE_TRAINER, shapes.TRL)
        attach_head(self.model)  # now: below what accelerate will wrap it in
        self.data_collator = WithRowColumns(self.data_collator)
        watch_first_step(self)

    return __init__


@contextmanager
def _adapter_on_head(module: Any) -> Iterator[None]:
    """TRL refuses an adapter on lm_head, which its own head would ignore; ours applies it."""
    known = getattr(module, "BaseTunerLayer", None)
    if known is None:
        yield
        return
    module.BaseTunerLayer = ()  # isinstance(x, ()) is False
    try:
        yield
    finally:
        module.BaseTunerLayer = known


@contextmanager
def _no_reference(module: Any, named: bool) -> Iterator[None]:
    """TRL loads a reference model where none is given; a loss without reference needs none."""
    load = getattr(module, "create_model_from_path", None)
    if load is None:
        yield
        return
    calls = [load] if named else []  # a policy given by name is loaded first

    def create(*args: Any, **kwargs: Any) -> Any:
        return calls.pop()(*args, **kwargs) if calls else None

    module.create_model_from_path = create
    try:
        yield
    finally:
        module.create_model_from_path = load


def _precompute(original: Callable) -> Callable:
    @functools.wraps(original)
    def _precompute_ref_logps(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if not needs_reference(loss_options(self)):
            return dataset
        if cache_of(self) is not None and _is_kept(self):
            return dataset  # its log-probs are kept by content as rows come
        kept = getattr(self, "_precompute_model_hash", None)
        if kept is None:
            return original(self, dataset, *args, **kwargs)
        # TRL's file goes by model and data alone, and its values depend on these too.
        self._precompute_model_hash = (kept, self.args.ld_alpha, self.args.max_length)
        try:
            return original(self, dataset, *args, **kwargs)
        finally:
            self._precompute_model_hash = kept

    return _precompute_ref_logps


def _is_kept(trainer: Any) -> bool:
    """Whether there is a reference to ask while the policy is trained."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return trainer.ref_model is not None or hasattr(policy, "peft_config")


def _get_batch_samples(original: Callable) -> Callable:
    @functools.wraps(original)
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        self._pairs_of_step = [len(batch.get("input_ids", ())) // 2 for batch in found[0]]
        return found

    return get_batch_samples


def _share_of_step(trainer: Any) -> dict[str, float]:
    """Where the batches of a step differ in size, the mean of their means is not the mean."""
    sizes = getattr(trainer, "_pairs_of_step", [])
    return {"num_pairs": sum(sizes) / len(sizes)} if len(set(sizes)) > 1 else {}


def _rows(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch, cut to `max_length` where the trainer and not its collator does that (0.29)."""
    shapes.check_batch(inputs, _OF_THE_BATCH, shapes.TRL)
    cut = getattr(trainer, "_truncate_inputs", None)
    if cut is None:
        return inputs
    kept = cut(*(inputs[n] for n in _OF_THE_BATCH))
    return {**inputs, **dict(zip(_OF_THE_BATCH, kept, strict=True))}


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in inputs.items() if k not in _NOT_FOR_THE_MODEL}
    kept["use_cache"] = False
    return kept


@contextmanager
def _reference(trainer: Any, model: Any = None) -> Iterator[Any]:
    """The model that gives reference log-probs, ready to be called."""
    from trl.models.utils import disable_gradient_checkpointing

    if trainer.ref_model is not None:
        model = trainer.ref_model if model is None else model
        adapter: Any = nullcontext()
    else:
        model = trainer.model if model is None else model
        policy = trainer.accelerator.unwrap_model(trainer.model)
        name = trainer.fused.ref_adapter_name
        adapted = hasattr(policy, "peft_config")
        adapter = reference_adapter(policy, name) if adapted else nullcontext()
    attach_head(trainer.accelerator.unwrap_model(model))
    checkpointing = getattr(trainer.args, "gradient_checkpointing_kwargs", None)
    with (
        torch.no_grad(),
        disable_gradient_checkpointing(trainer.model, checkpointing),
        adapter,
        deterministic(model),
        trainer.accelerator.autocast(),  # TRL has wrapped the reference before the head came
    ):
        yield model


def _compute_ref_log_probs(original: Callable) -> Callable:
    @functools.wraps(original)
    def compute_ref_log_probs(self: Any, *args: Any) -> tuple[Tensor, Tensor]:
        model = args[0] if len(args) == 2 else None  # since TRL 1.10
        inputs, _ = take_row_options(_rows(self, args[-1]))
        labels = labels_of(inputs["input_ids"], inputs["completion_mask"])
        alpha, cache = loss_options(self)["ld_alpha"], cache_of(self)
        model_inputs = _model_inputs(inputs)
        if cache is not None:
            logps = cache.logps(
                model_inputs,
                labels,
                lambda: _reference(self, model),
                lambda reference: _token_logps(self, reference, model_inputs, labels),
            )
            chosen, rejected = completion_sums(logps, labels, alpha).chunk(2)
            return chosen, rejected
        with _reference(self, model) as reference:
            logps = pair_logps(reference, model_inputs, labels, self.fused, alpha)
        return logps[0], logps[1]

    return compute_ref_log_probs


def _compute_loss(original: Callable) -> Callable:
    @functools.wraps(original)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        training = self.model.training
        given = inputs
        inputs, row_options = take_row_options(_rows(self, inputs))
        tokens = given["attention_mask"].sum()  # TRL 0.29 counts those that it cuts off too
        labels = labels_of(inputs["input_ids"], inputs["completion_mask"])
        options = {**loss_options(self), **row_options}
        if not training:
            options |= ONE_BY_ONE
        else:
            options |= _share_of_step(self)
        options = hf_trainer.loss_state(self, options)
        reference = None
        if needs_reference(options):
            reference = _reference_of(self, inputs, labels, needs_states(options))
        first = training and not self._reference_seen
        if first:
            check_first_rows(self, labels)
        if first and not getattr(self, "_is_vlm", False):
            hf_trainer.check_head_of(self)
        model_inputs = _model_inputs(inputs)
        enabled = getattr(self, "aux_loss_enabled", False)
        router_weight = self.router_aux_loss_coef if enabled else 0.0
        with self.accelerator.autocast():
            out = pair_step(
                model, model_inputs, labels, reference, options, self.fused, router_weight
            )
            if first and out.loss is not None:
                check_first_loss(self, out.loss)
            if first and reference is not None:
                _check_reference(self, model, model_inputs, out, labels, reference, options)
        if first:
            announce(self, hf_trainer.model_dtype(self), out.strategy)
        self._reference_seen |= training
        beta = None if reference is None else options["beta"]
        loss = out.loss
        assert loss is not None
        if training:
            note_loss(self, loss, inputs["input_ids"])
            self._packed["train"].add(out, labels, tokens, None, beta)
        else:
            real = real_pairs(self, len(loss))
            self._packed["eval"].add(out, labels, tokens, real, beta)
            loss = mean_loss(loss_sums(out, labels, real or len(loss)))
        if return_outputs:
            with torch.no_grad():  # compute_metrics wants logits, which nothing here makes
                return loss, model(**model_inputs)
        return loss

    return _compute_loss


def _reference_of(trainer: Any, inputs: dict[str, Any], labels: Tensor, states: bool) -> Reference:
    """[2B] precomputed, or from the reference now: [2B, T - 1], or its states."""
    if trainer.precompute_ref_logps and "ref_chosen_logps" in inputs:
        return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
    if not _is_kept(trainer):
        raise ValueError(
            "no reference: ref_model is None, and the batch has no precomputed log-probs "
            "(precompute_ref_log_probs adds them to train_dataset and eval_dataset)"
        )
    model_inputs, cache = _model_inputs(inputs), cache_of(trainer)

    def score(reference: Any) -> Tensor:
        return _token_logps(trainer, reference, model_inputs, labels)

    if states and cache is not None:
        cache.unused(OF_STATES)
    if cache is not None and not states:
        return cache.logps(model_inputs, labels, lambda: _reference(trainer), score)
    with _reference(trainer) as reference:
        if states:
            return reference_states(reference, model_inputs, labels, trainer.fused)
        return score(reference)


def _token_logps(
    trainer: Any, reference: Any, model_inputs: dict[str, Any], labels: Tensor
) -> Tensor:
    logps = scored_tokens(reference, model_inputs, labels, trainer.fused).logps
    assert logps is not None
    return logps


def _check_reference(
    trainer: Any,
    model: Any,
    model_inputs: dict[str, Any],
    out: Any,
    labels: Tensor,
    reference: Reference,
    options: dict[str, Any],
) -> None:
    if not trainer.fused.check_reference or trainer.state.global_step:
        return
    dtype, unless = hf_trainer.model_dtype(trainer), opt_out(trainer, "check_reference")
    seen = check_first_step(
        model, model_inputs, labels, out, reference, options, trainer.fused, dtype, unless
    )
    # What is logged of the first step is the policy as it was checked: rewards of 0.
    out.rewards, out.pair_logps = seen.rewards, seen.pair_logps


def _evaluation_loop(original: Callable) -> Callable:
    @functools.wraps(original)
    def evaluation_loop(
        self: Any,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._packed["eval"] = PackedMetrics()
        output = original(
            self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        values = {**evaluation_metrics(self), "num_tokens": self._total_train_tokens}
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in values.items()})
        return output

    return evaluation_loop


def _log(original: Callable) -> Callable:
    @functools.wraps(original)
    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            values, tokens = self._packed["train"].take_each(
                self.accelerator.device, lambda x: self.accelerator.reduce(x, "sum")
            )
            for name, steps in values.items():
                self._metrics["train"][name] += steps
            if values:
                self._total_train_tokens += tokens // getattr(self, "_tp_size", 1)
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        original(self, logs, start_time)

    return log
