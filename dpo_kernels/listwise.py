"""`plackett_luce`: K completions of a prompt, ranked from the best to the last.

    L = -sum_{k=1}^{K-1} [ beta a_k - logsumexp_{j >= k} beta a_j ],   a = log pi / pi_ref

(arXiv 2305.18290, appendix A.3), the mean over prompts; K = 2 is `sigmoid`. Sequence k B + i is the
completion of rank k of prompt i. The front functions of pairs come here for it, with
`num_completions=K`; the log-probs are from the same ops, what is here is O(sequences), in fp64.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .inputs import checks
from .loss.from_pairs import DPOOutput, check_row_weights, ignored
from .loss_values import check_count
from .losses import LISTWISE as NAME


def plackett_luce_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    *,
    num_completions: int = 2,
    beta: float = 0.1,
    weights: Tensor | None = None,
    reference_free: bool = False,
    reduction: str = "mean",
    num_pairs: float | Tensor | None = None,
    loss_type: Any = NAME,
) -> DPOOutput:
    """From log-probs [K B] (rank k of prompt i at k B + i) of the policy and the reference.

    Returns `DPOOutput` with chosen the best and rejected the last of each prompt. `weights` [B] of
    the prompts; `num_pairs` divides the sum in place of B.

    Raises:
        ValueError, TypeError: a wrong argument, named.
    """
    K = num_completions
    if isinstance(K, bool) or not isinstance(K, int):
        raise TypeError(f"num_completions must be an int, got {type(K).__name__}")
    if K < 2:
        raise ValueError(f"num_completions must be at least 2, got {K}")
    checks.floating("logps", logps)
    if logps.dim() != 1 or not len(logps) or len(logps) % K:
        raise ValueError(
            f"{NAME} with num_completions={K} needs K B sequences, got {list(logps.shape)}"
        )
    if (ref_logps is None) != reference_free:
        raise ValueError("give exactly one reference (ref_logps, ...) and reference_free=True")
    if ref_logps is not None:
        checks.floating("ref_logps", ref_logps)
        checks.shape("ref_logps", ref_logps, tuple(logps.shape), "[K B], as the sequences")
        checks.same_device("ref_logps", ref_logps, "logps", logps)
    checks.positive("beta", beta, "a positive finite number")
    checks.choice("reduction", reduction, ("mean", "none"))
    checks.flag("reference_free", reference_free)
    check_count("num_pairs", num_pairs)
    policy = logps.double().view(K, -1)  # [K, B]
    B = policy.shape[1]
    ratio = policy if ref_logps is None else policy - ref_logps.detach().double().view(K, -1)
    scores = beta * ratio
    loss = _per_prompt(scores)
    if weights is not None:
        check_row_weights(weights, B, "one for each prompt", logps)
        weights = weights.double()
        left_out = ignored(weights, loss)
        loss = weights * _per_prompt(torch.where(left_out, 0.0, scores))
    if reduction == "mean":
        loss = loss.sum() / (B if num_pairs is None else num_pairs)
    dtype = torch.float64 if logps.dtype == torch.float64 else torch.float32
    rewards = scores.detach()
    margins = rewards[0] - rewards[-1]
    rest = (policy[0], policy[-1], rewards[0], rewards[-1], margins, margins > 0)
    return DPOOutput(loss.to(dtype), *(x.detach().to(dtype) for x in rest))


def _per_prompt(scores: Tensor) -> Tensor:
    """[B] losses of beta times the log-ratios [K, B]."""
    # logsumexp over the ranks from k on: a running one from the last.
    tails = scores.flip(0).logcumsumexp(0).flip(0)
    return (tails - scores)[:-1].sum(0)


def from_scored(
    found: Any, reference: Tensor | None, stats: tuple[str, ...], options: dict[str, Any]
) -> DPOOutput:
    """The loss from what `sequence_logps` gave: log-probs, with statistics a pair."""
    logps, told = found if stats else (found, {})
    known = inspect.signature(plackett_luce_loss).parameters
    checks.names(options, [name for name in known if "logps" not in name], "loss option")
    return plackett_luce_loss(logps, reference, **options).told(None, told)


def scoring(given: dict[str, Any]) -> dict[str, Any]:
    """Those that score K completions, of the arguments that are given for pairs."""
    if given["drop_common_prefix"]:  # what K completions share does not cancel pair by pair
        raise ValueError(f"drop_common_prefix has no meaning for {NAME!r}")
    if given.get("strategy") is not None:
        raise ValueError(f"strategy={given['strategy']!r} has no meaning for {NAME!r}")
    of_pairs = ("drop_common_prefix", "strategy")
    return {name: value for name, value in given.items() if name not in of_pairs}
