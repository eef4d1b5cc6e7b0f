"""One rank of the tests of the sharded head: runs every check, writes what failed as JSON.

python parallel_ranks.py RANK WORLD STORE OUT
"""

import json
import re
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import parallel_costs  # noqa: F401  (its checks are run too)
import torch
import torch.distributed as dist
from linear_cases import OPTIONS, B, H, T, V, labels_of, tensors
from parallel_parts import (
    CHECKS,
    STATS,
    check,
    compare,
    leaf,
    near,
    new_shards,
    raises,
    rows,
    shards,
)

import dpo_kernels as dk


def every_loss(dtype):
    for name in dk.losses.available():
        row = dk.losses.get(name)
        ref = "hidden" if row.reference else None
        compare(dtype, loss_type=name, ref=ref, **OPTIONS.get(row.name, {}))


@check
def every_loss_in_float64():
    every_loss(torch.float64)


@check
def every_loss_in_fp32():
    every_loss(torch.float32)


@check
def strategies():
    for loss in ("sigmoid", "tdpo2"):
        for strategy in ("streaming", "recompute"):
            for budget in (None, 32 * (8 * 128 + 20 * H)):
                call = {"strategy": strategy, "memory_budget": budget}
                compare(torch.float32, loss_type=loss, call=call)
        compare(
            torch.float32,
            loss_type=loss,
            train=("hidden",),
            call={"strategy": "frozen", "memory_budget": 32 * (8 * 128 + 20 * H)},
        )
        compare(torch.float32, loss_type=loss, train=())
    compare(torch.float32, call={"batch_invariant": True})


@check
def adapters():
    for dtype in (torch.float32, torch.float64):
        for train in (("hidden",), ("hidden", "weight", "bias"), ()):
            compare(dtype, lora=True, train=train)
    for strategy in ("streaming", "recompute"):
        compare(torch.float32, lora=True, train=("hidden",), call={"strategy": strategy})


@check
def transforms_and_statistics():
    for dtype in (torch.float32, torch.float64):
        for transform in (
            {"logit_softcap": 2.0},
            {"temperature": 0.7, "logit_scale": -0.5},
            {"logit_scale": 0.0},
        ):
            compare(dtype, **transform, stats=STATS)
            compare(dtype, **transform, loss_type="tdpo1", stats=STATS)
    compare(torch.float32, train=("hidden",), stats=STATS, call={"strategy": "frozen"})
    compare(torch.float32, use_weighting=True)


@check
def narrow_weights():
    compare(torch.bfloat16, tolerance=2e-2)


@check
def other_backends():
    compare(torch.float32, call={"backend": "torch"})
    compare(torch.float32, ref="logps", call={"backend": "cpu"})
    # On CPU tensors in its interpreter.
    if "triton" in dk.backends.available() and dist.get_world_size() == 2:
        for loss in ("sigmoid", "tdpo1"):
            compare(torch.float32, loss_type=loss, call={"backend": "triton"})


@check
def log_probs():
    s = shards()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        torch.manual_seed(2)
        hidden, weight, bias, *_ = tensors(dtype)
        labels = labels_of()
        for reduction in ("sum", "none", "mean"):
            a, b = leaf(hidden), leaf(hidden)
            w, v = leaf(weight), leaf(rows(s, weight))
            call = {"reduction": reduction, "stats": STATS}
            x, xs = dk.linear_sequence_logps(a, w, labels, bias=bias, **call)
            y, ys = dk.linear_sequence_logps(
                b, v, labels, bias=rows(s, bias), vocab_group=s, **call
            )
            near("logps", y, x, tolerance)
            for name in STATS:
                near(name, ys[name], xs[name], tolerance)
            x.sum().backward(), y.sum().backward()
            near("hidden", b.grad, a.grad, tolerance)
            near("weight", v.grad, rows(s, w.grad), tolerance)


@check
def ties_go_to_the_lowest_index():
    s = shards()
    hidden = torch.ones(2, 3, H)
    weight = torch.ones(s.vocab, H)  # every logit is the largest
    for y, expected in ((0, 1.0), (s.sizes[0], 0.0), (s.vocab - 1, 0.0)):
        labels = torch.full((2, 3), y)
        call = {"stats": "is_top1", "reduction": "none"}
        _, stats = dk.linear_sequence_logps(hidden, rows(s, weight), labels, vocab_group=s, **call)
        assert (stats["is_top1"] == expected).all(), (y, stats)


@check
def classes_that_are_ruled_out():
    """A bias of -inf over a whole shard: nothing there has a probability."""
    for dtype in (torch.float32, torch.float64):
        s = shards()
        torch.manual_seed(3)
        hidden, weight, bias, *_ = tensors(dtype)
        bias[s.vocab // 2 - 3 :] = -float("inf")
        labels = labels_of(s.vocab // 2 - 3)
        for stats in (("mean_logits",), ("entropy", "is_top1", "log_sum_sq_probs")):
            call = {"reduction": "none", "stats": stats}
            x, xs = dk.linear_sequence_logps(hidden, weight, labels, bias=bias, **call)
            own = rows(s, weight), labels
            y, ys = dk.linear_sequence_logps(
                hidden, *own, bias=rows(s, bias), vocab_group=s, **call
            )
            near("logps", y, x, 1e-5)
            for name in stats:
                near(name, ys[name], xs[name], 1e-5)


@check
def the_kl_of_classes_that_are_ruled_out():
    """Infinite where only the policy rules them out, 0 of what the reference rules out."""
    s = shards()
    torch.manual_seed(14)
    hidden, weight, bias, ref_hidden, ref_weight = tensors()
    out = torch.arange(s.vocab) >= s.vocab // 2 - 3
    labels = labels_of(s.vocab // 2 - 3)
    none = torch.where(out, -float("inf"), bias)
    for mine, theirs, backend in (
        (none, bias, "cpu"),
        (bias, none, "cpu"),
        (none, none, "torch"),
        (none, bias, "torch"),
    ):
        found = []
        for own, group in ((lambda a: a, None), (lambda a: rows(s, a), s)):
            found.append(
                dk.fused_linear_dpo_loss(
                    hidden,
                    own(weight),
                    labels,
                    bias=own(mine),
                    ref_hidden=ref_hidden,
                    ref_weight=own(ref_weight),
                    ref_bias=own(theirs),
                    loss_type="tdpo1",
                    backend=backend,
                    vocab_group=group,
                    reduction="none",
                )
            )
        for name, a, b in zip(found[0]._fields, found[1], found[0], strict=False):
            assert torch.equal(a.isnan(), b.isnan()), (name, a, b)
            near(name, a.nan_to_num(posinf=9e9), b.nan_to_num(posinf=9e9), 1e-5)


@check
def not_a_number_stays_one():
    """A weight that is NaN on one rank makes the log-probs NaN on all."""
    s = shards()
    hidden, weight, *_ = tensors()
    weight[-1] = float("nan")
    logps = dk.linear_sequence_logps(
        hidden, rows(s, weight), torch.ones(2 * B, T, dtype=torch.int64), vocab_group=s
    )
    assert logps.isnan().all()


@check
def tensor_options_have_the_whole_gradient():
    s = shards()
    torch.manual_seed(4)
    hidden, weight, *_ = tensors(torch.float64)
    labels, grads = labels_of(), []
    for w, group in ((weight, None), (rows(s, weight), s)):
        beta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        out = dk.fused_linear_dpo_loss(
            leaf(hidden), w, labels, reference_free=True, beta=beta, vocab_group=group
        )
        out.loss.backward()
        grads.append(beta.grad)
    near("beta", grads[1], grads[0], 1e-9)


@check
def dtensor():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(5)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        hidden, weight, *_ = tensors(dtype)
        labels = labels_of()
        a, w = leaf(hidden), leaf(weight)
        expected = dk.fused_linear_dpo_loss(a, w, labels, reference_free=True)
        expected.loss.backward()
        b = leaf(hidden)
        sharded = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        out = dk.fused_linear_dpo_loss(b, sharded, labels, reference_free=True)
        out.loss.backward()
        near("loss", out.loss, expected.loss, tolerance)
        near("hidden", b.grad, a.grad, tolerance)
        assert isinstance(sharded.grad, DTensor) and sharded.grad.placements == (Shard(0),)
        near("weight", sharded.grad.full_tensor(), w.grad, tolerance)
    wrong = distribute_tensor(weight, mesh, [Replicate()])
    raises("must be placed as", b.detach(), wrong, labels, reference_free=True)


@check
def ranks_that_differ_are_named():
    """On every rank, at the first call, before anything else is sent."""
    last = dist.get_rank() == dist.get_world_size() - 1
    torch.manual_seed(6)
    hidden, weight, *_ = tensors()
    labels = labels_of()

    def wrong(text, w=None, x=hidden, y=labels, group=None, **options):
        s = group or new_shards()  # the first call of these
        w = rows(shards(), weight) if w is None else w
        raises(text, x, w, y, reference_free=True, vocab_group=s, **options)

    wrong("beta must be the same on all ranks", beta=0.2 if last else 0.1)
    wrong("temperature must be the same", temperature=0.5 if last else 1.0)
    wrong("backend must be the same", backend="torch" if last else None)
    wrong("labels of the first call", y=labels.roll(1, 0) if last else labels)
    wrong("hidden of the first call must", x=hidden[:, 1:] if last else hidden)
    wrong("hidden must be the same", x=leaf(hidden, last))
    s = new_shards()
    wrong("of vocab_group: weight must have", w=weight if last else rows(s, weight), group=s)
    wrong("must be a torch.distributed.ProcessGroup", group="tensor")
    try:
        dk.parallel.vocab_parallel(dist.group.WORLD, 5 if last else 6, vocab=1000)
    except ValueError as error:
        assert "the 1000 rows" in str(error) and "rank 0 has 6" in str(error)
    else:
        raise AssertionError("rows that are missing were not seen")
    y = labels.clone()
    y[0, 5] = V
    wrong("labels must", y=y)
    # All of it agrees again: a group is not spoilt by what was refused.
    compare(torch.float32)


@check
def a_process_group_will_do():
    s = shards()
    torch.manual_seed(7)
    hidden, weight, *_ = tensors()
    labels = labels_of()
    a = dk.linear_sequence_logps(hidden, weight, labels)
    for _ in range(2):
        b = dk.linear_sequence_logps(hidden, rows(s, weight), labels, vocab_group=dist.group.WORLD)
    near("logps", b, a, 1e-5)
    module = dk.FusedLinearDPOLoss(reference_free=True, vocab_group=dist.group.WORLD)
    module(leaf(hidden), rows(s, weight), labels).loss.backward()


@check
def other_forms_of_a_batch():
    """Packed rows, a common start, lists of losses, a reference without a head of its own."""
    s = shards()
    torch.manual_seed(11)
    hidden, weight, bias, ref_hidden, _ = tensors(torch.float64)
    labels = labels_of()
    flat, ends = labels.reshape(-1), torch.arange(0, 2 * B * T + 1, T, dtype=torch.int32)
    packed = {"cu_seqlens": ends}
    per_token = torch.randn(2 * B, T - 1, dtype=torch.float64)
    start = labels.clone()
    start[B:, 2:5] = start[:B, 2:5]
    cases = [
        ((hidden.reshape(-1, H), flat), packed | {"reference_free": True}),
        ((hidden, labels), {"ref_hidden": ref_hidden}),
        ((hidden, labels), {"ref_logps": per_token, "ld_alpha": 0.5}),
        ((hidden, start), {"reference_free": True, "drop_common_prefix": True}),
        ((hidden, labels), {"reference_free": True, "loss_type": ["sigmoid", "sft"]}),
        ((hidden, labels), {"reference_free": True, "reduction": "none"}),
    ]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        for (x, y), options in cases:
            given = {
                k: v.to(dtype) if k[:3] == "ref" and v is not True else v
                for k, v in options.items()
            }
            found = []
            for own, group in ((lambda a: a, None), (lambda a: rows(s, a), s)):
                leaves = [leaf(x.to(dtype)), leaf(own(weight.to(dtype)))]
                out = dk.fused_linear_dpo_loss(
                    *leaves, y, bias=own(bias.to(dtype)), vocab_group=group, **given
                )
                out.loss.sum().backward()
                found.append((out, *(t.grad for t in leaves)))
            for a, b in zip(found[1][0], found[0][0], strict=True):
                near(str(options), a, b, tolerance)
            near("hidden", found[1][1], found[0][1], tolerance)
            near("weight", found[1][2], rows(s, found[0][2]), tolerance, found[0][2].abs().max())


@check
def losses_that_are_not_of_pairs():
    """Of single completions, and of ranked ones."""
    s = shards()
    torch.manual_seed(13)
    labels, desirable = labels_of(), torch.arange(2 * B) % 3 == 0
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        hidden, weight, bias, ref_hidden, ref_weight = tensors(dtype)
        for name, options in (
            ("kto", {"desirable": desirable, "z": 0.1}),
            ("apo_zero_unpaired", {"desirable": desirable}),
            ("plackett_luce", {"num_completions": 4}),
        ):
            pairs = name == "plackett_luce"
            loss = dk.fused_linear_dpo_loss if pairs else dk.fused_linear_unpaired_loss
            found = []
            for own, group in ((lambda a: a, None), (lambda a: rows(s, a), s)):
                x, w = leaf(hidden), leaf(own(weight))
                head = {"bias": own(bias), "ref_hidden": ref_hidden, "ref_weight": own(ref_weight)}
                out = loss(x, w, labels, loss_type=name, vocab_group=group, **head, **options)
                out.loss.backward()
                found.append((out.loss.detach(), x.grad, w.grad))
            (a, dx, dw), (b, ex, ew) = found
            near(name, b, a, tolerance)
            near("hidden", ex, dx, tolerance)
            near("weight", ew, rows(s, dw), tolerance, dw.abs().max())


@check
def a_second_backward_says_what_it_cannot():
    s = shards()
    hidden, weight, *_ = tensors(torch.float64)
    x = leaf(hidden)
    out = dk.fused_linear_dpo_loss(
        x, rows(s, weight), labels_of(), reference_free=True, vocab_group=s
    )
    try:
        (g,) = torch.autograd.grad(out.loss, x, create_graph=True)
        g.sum().backward()
    except RuntimeError as error:
        assert "once_differentiable" in str(error) or "second derivatives" in str(error), error
    else:
        raise AssertionError("a gradient was dropped without a word")


@check
def the_example_of_the_docs():
    page = Path(__file__).parents[2] / "docs/parallel.md"
    code = re.search(r"```py\n(.*?)```", page.read_text(), re.DOTALL)[1]
    assert 'dist.init_process_group("gloo")' in code
    names = {}
    exec(code.replace('dist.init_process_group("gloo")', "pass"), names)
    assert names["weight"].grad.shape == names["weight"].shape
    losses = [None] * dist.get_world_size()
    dist.all_gather_object(losses, names["out"].loss.item())
    assert len(set(losses)) == 1, losses


@check
def under_compile():
    """The collectives do not trace: refused where one graph is demanded, else run beside it."""
    if dist.get_world_size() > 2:
        return
    s = shards()
    torch.manual_seed(12)
    hidden, weight, *_ = tensors()
    labels, own = labels_of(), leaf(rows(s, weight))

    def loss(x, w):
        return dk.fused_linear_dpo_loss(x, w, labels, reference_free=True, vocab_group=s).loss

    expected, compiled = loss(hidden, own), torch.compile(loss, backend="eager")
    near("loss", compiled(hidden, own).detach(), expected.detach(), 1e-5)
    torch.compiler.reset()
    try:
        torch.compile(loss, backend="eager", fullgraph=True)(hidden, own)
    except Exception as error:
        assert "vocab_group" in str(error)
    else:
        raise AssertionError("traced")


def main():
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = {}
    only = sys.argv[5:]
    for name, function in CHECKS.items():
        if only and name not in only:
            continue
        torch.manual_seed(0)  # the same batch on every rank
        try:
            function()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
        Path(out).write_text(json.dumps(found))
        if found[name]:
            break  # the ranks may no longer be in step
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
