import copy
import json
import logging

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipConfig,
    SiglipModel,
    ViTModel,
    YolosConfig,
    YolosModel,
)

from mmpeft.core.errors import ModelError
from mmpeft.families.registry import family_of
from mmpeft.models.compose import compose_model
from mmpeft.models.modeling_composed import ComposedForConditionalGeneration
from tests.models.parts import LANGUAGES, NATIVE_LANGUAGES, NATIVE_VISIONS, VISIONS, tiny_language, tiny_vision
from tests.tiny import IMAGE_TOKENS, tiny_clip, tiny_image_processor, tiny_llama, tiny_tokenizer

PAIRS = [(vision, language) for vision in VISIONS for language in LANGUAGES]
RED, BLUE = Image.new("RGB", (20, 14), (200, 30, 30)), Image.new("RGB", (14, 20), (20, 40, 220))


def compose(vision="clip", language="llama", **options):
    tokenizer = tiny_tokenizer(image_token=False)
    return compose_model(
        vision=tiny_vision(vision),
        language=tiny_language(language, tokenizer),
        tokenizer=tokenizer,
        image_processor=tiny_image_processor(),
        **options,
    )


def ask(processor, image=RED, text="what is it? 这是什么?"):
    return processor(images=image, text=f"<image>{text}", return_tensors="pt")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def same(one, other):
    """Equal but for the last bit, which the CPU's matrix product lets hang on where in memory a weight lies."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_every_pair_keeps_the_language_model_and_sees_the_picture(vision, language, tmp_path):
    tokenizer = tiny_tokenizer(image_token=False)
    original = tiny_language(language, tokenizer)
    reference, size = copy.deepcopy(original), len(tokenizer)
    model, processor = compose_model(
        vision=tiny_vision(vision), language=original, tokenizer=tokenizer, image_processor=tiny_image_processor()
    )

    native = vision in NATIVE_VISIONS and language in NATIVE_LANGUAGES
    assert type(model) is (LlavaForConditionalGeneration if native else ComposedForConditionalGeneration)
    assert family_of(model).name == ("llava" if native else "composed")

    text = tokenizer("just text, 只有文字", return_tensors="pt")
    ids = {"input_ids": text["input_ids"]}
    torch.testing.assert_close(logits(model, ids)[..., :size], logits(reference, ids), rtol=1e-5, atol=1e-5)

    assert (logits(model, ask(processor)) - logits(model, ask(processor, BLUE))).abs().max() > 1e-6

    tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor_again = AutoProcessor.from_pretrained(tmp_path)
    inputs = ask(processor_again)
    assert torch.equal(inputs["input_ids"], ask(processor)["input_ids"])
    same(logits(again, inputs), logits(model, inputs))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied

    written = again.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert written.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(written, step_by_step(model, inputs, 4))


def step_by_step(model, inputs, count):
    """Greedy decoding without a cache: the whole row again for every token."""
    ids, blocked = inputs["input_ids"], model.generation_config.eos_token_id
    for _ in range(count):
        scores = logits(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]})[:, -1]
        scores[:, blocked] = -torch.inf
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


def test_linear_projector_is_native_with_a_fixed_identity():
    model, _ = compose(projector="linear")
    projector = model.model.multi_modal_projector
    assert type(model) is LlavaForConditionalGeneration
    assert torch.equal(projector.linear_2.weight, torch.eye(32))
    assert not projector.linear_2.bias.any()
    assert not projector.linear_2.weight.requires_grad
    features = torch.randn(1, 4, 16)
    assert torch.equal(projector(features), projector.linear_1(features))
    assert family_of(model).projector_leaves(model, family_of(model)) == ["model.multi_modal_projector.linear_1"]


def test_linear_kind_is_known_again_after_saving(tmp_path):
    model, _ = compose(projector="linear")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert family_of(again).projector_leaves(again, family_of(again)) == ["model.multi_modal_projector.linear_1"]


def test_the_log_says_which_class_and_why(caplog):
    caplog.set_level(logging.INFO, logger="mmpeft")
    compose(language="gemma2")
    assert "not a native LLaVA: LLaVA's logits on text alone differ from the language model's by" in caplog.text
    compose(vision="dinov2_registers")
    assert "LLaVA drops at most one leading token, and Dinov2WithRegistersModel has 5" in caplog.text
    compose()
    assert "composed a native LlavaForConditionalGeneration" in caplog.text


def test_same_seed_same_projector_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        tokenizer = tiny_tokenizer()
        clip, llama = tiny_clip(), tiny_llama(tokenizer)
        torch.random.set_rng_state(before)
        model, _ = compose_model(
            vision=clip, language=llama, tokenizer=tokenizer, image_processor=tiny_image_processor(), seed=seed
        )
        weights.append(model.model.multi_modal_projector.linear_1.weight)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_prefix_decides_llavas_feature_strategy():
    for vision, strategy, extra in (("clip", "default", 1), ("siglip", "full", 0)):
        model, processor = compose(vision=vision)
        assert isinstance(processor, LlavaProcessor)
        assert model.config.vision_feature_select_strategy == strategy
        assert processor.num_additional_image_tokens == extra
        assert (ask(processor)["input_ids"] == processor.image_token_id).sum() == IMAGE_TOKENS


def test_everything_from_directories(tmp_path):
    tokenizer = tiny_tokenizer(image_token=False)
    tiny_clip().save_pretrained(tmp_path / "clip")
    tiny_image_processor().save_pretrained(tmp_path / "clip")
    tiny_llama(tokenizer).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    model, processor = compose_model(vision=str(tmp_path / "clip"), language=str(tmp_path / "llama"))
    assert type(model) is LlavaForConditionalGeneration
    assert logits(model, ask(processor)).isfinite().all()
    model.save_pretrained(tmp_path / "model")
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()


@pytest.mark.parametrize(("config_class", "model_class"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)])
def test_the_vision_half_of_a_dual_encoder(config_class, model_class, tmp_path):
    vision = {"clip": "clip", "siglip": "siglip"}[config_class.model_type]
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    dual = model_class(config_class(vision_config=VISIONS[vision]().to_dict(), text_config=text)).eval()
    dual.save_pretrained(tmp_path)
    tiny_image_processor().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    for source in (str(tmp_path), dual):
        model, _ = compose_model(
            vision=source,
            language=tiny_llama(tokenizer),
            tokenizer=tokenizer,
            image_processor=tiny_image_processor(),
        )
        expected, found = dual.vision_model.state_dict(), model.get_encoder(modality="image").state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_pooler_that_is_not_in_the_checkpoint_does_not_matter_but_a_layer_does(tmp_path):
    torch.manual_seed(0)
    vit = ViTModel(VISIONS["vit"](), add_pooling_layer=False)
    vit.save_pretrained(tmp_path)
    tiny_image_processor().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    model, _ = compose_model(vision=str(tmp_path), language=tiny_llama(tokenizer), tokenizer=tokenizer)
    assert not model.model.vision_tower.pooler.dense.weight.any()

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"weights are not in the checkpoint and would be random, first .*2"):
        compose_model(
            vision=str(tmp_path), language=tiny_llama(tokenizer), tokenizer=tokenizer, vision_feature_layer=-1
        )


def test_buffers_keep_full_precision_in_half_precision_models():
    model, _ = compose(dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rotary = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    assert rotary
    assert {buffer.dtype for buffer in rotary} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_given_tokenizer_is_left_alone():
    tokenizer = tiny_tokenizer(image_token=False)
    size, template = len(tokenizer), tokenizer.chat_template
    compose_model(
        vision=tiny_clip(),
        language=tiny_llama(tokenizer),
        tokenizer=tokenizer,
        image_processor=tiny_image_processor(),
    )
    assert (len(tokenizer), tokenizer.chat_template) == (size, template)


def test_generation_settings_have_an_end_and_padding():
    model, processor = compose()
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


class TestErrors:
    def test_unknown_projector_names_the_nearest(self):
        with pytest.raises(ModelError, match="projector 'mpl' is not registered; did you mean 'mlp'"):
            compose(projector="mpl")

    def test_projector_without_kind(self):
        with pytest.raises(ModelError, match="names no kind"):
            compose(projector={"num_queries": 3})

    def test_unknown_projector_option(self):
        with pytest.raises(ModelError, match="takes no option 'queries'; its options: num_queries, depth, num_heads"):
            compose(projector={"kind": "resampler", "queries": 3})

    def test_feature_layer_out_of_range(self):
        with pytest.raises(ModelError, match=r"vision_feature_layer=-9, but the encoder has 3 hidden states"):
            compose(vision_feature_layer=-9)

    def test_model_without_tokenizer(self):
        with pytest.raises(ModelError, match="give its tokenizer= too"):
            compose_model(
                vision=tiny_clip(), language=tiny_llama(tiny_tokenizer()), image_processor=tiny_image_processor()
            )

    def test_encoder_without_image_processor(self):
        tokenizer = tiny_tokenizer()
        with pytest.raises(ModelError, match="give its image_processor= too"):
            compose_model(vision=tiny_clip(), language=tiny_llama(tokenizer), tokenizer=tokenizer)

    def test_pictures_of_another_size_than_the_encoders(self):
        tokenizer, pictures = tiny_tokenizer(), tiny_image_processor()
        pictures.size = pictures.crop_size = {"height": 24, "width": 24}
        with pytest.raises(ModelError, match="does not take pictures of 24 x 24 pixels"):
            compose_model(
                vision=tiny_clip(), language=tiny_llama(tokenizer), tokenizer=tokenizer, image_processor=pictures
            )

    def test_pictures_of_changing_size(self):
        tokenizer, pictures = tiny_tokenizer(), tiny_image_processor()
        pictures.size = {"shortest_edge": 16}
        with pytest.raises(ModelError, match=r"a composed model needs one size"):
            compose_model(
                vision=tiny_clip(), language=tiny_llama(tokenizer), tokenizer=tokenizer, image_processor=pictures
            )

    def test_an_encoder_whose_last_tokens_are_no_patches(self):
        tokenizer = tiny_tokenizer()
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        yolos = YolosModel(YolosConfig(**sizes, image_size=[16, 16], patch_size=8, num_detection_tokens=3)).eval()
        with pytest.raises(
            ModelError, match=r"YolosModel gives 8 features for 2 x 2 patches, and they are not leading"
        ):
            compose_model(
                vision=yolos,
                language=tiny_llama(tokenizer),
                tokenizer=tokenizer,
                image_processor=tiny_image_processor(),
            )

    def test_a_language_model_is_no_encoder(self):
        tokenizer = tiny_tokenizer()
        with pytest.raises(ModelError, match="LlamaForCausalLM does not take pictures"):
            compose_model(
                vision=tiny_llama(tokenizer),
                language=tiny_llama(tokenizer),
                tokenizer=tokenizer,
                image_processor=tiny_image_processor(),
            )

    def test_an_encoder_is_no_language_model(self):
        with pytest.raises(ModelError, match="CLIPVisionModel has no language-model head"):
            compose_model(
                vision=tiny_clip(),
                language=tiny_clip(),
                tokenizer=tiny_tokenizer(),
                image_processor=tiny_image_processor(),
            )

    def test_three_encoders(self):
        tokenizer = tiny_tokenizer()
        with pytest.raises(ModelError, match="names 3 encoders"):
            compose_model(vision=[tiny_clip()] * 3, language=tiny_llama(tokenizer), tokenizer=tokenizer)

    def test_missing_directory(self):
        with pytest.raises(ModelError, match=r"\./nowhere: no such directory"):
            compose_model(vision="./nowhere", language="./nowhere")
