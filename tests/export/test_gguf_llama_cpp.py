"""llama.cpp computes from GGUF files what the source computes: text alone, and with a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import IMAGE_SIZE

pytest.importorskip("gguf", reason="the gguf package is not installed")
pytest.importorskip("cyllama", reason="llama.cpp is not installed (pip install --no-deps cyllama)")

from mmpeft.core.errors import ModelError
from mmpeft.export.llama_cpp import LlamaCpp, version
from tests.export.gguf_models import llava_of, saved, siglip_llava, tiny, written
from tests.export.test_gguf import LORA, trained

PICTURE = Image.linear_gradient("L").resize((IMAGE_SIZE, IMAGE_SIZE)).convert("RGB")
PROMPT = "<|im_start|>user\n<picture>What is it, and how many are there?<|im_end|>\n<|im_start|>assistant\n"


def source_logits(model, processor, prompt, picture=None):
    """Of what comes next after a prompt: [vocabulary]."""
    text = prompt.replace("<picture>", processor.image_token)
    images = None if picture is None else [picture]
    batch = processor(text=[text], images=images, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[0, -1].numpy()


def apart(found, want):
    """How far two rows of logits are from each other, relative to how far theirs are from their mean."""
    return float(np.abs(found - want).max() / np.std(want))


def made_of(tower, kind, layer):
    """A LLaVA whose projector gives enough that the picture would be missed, and its processor."""
    changes = {"vision_feature_layer": layer}
    model, processor = siglip_llava(kind, **changes) if tower == "siglip" else llava_of(kind, **changes)
    model.model.multi_modal_projector.linear_2.weight.data *= 50
    return model, processor


def seen(model, processor, tmp_path, *, outtype="f16"):
    """Logits behind a prompt with a picture, by llama.cpp."""
    base = saved((model, processor), tmp_path / "base")
    written(base, tmp_path / "out", outtype=outtype)
    cpp = LlamaCpp.of_export(tmp_path / "out")
    cpp.read(PROMPT.replace("<picture>", cpp.mark), [PICTURE])
    return cpp.logits()


@pytest.mark.parametrize(("outtype", "near"), [("f16", 0.03), ("q8_0", 0.06)])
@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_llava_with_siglip_sees_what_the_source_sees(kind, layer, outtype, near, tmp_path):
    model, processor = made_of("siglip", kind, layer)
    want = source_logits(model, processor, PROMPT, PICTURE)
    assert apart(seen(model, processor, tmp_path, outtype=outtype), want) < near
    other = source_logits(model, processor, PROMPT, Image.new("RGB", PICTURE.size, (250, 20, 90)))
    assert apart(other, want) > 2 * near


def logits_with_the_class_token_last(model, processor):
    """Of a LLaVA on CLIP, as llama.cpp computes it (its issue 25814): the class token stands behind the patches, while
    positions and the choice of features take it to stand before them.
    """
    batch = processor(text=[PROMPT.replace("<picture>", "<image>")], images=[PICTURE], return_tensors="pt")
    inner, tower = model.model, model.model.vision_tower
    with torch.no_grad():
        patches = tower.embeddings.patch_embedding(batch["pixel_values"]).flatten(2).transpose(1, 2)
        row = torch.cat([patches, tower.embeddings.class_embedding[None, None]], dim=1)
        row = tower.pre_layrnorm(row + tower.embeddings.position_embedding.weight)
        blocks = len(tower.encoder.layers) + 1 + model.config.vision_feature_layer
        for block in tower.encoder.layers[:blocks]:
            row = block(row, attention_mask=None)
        features = inner.multi_modal_projector(row[:, 1:])
        words = inner.get_input_embeddings()(batch["input_ids"])
        words[batch["input_ids"] == processor.image_token_id] = features[0]
        return model(inputs_embeds=words).logits[0, -1].numpy()


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_llava_with_clip_is_right_but_for_what_llama_cpp_does_with_its_class_token(kind, layer, tmp_path):
    model, processor = made_of("clip", kind, layer)
    found = seen(model, processor, tmp_path)
    assert apart(found, logits_with_the_class_token_last(model, processor)) < 0.03
    # Where this fails llama.cpp has mended it, and the note in gguf_vision.py can go.
    assert apart(found, source_logits(model, processor, PROMPT, PICTURE)) > 0.06


def of_family(family, projector):
    """A tiny model of a family whose picture would be missed, and its processor."""
    model, processor = tiny(family)
    model.get_submodule(projector).weight.data *= 50
    if family == "qwen2_5_vl":
        # llama.cpp (b9190) does not read this number for qwen2vl and takes 0; to large models it makes no difference.
        for module in model.model.language_model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 0.0
        # Wider than a window of the tower.
        processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 240 * 160}
    return model, processor


@pytest.mark.parametrize(
    ("family", "projector", "mark", "size"),
    [
        ("qwen2_5_vl", "model.visual.merger.mlp.2", "<|vision_start|><|image_pad|><|vision_end|>", (240, 160)),
        ("smolvlm", "model.connector.modality_projection.proj", "<image>", (16, 16)),
        ("idefics3", "model.connector.modality_projection.proj", "<image>", (16, 16)),
    ],
)
def test_other_families_see_what_the_source_sees(family, projector, mark, size, tmp_path):
    model, processor = of_family(family, projector)
    base, picture = saved((model, processor), tmp_path / "base"), PICTURE.resize(size)
    written(base, tmp_path / "out", outtype="f16")
    cpp = LlamaCpp.of_export(tmp_path / "out")
    prompt = PROMPT.replace("<picture>", mark)
    want = source_logits(model, processor, prompt, picture)
    cpp.read(PROMPT.replace("<picture>", cpp.mark), [picture])
    assert apart(cpp.logits(), want) < 0.05
    other = source_logits(model, processor, prompt, Image.new("RGB", size, (250, 20, 90)))
    assert apart(other, want) > 0.25
    cpp.read(PROMPT.replace("<picture>", ""))
    assert apart(cpp.logits(), source_logits(model, processor, PROMPT.replace("<picture>", ""))) < 0.02


def test_text_is_split_as_the_source_splits_it(tmp_path):
    model, processor = llava_of("llama")
    written(saved((model, processor), tmp_path / "base"), tmp_path / "out")
    cpp = LlamaCpp(tmp_path / "out" / "model-q8_0.gguf")
    for text in (
        "Is it the 3rd of 12,345?",
        "  两只羊\n\n\tthat 't",
        "<|im_start|>user\n<image>hi<|im_end|>\n",
        "🦙 naïve",
    ):
        assert cpp.tokens(text) == processor.tokenizer(text)["input_ids"]


def test_an_adapter_is_taken_for_the_base(tmp_path):
    base = saved(llava_of("llama"), tmp_path / "base")
    trained(base, LORA, tmp_path / "adapter")
    written(base, tmp_path / "out")
    written(tmp_path / "adapter", tmp_path / "lora", lora=True)
    model = LlamaCpp.of_export(tmp_path / "out").model
    assert model.lora_adapter_init(str(tmp_path / "lora" / "adapter-f32.gguf")).meta_val_str("adapter.type") == "lora"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model in llama.cpp, the model itself and its processor."""
    folder = tmp_path_factory.mktemp("exported")
    model, processor = made_of("siglip", "llama", -1)
    written(saved((model, processor), folder / "base"), folder / "out", outtype="f16")
    return folder / "out", model, processor


def test_what_follows_a_prompt_is_judged_as_by_the_source(exported):
    out, model, processor = exported
    cpp = LlamaCpp.of_export(out)
    answer = processor.tokenizer("It is 12, and more.<|im_end|>")["input_ids"]
    cpp.read(PROMPT.replace("<picture>", cpp.mark), [PICTURE], more=len(answer))
    batch = processor(text=[PROMPT.replace("<picture>", "<image>")], images=[PICTURE], return_tensors="pt")
    ids = torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1)
    with torch.no_grad():
        want = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits[0, -len(answer) - 1 : -1].numpy()
    found = cpp.follow(answer)
    assert found.shape == want.shape
    assert apart(found, want) < 0.03
    # Each row is that of its own token.
    assert apart(found[1:], want[:-1]) > 0.1


def test_what_was_read_before_is_forgotten(exported):
    out, _, _ = exported
    cpp = LlamaCpp.of_export(out)
    prompt = PROMPT.replace("<picture>", cpp.mark)
    cpp.read(prompt, [PICTURE])
    first = cpp.logits()
    cpp.read("Something else" * 9)
    cpp.go_on(5, stop=False)
    cpp.read(prompt, [PICTURE])
    assert np.array_equal(cpp.logits(), first)


def test_room_is_made_for_longer_texts_than_it_was_opened_for(exported):
    out, model, processor = exported
    cpp = LlamaCpp(out / "model-f16.gguf", room=8)
    assert cpp.room < 300
    text = "a word, " * 40
    length = cpp.read(text)
    assert length == len(processor.tokenizer(text)["input_ids"]) > cpp.room - 64 - 256
    assert apart(cpp.logits(), source_logits(model, processor, text)) < 0.03


def test_what_it_does_not_load_or_take_is_named(exported, tmp_path):
    out, _, _ = exported
    (tmp_path / "model-f16.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(
        ModelError, match=r"model-f16\.gguf: llama\.cpp b\d+ .* does not load it .*export the model again"
    ):
        LlamaCpp.of_export(tmp_path)
    with pytest.raises(ModelError, match=r"no model-\*\.gguf there; export a whole model, without --lora"):
        LlamaCpp.of_export(out.parent)
    cpp = LlamaCpp(out / "model-f16.gguf")
    with pytest.raises(ModelError, match="opened without a vision tower, and is given 1 pictures; give mmproj"):
        cpp.read(cpp.mark, [PICTURE])
    with pytest.raises(ModelError, match="does not take a prompt with 2 pictures"):
        LlamaCpp.of_export(out).read(cpp.mark, [PICTURE, PICTURE])


def test_pictures_are_taken_in_without_a_word(exported, capfd):
    out, _, _ = exported
    cpp = LlamaCpp.of_export(out)
    cpp.read(cpp.mark, [PICTURE])
    assert capfd.readouterr().err == ""


def test_its_version_is_told():
    assert version().startswith("llama.cpp b")
