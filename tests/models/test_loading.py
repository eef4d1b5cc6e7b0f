"""Checkpoints that are no plain folder, trained under an integration as under the trainer."""

from __future__ import annotations

import pytest
import tiny
import torch

pytest.importorskip("transformers", reason="pip install transformers")

from dpo_kernels.integrations import plain
from dpo_kernels.models.loading import ModelError, load_model

IDS = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [8, 11]}
BATCH = plain.PreferenceCollator(0)([IDS])
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def write_gguf(file, model):
    """A Llama's weights as llama.cpp keeps them, but for the order of q's and k's rows."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    c = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    for name, value in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def test_a_gguf_file_trains_under_an_integration_and_is_saved(tmp_path):
    pytest.importorskip("accelerate", reason="pip install accelerate")
    start = tiny.model()
    model = load_model(write_gguf(tmp_path / "tiny.gguf", start), dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, start.lm_head.weight)
    plain.attach(model)
    ref = plain.reference_logps(model, BATCH)
    out = plain.dpo_step(model, BATCH, ref_logps=ref)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0.693147, abs=1e-5)
    assert model.lm_head.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_model_that_cannot_be_trained_is_a_value_error(tmp_path):
    with pytest.raises(ModelError, match=r"x\.gguf does not exist"):
        load_model(str(tmp_path / "x.gguf"))
    assert issubclass(ModelError, ValueError)


def test_weights_of_another_shape_are_named(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    model.config.intermediate_size = 48
    model.config.save_pretrained(tmp_path)
    named = r"another shape: model\.layers\.0\.mlp\.down_proj\.weight \[16, 32\].*\[16, 48\]"
    with pytest.raises(ModelError, match=named):
        load_model(str(tmp_path))
