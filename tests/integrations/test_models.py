"""Models: which are refused before training, and what of their own objective comes along."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers
from torch import nn

pytest.importorskip("accelerate", reason="pip install accelerate")

from test_transformers import examples, trainer

from dpo_kernels.integrations import plain
from dpo_kernels.integrations.plain import PreferenceCollator, attach, dpo_step

DATA = examples(4)
BATCH = PreferenceCollator(0)(DATA)
TOKENS = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
TWO_SIDES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


def made(kind, config, **options):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**TOKENS, **options}))


ENCODER_DECODERS = {
    "BartForConditionalGeneration": ("BartConfig", TWO_SIDES),
    "PegasusForConditionalGeneration": ("PegasusConfig", TWO_SIDES),
    "MarianMTModel": ("MarianConfig", TWO_SIDES),
    "MBartForConditionalGeneration": ("MBartConfig", TWO_SIDES),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**TWO_SIDES, "begin_suppress_tokens": None, "suppress_tokens": None},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 8},
    ),
}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_encoder_decoders_are_refused(kind, tmp_path):
    """trl#579"""
    config, options = ENCODER_DECODERS[kind]
    model = made(kind, config, **options)
    for check in (True, False):
        with pytest.raises(ValueError, match=f"{kind} is an encoder-decoder"):
            attach(model, check=check)
    with pytest.raises(ValueError, match="encoder-decoder"):
        trainer(tmp_path, model, ref_model=None)
    with pytest.raises(ValueError, match="encoder-decoder"):
        plain.reference_logps(model, BATCH)


def test_a_decoder_of_such_a_model_is_not_refused():
    attach(made("BartForCausalLM", "BartConfig", **TWO_SIDES))


@pytest.mark.parametrize(
    ("kind", "config"), [("BertForMaskedLM", "BertConfig"), ("RobertaForCausalLM", "RobertaConfig")]
)
def test_models_that_see_what_they_score_are_refused(kind, config):
    with pytest.raises(ValueError, match=f"{kind}.*change with the tokens behind it"):
        attach(made(kind, config, **BERT))


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny.model().model,
        lambda: nn.Linear(2, 2),
        lambda: transformers.LlamaForSequenceClassification(tiny.model().config),
    ],
)
def test_models_without_a_head_are_refused(model):
    with pytest.raises(ValueError, match="no trunk and lm_head"):
        attach(model())


class Packed(nn.Module):
    """As GPTQ, AWQ and AQLM keep a layer: codes and no weight."""

    def __init__(self, head):
        super().__init__()
        self.register_buffer("qweight", head.weight.detach().to(torch.int32))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).T


class Normed(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


def narrow(dtype, *shape):
    def change(head):
        weight = head.weight.detach().to(dtype)
        head.weight = nn.Parameter(weight.reshape(shape) if shape else weight, requires_grad=False)
        return head

    return change


def dynamic(head):
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(head))[0]


class Params4bit(nn.Parameter):
    """As bitsandbytes keeps codes in float storage (bnb_4bit_quant_storage)."""


def float_storage(known):
    def change(head):
        codes = torch.zeros(64 * 16 // 4, 1, dtype=torch.bfloat16)
        head.weight = Params4bit(codes, requires_grad=False)
        if known:
            head.weight.quant_state = object()
        return head

    return change


def transposed(head):
    return transformers.pytorch_utils.Conv1D(*head.weight.shape)


# LLamaTuner#39, AQLM#31
HEADS = {
    "4 bits in bfloat16": (float_storage(True), r"Params4bit \[256, 1\]: it is quantised"),
    "4 bits, unmarked": (float_storage(False), r"Params4bit \[256, 1\]: it is quantised"),
    "Conv1D": (transposed, r"Conv1D, whose weight has shape \[16, 64\], which is \[H, V\]"),
    "a sequence of layers": (nn.Sequential, "Sequential, which has no weight"),
    "codes": (Packed, "Packed, which has no weight"),
    "int8": (narrow(torch.int8), "torch.int8: it is quantised"),
    "4 bits": (narrow(torch.uint8, 1024, 1), "torch.uint8: it is quantised"),
    "float8": (narrow(torch.float8_e4m3fn), "torch.float8_e4m3fn: it is quantised"),
    "torch's dynamic quantisation": (dynamic, "Linear, which has no weight"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_no_plain_linear_layer_are_refused(name, tmp_path):
    change, text = HEADS[name]
    model = tiny.model()
    model.lm_head = change(model.lm_head)
    for check in (True, False):
        with pytest.raises(ValueError, match=rf"the head \(lm_head.*{text}; expected a linear"):
            attach(model, check=check)
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, model, ref_model=None)


def test_a_head_that_changes_its_weight_is_refused():
    model = tiny.model()
    model.lm_head = Normed(16, 64, bias=False)
    with pytest.raises(ValueError, match="differ by"):
        attach(model)


# --- mixtures of experts ---

EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "router_aux_loss_coef": 0.5,
}


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GraniteMoe"])
def test_the_routers_loss_is_the_models_own(kind):
    model = tiny.model(kind, **EXPERTS).eval()
    attach(model)
    with_it = dpo_step(model, BATCH, reference_free=True)
    inputs = {k: BATCH[k] for k in ("input_ids", "attention_mask")}
    own = model(**inputs, output_router_logits=True).aux_loss
    model.config.router_aux_loss_coef = 0.0
    without = dpo_step(model, BATCH, reference_free=True)
    assert float(own) > 1 and without.aux_loss is None
    assert with_it.aux_loss.item() == pytest.approx(own.item(), abs=1e-6)
    assert (with_it.loss - without.loss).item() == pytest.approx(0.5 * own.item(), abs=1e-5)


def test_the_routers_loss_trains(tmp_path):
    made = trainer(tmp_path, tiny.model("Mixtral", **EXPERTS), max_steps=3, eval_dataset=DATA)
    made.train()
    rows = [r for r in made.state.log_history if "aux_loss" in r]
    assert len(rows) == 3 and rows[0]["loss"] == pytest.approx(
        0.693147 + 0.5 * rows[0]["aux_loss"], abs=1e-3
    )
    gate = next(p for n, p in made.model.named_parameters() if "gate" in n and p.dim() == 2)
    assert gate.requires_grad and "eval_aux_loss" in made.evaluate()


def test_lightning_has_the_routers_loss():
    pytest.importorskip("lightning", reason="pip install lightning")
    from test_lightning import fit

    from dpo_kernels.integrations.lightning import DPOModule

    start = [tiny.model("Mixtral", **EXPERTS) for _ in range(2)]
    metrics = fit(DPOModule(start[0], ref_model=start[1]), steps=1)
    assert metrics["loss"] == pytest.approx(0.693147 + 0.5 * metrics["aux_loss"], abs=1e-3)


@tiny.NEEDS_SEGMENTS
def test_a_shared_prompt_and_a_routers_loss_are_refused():
    model = tiny.model("Mixtral", **EXPERTS)
    attach(model)
    with pytest.raises(ValueError, match=r"share_prefix.*auxiliary loss"):
        dpo_step(model, BATCH, reference_free=True, fused={"share_prefix": True})


# --- rows ---


def test_pairs_without_signal_are_left_out():
    """trl#3042"""
    same = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [8, 9, 11]}
    other = {"prompt_ids": [5], "chosen_ids": [8, 9], "rejected_ids": [9, 8], "margin": 2.0}
    with pytest.raises(ValueError, match=r"max_length=5.*chosen and rejected are equal.*none"):
        PreferenceCollator(4, max_length=5)([same])
    with pytest.raises(ValueError, match="chosen is empty"):
        PreferenceCollator(4, max_length=3)([same])
    with pytest.raises(ValueError, match="rejected is empty"):
        PreferenceCollator(4)([{**same, "rejected_ids": []}])
    with pytest.warns(UserWarning, match=r"left out .*example 1 of the batch \(prompt_ids \[5, 6"):
        batch = PreferenceCollator(4, max_length=5)([other, {**same, "margin": 1.0}])
    assert batch["input_ids"].shape == (2, 3) and batch["margin"].tolist() == [2.0]
    assert PreferenceCollator(4, max_length=6)([same])["input_ids"].shape == (2, 6)


@pytest.mark.parametrize("bad", [None, "1", float("nan"), [1.0]])
def test_a_row_column_that_is_no_number_names_its_row(bad):
    """trl#5804"""
    rows = [{**e, "margin": bad if i == 2 else 0.5} for i, e in enumerate(DATA)]
    with pytest.raises(ValueError, match=r"column 'margin' of example 2 of the batch \(prompt"):
        PreferenceCollator(0)(rows)


def test_patched_trl_names_the_row():
    """trl#5804"""
    pytest.importorskip("trl", reason="pip install trl")
    from trl_runs import make

    from dpo_kernels.integrations.trl import DPOTrainer

    data = tiny.rows(6, margin=lambda i: None if i == 4 else 0.1 * i)
    with pytest.raises(ValueError, match=r"column 'margin' of train_dataset row 4 .*got None"):
        make(DPOTrainer, data=data)
