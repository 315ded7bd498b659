"""GGUF files hold the model: each tensor under llama.cpp's name, in its order of rows, near to what it was."""

import json

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, ViTConfig
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from typer.testing import CliRunner

from mmpeft import get_peft_model, save_adapter
from mmpeft.cli.export_gguf import gguf as command
from mmpeft.core.errors import AdapterError, ModelError, OutputError, RecipeError
from mmpeft.methods.checkpoint import initial_lora
from tests.families.models import MODELS
from tests.methods.test_checkpoint import load, shake

pytest.importorskip("gguf", reason="the gguf package is not installed")

from mmpeft.export.gguf_vision import SHAPES
from mmpeft.export.gguf_words import pre_tokenizer
from tests.export.gguf_models import Read, llava_of, saved, tiny, written

LORA = {"language": {"r": 4, "lora_alpha": 12}}


def trained(base, train, path):
    """A trained adapter, and the model that has it."""
    model = get_peft_model(load(base), train)
    initial = initial_lora(model)
    shake(model)
    save_adapter(model, path, initial=initial)
    return model


def text_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def read_back(folder):
    """The language model of a GGUF file, as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-q8_0.gguf", dtype=torch.float32).eval()


TIED = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

IDS = torch.tensor([[5, 80, 81, 3, 200, 17, 44, 9]])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformers_reads_the_language_model_that_was_exported(kind, tied, tmp_path):
    base = saved(llava_of(kind, tied=tied), tmp_path / "base")
    written(base, tmp_path / "out")
    want = text_logits(load(base), IDS)
    found = text_logits(read_back(tmp_path / "out"), IDS)
    assert want.std() > 0.05
    torch.testing.assert_close(found, want, atol=0.02 * float(want.abs().max()), rtol=0)
    assert ("output.weight" in Read(tmp_path / "out" / "model-q8_0.gguf").types) is not tied


def test_an_adapter_is_merged(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    model = trained(base, {**LORA, "projector": "full"}, tmp_path / "adapter")
    before = text_logits(load(base), IDS)
    written(tmp_path / "adapter", tmp_path / "out")
    want, found = text_logits(model, IDS), text_logits(read_back(tmp_path / "out"), IDS)
    torch.testing.assert_close(found, want, atol=0.02 * float(want.abs().max()), rtol=0)
    assert (want - before).abs().max() > 3 * (want - found).abs().max()
    facts = json.loads((tmp_path / "out" / "mmpeft.json").read_text())
    assert facts["artefact"] == "GGUF"
    assert facts["merged_adapter"] == str(tmp_path / "adapter")
    assert facts["files"] == ["mmproj-f16.gguf", "model-q8_0.gguf"]
    linear = model.get_base_model().model.multi_modal_projector.linear_2.modules_to_save["default"]
    projector = Read(tmp_path / "out" / "mmproj-f16.gguf").numbers["mm.2.weight"]
    np.testing.assert_allclose(projector, linear.weight.detach(), atol=1e-3)


@TIED
def test_a_head_that_an_adapter_has_untied_is_written_apart(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    model = trained(base, {"language": {"r": 2, "target_modules": ["lm_head"]}}, tmp_path / "adapter")
    written(tmp_path / "adapter", tmp_path / "out")
    assert "output.weight" in Read(tmp_path / "out" / "model-q8_0.gguf").types
    want, found = text_logits(model, IDS), text_logits(read_back(tmp_path / "out"), IDS)
    torch.testing.assert_close(found, want, atol=0.02 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize(("outtype", "near"), [("q8_0", 5e-3), ("f16", 1e-3), ("bf16", 5e-3)])
def test_matrices_are_near_and_vectors_exact(outtype, near, tmp_path):
    model, processor = llava_of("qwen2")
    shake(model)
    base = saved((model, processor), tmp_path / "base")
    written(base, tmp_path / "out", outtype=outtype)
    file = Read(tmp_path / "out" / f"model-{outtype}.gguf")
    matrix, vector = "model.language_model.layers.1.mlp.down_proj.weight", "model.language_model.norm.weight"
    state = model.state_dict()
    assert file.types["blk.1.ffn_down.weight"] == outtype.upper()
    assert file.types["output_norm.weight"] == file.types["blk.0.attn_q.bias"] == "F32"
    np.testing.assert_allclose(file.numbers["blk.1.ffn_down.weight"], state[matrix], atol=near * 2)
    np.testing.assert_array_equal(file.numbers["output_norm.weight"], state[vector])
    # Qwen2 turns the halves of a head in llama.cpp too.
    queries = state["model.language_model.layers.0.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(file.numbers["blk.0.attn_q.bias"], queries)


def test_layers_are_left_by_their_names(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    layers = "model.language_model.layers"
    skip = (f"{layers}.0.mlp.down_proj", r"re:layers\.1\.self_attn\.[qk]_proj")
    done = written(base, tmp_path / "out", skip=skip)
    types = Read(tmp_path / "out" / "model-q8_0.gguf").types
    left = {"blk.0.ffn_down.weight", "blk.1.attn_q.weight", "blk.1.attn_k.weight"}
    assert {name for name, kind in types.items() if kind == "F16"} == left
    assert f"{layers}.1.mlp.down_proj" in done.quantized
    assert not {f"{layers}.0.mlp.down_proj", f"{layers}.1.self_attn.q_proj"} & set(done.quantized)
    assert sum(kind == "Q8_0" for kind in types.values()) == len(done.quantized)
    # The embedding has the head's weights.
    written(base, tmp_path / "out", skip=("lm_head",))
    types = Read(tmp_path / "out" / "model-q8_0.gguf").types
    assert {name for name, kind in types.items() if kind == "F16"} == {"token_embd.weight"}
    with pytest.raises(RecipeError, match="no linear layer is called 'down'"):
        written(base, tmp_path / "none", skip=("down",))
    with pytest.raises(RecipeError, match="f16 has no layer in int8; leave --skip out"):
        written(base, tmp_path / "none", skip=skip, outtype="f16")


def test_keys_describe_model_and_words(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    written(base, tmp_path / "out")
    keys = Read(tmp_path / "out" / "model-q8_0.gguf").keys
    model, tokenizer = load(base), tmp_path / "base" / "tokenizer.json"
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "base"
    assert keys["llama.block_count"] == 2
    assert keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.rope.dimension_count"] == 8
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.merges"] == ["Ġ t", "Ċ Ċ"]
    words = {token["content"]: token["id"] for token in json.loads(tokenizer.read_text())["added_tokens"]}
    assert keys["tokenizer.ggml.eos_token_id"] == words["<|im_end|>"]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert len(keys["tokenizer.ggml.tokens"]) == model.get_input_embeddings().num_embeddings
    assert keys["tokenizer.ggml.tokens"][words["<image>"]] == "<image>"
    kinds = keys["tokenizer.ggml.token_type"]
    assert (kinds[words["<|im_start|>"]], kinds[65]) == (3, 1)
    assert "<|im_start|>" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_tower_ends_where_llava_takes_its_features(layer, tmp_path):
    model, processor = llava_of("llama", vision_feature_layer=layer)
    base = saved((model, processor), tmp_path / "base")
    done = written(base, tmp_path / "out")
    file, blocks = Read(tmp_path / "out" / "mmproj-f16.gguf"), 3 + layer
    assert file.keys["clip.projector_type"] == "mlp"
    assert file.keys["clip.vision.feature_layer"] == [blocks]
    assert file.keys["clip.vision.block_count"] == blocks
    assert file.keys["clip.use_gelu"] is False
    assert {name.split(".")[2] for name in file.types if name.startswith("v.blk.")} == set(map(str, range(blocks)))
    assert not [name for name in file.types if "post_ln" in name]
    tower = model.model.vision_tower
    np.testing.assert_array_equal(file.numbers["v.class_embd"], tower.embeddings.class_embedding.detach())
    first = tower.encoder.layers[0]
    np.testing.assert_allclose(file.numbers["v.blk.0.ffn_up.weight"], first.mlp.fc1.weight.detach(), atol=1e-3)
    np.testing.assert_allclose(file.numbers["mm.0.bias"], model.model.multi_modal_projector.linear_1.bias.detach())
    assert "class token of a CLIP tower" in done.notes[0]
    assert "stretches" in done.notes[1]


NAMES = {
    "qwen2_5_vl": {"v.patch_embd.weight.1", "v.blk.0.attn_k.bias", "v.blk.0.ffn_gate.weight", "v.post_ln.weight"},
    "smolvlm": {"v.patch_embd.bias", "v.blk.1.ffn_down.bias", "v.post_ln.bias", "mm.model.fc.weight"},
    "idefics3": {"v.position_embd.weight", "v.blk.0.ln1.bias", "v.blk.0.attn_out.weight", "mm.model.fc.weight"},
}


@pytest.mark.parametrize("family", NAMES)
def test_other_families_have_the_tensors_that_llama_cpp_asks_for(family, tmp_path):
    made = tiny(family)
    state = made[0].state_dict()
    written(saved(made, tmp_path / "base"), tmp_path / "out")
    seen, spoken = (Read(tmp_path / "out" / name) for name in ("mmproj-f16.gguf", "model-q8_0.gguf"))
    assert NAMES[family] <= set(seen.types)
    assert {"token_embd.weight", "blk.1.attn_output.weight", "output_norm.weight"} <= set(spoken.types)
    if family == "qwen2_5_vl":
        assert spoken.keys["general.architecture"] == "qwen2vl"
        assert len(spoken.keys["qwen2vl.rope.dimension_sections"]) == 4
        queries, keys, values = (seen.numbers[f"v.blk.0.attn_{part}.weight"] for part in "qkv")
        whole = state["model.visual.blocks.0.attn.qkv.weight"]
        np.testing.assert_allclose(np.concatenate([queries, keys, values]), whole, atol=1e-3)
        patches = state["model.visual.patch_embed.proj.weight"]
        np.testing.assert_allclose(seen.numbers["v.patch_embd.weight.1"], patches[:, :, 1], atol=1e-3)
        np.testing.assert_allclose(seen.numbers["mm.2.weight"], state["model.visual.merger.mlp.2.weight"], atol=1e-3)
    else:
        assert spoken.keys["general.architecture"] == "llama"
        assert seen.keys["clip.vision.projector.scale_factor"] == made[0].config.scale_factor


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_lora_is_an_adapter_for_the_base(kind, tmp_path):
    base = saved(llava_of(kind), tmp_path / "base")
    train = {"language": LORA["language"], "vision": {"r": 2, "lora_alpha": 3}, "projector": "full"}
    trained(base, train, tmp_path / "adapter")
    done = written(tmp_path / "adapter", tmp_path / "out", lora=True)
    assert set(done.files) == {"adapter-f32.gguf", "mmproj-f16.gguf"}
    file = Read(tmp_path / "out" / "adapter-f32.gguf")
    assert file.keys["general.type"] == "adapter"
    assert file.keys["adapter.type"] == "lora"
    assert file.keys["general.architecture"] == kind
    written(base, tmp_path / "plain", outtype="f16")
    written(tmp_path / "adapter", tmp_path / "merged", outtype="f16")
    plain, merged = (Read(tmp_path / name / "model-f16.gguf").numbers for name in ("plain", "merged"))
    changed = {name.removesuffix(".lora_a") for name in file.types if name.endswith(".lora_a")}
    assert changed == {name for name in plain if not np.array_equal(plain[name], merged[name])}
    for name in changed:
        first, second = file.numbers[f"{name}.lora_a"], file.numbers[f"{name}.lora_b"]
        scale = file.keys["adapter.lora.alpha"] / first.shape[0]
        np.testing.assert_allclose(plain[name] + scale * second @ first, merged[name], atol=2e-3)


@TIED
@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"language": {"r": 2, "use_dora": True}}, "q_proj.weight is changed by DoRA"),
        ({"language": {"r": 2, "target_modules": ["lm_head"]}}, "lm_head.weight is changed"),
        ({"language": {"r": 2, "trainable_token_indices": [1, 2]}}, "embed_tokens.weight is changed by something else"),
        ({"projector": "full"}, "it has no LoRA on the language model"),
    ],
)
def test_what_no_gguf_adapter_can_say_is_refused(train, said, tmp_path):
    trained(saved(llava_of("llama"), tmp_path / "base"), train, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=said):
        written(tmp_path / "adapter", tmp_path / "out", lora=True)
    assert not (tmp_path / "out").exists()


def test_families_that_are_not_written_are_refused_by_name(tmp_path):
    made = MODELS["internvl"]()
    with pytest.raises(ModelError, match=f"a model of type internvl is not written as GGUF; .*{', '.join(SHAPES)}"):
        written(saved(made, tmp_path / "base"), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"projector_hidden_act": "relu"}, "its projector is of kind 'relu'"),
        ({"vision_feature_layer": [-1, -2]}, "it joins the features"),
        ({"vision_feature_select_strategy": "full"}, "it chooses features by 'full'"),
        ({"multimodal_projector_bias": False}, "its projector has no biases"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(changes, said, tmp_path):
    base = saved(llava_of("llama", **changes), tmp_path / "base")
    with pytest.raises(ModelError, match=said):
        written(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_towers_and_rotations_are_refused(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    text = {**config["text_config"], "rope_parameters": yarn}
    (base / "config.json").write_text(json.dumps({**config, "text_config": text}))
    with pytest.raises(ModelError, match="rotary positions are of type yarn"):
        written(base, tmp_path / "out")
    tower = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32).to_dict()
    (base / "config.json").write_text(json.dumps({**config, "vision_config": tower}))
    with pytest.raises(ModelError, match="its vision tower is of type vit"):
        written(base, tmp_path / "out")


def test_a_weight_beyond_half_precision_is_refused_and_leaves_nothing(tmp_path):
    model, processor = llava_of("llama")
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = 1e6
    base = saved((model, processor), tmp_path / "base")
    with pytest.raises(ModelError, match=r"linear_1\.weight: a weight is too large for half precision"):
        written(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_output_is_whole_or_as_it_was(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds mine\.txt"):
        written(base, tmp_path / "out")
    with pytest.raises(RecipeError, match="outtype 'q4_0': expected one of q8_0, f16, bf16"):
        written(base, tmp_path / "new", outtype="q4_0")
    with pytest.raises(RecipeError, match="it is a model and no adapter"):
        written(base, tmp_path / "new", lora=True)


def test_llama_cpps_mark_takes_the_place_of_all_that_it_writes_by_itself():
    turn = "a <|vision_start|><|image_pad|><|vision_end|> b <|vision_start|><|image_pad|><|vision_end|>"
    assert SHAPES["qwen2_5_vl"].marked(turn, "<|image_pad|>", "M") == "a M b M"
    assert SHAPES["smolvlm"].marked("a <image> b <image>", "<image>", "M") == "a M b M"


DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "gpt-2"),
        ([DIGITS, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}], "smollm"),
        ([{**SPLIT, "pattern": {"Regex": PRETOKENIZE_REGEX}}, {"type": "ByteLevel", "use_regex": False}], "qwen2"),
        ([{**SPLIT, "pattern": {"Regex": LLAMA3}}, {"type": "ByteLevel", "use_regex": False}], "llama-bpe"),
    ],
)
def test_the_way_to_cut_text_has_llama_cpps_name(steps, name):
    whole = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    assert pre_tokenizer({"pre_tokenizer": whole}, "words") == name


@pytest.mark.parametrize(
    "first",
    [
        {"type": "Metaspace"},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "ByteLevel", "use_regex": False},
        None,
    ],
)
def test_an_unknown_way_to_cut_text_is_refused(first):
    with pytest.raises(ModelError, match=r"words: llama\.cpp has no name .*known are gpt-2, smollm, qwen2, llama-bpe"):
        pre_tokenizer({"pre_tokenizer": first}, "words")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(processor, llava, tmp_path):
    with pytest.raises(ModelError, match=r"llama\.cpp has no name"):
        written(saved((llava, processor), tmp_path / "base"), tmp_path / "out")


def test_the_command_says_what_it_wrote(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(base), str(tmp_path / "out"), "--no-parity", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found["files"]) == {"model-q8_0.gguf", "mmproj-f16.gguf"}
    shown = CliRunner().invoke(app, [str(base), str(tmp_path / "out"), "--no-parity"])
    assert "out: model-q8_0.gguf (" in shown.stdout
    assert "note: llama.cpp puts the class token" in shown.stderr
