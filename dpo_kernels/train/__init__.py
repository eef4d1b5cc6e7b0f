"""The thin training loop: a causal LM, preference pairs, reference log-probs computed once, AdamW.

    config -> model (trunk, head) -> data -> reference -> loop -> metrics, plot, saved model

The maths is not here: every loss is `dpo_kernels.fused_linear_dpo_loss` over the rows that a
`ScoredBatch` names. Nothing imports transformers or matplotlib until it is called.
"""

from .config import DPOTrainConfig, UserError, load_config

__all__ = ["DPOTrainConfig", "UserError", "load_config"]
