"""Second derivatives and forward mode: right, or an error that names the way out; never dropped."""

import pytest
import torch
from linear_cases import B, H, T, V, labels_of, tensors

import dpo_kernels as dk

ALL = ("torch", "cpu", "triton", "cuda")
WAY_OUT = 'backend="torch"'


def second(loss_of, leaves, wrt):
    """d/d leaves[wrt] of the summed gradients of loss_of(*leaves) + sum of squares: the added part
    keeps a graph of its own, in which a constant gradient of ours would go unnoticed."""
    x = [t.detach().clone().requires_grad_() for t in leaves]
    loss = loss_of(*x) + sum((t**2).sum() for t in x)
    first = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in first), x[wrt])[0]


def right_or_refused(loss_of, exact, leaves):
    """True where right, False where refused, for each leaf alike."""
    outcomes = set()
    for wrt in range(len(leaves)):
        expected = second(exact, [t.double() for t in leaves], wrt)
        try:
            got = second(loss_of, leaves, wrt)
        except RuntimeError as error:
            assert WAY_OUT in str(error), error
            outcomes.add(False)
        else:
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
            outcomes.add(True)
    assert len(outcomes) == 1
    return outcomes.pop()


class TestPreferenceLoss:
    """C1: the values of the report, and every loss: here second derivatives are right."""

    @pytest.mark.parametrize("backend", ALL)
    def test_the_report(self, backend):
        c = torch.tensor([-3.0, -4.0], requires_grad=True)
        loss = dk.preference_loss(c, torch.tensor([-5.0, -4.5]), beta=1.0, backend=backend).loss
        (g,) = torch.autograd.grad(loss + (c**2).sum(), c, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), c)
        torch.testing.assert_close(h, torch.tensor([2.0525, 2.1175]), rtol=1e-4, atol=0)

    @pytest.mark.parametrize("backend", ALL[1:])
    @pytest.mark.parametrize(
        "name", [n for n, row in dk.losses.TABLE.items() if n != "beta_dpo" and not row.needs_kl]
    )
    def test_every_loss(self, name, backend):
        row = dk.losses.get(name)
        lengths = {
            "chosen_lengths": torch.tensor([3, 7, 1]),
            "rejected_lengths": torch.tensor([5, 2, 6]),
        }
        options = {"loss_type": name, **lengths}
        if row.smoothing is not None:
            options["label_smoothing"] = 0.1
        references = tuple(torch.randn(2, 3) - 9) if row.reference or name == "sft" else ()
        offset = row.name == "odpo"

        def call(backend):
            def loss_of(chosen, rejected, beta, weights, *shift):
                given = {"offset": shift[0]} if offset else {}
                out = dk.preference_loss(
                    chosen,
                    rejected,
                    *references,
                    beta=beta,
                    weights=weights,
                    backend=backend,
                    **given,
                    **options,
                )
                return out.loss

            return loss_of

        leaves = [torch.randn(3) - 9, torch.randn(3) - 9, torch.rand(3) + 0.2, torch.rand(3)]
        leaves += [torch.rand(3)] if offset else []
        leaves = [x.double() for x in leaves]
        assert right_or_refused(call(backend), call("torch"), leaves)


def refused(loss_of, exact, leaves):
    assert not right_or_refused(loss_of, exact, leaves)


@pytest.mark.parametrize("backend", ALL[1:])
@pytest.mark.parametrize("which", ("sum", "none", "loss", "learned", "kl"))
def test_from_logits(which, backend):
    if (which, backend) == ("kl", "cuda"):
        pytest.skip("no kernel of its own")
    labels = torch.randint(0, 7, (4, 5))
    ref, beta = torch.randn(4, 5, 7), torch.rand(2)

    def call(backend):
        def loss_of(logits, beta=beta):
            if which in ("sum", "none"):
                return dk.sequence_logps(logits, labels, reduction=which, backend=backend).sum()
            name = "tdpo1" if which == "kl" else "sigmoid"
            options = {"beta": beta if which == "learned" else 0.1}
            given = ref.to(logits.dtype)
            return dk.fused_dpo_loss(
                logits, labels, given, loss_type=name, backend=backend, **options
            ).loss

        return loss_of

    leaves = [torch.randn(4, 5, 7), *([beta] if which == "learned" else [])]
    refused(call(backend), call("torch"), leaves[:1])
    if which == "learned":  # what follows the log-probs is right, the log-probs themselves refuse
        x = leaves[0].requires_grad_()
        b = beta.requires_grad_()
        for loss_of in (call(backend), call("torch")):
            (g,) = torch.autograd.grad(loss_of(x, b), b, create_graph=True)
            torch.autograd.grad(g.sum(), x)


@pytest.mark.parametrize("backend", ALL)
def test_in_place_raises_before_it_writes(backend):
    base = torch.randn(4, 5, 7, requires_grad=True)
    x = base * 1.0
    loss = dk.fused_dpo_loss(
        x, torch.randint(0, 7, (4, 5)), reference_free=True, inplace=True, backend=backend
    ).loss
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.autograd.grad(loss + (x**2).sum(), base, create_graph=True)
    assert torch.equal(x, base)


@pytest.mark.parametrize("backend", ALL[1:3])
@pytest.mark.parametrize("lora", (False, True))
@pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo2"))
@pytest.mark.parametrize("strategy", ("streaming", "frozen", "recompute"))
def test_linear(strategy, loss_type, lora, backend):
    hidden, weight, _, ref_hidden, ref_weight = tensors()
    labels, adapter = labels_of(), (torch.randn(3, H), torch.randn(V, 3))
    beta = torch.rand(B) + 0.1
    trained = strategy != "frozen"
    leaves = [hidden, *([weight] if trained else []), *(adapter[:1] if lora else [])]
    leaves += [beta] if strategy == "streaming" else []

    def call(backend, strategy):
        def loss_of(hidden, *rest):
            rest = list(rest)
            wide = hidden.dtype
            W = rest.pop(0) if trained else weight.to(wide)
            low = rest.pop(0) if lora else None
            given = {"lora": (low, adapter[1].to(wide), 0.5)} if lora else {}
            return dk.fused_linear_dpo_loss(
                hidden,
                W,
                labels,
                ref_hidden=ref_hidden.to(wide),
                ref_weight=ref_weight.to(wide),
                loss_type=loss_type,
                beta=rest[0] if rest else 0.1,
                strategy=strategy,
                backend=backend,
                **given,
            ).loss

        return loss_of

    refused(call(backend, strategy), call("torch", None), leaves)


def test_the_gates_keep_no_input_and_change_no_gradient():
    from dpo_kernels.ops.derivatives import once

    x = torch.randn(3, 4, requires_grad=True)
    beta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y, none, b = once(x, None, beta)
    assert none is None and y.data_ptr() == x.data_ptr()
    (key,) = y.grad_fn.saved_tensors
    assert key.untyped_storage().nbytes() == 0
    grads = torch.autograd.grad((y.double() * b).sum(), (x, beta))
    assert torch.equal(grads[0], torch.full_like(x, 0.5))
    torch.testing.assert_close(grads[1], x.double().sum())


def calls():
    """Each public function of one differentiable tensor, by name."""
    labels, logps = labels_of(), torch.randn(B)
    hidden, weight, _, ref_hidden, _ = tensors()
    ref = torch.randn(2 * B, T, V)
    free = {"reference_free": True}
    return {
        "logits": (
            torch.randn(2 * B, T, V),
            lambda x, **b: dk.fused_dpo_loss(x, labels, **free, **b).loss,
        ),
        "kl": (
            torch.randn(2 * B, T, V),
            lambda x, **b: dk.fused_dpo_loss(x, labels, ref, loss_type="tdpo1", **b).loss,
        ),
        "sequence": (
            torch.randn(2 * B, T, V),
            lambda x, **b: dk.sequence_logps(x, labels, **b).sum(),
        ),
        "hidden": (
            hidden,
            lambda x, **b: dk.fused_linear_dpo_loss(x, weight, labels, **free, **b).loss,
        ),
        "weight": (
            weight,
            lambda x, **b: dk.fused_linear_dpo_loss(hidden, x, labels, **free, **b).loss,
        ),
        "linear kl": (
            weight,
            lambda x, **b: (
                dk.fused_linear_dpo_loss(
                    hidden, x, labels, ref_hidden=ref_hidden, loss_type="tdpo1", **b
                ).loss
            ),
        ),
        "linear sequence": (
            hidden,
            lambda x, **b: dk.linear_sequence_logps(x, weight, labels, **b).sum(),
        ),
        "preference": (logps, lambda x, **b: dk.preference_loss(x, logps + 1, **b).loss),
        "beta": (
            torch.rand(B),
            lambda x, **b: (
                dk.fused_linear_dpo_loss(hidden, weight, labels, beta=x, **free, **b).loss
            ),
        ),
    }


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize("backend", ALL[:3])
def test_forward_mode(name, backend):
    """A tangent or an error, under forward_ad as under torch.func; grad of torch.func likewise."""
    x, f = calls()[name]
    forward = torch.autograd.forward_ad
    if backend == "torch":
        with forward.dual_level():
            tangent = forward.unpack_dual(f(forward.make_dual(x, x), backend=backend)).tangent
        expected = torch.func.jvp(lambda x: f(x, backend=backend), (x,), (x,))[1]
        torch.testing.assert_close(tangent, expected)
        return
    for leaf in (x, x.clone().requires_grad_()):
        with forward.dual_level(), pytest.raises(RuntimeError, match=WAY_OUT):
            f(forward.make_dual(leaf, x), backend=backend)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.func.jvp(lambda x: f(x, backend=backend), (x,), (x,))
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.func.grad(lambda x: f(x, backend=backend))(x)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.func.vmap(torch.func.grad(lambda x: f(x, backend=backend)))(torch.stack([x, x]))
