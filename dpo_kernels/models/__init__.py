"""What is known of causal language models, once: the training loop and every integration are thin
over this room.

    attached       a model's own forward that ends in the fused head
    forward        the step of a batch through it: loss, log-probs, statistics, the noiseless step
    structure      what wraps a model, its trunk, its eval mode
    lm_head        the head's weight, bias, adapter and scales, whole on this rank
    experts        the load-balancing loss of a mixture of experts
    layouts        padded batches in, packed segments inside, states back where they were
    layout_check   the first batch in a layout, beside padded rows
    segment_attention, segment_kernels   attention by segment under transformers' interface
    references     which losses need a reference, and the reference below an adapter
    head_check, step0   the two checks before the first step
    step1, falling, nonfinite   what is looked at around the first step, and later
    reference_cache     the reference's log-probs on disk, by content
    loading, versions   checkpoints (GGUF, adapters), and what releases of transformers changed
"""
