"""What the LLaVA class cannot express: our own model class, its processor and configuration."""

import copy
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmpeft.core.errors import ModelError
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.types import Media, Sample, Turn
from mmpeft.families.registry import family_of
from mmpeft.models.compose import compose_model
from mmpeft.models.load import load_model
from mmpeft.models.modeling_composed import ComposedForConditionalGeneration
from mmpeft.models.processing_composed import ComposedProcessor
from tests.models.parts import tiny_language, tiny_vision
from tests.plain import PRELUDE
from tests.tiny import IMAGE_TOKENS, tiny_image_processor, tiny_tokenizer

KINDS = {
    "linear": IMAGE_TOKENS,
    "mlp": IMAGE_TOKENS,
    "fusion_mlp": IMAGE_TOKENS,
    "pixel_shuffle_mlp": IMAGE_TOKENS // 4,
    "resampler": 3,
}
RED, BLUE = Image.new("RGB", (20, 14), (200, 30, 30)), Image.new("RGB", (14, 20), (20, 40, 220))


def own(kind="pixel_shuffle_mlp", *, vision="dinov2_registers", language="llama", **options):
    tokenizer = tiny_tokenizer(image_token=False)
    encoders = [tiny_vision(name, seed) for seed, name in enumerate([vision] if isinstance(vision, str) else vision)]
    return compose_model(
        vision=encoders,
        language=tiny_language(language, tokenizer),
        tokenizer=tokenizer,
        image_processor=options.pop("image_processor", [tiny_image_processor() for _ in encoders]),
        projector={"kind": kind, **({"num_queries": 3} if kind == "resampler" else {})},
        **options,
    )


def ask(processor, images=(RED,), text="这是什么? what is it?", **options):
    prompt = processor.image_token * len(images) + text
    return processor(images=list(images), text=prompt, return_tensors="pt", **options)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def same(one, other):
    """Equal but for the last bit, which the CPU's matrix product lets hang on where in memory a weight lies."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_saves_loads_generates_and_learns(kind, tmp_path):
    model, processor = own(kind)
    assert type(model) is ComposedForConditionalGeneration
    inputs = ask(processor)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == KINDS[kind] == processor.tokens_per_image

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is ComposedForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is ComposedProcessor
    same(logits(again, inputs), logits(model, inputs))
    assert (logits(model, ask(processor, [BLUE])) - logits(model, inputs)).abs().max() > 1e-6

    written = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    ids = inputs["input_ids"]
    for _ in range(3):
        scores = logits(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})[:, -1]
        scores[:, model.generation_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)

    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.multi_modal_projector.parameters())


def test_family_finds_the_parts_and_transformers_the_submodules():
    model, _ = own("resampler")
    spec = family_of(model)
    assert {spec.part_of(name) for name, _ in model.named_parameters()} == {"vision", "projector", "language"}
    assert "multi_modal_projector.queries" in spec.projector_leaves(model, spec)
    assert model.get_encoder(modality="image") is model.vision_towers[0]
    assert model.get_decoder() is model.language_model.model
    assert model.get_input_embeddings() is model.language_model.model.embed_tokens
    assert model.get_output_embeddings() is model.language_model.lm_head
    assert model.config.get_text_config() is model.language_model.config


def test_all_parameters_of_projectors_sit_in_called_leaves():
    for kind in KINDS:
        model, processor = own(kind)
        spec, called = family_of(model), set()
        leaves = spec.projector_leaves(model, spec)
        for name in leaves:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name, called=called: called.add(name))
        logits(model, ask(processor))
        assert called == set(leaves), kind


class TestForward:
    def test_logits_to_keep_by_number_and_by_index(self):
        model, processor = own()
        inputs = ask(processor)
        everything = logits(model, inputs)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, everything[:, -2:])
            kept = torch.tensor([0, 3])
            torch.testing.assert_close(model(**inputs, logits_to_keep=kept).logits, everything[:, kept])

    def test_shift_labels_and_num_items_reach_the_loss(self):
        model, processor = own()
        inputs = ask(processor)
        kept = torch.tensor([2, 4, 5])
        target = inputs["input_ids"][:, kept + 1]
        loss = model(
            **inputs, labels=inputs["input_ids"], shift_labels=target, logits_to_keep=kept, num_items_in_batch=7
        ).loss
        scores = model(**inputs, logits_to_keep=kept).logits
        expected = functional.cross_entropy(scores.flatten(0, 1), target.flatten(), reduction="sum") / 7
        torch.testing.assert_close(loss, expected)

    def test_inputs_embeds_in_place_of_ids(self):
        model, processor = own()
        inputs = ask(processor)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = logits(model, {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]})
        torch.testing.assert_close(got, logits(model, inputs))

    def test_features_made_beforehand_in_place_of_pixels(self):
        model, processor = own()
        inputs = ask(processor)
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"])
        assert features.last_hidden_state.shape == (1, IMAGE_TOKENS, 16)
        got = logits(model, {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": features}})
        torch.testing.assert_close(got, logits(model, inputs))

    def test_positions_and_padding_do_not_change_a_row(self):
        model, processor = own()
        alone = ask(processor, text="hi")
        both = processor(
            images=[RED, BLUE],
            text=[f"{processor.image_token}hi", f"{processor.image_token}a longer question"],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        positions = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
        length = alone["input_ids"].shape[1]
        got = logits(model, {**both, "position_ids": positions})[0, -length:]
        torch.testing.assert_close(got, logits(model, alone)[0], rtol=1e-4, atol=1e-5)

    def test_two_pictures_go_to_their_own_places(self):
        model, processor = own("resampler")
        first, second = ask(processor, [RED, BLUE]), ask(processor, [BLUE, RED])
        assert (logits(model, first) - logits(model, second)).abs().max() > 1e-6

    def test_beams_take_their_pictures_along(self):
        model, processor = own("resampler")
        inputs = ask(processor, [RED, BLUE])
        beams = model.generate(**inputs, num_beams=2, max_new_tokens=3, do_sample=False)
        assert beams.shape[0] == 1

    def test_pictures_and_tokens_that_do_not_match(self):
        model, processor = own()
        inputs = ask(processor, [RED, BLUE])
        with pytest.raises(
            Exception, match=r"the text holds 2 picture tokens \(id \d+\), but 1 pictures give 1 features"
        ):
            model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])

    def test_ids_and_embeddings_exclude_each_other(self):
        model, processor = own()
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(pixel_values=ask(processor)["pixel_values"])

    def test_pixels_and_features_exclude_each_other(self):
        model, processor = own()
        inputs = ask(processor)
        features = model.get_image_features(inputs["pixel_values"])
        with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs, not both"):
            model(**inputs, mm_encoder_outputs={"image": features})

    @pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
    def test_gradient_checkpointing_gives_the_same_gradients(self):
        model, processor = own()
        inputs = ask(processor)
        grads = []
        for checkpointing in (False, True):
            copied = copy.deepcopy(model).train()
            if checkpointing:
                copied.activation_checkpointing_enable()
                assert copied.language_model.model.gradient_checkpointing
            copied(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            grads.append(copied.multi_modal_projector.linear_1.weight.grad)
        torch.testing.assert_close(grads[0], grads[1])

    def test_attention_implementation_reaches_every_layer(self):
        for model, processor in (own(), own("mlp", vision="clip")):
            before = logits(model, ask(processor))
            model.set_attn_implementation("eager")
            assert model.get_decoder().layers[0].self_attn.config._attn_implementation == "eager"
            torch.testing.assert_close(logits(model, ask(processor)), before, rtol=1e-4, atol=1e-5)


class TestHeads:
    def test_a_capped_head_stays_capped(self, tmp_path):
        model, processor = own("mlp", vision="clip", language="gemma2")
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert logits(again, ask(processor)).abs().max() <= 0.05

    def test_a_tied_head_stays_tied_and_is_stored_once(self, tmp_path):
        model, _ = own("mlp", vision="clip", language="gpt2")
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert again.config.tie_word_embeddings


class TestTwoEncoders:
    def test_features_are_joined_on_the_channels(self, tmp_path):
        model, processor = own("fusion_mlp", vision=["siglip", "dinov2_registers"])
        inputs = ask(processor)
        with torch.no_grad():
            joined = model.get_image_features(inputs["pixel_values"]).last_hidden_state
            states = [
                tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
                for tower in model.vision_towers
            ]
        torch.testing.assert_close(joined, torch.cat([states[0], states[1][:, 5:]], dim=-1))
        assert model.get_encoder(modality="image") is model.vision_towers
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path)
        same(logits(again, inputs), logits(model, inputs))

    def test_each_encoder_gets_its_own_normalisation(self):
        pictures = [tiny_image_processor(), tiny_image_processor()]
        pictures[1].image_mean, pictures[1].image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
        model, processor = own("fusion_mlp", vision=["siglip", "vit"], image_processor=pictures)
        seen = []
        model.vision_towers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        logits(model, ask(processor))
        expected = pictures[1](images=RED, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)

    def test_grids_that_differ_are_refused_with_the_numbers(self):
        tokenizer = tiny_tokenizer()
        coarse = AutoConfig.for_model(**{**tiny_vision("vit").config.to_dict(), "patch_size": 16})
        with pytest.raises(
            ModelError, match=r"at 16 x 16 pixels .* gives 2 x 2 patches of 8 pixels, .* 1 x 1 patches of"
        ):
            compose_model(
                vision=[tiny_vision("siglip"), type(tiny_vision("vit"))(coarse)],
                language=tiny_language("llama", tokenizer),
                tokenizer=tokenizer,
                image_processor=[tiny_image_processor()] * 2,
            )


def test_peft_trains_projector_leaves_and_lora_and_comes_back(tmp_path):
    model, processor = own("resampler", language="gemma2")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model, processor = load_model(tmp_path / "base", device="cpu")
    spec, inputs = family_of(model), ask(processor)
    before = logits(model, inputs)
    config = LoraConfig(
        r=4,
        target_modules=r"language_model\..*\.(q_proj|v_proj)",
        modules_to_save=spec.projector_leaves(model, spec),
    )
    peft_model = get_peft_model(model, config)
    assert torch.equal(logits(peft_model, inputs), before)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        peft_model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(peft_model, inputs)
    assert (trained - before).abs().max() > 1e-5
    peft_model.save_pretrained(tmp_path / "adapter")
    again, _ = load_model(tmp_path / "adapter", device="cpu")
    assert isinstance(again, PeftModel)
    same(logits(again, inputs), trained)
    same(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter"), inputs), trained)


_WITHOUT_MMPEFT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmpeft":
            raise ModuleNotFoundError("No module named 'mmpeft'", name="mmpeft")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({folder!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)
inputs = torch.load({folder!r} + "/inputs.pt")
ids = processor(images=[__import__("PIL.Image").Image.new("RGB", (20, 14), (200, 30, 30))],
                text="<image>这是什么? what is it?", return_tensors="pt")["input_ids"]
assert torch.equal(ids, inputs["input_ids"])
assert not any(name.split(".")[0] == "mmpeft" for name in sys.modules)
with torch.no_grad():
    torch.save(model(**inputs).logits, {folder!r} + "/logits.pt")
model.save_pretrained({folder!r} + "/again")
processor.save_pretrained({folder!r} + "/again")
"""


def test_a_program_without_mmpeft_loads_it_with_its_own_code(tmp_path):
    model, processor = own("fusion_mlp", vision=["siglip", "dinov2_registers"])
    inputs = ask(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    files = {"modeling_composed.py", "configuration_composed.py", "processing_composed.py", "projectors.py"}
    assert files <= {file.name for file in tmp_path.iterdir()}
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_composed.ComposedConfig",
        "AutoModelForImageTextToText": "modeling_composed.ComposedForConditionalGeneration",
    }
    torch.save({"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(_WITHOUT_MMPEFT).format(folder=str(tmp_path))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    same(torch.load(tmp_path / "logits.pt"), logits(model, inputs))
    assert files <= {file.name for file in Path(tmp_path / "again").iterdir()}
    back, _ = load_model(tmp_path / "again", device="cpu")
    same(logits(back, inputs), logits(model, inputs))


def test_a_data_rooms_batch_gives_the_same_loss_whole_and_supervised_only():
    model, processor = own("resampler", language="gemma2")
    sample = Sample(
        id="0",
        turns=(
            Turn(role="user", text="<image>\n描述这张图片"),
            Turn(role="assistant", text="一只猫"),
            Turn(role="user", text="and this? <image>"),
            Turn(role="assistant", text="a dog"),
        ),
        images=("a.png", "b.png"),
        index=0,
        line=1,
    )
    encoded = encode_sample(processor, sample, Media(images=[RED, BLUE]))
    losses = []
    for supervised_only in (False, True):
        batch = MultimodalCollator(processor, supervised_only=supervised_only)([encoded, encoded])
        assert batch["pixel_values"].shape == (4, 3, 16, 16)
        assert (batch["input_ids"] == model.config.image_token_id).sum() == 4 * processor.tokens_per_image
        with torch.no_grad():
            losses.append(model(**batch).loss)
    torch.testing.assert_close(losses[0], losses[1])
