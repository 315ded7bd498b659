"""Every first-class family through the whole of the data rooms: one set of promises, a tiny real model of each."""

import copy
import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.chat import control_tokens, render_chat
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_prompt, encode_sample
from mmpeft.data.expand import picture_length
from mmpeft.data.labels import conversation_of
from mmpeft.data.types import Media
from mmpeft.evaluation.generate import answer
from mmpeft.families.registry import FAMILIES, family_of
from mmpeft.models.pixels import limit_pixels
from tests.families.models import ENCODED_TOGETHER, FIRST_CLASS, MODELS, SINGLE_TURN
from tests.families.samples import SIZES, film, first_medium, picture, sample_of, sound


@pytest.fixture(scope="module", params=sorted(MODELS))
def family(request):
    """(name, model, processor)"""
    torch.manual_seed(0)
    model, processor = MODELS[request.param]()
    return request.param, model.eval(), processor


def encoded_batch(model, processor, count, **options):
    rows = [encode_sample(processor, *first_medium(model, number)) for number in range(count)]
    return rows, MultimodalCollator(processor, **options)(rows)


def test_every_first_class_family_is_here():
    assert {spec.name for spec in FAMILIES} - {"composed"} == set(FIRST_CLASS)


def test_only_keys_of_the_models_forward_come_out(family):
    _, model, processor = family
    rows, _ = encoded_batch(model, processor, 1)
    assert set(rows[0]) <= set(inspect.signature(model.forward).parameters)


def test_labels_cover_exactly_the_assistants_tokens(family):
    _, model, processor = family
    sample, media = first_medium(model)
    found = encode_sample(processor, sample, media)
    labelled = found["labels"] != IGNORE_INDEX
    text = processor.tokenizer.decode(found["labels"][labelled])
    assert text.replace(processor.tokenizer.eos_token, "").replace("<end_of_turn>", "").strip() == "a cat"
    assert torch.equal(found["labels"][labelled], found["input_ids"][labelled])
    assert not labelled[: len(found["input_ids"]) - int(labelled.sum()) - 2].any(), "a label before the answer"


def test_the_prompt_before_an_answer_is_the_one_of_inference(family):
    _, model, processor = family
    sample, media = first_medium(model)
    whole = encode_sample(processor, sample, media)
    prompt = encode_prompt(processor, sample.turns[:1], media)
    first = int((whole["labels"] != IGNORE_INDEX).nonzero()[0])
    assert torch.equal(whole["input_ids"][:first], prompt["input_ids"])
    for key in set(prompt) - {"input_ids", "token_type_ids", "mm_token_type_ids"}:
        torch.testing.assert_close(whole[key], prompt[key], rtol=0, atol=0)


def test_ids_are_those_of_the_processor_itself(family):
    name, model, processor = family
    if name in SINGLE_TURN:
        pytest.skip(f"{name}'s processor writes the end of its prompt itself")
    sample, media = first_medium(model)
    found = encode_sample(processor, sample, media)
    given = {"images": [list(media.images)]} if media.images else {"audio": [media.audios[0].samples]}
    whole = processor(text=[conversation_of(processor, sample.turns).text], return_tensors="pt", **given)
    ids = whole["input_ids"][0]
    assert torch.equal(found["input_ids"], ids[: len(found["input_ids"])])


def test_the_padded_batch_equals_single_samples(family):
    _, model, processor = family
    rows, batch = encoded_batch(model, processor, 3, supervised_only=False)
    with torch.no_grad():
        together = model(**batch).logits
        for number, row in enumerate(rows):
            alone = model(**MultimodalCollator(processor, supervised_only=False)([row])).logits[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=1e-4, atol=2e-5)


def test_supervised_positions_alone_give_the_same_loss_and_gradients(family):
    _, model, processor = family
    if not family_of(model).supervised_logits:
        pytest.skip("its forward computes the logits of every position")
    results = []
    for supervised_only in (False, True):
        _, batch = encoded_batch(model, processor, 2, supervised_only=supervised_only)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        results.append((loss.detach(), gradients))
    model.zero_grad()
    torch.testing.assert_close(results[0][0], results[1][0])
    assert len(results[0][1]) == len(results[1][1]) > 5
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_text_alone_shares_a_batch_with_pictures(family):
    name, model, processor = family
    if name in SINGLE_TURN:
        pytest.skip(f"{name} answers about pictures only")
    plain = encode_sample(processor, sample_of("1 + 1?", "2"), Media())
    rows, _ = encoded_batch(model, processor, 1)
    collate = MultimodalCollator(processor, supervised_only=False)
    with torch.no_grad():
        both = model(**collate([plain, *rows])).logits[0, : len(plain["input_ids"])]
        alone = model(**collate([plain])).logits[0]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=2e-5)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(9, 160), height=st.integers(9, 160))
def test_picture_tokens_match_features_at_odd_sizes(family, width, height):
    _, model, processor = family
    if "image" not in family_of(model).modalities:
        return
    sample = sample_of("<image>\nWhat?", "a", images=1)
    row = encode_sample(processor, sample, Media(images=[picture((width, height))]))
    with torch.no_grad():
        assert torch.isfinite(model(**MultimodalCollator(processor)([row])).loss)
    length = picture_length(processor, (width, height))
    short = len(render_tokens(processor, sample))
    assert abs(len(row["input_ids"]) - (short - 1 + length)) <= 2


def render_tokens(processor, sample):
    text = render_chat(processor, sample.turns, add_generation_prompt=False)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_many_pictures_in_one_turn_and_across_turns(family):
    name, model, processor = family
    if "image" not in family_of(model).modalities or name in SINGLE_TURN:
        pytest.skip(f"{name} takes one turn, or no pictures")
    sample = sample_of("<image> or <image>?", "the first", "and <image>?", "no", images=3)
    media = Media(images=[picture(size, number) for number, size in enumerate(SIZES[:3])])
    row = encode_sample(processor, sample, media)
    labelled = row["labels"][row["labels"] != IGNORE_INDEX]
    assert "the first" in processor.tokenizer.decode(labelled)
    with torch.no_grad():
        assert torch.isfinite(model(**MultimodalCollator(processor)([row])).loss)


def picture_token(model):
    return getattr(model.config, "image_token_id", None) or model.config.image_token_index


def test_a_picture_behind_the_cut_goes_with_its_tensors(family):
    name, model, processor = family
    if "image" not in family_of(model).modalities or name in SINGLE_TURN:
        pytest.skip(f"{name} takes one turn, or no pictures")
    sample = sample_of("<image>q", "yes", "<image>r", "no", images=2)
    media = Media(images=[picture((32, 32)), picture((32, 32), 1)])
    prompt = encode_prompt(processor, sample.turns[:3], media)["input_ids"]
    inside = int((prompt == picture_token(model)).nonzero()[-1])
    if name in ENCODED_TOGETHER:
        with pytest.raises(DataError, match="cannot be cut to the 1 that fit"):
            encode_sample(processor, sample, media, max_length=inside)
        return
    cut = encode_sample(processor, sample, media, max_length=inside)
    one = encode_sample(processor, sample_of("<image>q", "yes", images=1), Media(images=media.images[:1]))
    assert len(cut["pixel_values"]) == len(one["pixel_values"])
    with torch.no_grad():
        assert torch.isfinite(model(**MultimodalCollator(processor)([cut])).loss)


def test_a_film_and_a_recording_go_in_where_the_family_takes_them(family):
    _, model, processor = family
    modalities = set(family_of(model).modalities) & {"video", "audio"} & set(control_tokens(processor).media)
    for modality in sorted(modalities):
        media = Media(videos=[film()]) if modality == "video" else Media(audios=[sound()])
        sample = sample_of(f"<{modality}>\nWhat?", "a", **{f"{modality}s": 1})
        row = encode_sample(processor, sample, media)
        with torch.no_grad():
            assert torch.isfinite(model(**MultimodalCollator(processor)([row])).loss)


def test_generated_answers_do_not_depend_on_the_cache(family):
    _, model, processor = family
    if "image" not in family_of(model).modalities:
        pytest.skip("answer() takes pictures; recordings come with the data set")
    text = answer(model, processor, images=[picture(SIZES[0])], prompt="What?", max_new_tokens=4)
    assert isinstance(text, str)


def test_max_pixels_is_obeyed_and_goes_with_the_processor(family, tmp_path):
    _, model, processor = family
    spec = family_of(model)
    if "image" not in spec.modalities:
        with pytest.raises(ModelError, match="takes no pictures"):
            limit_pixels(processor, 4096)
        return
    limited = copy.deepcopy(processor)
    least = least_pixels(processor.image_processor)
    if least is None:
        with pytest.raises(ModelError, match="the size that the model was built for"):
            limit_pixels(limited, 4096)
        return
    limit_pixels(limited, least)
    limited.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    lengths = [picture_length(each, (64, 64)) for each in (processor, limited, again)]
    assert lengths[0] > lengths[1] == lengths[2] > 0
    row = encode_sample(limited, sample_of("<image>\nWhat?", "a", images=1), Media(images=[picture((64, 64))]))
    assert kept_pixels(row, processor.image_processor) <= least
    with pytest.raises(ModelError, match=f"{least - 1} is below one (picture token|tile)"):
        limit_pixels(limited, least - 1)


def least_pixels(image_processor):
    """Pixels of one picture token or one tile; None where every picture has the size of the model."""
    if hasattr(image_processor, "merge_size"):
        return (image_processor.patch_size * image_processor.merge_size) ** 2
    if getattr(image_processor, "max_patches", None):
        return image_processor.size["height"] * image_processor.size["width"]
    tile = getattr(image_processor, "max_image_size", None)
    return tile["longest_edge"] ** 2 if tile else None


def kept_pixels(row, image_processor):
    """Width x height that the tower sees."""
    if "image_grid_thw" in row:
        return int(row["image_grid_thw"].prod()) * image_processor.patch_size**2
    *_, height, width = row["pixel_values"].shape
    return row["pixel_values"].numel() // 3 // (height * width) * height * width
