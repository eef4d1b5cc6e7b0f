"""Looking at a policy without training it: held-out pairs, and what must hold before step 1."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from ..data import TokenRow, sequences_of
from ..data.sequences import ENDING
from ..models.attached import HeadOutput
from ..models.forward import run_pairs
from ..models.step0 import WrongReference
from ..models.step0 import check_step0 as check_same
from ..models.step1 import FirstStepError, check_ends, check_scored, eos_ids_of
from ..models.structure import deterministic
from .config import DPOTrainConfig
from .console import Console
from .groups import Groups
from .model import Policy
from .optim import TrainingError
from .reference import PairData
from .sft import evaluate_sft
from .step_batches import begin, of_one_length
from .step_loss import chosen_tokens, loss_of
from .step_parts import Parts, idle_pair, tokens_of


@torch.no_grad()
def evaluate(
    policy: Policy,
    data: PairData,
    config: DPOTrainConfig,
    console: Console,
    what: str,
    groups: Groups | None = None,
    margins: list[float] | None = None,
) -> dict[str, float]:
    """Loss and metrics of held-out pairs, names prefixed `eval_`; `margins` takes the pairs'."""
    loss = loss_of(policy, config, groups)
    loss.function.eval()
    meter, n, size = loss.meter(), len(data.pairs), config.per_device_eval_batch_size
    tokens, beta = chosen_tokens(data.pairs), config.beta if data.reference else None
    batches = [
        part
        for start in range(0, n, size)
        for part in of_one_length(range(start, min(start + size, n)), data.pairs)
    ]
    parts = Parts.whole_batches(policy.ranks, batches, lambda i: tokens_of(data.pairs[i]))
    table = loss.table(n) if policy.ranks.many else None
    began = time.perf_counter()

    def note(out: HeadOutput) -> None:
        if margins is not None and out.rewards is not None and out.pair_logps is not None:
            margins.extend((out.rewards[0] - out.rewards[1]).tolist())
        meter.add(out, beta)

    with deterministic(policy.model):
        begin(loss, data, range(n), config)
        for part in console.progress(parts, f"evaluation {what}", parts.rounds, "batches"):
            policy.ranks.at(f"evaluation {what}")
            if part is None:
                idle_pair(policy, data.pairs[0])
                continue
            out, _ = loss(data, part, n, tokens)
            if table is None:
                note(out)
            else:
                table.put_out(part, out)
    policy.sharded.rest()
    if table is not None:
        table.reduce()
        note(table.out())
    result = meter.result()
    if data.conversations:
        result["sft_loss"] = evaluate_sft(policy, data.conversations, size)["eval_loss"]
    result["runtime"] = time.perf_counter() - began
    return {f"eval_{name}": value for name, value in result.items()}


@torch.no_grad()
def check_step0(
    policy: Policy,
    data: PairData,
    config: DPOTrainConfig,
    indices: Sequence[int],
    say: Callable[[str], None] = lambda text: None,
) -> tuple[float, float]:
    """(loss, loss at zero log-ratios) of one batch before the first step; they must be equal.

    The policy is the reference and its noise is off, so every log-ratio is zero: for `sigmoid` the
    loss is log 2. Anything else means another reference, or kernels that disagree. Of a reference
    that was named it may be meant, and is said.
    """
    loss = loss_of(policy, config)
    loss.function.eval()
    indices = of_one_length(indices, data.pairs)[0]
    devices = [policy.device] if policy.device.type == "cuda" else []
    # Of the random numbers that the steps draw (beta-DPO's) it takes none.
    with torch.random.fork_rng(devices), deterministic(policy.model), policy.autocast():
        out = run_pairs(policy.model, {}, loss.task(data, indices), 0.0, first=True)
    policy.sharded.rest()
    assert out.loss is not None and out.zero_loss is not None
    logps = out.logps if out.pair_logps is None else out.pair_logps
    assert out.rewards is not None and logps is not None
    if data.reference:
        options = config.loss_options()
        # What 8-bit products round depends on the rows beside a row.
        dtype = torch.float16 if config.load_in_8bit else policy.dtype
        try:
            check_same(
                out.rewards,
                logps,
                options,
                dtype,
                loss=out.loss,
                zero_loss=out.zero_loss,
            )
        except WrongReference as error:
            if not config.reference_name:
                raise TrainingError(str(error)) from None
            say(
                f"warning: step 0: the policy is another than its reference "
                f"({config.reference_name}): loss {float(out.loss):.6f}, {float(out.zero_loss):.6f}"
                " at zero log-ratios. A wrong reference, unless the policy was trained from it"
            )
    return float(out.loss), float(out.zero_loss)


def check_first_rows(policy: Policy, pairs: Sequence[TokenRow]) -> None:
    """The first batch has tokens that are scored, and its completions end once."""
    sequences = sequences_of(pairs)
    ends = [[s.ids[t] for t in list(s.scored)[-ENDING:]] for s in sequences]
    eos = eos_ids_of(policy.model, policy.tokenizer)
    try:
        check_scored([s.num_scored for s in sequences])
        check_ends(ends, eos, [s.source for s in sequences], "--check_first_step false")
    except FirstStepError as error:
        raise TrainingError(str(error)) from None
