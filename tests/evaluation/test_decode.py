"""Questions that share their pictures get the answers that they get one by one, in every family."""

from dataclasses import replace

import pytest
import torch

from mmpeft.data.chat import control_tokens
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_prompt
from mmpeft.data.types import Media, Turn
from mmpeft.evaluation import decode
from mmpeft.evaluation.decode import Decoder, obstacle
from mmpeft.evaluation.generate import _generate, end_tokens
from mmpeft.evaluation.prompt_row import lay_out
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.models import MODELS, SINGLE_TURN
from tests.families.samples import SIZES, film, picture, sound
from tests.families.test_adapters import LORA, PROJECTOR, scattered

SHARED = [name for name, make in MODELS.items() if obstacle(make()[0]) is None]


EMBEDDING = {"gemma3": 0.02}


def turns(*texts):
    return [Turn(role=("user", "assistant")[number % 2], text=text) for number, text in enumerate(texts)]


def prompts_of(family, model, processor):
    """On pictures of their own and shared, on none, on two, after earlier turns, the same one twice, films, sounds."""
    first, second = (Media(images=[picture(SIZES[number], number)]) for number in (0, 1))
    made = [
        (turns("<image>\nWhat is it?"), first),
        (turns("<image>\nWhich colour is it, and why is it not another one?"), first),
        (turns("<image>\nWho?"), second),
        (turns("<image>\nWhat is it?"), first),
    ]
    if family not in SINGLE_TURN:
        two = Media(images=[*second.images, *first.images])
        made += [
            (turns("1 + 1?"), Media()),
            (turns("<image>\nWhat is it?", "A cat.", "Of which colour?"), first),
            (turns("<image>\nWho?", "She.", "And <image>?"), two),
            (turns("<image>\nWho?", "She.", "And <image>, what is that?"), two),
        ]
    modalities = set(family_of(model).modalities) & set(control_tokens(processor).media)
    if "video" in modalities:
        made += [(turns(f"<video>\n{text}"), Media(videos=[film()])) for text in ("When?", "What comes first?")]
    if "audio" in modalities:
        made += [(turns(f"<audio>\n{text}"), Media(audios=[sound()])) for text in ("Who?", "What is said?")]
    return [encode_prompt(processor, *each) for each in made]


def talkative(model):
    """Weights that say something else for every prompt, and are far from ties."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            # Where the head is the embedding, a large one would have each token repeat itself.
            parameter.data.normal_(std=EMBEDDING.get(model.config.model_type, 1) if "embed" in name else 0.3)
    return model


def said(model, processor, prompts, *, batch_size=8, max_new_tokens=6, groups=None):
    found = {}
    decoder = Decoder(
        model,
        processor,
        groups=groups or [range(len(prompts))],
        encode=lambda numbers: [prompts[number] for number in numbers],
        ends=end_tokens(model, processor),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        finish=found.update,
    )
    with torch.no_grad():
        decoder.run()
    texts = [processor.tokenizer.decode(found[number], skip_special_tokens=True).strip() for number in sorted(found)]
    return texts, decoder.work


def one_by_one(model, processor, prompts, max_new_tokens=6):
    return [_generate(model, processor, [prompt], max_new_tokens)[0] for prompt in prompts]


@pytest.mark.parametrize("family", SHARED)
def test_answers_and_first_logits_are_those_of_one_by_one(family):
    model, processor = MODELS[family]()
    adapted = talkative(scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval())
    prompts = prompts_of(family, model, processor)
    expected = one_by_one(adapted, processor, prompts)
    assert len(set(expected)) > len(expected) // 2
    for batch_size in (1, 3, 16):
        found, work = said(adapted, processor, prompts, batch_size=batch_size)
        assert found == expected
    assert (work.prompts < sum(len(prompt["input_ids"]) for prompt in prompts)) == (family != "paligemma")
    row = lay_out(adapted, processor, prompts)
    with torch.no_grad(), tree_attention_on(adapted):
        logits = adapted(**row.inputs).logits[0]
    if "logits_to_keep" not in row.inputs:
        logits = logits[row.last]
    collate = MultimodalCollator(processor, supervised_only=False)
    for number, found in zip(row.order, logits, strict=True):
        batch = collate([{**prompts[number], "labels": prompts[number]["input_ids"]}])
        batch.pop("labels")
        with torch.no_grad():
            plain = adapted(**batch).logits[0, -1]
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_the_other_families_say_why_not():
    assert {"qwen3_5", "qwen2_audio"} == {name for name in MODELS if name not in SHARED}
    model, _ = MODELS["qwen2_audio"]()
    assert obstacle(model) == "prompts of the family qwen2_audio cannot share a row"


def test_settings_that_change_answers_are_kept():
    model, processor = MODELS["qwen2_5_vl"]()
    prompts = prompts_of("qwen2_5_vl", talkative(model), processor)
    plain = one_by_one(model, processor, prompts)
    model.generation_config.repetition_penalty = 5.0
    expected = one_by_one(model, processor, prompts)
    assert expected != plain
    assert said(model, processor, prompts, batch_size=3)[0] == expected
    model.generation_config.no_repeat_ngram_size = 2
    assert obstacle(model) == "its generation config sets no_repeat_ngram_size"


def test_an_answer_that_ends_makes_room_and_is_not_computed_further(monkeypatch):
    model, processor = MODELS["llava"]()
    prompts = prompts_of("llava", talkative(model), processor)
    long, _ = said(model, processor, prompts, max_new_tokens=12)
    # A token that some answers hold early, others late or never: from now on it ends them.
    ids = [processor.tokenizer(text)["input_ids"] for text in long]
    first = {}
    for answer in ids:
        for token in set(answer):
            first.setdefault(token, []).append(answer.index(token))
    end = next(token for token, places in first.items() if min(places) > 0 and len(places) < len(ids))
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    expected = one_by_one(model, processor, prompts, max_new_tokens=12)
    assert {len(text) for text in expected} != {len(text) for text in long}
    for batch_size in (2, 4, 16):
        found, work = said(
            model, processor, prompts, batch_size=batch_size, max_new_tokens=12, groups=[[n] for n in range(len(ids))]
        )
        assert found == expected
        assert work.answers < 11 * len(prompts)


def test_one_question_alone_and_an_answer_of_one_token():
    model, processor = MODELS["llava"]()
    prompts = prompts_of("llava", talkative(model), processor)
    assert said(model, processor, prompts[:1])[0] == one_by_one(model, processor, prompts[:1])
    found, work = said(model, processor, prompts, max_new_tokens=1)
    assert found == one_by_one(model, processor, prompts, max_new_tokens=1)
    assert work.steps == 0


def test_a_picture_goes_through_its_tower_once():
    model, processor = MODELS["llava"]()
    image = Media(images=[picture(SIZES[0])])
    prompts = [encode_prompt(processor, turns(f"<image>\n{text}?"), image) for text in ("What", "Who", "When", "Why")]
    pictures = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: pictures.append(len(args[0] if args else kwargs["pixel_values"])),
        with_kwargs=True,
    )
    said(model, processor, prompts)
    hook.remove()
    assert pictures == [1]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_half_precision_answers(family):
    model, processor = MODELS[family]()
    prompts = prompts_of(family, model, processor)
    model.to(torch.bfloat16)
    assert len(said(model, processor, prompts)[0]) == len(prompts)


def test_tokens_of_padded_batches():
    assert decode.padded_tokens([3, 9, 5, 8], 2) == 2 * 9 + 2 * 5


def test_a_question_that_begins_otherwise_does_not_keep_the_others_from_sharing():
    model, processor = MODELS["llava"]()
    talkative(model)
    image = Media(images=[picture(SIZES[0])])
    asked = [encode_prompt(processor, turns(f"<image>\n{text}?"), image) for text in ("What", "Who", "When")]
    _, work = said(model, processor, asked)
    other = encode_prompt(processor, turns("What stands before it, <image>?"), image)
    found, mixed = said(model, processor, [*asked, other])
    assert found == one_by_one(model, processor, [*asked, other])
    assert mixed.prompts == work.prompts + len(other["input_ids"])


def test_films_with_their_sound_share_it():
    model, processor = MODELS["qwen2_5_omni"]()
    media = Media(videos=[replace(film(), audio=sound())])
    texts = ("When?", "What is said first?", "Who?")
    prompts = [encode_prompt(processor, turns(f"<video>\n{text}"), media) for text in texts]
    assert prompts[0]["use_audio_in_video"]
    expected = one_by_one(talkative(model), processor, prompts)
    found, work = said(model, processor, prompts)
    assert found == expected
    assert len(set(expected)) == 3
    assert work.prompts < work.padded / 2
