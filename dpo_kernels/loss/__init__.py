"""From log-probs to the loss: sums of sequences, pairs, and pairs streamed through a head."""
