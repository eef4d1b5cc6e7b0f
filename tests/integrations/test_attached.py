"""The attached forward behaves like the model's own, and says so where it gives no loss."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle

import pytest
import tiny
import torch
import transformers

pytest.importorskip("accelerate", reason="pip install accelerate")

from test_transformers import examples

from dpo_kernels.integrations.plain import PreferenceCollator, attach, dpo_step
from dpo_kernels.models.attached import head_calls

BATCH = PreferenceCollator(0)(examples(4))
IDS = torch.tensor([[5, 6, 7]])


def loss_of(model):
    return dpo_step(model, BATCH, reference_free=True).loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hook_on_the_head_gets_a_tensor(dtype):
    """LLaMA-Factory's upcast_lmhead_output casts what the head gives; the loss has statistics."""
    results = []
    for hooked in (False, True):
        model = tiny.model(dtype=dtype)
        attach(model)
        if hooked:
            model.lm_head.register_forward_hook(lambda module, args, out: out.to(torch.float32))
        out = dpo_step(model, BATCH, reference_free=True)
        out.loss.backward()
        results.append((out, model))
    (a, plain), (b, upcast) = results
    assert a.keys() == b.keys() and len(a) > 3
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]) and value.dtype == b[name].dtype, name
            assert value.requires_grad is b[name].requires_grad, name
    for p, q in zip(plain.parameters(), upcast.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@tiny.NEEDS_SEGMENTS
def test_the_check_of_the_layout_is_no_fused_call():
    model = tiny.model()
    attach(model)
    dpo_step(model, BATCH, reference_free=True, fused={"layout": "shared"}).loss.backward()
    assert head_calls(model) == 1


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_signatures_are_each_classes_own():
    """trl#6156: a second attach, of another class, changed what generate() and Trainer read."""
    first, second = gpt2(), tiny.model()
    wanted = [inspect.signature(m.forward) for m in (first, second)]
    of_class = inspect.signature(type(first).forward)
    plain = first.generate(IDS, token_type_ids=IDS * 0, max_new_tokens=2, do_sample=False)
    attach(first)
    attach(second)
    assert [inspect.signature(m.forward) for m in (first, second)] == wanted
    assert inspect.signature(type(first).forward) == of_class
    again = first.generate(IDS, token_type_ids=IDS * 0, max_new_tokens=2, do_sample=False)
    assert torch.equal(plain, again)
    with pytest.raises(ValueError, match="token_types"):
        first.generate(IDS, token_types=IDS * 0, max_new_tokens=2)


def test_a_trainer_keeps_the_models_columns(tmp_path):
    """trl#6156"""
    model = gpt2()
    attach(model)
    attach(tiny.model())
    options = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    made = transformers.Trainer(model=model, args=options)
    made._set_signature_columns_if_needed()
    assert "token_type_ids" in made._signature_columns and "args" not in made._signature_columns
    assert made.can_return_loss == transformers.Trainer(model=gpt2(), args=options).can_return_loss


def test_names_and_kinds_stay(tmp_path):
    model = tiny.model()
    kind = type(model)
    attach(model)
    assert isinstance(model, kind) and repr(type(model)) == repr(kind)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is kind and again.config.architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy", "copy"])
def test_copies_and_files_are_attached(way):
    """ms-swift#10063"""
    model = tiny.model()
    attach(model)
    wanted = loss_of(model)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = getattr(copy, way)(model)
    assert loss_of(other) == wanted
    attach(other, check=False)
    assert loss_of(other) == wanted
    if way != "copy":
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert loss_of(other) != wanted and loss_of(model) == wanted


@pytest.mark.parametrize("first", ["attach", "prepare"])
def test_accelerate_wraps_and_unwraps(first):
    """accelerate#4255"""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = tiny.model()
    wanted, logits = copy.deepcopy(model), model(IDS).logits
    attach(wanted)
    if first == "attach":
        attach(model)
    prepared = accelerator.prepare(model)
    attach(prepared)
    assert loss_of(prepared) == pytest.approx(loss_of(wanted), abs=0.05)
    for keep in (True, False):
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
        assert loss_of(bare) == pytest.approx(loss_of(wanted), abs=0.05)
    assert torch.allclose(bare(IDS).logits, logits, atol=0.1)
    attach(bare)
    assert loss_of(bare) == pytest.approx(loss_of(wanted), abs=0.05)
    AcceleratorState._reset_state(True)


def test_no_loss_is_an_error_with_its_reason():
    model = tiny.model()
    with pytest.raises(RuntimeError, match=r"answered without a loss.*attach\(model\)"):
        loss_of(model)
    attach(model)
    wanted, own = loss_of(model), type(model).__mro__[1].forward

    def replacement(input_ids=None, attention_mask=None, **_):
        return own(model, input_ids, attention_mask)

    model.forward = replacement
    with pytest.raises(RuntimeError, match="its forward was replaced"):
        loss_of(model)
    attach(model)
    assert loss_of(model) == wanted and model(IDS).logits.shape == (1, 3, 64)


def test_a_forward_that_wraps_the_attached_one_does_not_go_in_circles():
    model = tiny.model()
    attach(model)
    wanted, inner = loss_of(model), model.forward
    model.forward = lambda input_ids=None, attention_mask=None, use_cache=None: inner(
        input_ids, attention_mask, use_cache=use_cache
    )
    attach(model, check=False)
    assert loss_of(model) == wanted and model(IDS).logits.shape == (1, 3, 64)


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_a_compiled_model(first):
    model = tiny.model()
    if first == "attach":
        attach(model)
    compiled = torch.compile(model, backend="eager")
    attach(compiled)
    assert loss_of(compiled) == pytest.approx(loss_of(model), abs=1e-6)


def narrow(own):
    return lambda input_ids, attention_mask: own(input_ids, attention_mask)


def narrow_that_says_otherwise(own):
    return functools.wraps(own)(narrow(own))


@pytest.mark.parametrize("wrap", [narrow, narrow_that_says_otherwise])
@pytest.mark.parametrize("attached", [False, True])
def test_the_head_check_calls_a_replaced_forward_as_it_can_be_called(wrap, attached):
    model = tiny.model()
    if attached:
        attach(model)
    model.forward = wrap(model.forward)
    attach(model, check=True)
    mask = torch.ones_like(IDS)
    assert model(input_ids=IDS, attention_mask=mask).logits.shape == (1, 3, 64)
