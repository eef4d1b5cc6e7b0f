"""The checks around the first step: what would train at log 2 for ever ends there, with its cause.

Before the forward, the rows: a token of each is scored, and none ends twice. After the backward,
the gradients: every trainable weight has one, and it is not zero. After the optimizer's step, the
weights: they moved.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sequences import ENDING, doubled_end
from .structure import base_model_of

# Below this share of the weights with a gradient that a step has moved, it is called vain.
MOVED = 0.5
_SAMPLE = 4096  # weights looked at in each parameter
_AHEAD = 10_000  # steps of a schedule that are looked at
_NARROW = (torch.bfloat16, torch.float16)


class FirstStepError(ValueError):
    """Nothing can be learned so; the message says why."""


def check_rows(
    labels: Tensor, eos_ids: Iterable[int | None] = (), names: Sequence[str] = (), opt_out: str = ""
) -> None:
    """`FirstStepError` for a batch [2B, T] without a scored token, or whose rows end twice.

    Labels are the ids where they are scored, -100 elsewhere. `names`: of the pairs, for messages.
    """
    rows = [row[row != -100].tolist() for row in labels.cpu()]
    check_scored([len(row) for row in rows], opt_out)
    check_ends([row[-ENDING:] for row in rows], eos_ids, names, opt_out)


def check_scored(counts: Sequence[int], opt_out: str = "") -> None:
    """`FirstStepError` where no sequence of a batch has a scored token."""
    if not any(counts):
        raise FirstStepError(
            "no token of the first batch is scored: the labels are all masked (-100). "
            "Completions are empty, were cut off (max_length), or the completion mask is of "
            "another template" + _unless(opt_out)
        )


def check_ends(
    ends: Sequence[Sequence[int]],
    eos_ids: Iterable[int | None],
    names: Sequence[str] = (),
    opt_out: str = "",
) -> None:
    """`FirstStepError` where half of the rows end with the end token twice.

    `ends`: the last `ENDING` scored ids of each row, chosen then rejected; `names` of the pairs, or
    of the rows.
    """
    known = {i for i in eos_ids if i is not None}
    found = [doubled_end(ids, known) for ids in ends]
    twice = [r for r, token in enumerate(found) if token is not None]
    if twice and 2 * len(twice) >= len(ends):
        where = f" ({names[twice[0] % len(names)]})" if names else ""
        raise FirstStepError(
            f"{len(twice)} of {len(ends)} completions of the first batch end with the end token "
            f"(EOS, id {found[twice[0]]}) twice{where}: it is in the text and added once more; "
            "the model would learn to go on after its end. Take it out of the text, or of the chat "
            "template" + _unless(opt_out)
        )


def eos_ids_of(model: nn.Module, tokenizer: Any = None) -> list[int | None]:
    """The ids that end a sequence, by the tokenizer and by the model's configurations."""
    base = base_model_of(model)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    found: list[int | None] = []
    for source in (tokenizer, base.config, getattr(base, "generation_config", None)):
        known = getattr(source, "eos_token_id", None)
        found += known if isinstance(known, list | tuple) else [known]
    return found


def check_connected(model: nn.Module, loss: Tensor) -> None:
    """`FirstStepError` for a loss that no trainable weight has a part in (backward would raise)."""
    if not loss.requires_grad and torch.is_grad_enabled():
        raise FirstStepError(f"the loss does not depend on a trainable weight: {cause_of(model)}")


def cause_of(model: nn.Module) -> str:
    """Why weights have no gradient, as far as it can be seen."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    for module in model.modules():
        if _flag(module, "merged"):
            return (
                "an adapter is merged into its weights, where it is not trained (unmerge_adapter, "
                "or load it without merging)"
            )
    if not names:
        return (
            "every weight is frozen (requires_grad=False): an adapter that was loaded without "
            "is_trainable=True or was merged (merge_and_unload), or a model that was frozen"
        )
    if any(_flag(module, "disable_adapters") for module in model.modules()):
        return "the adapter is switched off (disable_adapter)"
    if all("lora_" in name or "adapter" in name for name in names):
        return (
            "the trainable weights are an adapter's that the forward does not use (another adapter "
            "is active), or gradient checkpointing cuts it off (use_reentrant=False mends that)"
        )
    if any(p.grad is not None for p in model.parameters()):
        return (
            "the gradients are all 0: chosen and rejected are equal, or the loss is flat where it "
            "starts"
        )
    return "the head is detached from the model: its states come from a no_grad or a detach()"


def _flag(module: nn.Module, name: str) -> bool:
    if not hasattr(module, "active_adapters"):  # PEFT's layers alone
        return False
    value = getattr(module, name, False)
    return isinstance(value, bool) and value


class FirstStep:
    """Watches a model through its first optimizer step that is to move something.

        watch.after_backward(loss)  # gradients are there, and not zero (but of a loss of 0)
        optimizer.step()
        watch.after_step(optimizer) # weights have moved

    `done` is True from then on. `warnings` holds what is strange and may be meant.
    """

    def __init__(self, model: nn.Module, opt_out: str = "") -> None:
        self.model, self.opt_out = model, opt_out
        self.done = False
        self.warnings: list[str] = []
        self._gradients_seen = False
        self._finite = True
        self._vain = 0  # steps at a learning rate of 0
        self._before: list[tuple[Tensor, Tensor, Tensor]] | None = None

    @torch.no_grad()
    def after_backward(self, loss: float | Tensor | None = None) -> None:
        """Before the optimizer's step: `FirstStepError` where nothing has a gradient.

        `loss` of the step: one of 0 (all weights 0, a hinge that is met) may have gradients of 0.
        """
        if self.done:
            return
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        # DeepSpeed keeps gradients elsewhere; FSDP1 leaves a rank without some of the weights.
        if any(hasattr(p, "ds_id") or p.numel() == 0 for _, p in trained):
            self.done = True
            return
        if not self._gradients_seen:
            self._check_gradients(trained, loss)
            self._gradients_seen = True
        live = [(p, p.grad) for _, p in trained if p.grad is not None]
        self._before = [(p, _some(p).clone(), _some(grad) != 0) for p, grad in live]
        sums = [_some(grad).sum().float().cpu() for _, grad in live]
        self._finite = bool(torch.stack(sums).isfinite().all()) if sums else True

    def _check_gradients(
        self, trained: list[tuple[str, nn.Parameter]], loss: float | Tensor | None
    ) -> None:
        if not trained:
            raise FirstStepError(f"nothing is trained: {cause_of(self.model)}")
        live = [(n, p) for n, p in trained if p.grad is not None]
        norms = [_local(p.grad.abs().max()).float().cpu() for _, p in live if p.grad is not None]
        alive = {n for (n, _), norm in zip(live, norms, strict=True) if bool(norm)}
        if live and not alive and (loss is None or float(loss) == 0):
            self.warnings.append(
                "every gradient of the first step is 0: its loss is 0 or flat there (rows of "
                "weight 0, or a loss that has nothing left to ask)"
            )
            return
        if not alive:
            raise FirstStepError(
                f"after the first backward no trainable weight has a gradient: "
                f"{cause_of(self.model)}" + _unless(self.opt_out)
            )
        silent = [n for n, _ in trained if n not in alive and not self._may_be_silent(n)]
        head = self._head_names()
        trunk = [n for n, _ in trained if n not in head]
        if trunk and not alive & set(trunk):
            raise FirstStepError(
                "after the first backward the head alone has a gradient: it is detached from the "
                "model below it (a no_grad or detach(), or frozen inputs under gradient "
                "checkpointing)" + _unless(self.opt_out)
            )
        if silent:
            shown = ", ".join(silent[:4]) + (f" and {len(silent) - 4} more" if silent[4:] else "")
            self.warnings.append(
                f"after the first backward {len(silent)} of {len(trained)} trainable weights have "
                f"no gradient, or one of zeros: {shown}"
            )

    def _head_names(self) -> set[str]:
        head = base_model_of(self.model).get_output_embeddings()
        mine = {id(p) for p in head.parameters()} if head is not None else set()
        return {n for n, p in self.model.named_parameters() if id(p) in mine}

    def _may_be_silent(self, name: str) -> bool:
        """LoRA's A, while B is zero; experts that no token went to; a key's bias, which softmax
        does not see."""
        quiet = ("lora_A", "lora_embedding_A", "experts", "k_proj.bias", "lora_magnitude")
        return any(part in name for part in quiet)

    @torch.no_grad()
    def after_step(
        self,
        optimizer: Any,
        held: Container[int] | None = None,
        schedule: Any = None,
        left: int | None = None,
    ) -> None:
        """`FirstStepError` where no weight has moved; a warning where few have.

        `held`: ids of the weights that this optimizer is to move, where there are others.
        `schedule` of its learning rate, with so many steps `left` (None: it is not known).
        """
        if self.done or self._before is None:
            return
        before, self._before = self._before, None
        if held is not None:
            before = [entry for entry in before if id(entry[0]) in held]
        mine = {id(p) for p, _, _ in before}
        groups = [g for g in optimizer.param_groups if mine & {id(p) for p in g["params"]}]
        groups = groups or optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if not any(rates):
            if not any(group.get("initial_lr", group["lr"]) for group in groups):
                raise FirstStepError(
                    "the learning rate is 0: no step moves a weight. Set learning_rate above 0"
                    + _unless(self.opt_out)
                )
            self._vain += 1
            later = _later_rate(schedule, left)
            if later is False or (later is None and self._vain > 1):
                raise FirstStepError(
                    "the learning rate is 0 by its schedule, now and later: no step moves a "
                    "weight. Shorten the warm-up, train for more steps, or mend the schedule"
                    + _unless(self.opt_out)
                )
            return  # the warm-up begins at 0: the next step will tell
        if getattr(optimizer, "step_was_skipped", False):
            return  # a gradient scaler looks for its scale
        if not self._finite and all(bool((_some(p) == b).all()) for p, b, _ in before):
            return  # the same, of a scaler that does not say so
        self.done = True
        counts = [torch.stack([((_some(p) != b) & g).sum(), g.sum()]).cpu() for p, b, g in before]
        total = torch.stack(counts).sum(0) if counts else torch.zeros(2, dtype=torch.int64)
        moved, wanted = _over_ranks(total, [p for p, _, _ in before]).tolist()
        if wanted and moved < MOVED * wanted:
            self._too_small(moved / wanted, max(rates), before[0][0].dtype)

    def _too_small(self, share: float, rate: float, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        if dtype in _NARROW:
            text = (
                f"the first step moved {share:.1%} of the weights that have a gradient (sampled): "
                f"at learning_rate {rate:g} most updates are too small for {name} and are lost. "
                "Train with --dtype float32 --bf16 true (fp32 weights, bf16 arithmetic) or with a "
                "larger learning_rate"
            )
        else:
            text = (
                f"the first step moved {share:.1%} of the weights that have a gradient (sampled): "
                f"the optimizer does not hold them, or learning_rate {rate:g} is too small for "
                f"{name}"
            )
        if share == 0:
            raise FirstStepError(text + _unless(self.opt_out))
        self.warnings.append(text)


def _later_rate(schedule: Any, left: int | None) -> bool | None:
    """Whether a later step has a learning rate, by the schedule's functions; None: unknown."""
    if left is not None and left <= 0:
        return False
    inner = getattr(schedule, "scheduler", None)  # accelerate's is around it, with steps of its own
    if inner is not None:
        schedule, left = inner, None
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return None
    ahead = min(_AHEAD, left or _AHEAD)
    pairs = list(zip(schedule.lr_lambdas, schedule.base_lrs, strict=True))
    places = range(schedule.last_epoch + 1, schedule.last_epoch + 1 + ahead)
    try:
        return any(base * function(k) != 0 for k in places for function, base in pairs)
    except Exception:  # a function of the user's, asked beyond what it knows
        return None


def _unless(opt_out: str) -> str:
    return f". If this is meant: {opt_out}" if opt_out else ""


def _over_ranks(counts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The counts of all ranks, where weights are in shards."""
    meshes = [x.device_mesh for x in weights if hasattr(x, "device_mesh")]
    if not meshes:
        return counts
    counts = counts.to(meshes[0].device_type)
    torch.distributed.all_reduce(counts)
    return counts.cpu()


def _local(x: Tensor) -> Tensor:
    full = getattr(x, "full_tensor", None)
    return full() if full is not None else x


def _some(x: Tensor) -> Tensor:
    """Every n-th of the elements, `_SAMPLE` of them; of a sharded weight, of this rank's part."""
    local = getattr(x, "to_local", None)
    x = (local() if local is not None else x).detach().reshape(-1)
    return x[:: max(x.numel() // _SAMPLE, 1)]
