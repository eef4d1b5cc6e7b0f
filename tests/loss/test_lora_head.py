"""A LoRA adapter on the head: weight + scaling * B @ A, never formed."""

import pytest
import torch
from linear_cases import BUDGETS, H, V, close, labels_of, tensors

import dpo_kernels as dk


class TestLora:
    """weight + scaling * B @ A, never formed."""

    @pytest.mark.parametrize(
        ("trained", "strategy"),
        [
            ("hidden A B", "streaming"),
            ("hidden A B", "recompute"),
            ("hidden A", "frozen"),
            ("hidden weight bias A B", "streaming"),
            ("A B", "recompute"),
            ("", "score"),
        ],
    )
    def test_is_the_sum(self, trained, strategy):
        hidden, weight, bias, *ref = tensors()
        names = ("hidden", "weight", "bias", "A", "B")
        values = [hidden, weight, bias, torch.randn(3, H) * 0.3, torch.randn(V, 3) * 0.3]
        mine = dict(zip(names, [v.clone() for v in values], strict=True))
        wide = {k: v.double() for k, v in mine.items()}
        for name in trained.split():
            mine[name].requires_grad_(), wide[name].requires_grad_()
        labels = labels_of()
        options = {"logit_softcap": 7.0, "temperature": 1.2, "logit_scale": 0.9}
        out = dk.fused_linear_dpo_loss(
            mine["hidden"],
            mine["weight"],
            labels,
            bias=mine["bias"],
            lora=(mine["A"], mine["B"], 0.5),
            ref_hidden=ref[0],
            strategy=strategy,
            memory_budget=BUDGETS["tight"],
            **options,
        )
        total = wide["weight"] + 0.5 * wide["B"] @ wide["A"]
        # The reference is the head without its adapter.
        reference = ref[0].double() @ wide["weight"].detach().T + wide["bias"].detach()
        expected = dk.fused_dpo_loss(
            wide["hidden"] @ total.T + wide["bias"], labels, reference, **options
        )
        assert out.strategy == strategy
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(out.margins.double(), expected.margins, rtol=1e-5, atol=1e-5)
        if trained:
            out.loss.backward()
            expected.loss.backward()
        for name in trained.split():
            close(mine[name].grad, wide[name].grad)

    def test_sequence_logps_and_torch_backend(self):
        hidden, weight, *_ = tensors()
        A, up, labels = torch.randn(3, H), torch.randn(V, 3), labels_of()
        got = dk.linear_sequence_logps(hidden, weight, labels, lora=(A, up, 2.0))
        expected = dk.linear_sequence_logps(hidden, weight + 2.0 * up @ A, labels)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        plain = dk.linear_sequence_logps(
            hidden.double(), weight.double(), labels, lora=(A.double(), up.double(), 2.0)
        )
        torch.testing.assert_close(got.double(), plain, rtol=1e-5, atol=1e-5)

    def test_refused(self):
        hidden, weight, *_ = tensors()
        for lora, error, words in [
            ((torch.ones(3, H), torch.ones(V, 3)), TypeError, "lora must be"),
            (
                (torch.ones(3, H + 1), torch.ones(V, 3), 1.0),
                ValueError,
                r"lora\[0\] must have",
            ),
            ((torch.ones(3, H), torch.ones(V, 2), 1.0), ValueError, r"lora\[1\] must have"),
            ((torch.ones(3, H), torch.ones(V, 3), "1"), TypeError, "scaling"),
        ]:
            with pytest.raises(error, match=words):
                dk.linear_sequence_logps(hidden, weight, labels_of(), lora=lora)


class TestDhiddenIsRoundedOnce:
    """C3: with both its parts, so that parts that cancel leave no error and do not overflow."""

    @pytest.mark.parametrize("strategy", ("streaming", "recompute", "frozen", None))
    def test_fp16_does_not_overflow(self, strategy):
        hidden = torch.full((2, 2, 1), 1e-3).half().requires_grad_()
        weight = torch.tensor([[60000.0], [0.0]]).half()
        A, B = torch.ones(1, 1).half(), torch.tensor([[-59000.0], [0.0]]).half()
        if strategy in ("streaming", "recompute"):
            A.requires_grad_(), B.requires_grad_()
        backend = "torch" if strategy is None else "cpu"
        dk.fused_linear_dpo_loss(
            hidden,
            weight,
            torch.tensor([[0, 0], [1, 1]]),
            lora=(A, B, 1.0),
            loss_type="cal_dpo",
            beta=0.01,
            shift=False,
            reference_free=True,
            strategy=strategy,
            backend=backend,
        ).loss.backward()
        wide = hidden.detach().double().requires_grad_()
        dk.fused_linear_dpo_loss(
            wide,
            weight.double() + (B @ A).detach().double(),
            torch.tensor([[0, 0], [1, 1]]),
            loss_type="cal_dpo",
            beta=0.01,
            shift=False,
            reference_free=True,
        ).loss.backward()
        assert wide.grad.abs().max() > 1e4
        torch.testing.assert_close(hidden.grad.double(), wide.grad, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("trained", (False, True))
    @pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo1"))
    def test_bf16_parts_that_cancel(self, trained, loss_type):
        hidden, *_ = tensors(torch.bfloat16)
        labels, A, up = labels_of(), torch.randn(3, H), torch.randn(V, 3)
        weight = (torch.randn(V, H) * 0.05 - up @ A).bfloat16()
        ref = {"ref_hidden": torch.randn(hidden.shape).bfloat16(), "loss_type": loss_type}
        if trained:
            up.requires_grad_()
        hidden.requires_grad_()
        dk.fused_linear_dpo_loss(
            hidden, weight, labels, lora=(A, up, 1.0), beta=1.0, **ref
        ).loss.backward()
        wide = hidden.detach().double().requires_grad_()
        reference = ref["ref_hidden"].double() @ weight.double().T
        total = weight.double() + up.detach().double() @ A.double()
        dk.fused_dpo_loss(
            wide @ total.T, labels, reference, beta=1.0, loss_type=loss_type
        ).loss.backward()
        error = (hidden.grad.double() - wide.grad).square().mean().sqrt()
        assert error < 2.5e-3 * wide.grad.square().mean().sqrt()
