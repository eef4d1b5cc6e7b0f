"""Options mean the same in a list as alone, are true at 0, and are rounded once."""

import pytest
import torch
from linear_cases import B, labels_of, tensors

import dpo_kernels as dk
from dpo_kernels.losses import TABLE

NAMES = [name for name, row in TABLE.items() if not row.needs_kl]
N_W, N_L = torch.tensor([3, 7, 1, 4]), torch.tensor([5, 2, 6, 4])


def logps():
    return [-20 + 3 * torch.randn(4, dtype=torch.float64) for _ in range(4)]


def loss_of(names, values, backend=None, **options):
    torch.manual_seed(1)  # beta_dpo draws
    return dk.preference_loss(
        *values,
        chosen_lengths=N_W.to(values[0].device),
        rejected_lengths=N_L.to(values[0].device),
        loss_type=names,
        backend=backend,
        **options,
    )


def own_options(name):
    """One value, not the default, for each option the loss takes alone."""
    row = TABLE[name]
    options = {o: dk.losses._DEFAULTS[o] * 0.5 for o in row.options}
    if row.smoothing is not None:
        options["label_smoothing"] = 0.3
    if row.takes_offset(row.terms(dk.losses.LossOptions(label_smoothing=0.1))):
        options["offset"] = torch.tensor([0.1, -0.5, 0.0, 2.0])
    if row.f_divergence:
        options |= {"f_divergence_type": "js_divergence"}
    return options


@pytest.mark.parametrize("other", NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_in_a_list_as_alone(name, other):
    """C2: with every option that either takes, and a weight of 0 for the other, the list is the
    loss alone with its own options. What one of the two cannot have is refused."""
    values, mine = logps(), own_options(name)
    given = {**own_options(other), **mine}
    for option in ("offset", "f_divergence_type"):
        takers = [n for n in (name, other) if option in own_options(n) or n == "sft"]
        if option not in given or len(takers) == 2:
            continue
        with pytest.raises(ValueError, match=r"offset|f_divergence_type"):
            loss_of([other, name], values, **given)
        if option == "offset" and "odpo" in (name, other):
            return
        del given[option]
        mine.pop(option, None)
    if name == "sft":  # it reads neither: they are the other's
        mine.pop("f_divergence_type", None)
    alone = loss_of(name, values, **mine)
    listed = loss_of([other, name], values, loss_weights=[0.0, 1.0], **given)
    assert torch.equal(listed.loss, alone.loss)


def test_the_report():
    """C2: rdpo alone is .6779; with a smoothed sigmoid of weight 0 it was .6891."""
    values = logps()
    alone = loss_of("rdpo", values).loss
    for other in ("sigmoid", "robust", "simpo"):
        call = {"loss_weights": [0.0, 1.0], "label_smoothing": 0.3}
        assert torch.equal(loss_of([other, "rdpo"], values, **call).loss, alone)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.3 has no meaning for loss_type rdpo"):
        loss_of(["rdpo", "dpop"], values, label_smoothing=0.3)


class TestGradientsAtZero:
    @pytest.mark.parametrize("backend", ("torch", "cpu", "triton"))
    @pytest.mark.parametrize("name", [n for n in NAMES if n != "sft"])
    def test_of_weights(self, name, backend):
        """C6: d/dweights is the pair's loss over B, also where the weight is 0."""
        values = logps()
        options = own_options(name) if name in ("exo_pair", "odpo") else {}
        options = {k: v for k, v in options.items() if k in ("label_smoothing", "offset")}
        if name == "beta_dpo":
            options["beta_dpo_keep"] = 1.0
        slopes = []
        for w in ([0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]):
            w = torch.tensor(w, requires_grad=True)
            out = loss_of(name, values, backend, weights=w, **options)
            slopes.append(torch.autograd.grad(out.loss, w)[0])
        torch.testing.assert_close(*slopes)
        assert (slopes[0] != 0).any()

    @pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo1"))
    def test_of_weights_streamed(self, loss_type):
        hidden, weight, _, ref_hidden, _ = tensors()
        labels, slopes = labels_of(), []
        for how in ({"strategy": "streaming"}, {"backend": "torch"}):
            w = torch.zeros(B, requires_grad=True)
            out = dk.fused_linear_dpo_loss(
                hidden.requires_grad_(),
                weight,
                labels,
                ref_hidden=ref_hidden.detach(),
                loss_type=loss_type,
                weights=w,
                **how,
            )
            slopes.append(torch.autograd.grad(out.loss, w)[0])
        assert (slopes[0] != 0).all()
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("backend", ("torch", "cpu"))
    @pytest.mark.parametrize("bad", (float("nan"), float("inf"), -1e6))
    def test_a_bad_pair_of_weight_0_still_reaches_nothing(self, bad, backend):
        values = [x.clone().requires_grad_() for x in logps()[:2]]
        w = torch.tensor([0.0, 1.0, 1.0, 0.0], requires_grad=True)
        spoil = torch.tensor([bad, 0.0, 0.0, 0.0], dtype=torch.float64)
        chosen = values[0] + spoil
        out = loss_of("discopop", (chosen, values[1]), backend, weights=w)
        grads = torch.autograd.grad(out.loss, (*values, w))
        assert out.loss.isfinite() and all(g.isfinite().all() for g in grads)
        assert grads[0][0] == 0 and grads[1][0] == 0 and grads[2][3] != 0

    def test_of_offset_and_second_order(self):
        """A weight of 0 with a finite loss: the mixed derivative is the slope of the pair."""
        values = [x.clone().requires_grad_() for x in logps()]
        w = torch.zeros(4, requires_grad=True, dtype=torch.float64)
        offset = torch.zeros(4, requires_grad=True, dtype=torch.float64)
        for backend in ("torch", "cpu"):
            out = loss_of("sigmoid", values, backend, weights=w, offset=offset)
            (g,) = torch.autograd.grad(out.loss, offset, create_graph=True)
            (mixed,) = torch.autograd.grad(g.sum(), w)
            D = (values[0] - values[1] - values[2] + values[3]).detach()
            torch.testing.assert_close(mixed, torch.sigmoid(-0.1 * D) / 4)


class TestRoundedOnce:
    @pytest.mark.parametrize("backend", ("torch", "cpu"))
    def test_beta_of_lists(self, backend):
        """C10: the shares of the losses in d beta add up in fp64, and beta itself is widened."""
        values = logps()
        names = ["sigmoid", "ipo_sum", "hinge", "bco_pair", "nca_pair"]
        grads = []
        for dtype in (torch.float32, torch.float64):
            beta = torch.full((4,), 0.1).to(dtype).requires_grad_()
            out = loss_of(names, values, backend, beta=beta)
            grads.append(torch.autograd.grad(out.loss, beta)[0])
        assert torch.equal(grads[0], grads[1].float())

    def test_beta_of_chunks(self):
        hidden, weight, _, ref, _ = tensors()
        weight.requires_grad_()
        grads = []
        for dtype in (torch.float32, torch.float64):
            beta = torch.tensor(0.1).to(dtype).requires_grad_()
            out = dk.fused_linear_dpo_loss(
                hidden,
                weight,
                labels_of(),
                ref_hidden=ref,
                beta=beta,
                memory_budget=1 << 14,
                loss_type=["sigmoid", "ipo_sum", "hinge"],
            )
            torch.manual_seed(0)
            assert out.strategy == "streaming"
            grads.append(torch.autograd.grad(out.loss, beta)[0])
        assert grads[0].dtype == torch.float32

    @pytest.mark.parametrize("name", [n for n in NAMES if n != "exo_pair"])
    def test_fp32_beta_of_fp64_values(self, name):
        values = logps()
        options = {"offset": torch.ones(4)} if name == "odpo" else {}
        for beta in (torch.tensor(0.1), torch.full((4,), 0.1)):
            narrow, wide = (loss_of(name, values, beta=b, **options) for b in (beta, beta.double()))
            for a, b in zip(narrow, wide, strict=True):
                assert a.dtype == torch.float64 and torch.equal(a, b)

    @pytest.mark.parametrize("lora", (False, True))
    @pytest.mark.parametrize("loss_type", ("sigmoid", "tdpo1"))
    def test_the_torch_backend_under_autocast(self, loss_type, lora):
        """C4: hidden states and head are cast; their logits are not rounded again."""
        hidden, weight, _, ref_hidden, _ = (4 * x for x in tensors())
        options = {"ref_hidden": ref_hidden, "loss_type": loss_type}
        if lora:
            options["lora"] = (torch.randn(3, hidden.shape[-1]), torch.randn(weight.shape[0], 3), 1)
        with torch.autocast("cpu", torch.bfloat16):
            outs = [
                dk.fused_linear_dpo_loss(hidden, weight, labels_of(), backend=b, **options)
                for b in ("cpu", "torch")
                for _ in [torch.manual_seed(0)]
            ]
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("inplace", (False, True))
    @pytest.mark.parametrize("backend", ("torch", "cpu"))
    def test_logits_far_from_zero(self, backend, inplace):
        """C5: no worse than torch's own cross entropy, whatever is added to all logits."""
        logits = torch.randn(2, 6, 500) + 1e4
        labels = torch.randint(0, 500, (2, 6))
        probe = torch.rand(2, 6)

        def gradient(f, dtype):
            x = logits.to(dtype).requires_grad_()
            return torch.autograd.grad((f(x * 1) * probe).sum(), x)[0].double()

        def plain(x):
            return x.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

        def ours(x):
            return dk.sequence_logps(
                x, labels, shift=False, reduction="none", inplace=inplace, backend=backend
            )

        exact = gradient(plain, torch.float64)
        theirs = (gradient(plain, torch.float32) - exact).abs().max()
        mine = (gradient(ours, torch.float32) - exact).abs().max()
        assert mine <= theirs + 1e-7 * exact.abs().max()


class TestModules:
    def test_parameters_and_buffers(self):
        """C10: what is trained is found, what is a tensor moves, fp64 state stays fp64."""
        beta = torch.nn.Parameter(torch.tensor(0.3))
        loss = dk.FusedDPOLoss(beta=beta, weights=torch.ones(2), reference_free=True)
        assert list(loss.parameters()) == [beta] and list(loss.state_dict()) == ["beta"]
        logits, labels = torch.randn(4, 5, 7), torch.randint(0, 7, (4, 5))
        loss(logits, labels).loss.backward()
        assert beta.grad is not None and beta.grad != 0
        loss.to("meta")
        assert loss.options["beta"].device.type == loss.options["weights"].device.type == "meta"
        assert "reference_free=True" in repr(dk.FusedLinearDPOLoss(reference_free=True))
        state = dk.FusedDPOLoss(loss_type="beta_dpo", reference_free=True).half()
        assert state.state.dtype == torch.float64
        state(logits, labels)
        kept = state.state.clone()
        assert torch.equal(state.half().state, kept)


class TestPackedReference:
    @pytest.mark.parametrize("linear", (False, True))
    def test_as_many_rows_as_sequences(self, linear):
        """C8: [N] with N = 2B may be sums or one value a token."""
        cu = torch.tensor([0, 3, 3, 4, 4])
        hidden, weight, labels = torch.randn(4, 6), torch.randn(7, 6), torch.randint(0, 7, (4,))
        ref, call = torch.randn(4), {"shift": False, "cu_seqlens": cu, "beta": 1.0}

        def loss(**given):
            if linear:
                w = weight.clone().requires_grad_()
                out = dk.fused_linear_dpo_loss(hidden, w, labels, **given, **call)
                assert out.strategy == "streaming"
                return out.chosen_rewards - out.chosen_logps, out.margins
            out = dk.fused_dpo_loss(hidden @ weight.T, labels, **given, **call)
            return out.chosen_rewards - out.chosen_logps, out.margins

        with pytest.raises(ValueError, match=r"say ref_logps_per_token=False or True"):
            loss(ref_logps=ref)
        sums, _ = loss(ref_logps=ref, ref_logps_per_token=False)
        torch.testing.assert_close(sums, -ref[:2], rtol=1e-4, atol=1e-5)
        tokens, _ = loss(ref_logps=ref, ref_logps_per_token=True)
        expected = -torch.stack([ref[:3].sum(), torch.zeros(())])
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="ref_logps must have shape"):
            loss(ref_logps=ref[:3], ref_logps_per_token=True)

    def test_both_shapes_are_named(self):
        """C10: [6, 39] was named where [6] was meant."""
        logits, labels = torch.randn(6, 40, 7), torch.randint(0, 7, (6, 40))
        words = r"shape \[6\] \(sequence sums\) or \[6, 39\] \(one a token\), got \[5\]"
        with pytest.raises(ValueError, match=words):
            dk.fused_dpo_loss(logits, labels, ref_logps=torch.zeros(5))


def test_meta_tensors_and_a_transposed_head():
    """C10: autocast has no meta device; a transposed head is a wrong shape, not wrong labels."""
    hidden, weight, *_ = tensors()
    x, w, y = (t.to("meta") for t in (hidden, weight, labels_of()))
    lora = (torch.empty(2, hidden.shape[-1], device="meta"), weight[:, :2].to("meta"), 1.0)
    out = dk.fused_linear_dpo_loss(x, w, y, reference_free=True, lora=lora)
    assert out.loss.shape == () and out.loss.device.type == "meta"
    with pytest.raises(ValueError, match=r"weight must have shape \[V, H=12\].*got \[12, 83\]"):
        dk.fused_linear_dpo_loss(hidden, weight.T, labels_of(), reference_free=True)
