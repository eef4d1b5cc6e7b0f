"""drop_common_prefix: tokens that both completions start with cancel, and may be left out."""

import pytest
import torch
from linear_cases import IGNORE, B, T, V, labels_of, tensors

import dpo_kernels as dk


def ruled_out(logits):
    logits[..., V - 1] = -torch.inf
    return logits


class TestCommonPrefix:
    """Tokens that both completions start with cancel, and may be left out."""

    def batch(self):
        hidden, weight, _, *ref = tensors()
        labels = torch.randint(0, V, (2 * B, T))
        labels[:, :3] = IGNORE  # the prompt, at other places in pair 1
        labels[B + 1, 3] = IGNORE
        same = {0: 2, 1: 3, 2: 6, 3: 0}  # scored tokens in common; pair 2: all of them
        for i, n in same.items():
            start, other = 3, 3 + (i == 1)
            labels[B + i, other : other + n] = labels[i, start : start + n]
            if n < 5:
                labels[B + i, other + n] = (labels[i, start + n] + 1) % V
            for x in (hidden, ref[0]):  # the same context: the same hidden state
                x[B + i, other - 1 : other + n] = x[i, start - 1 : start + n]
        return hidden, weight, ref, labels, same

    def test_which_tokens(self):
        from dpo_kernels.inputs.layout import Layout

        _, _, _, labels, same = self.batch()
        for packed in (False, True):
            cu = torch.arange(2 * B + 1) * T if packed else None
            y = labels.reshape(-1) if packed else labels
            layout = Layout.of(y, cu, shift=True, ignore_index=IGNORE, V=V)
            left = layout.without_common_prefix().scored_counts()
            expected = layout.scored_counts()
            for i, n in same.items():
                expected[[i, B + i]] -= n
            assert left.tolist() == expected.tolist()

    def test_a_hole_ends_it(self):
        from dpo_kernels.inputs.layout import Layout

        labels = torch.arange(8).repeat(2, 1)
        labels[:, 3] = IGNORE  # a tool's output, which may differ
        layout = Layout.of(labels, None, shift=False, ignore_index=IGNORE, V=V)
        assert layout.without_common_prefix().scored_counts().tolist() == [4, 4]
        labels[0, 3] = 3
        layout = Layout.of(labels, None, shift=False, ignore_index=IGNORE, V=V)
        assert layout.without_common_prefix().scored_counts().tolist() == [5, 4]

    @pytest.mark.parametrize("packed", (False, True))
    def test_another_context_is_not_dropped(self, packed):
        """C10: equal first tokens after prompts that differ do not cancel."""
        hidden, weight, ref, labels, _ = self.batch()
        hidden[B] = torch.randn(T, hidden.shape[-1])  # the rejected of pair 0 had another prompt
        given = {"ref_hidden": ref[0], "ref_weight": ref[1]}
        logits = {"logits": hidden @ weight.T, "ref_logits": ref[0] @ ref[1].T}
        if packed:
            given["ref_hidden"], hidden = (x.flatten(0, 1) for x in (ref[0], hidden))
            logits = {k: x.flatten(0, 1) for k, x in logits.items()}
            labels = labels.flatten()
        how = {"cu_seqlens": torch.arange(2 * B + 1) * T} if packed else {}
        full, less = (
            dk.fused_linear_dpo_loss(hidden, weight, labels, drop_common_prefix=d, **given, **how)
            for d in (False, True)
        )
        torch.testing.assert_close(full.loss, less.loss)
        torch.testing.assert_close(full.chosen_logps[0], less.chosen_logps[0])
        assert full.chosen_logps[1] < less.chosen_logps[1]
        again = dk.fused_dpo_loss(labels=labels, drop_common_prefix=True, **logits, **how)
        torch.testing.assert_close(again.loss, less.loss)

    @pytest.mark.parametrize("packed", (False, True))
    def test_logits_that_lie_far_out_or_are_ruled_out(self, packed):
        """C10: another prompt does not show in what all logits have in common, nor beside -inf."""
        torch.manual_seed(1)
        labels = torch.tensor([[IGNORE, 1, 2, 3], [IGNORE, 1, 2, 4]])
        how = {"reference_free": True}
        for change in (lambda x: x + 100.0, lambda x: x - 1e4, ruled_out):
            logits = change(torch.randn(2, 4, V))
            y, x = labels, logits
            if packed:
                how["cu_seqlens"] = torch.tensor([0, 4, 8])
                y, x = labels.flatten(), logits.flatten(0, 1)
            full, less = (
                dk.fused_dpo_loss(x, y, drop_common_prefix=drop, **how) for drop in (False, True)
            )
            torch.testing.assert_close(full.chosen_logps, less.chosen_logps)
            torch.testing.assert_close(full.loss, less.loss)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"loss_type": "ipo_sum"},
            {"loss_type": "rdpo"},
            {"loss_type": "aot"},
            {"loss_type": ["robust", "hinge"]},
        ],
        ids=str,
    )
    def test_nothing_changes_but_the_log_probs(self, options):
        hidden, weight, ref, labels, _ = self.batch()
        results = []
        for drop in (False, True):
            x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = dk.fused_linear_dpo_loss(
                x,
                w,
                labels,
                ref_hidden=ref[0],
                ref_weight=ref[1],
                drop_common_prefix=drop,
                **options,
            )
            # The trunk sees the sum of the gradients of rows that are one state: 0 for these.
            results.append((out, *torch.autograd.grad(out.loss, (x, w))))
        (a, da, wa), (b, db, wb) = results
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.margins, b.margins, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wa, wb, rtol=1e-4, atol=1e-6)
        for i in range(B):
            torch.testing.assert_close(
                (da[i] + da[B + i]).sum(0), (db[i] + db[B + i]).sum(0), rtol=1e-4, atol=1e-6
            )
        assert (a.chosen_logps[:3] < b.chosen_logps[:3]).all() and b.chosen_logps[2] == 0

    def test_from_logits(self):
        hidden, weight, ref, labels, _ = self.batch()
        logits, ref_logits = hidden @ weight.T, ref[0] @ ref[1].T
        full = dk.fused_dpo_loss(logits, labels, ref_logits)
        less = dk.fused_dpo_loss(logits, labels, ref_logits, drop_common_prefix=True)
        torch.testing.assert_close(full.loss, less.loss)
        tokens = dk.sequence_logps(ref_logits, labels, reduction="none")
        same = dk.fused_dpo_loss(logits, labels, ref_logps=tokens, drop_common_prefix=True)
        torch.testing.assert_close(same.rejected_rewards, less.rejected_rewards)

    @pytest.mark.parametrize(
        "options",
        [
            {"loss_type": "ipo"},
            {"loss_type": "nca_pair"},
            {"loss_type": "rpo"},
            {"loss_type": ["sigmoid", "sft"]},
            {"loss_type": "aot_unpaired"},
            {"loss_type": "dpop"},
            {"loss_type": "apo_down"},
            {"sft_weight": 0.1},
            {"ld_alpha": 0.5},
            {"use_weighting": True},
            {"f_divergence_type": "forward_kl"},
            {"ref_logps": torch.zeros(2 * B)},
        ],
        ids=str,
    )
    def test_refused_where_they_do_not_cancel(self, options):
        logits, labels = torch.randn(2 * B, T, V), labels_of()
        given = {"ref_logits": logits} if "ref_logps" not in options else {}
        with pytest.raises(ValueError, match="drop_common_prefix"):
            dk.fused_dpo_loss(logits, labels, drop_common_prefix=True, **given, **options)
