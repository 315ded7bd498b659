"""Graphs answer as the model that they were made from."""

import json
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from mmpeft import OnnxModel, answer, get_peft_model, save_adapter
from mmpeft.core.errors import MissingDependencyError, ModelError, OutputError, RecipeError, RunInterrupted
from mmpeft.data.collate import TEXT_ALIGNED, join_media
from mmpeft.data.encode import encode_prompt
from mmpeft.data.types import Media, Turn
from mmpeft.export.coarse import in_blocks
from mmpeft.export.onnx import OnnxSettings, merged_in_memory, write_onnx
from mmpeft.export.onnx_graph import OnnxGraph, check_installed
from mmpeft.export.onnx_weights import block_of
from mmpeft.export.sources import find_source
from mmpeft.methods.checkpoint import initial_lora
from mmpeft.models.compose import compose_model
from mmpeft.models.load import load_model
from tests.families.models import MODELS
from tests.methods.test_checkpoint import shake
from tests.tiny import tiny_clip, tiny_image_processor, tiny_llama, tiny_llava, tiny_processor, tiny_tokenizer

pytestmark = pytest.mark.slow
"""Tracing takes a quarter of a minute whatever the model's size."""

EXACT = {"rtol": 1e-4, "atol": 1e-3}
SIDES = [(40, 56), (72, 30)]


@dataclass
class Pair:
    """A model, and what was exported of it."""

    model: Any
    processor: Any
    graphs: OnnxModel
    folder: Path


def export(folder: Path, model: Any, processor: Any, **settings: Any) -> Pair:
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    source = find_source(folder / "base")
    merged = merged_in_memory(source)
    write_onnx(source, merged, folder / "out", OnnxSettings(**settings))
    return Pair(merged, processor, OnnxModel.from_pretrained(folder / "out"), folder / "out")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    processor = tiny_processor()
    return export(tmp_path_factory.mktemp("llava"), tiny_llava(processor), processor, precision="fp32")


def pictures(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (*SIDES[n % 2], 3), dtype=np.uint8)) for n in range(count)]


def ask(processor: Any, count: int, text: str = "hello there") -> dict[str, Any]:
    row = encode_prompt(processor, [Turn(role="user", text="<image>" * count + text)], Media(images=pictures(count)))
    batch = {key: value[None] for key, value in row.items() if key in TEXT_ALIGNED or key == "input_ids"}
    return {**batch, **join_media([row]), "attention_mask": torch.ones_like(batch["input_ids"])}


@torch.no_grad()
def check_same(pair: Pair, batch: dict[str, Any], tokens: int = 12) -> None:
    want, found = pair.model(**batch).logits, pair.graphs(**batch).logits
    torch.testing.assert_close(found, want, **EXACT)
    how = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want, found = pair.model.generate(**batch, **how), pair.graphs.generate(**batch, **how)
    assert found.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), **EXACT)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_llava_answers_the_same(count, llava):
    check_same(llava, ask(llava.processor, count))


@torch.no_grad()
def test_a_picture_counts(llava):
    batch = ask(llava.processor, 1)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    assert (llava.graphs(**batch).logits - llava.graphs(**other).logits).abs().max() > 1e-3


@torch.no_grad()
def test_rows_padded_on_the_left_and_a_long_past(llava):
    ids = torch.randint(0, 200, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    want = llava.model(**batch).logits[mask.bool()]
    torch.testing.assert_close(llava.graphs(**batch).logits[mask.bool()], want, **EXACT)
    how = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None}
    assert llava.graphs.generate(**batch, **how).tolist() == llava.model.generate(**batch, **how).tolist()


@torch.no_grad()
def test_goes_on_from_a_cache(llava):
    ids = torch.randint(0, 200, (2, 30))
    first = llava.graphs(input_ids=ids[:, :20], use_cache=True)
    second = llava.graphs(input_ids=ids[:, 20:], cache=first.cache, attention_mask=torch.ones_like(ids), use_cache=True)
    want = llava.model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), want, **EXACT)
    assert second.cache.get_seq_length() == 30


def test_streams_what_it_generates(llava):
    batch = ask(llava.processor, 1)
    how = {"max_new_tokens": 16, "do_sample": False}
    whole = llava.graphs.generate(**batch, **how)[0, batch["input_ids"].shape[1] :]
    pieces = list(llava.graphs.stream(**batch, **how))
    assert "".join(pieces) == llava.processor.tokenizer.decode(whole, skip_special_tokens=True)
    with pytest.raises(ValueError, match="features"):
        list(llava.graphs.stream(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)}, **how))


def test_answers_through_mmpeft(llava):
    want = answer(llava.model, llava.processor, images=pictures(1), prompt="what?", max_new_tokens=8)
    assert answer(llava.graphs, llava.graphs.processor, images=pictures(1), prompt="what?", max_new_tokens=8) == want


def test_directory_holds_no_code_and_records_itself(llava):
    names = {file.name for file in llava.folder.iterdir()}
    assert {"vision.onnx", "embedding.onnx", "decoder.onnx", "head.onnx", "config.json", "onnx.json"} <= names
    assert {"tokenizer.json", "processor_config.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".safetensors"))]
    facts = json.loads((llava.folder / "mmpeft.json").read_text())
    assert facts["artefact"] == "ONNX model"
    assert facts["onnx"]["precision"] == "fp32"


def test_what_is_not_whole_is_named(llava, tmp_path):
    folder = shutil.copytree(llava.folder, tmp_path / "copy")
    (folder / "head.onnx").write_bytes((folder / "head.onnx").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"head\.onnx: cannot be read"):
        OnnxModel.from_pretrained(folder)
    (folder / "head.onnx").unlink()
    with pytest.raises(ModelError, match=r"head\.onnx: not there"):
        OnnxModel.from_pretrained(folder)
    manifest = json.loads((folder / "onnx.json").read_text())
    manifest["graphs"]["head"] = "../head.onnx"
    (folder / "onnx.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="export the model again"):
        OnnxModel.from_pretrained(folder)
    (folder / "onnx.json").unlink()
    with pytest.raises(ModelError, match="no export of `mmpeft export onnx`"):
        OnnxModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "smolvlm", "idefics3"])
def test_families(name, tmp_path):
    pair = export(tmp_path, *MODELS[name](), precision="fp32")
    for count in (0, 1, 2):
        check_same(pair, ask(pair.processor, count))


@torch.no_grad()
def test_the_tower_of_qwen_is_in_int8_where_it_is_asked_for(tmp_path):
    """Its linear layers are `Gemm` in the graph, for they read [patches, channels]."""
    model, processor = MODELS["qwen2_5_vl"]()
    skip = ("re:visual.blocks.0.",)
    pair = export(tmp_path, model, processor, include=("vision",), skip=skip)
    found = operators(pair.folder / "vision.onnx")
    linears = [name for name, each in model.model.visual.named_modules() if isinstance(each, torch.nn.Linear)]
    left = [name for name in linears if name.startswith("blocks.0.")]
    assert found["Gemm"] == 0
    assert found["MatMulNBits"] == len(linears) - len(left) > 0
    batch = ask(processor, 1)
    want, ours = pair.model(**batch).logits.log_softmax(-1), pair.graphs(**batch).logits.log_softmax(-1)
    assert 0 < float((want.exp() * (want - ours)).sum(-1).mean()) < 1e-2


def test_a_composed_model(tmp_path):
    tokenizer = tiny_tokenizer(image_token=False)
    parts = {"vision": tiny_clip(), "language": tiny_llama(tokenizer), "image_processor": tiny_image_processor()}
    model, processor = compose_model(**parts, tokenizer=tokenizer, projector="resampler")
    assert model.config.model_type == "mmpeft_composed"
    pair = export(tmp_path, model, processor, precision="fp32")
    assert not list(pair.folder.glob("*.py"))
    for count in (0, 2):
        check_same(pair, ask(pair.processor, count))


@torch.no_grad()
def test_int8_is_near_and_small(tmp_path):
    processor = tiny_processor()
    pair = export(tmp_path, tiny_llava(processor), processor)
    batch = ask(processor, 2)
    want, found = pair.model(**batch).logits.log_softmax(-1), pair.graphs(**batch).logits.log_softmax(-1)
    assert 0 < float((want.exp() * (want - found)).sum(-1).mean()) < 1e-3
    graph = (pair.folder / "decoder.onnx").read_bytes()
    assert b"MatMulNBits" in graph


def operators(file: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(file), load_external_data=False).graph.node)


@torch.no_grad()
def test_layers_are_left_by_their_names(tmp_path):
    processor = tiny_processor()
    model = tiny_llava(processor, hidden=64)
    whole = export(tmp_path / "whole", model, processor, include=("vision",))
    # Queries, keys and values are one product in the graph, gates and what they gate another.
    before = operators(whole.folder / "decoder.onnx")
    assert before["MatMulNBits"] == 8
    skip = ("model.language_model.layers.0.mlp.up_proj", r"re:layers\.1\.self_attn", "lm_head")
    left = export(tmp_path / "left", model, processor, include=("vision",), skip=skip)
    found = operators(left.folder / "decoder.onnx")
    assert (found["MatMulNBits"], found["MatMul"], found["Cast"] - before["Cast"]) == (5, 3, 3)
    assert operators(left.folder / "head.onnx")["MatMulNBits"] == 0
    # Head and embedding have the same weights, and have them in 16 bits and in int8 now.
    assert not (left.folder / "head.onnx.data").exists()
    batch = ask(processor, 2)
    want = left.model(**batch).logits
    far = [float((pair.graphs(**batch).logits - want).square().sum()) for pair in (whole, left)]
    assert far[1] < far[0]
    none = export(tmp_path / "none", model, processor, skip=("re:.",))
    torch.testing.assert_close(none.graphs(**batch).logits, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"skip": ("lm_haed",)}, "no linear layer is called 'lm_haed'"),
        ({"skip": ("lm_head",), "precision": "fp16"}, "no layer is in int8"),
        ({"include": ("audio",)}, "expected vision"),
    ],
)
def test_settings_that_name_what_is_not_there(settings, said, llava, tmp_path):
    source = find_source(llava.folder.parent / "base")
    with pytest.raises(RecipeError, match=said):
        write_onnx(source, llava.model, tmp_path / "out", OnnxSettings(**settings))
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_errors_by_layer_are_those_of_the_runtime(tmp_path):
    processor = tiny_processor()
    pair = export(tmp_path, tiny_llava(processor, hidden=64), processor)
    head, x = pair.model.lm_head, torch.randn(50, 5, 64)
    right = head(x)
    theirs = OnnxGraph(pair.folder / "head.onnx")(hidden_states=x)["logits"] - right
    ours = in_blocks(block_of)("lm_head", head, x) - right
    # Scales are rounded otherwise, so not number by number.
    assert float(ours.norm()) == pytest.approx(float(theirs.norm()), rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("hidden", [64, 96, 128])
def test_weights_that_head_and_embedding_share_are_stored_once(tmp_path, hidden):
    """96 channels are half a block of 64 short of two."""
    processor = tiny_processor()
    pair = export(tmp_path, tiny_llava(processor, hidden=hidden), processor)
    table = pair.model.get_input_embeddings().weight
    found = pair.graphs.host.get_input_embeddings()(torch.arange(len(table))[None])[0]
    # About half a step of a scale, which is about a 127th of the largest of its block.
    assert float((found - table).abs().max()) <= 0.6 * float(table.abs().max()) / 127
    data = (pair.folder / "head.onnx.data").stat().st_size
    assert (pair.folder / "embedding.onnx").stat().st_size < data / 2
    block = 128 if hidden != 64 else 64
    assert data == pytest.approx(len(table) * -(-hidden // block) * (block + 4), rel=0.05)
    (pair.folder / "head.onnx.data").unlink()
    with pytest.raises(ModelError, match="export or copy the model again"):
        OnnxModel.from_pretrained(pair.folder)


@torch.no_grad()
def test_an_adapter_goes_in(tmp_path):
    processor = tiny_processor()
    tiny_llava(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = get_peft_model(load_model(tmp_path / "base")[0], {"projector": "full", "language": {"r": 4}})
    initial = initial_lora(model)
    shake(model)
    save_adapter(model, tmp_path / "adapter", initial=initial)
    source = find_source(tmp_path / "adapter")
    write_onnx(source, merged_in_memory(source), tmp_path / "out", OnnxSettings(precision="fp16"))
    batch = ask(processor, 1)
    found = OnnxModel.from_pretrained(tmp_path / "out")(**batch).logits
    torch.testing.assert_close(found, model.eval()(**batch).logits, rtol=1e-2, atol=1e-2)


def test_a_failure_leaves_what_was_there(llava, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    source = find_source(llava.folder.parent / "base")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write_onnx(source, llava.model, out)
    with pytest.raises(RecipeError, match="expected vision"):
        write_onnx(source, llava.model, tmp_path / "new", OnnxSettings(include=("audio",)))
    monkeypatch.setattr("mmpeft.export.onnx._save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(RunInterrupted, match="nothing was left there"):
        write_onnx(source, llava.model, tmp_path / "new", OnnxSettings(precision="fp32"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_an_absent_library_names_its_extra(monkeypatch, llava):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"mmpeft\[onnx\]"):
        check_installed()
    with pytest.raises(MissingDependencyError, match=r"mmpeft\[onnx\]"):
        OnnxModel.from_pretrained(llava.folder)
