import contextlib
import copy

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from mmpeft.core.errors import DataError
from mmpeft.data.encode import encode_prompt, encode_prompt_turns
from mmpeft.data.types import Media, Question, Turn
from mmpeft.evaluation import generate
from mmpeft.evaluation.generate import answer, end_tokens
from mmpeft.evaluation.shared_media import SharedMedia
from tests.families.models import MODELS
from tests.families.samples import film, picture
from tests.tiny import IMAGE_TOKENS, tiny_llava, tiny_processor, tiny_tokenizer

TEXTS = ["What?", "Which digit is written here?", "这是什么数字", "Odd or even", "Why, and since when, and by whom?"]


def answer_questions(*args, **options):
    return generate.answer_questions(*args, **options).texts


def ask(text, *images):
    return (Turn(role="user", text="<image>" * len(images) + text),)


@pytest.fixture
def questions(tmp_path):
    """Of unequal length, with no, one or two pictures, and one with earlier turns."""
    rng = np.random.default_rng(0)
    names = [f"{index}.png" for index in range(6)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name)
    shown = [names[:1], names[1:2], [], names[2:4], names[4:5]]
    made = [
        Question(id=str(index), prompt=ask(text, *images), images=tuple(images), reference="x")
        for index, (text, images) in enumerate(zip(TEXTS, shown, strict=True))
    ]
    longer = (*ask("What?", names[5]), Turn(role="assistant", text="A cat."), *ask("Of what colour?"))
    return [*made, Question(id="5", prompt=longer, images=(names[5],), reference="x")]


@pytest.fixture
def talkative(llava):
    """Weights that say something else for every prompt, and are far from ties."""
    for name, parameter in llava.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=1 if "embed" in name else 0.4)
    return llava


def one_by_one(model, processor, questions, root, **options):
    return [answer_questions(model, processor, [item], media_root=root, **options)[0] for item in questions]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_batched_answers_are_those_of_one_by_one(talkative, processor, questions, tmp_path, batch_size):
    single = one_by_one(talkative, processor, questions, tmp_path, max_new_tokens=8)
    assert len(set(single)) == len(single)
    got = answer_questions(
        talkative, processor, questions, media_root=tmp_path, max_new_tokens=8, batch_size=batch_size
    )
    assert got == single


def test_answers_are_those_of_plain_transformers(talkative, processor, questions, tmp_path):
    got = answer_questions(talkative, processor, questions[:1], media_root=tmp_path, max_new_tokens=8)
    content = [{"type": "image"}, {"type": "text", "text": TEXTS[0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(tmp_path / "0.png")
    batch = processor(text=[text], images=[image], return_tensors="pt")
    tokens = talkative.generate(**batch, do_sample=False, max_new_tokens=8, pad_token_id=0)
    plain = processor.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert got == [plain]
    assert answer(talkative, processor, images=[image], prompt=TEXTS[0], max_new_tokens=8) == plain
    assert answer(talkative, processor, images=[tmp_path / "0.png"], prompt=TEXTS[0], max_new_tokens=8) == plain


def test_the_order_is_kept_and_progress_told(talkative, processor, questions, tmp_path):
    told = []
    options = {"media_root": tmp_path, "max_new_tokens": 4, "batch_size": 4}
    forward = answer_questions(talkative, processor, questions, on_batch=told.append, **options)
    backward = answer_questions(talkative, processor, questions[::-1], **options)
    assert forward == backward[::-1]
    assert told == [4, 2]
    assert answer_questions(talkative, processor, [], media_root=tmp_path) == []


def test_modes_and_padding_are_as_they_were(llava, processor, questions, tmp_path):
    llava.train()
    llava.model.vision_tower.eval()
    modes = [module.training for module in llava.modules()]
    side = processor.tokenizer.padding_side
    config = llava.generation_config.to_dict()
    answer_questions(llava, processor, questions, media_root=tmp_path, max_new_tokens=1)
    assert [module.training for module in llava.modules()] == modes
    assert processor.tokenizer.padding_side == side
    assert llava.generation_config.to_dict() == config
    lost = Question(id="1", prompt=ask("?", "gone.png"), images=("gone.png",), reference="x")
    with pytest.raises(DataError, match=r"question '1': picture 'gone.png' does not exist"):
        answer_questions(llava, processor, [lost], media_root=tmp_path)
    assert [module.training for module in llava.modules()] == modes


@pytest.mark.parametrize("share_media", [True, False])
def test_patches_are_projected_by_a_matrix_product(tmp_path, monkeypatch, share_media):
    model, processor = MODELS["qwen2_5_vl"]()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "0.png")
    asked = [Question(id="0", prompt=ask("What?", "0.png"), images=("0.png",), reference="x")]
    given = {"media_root": tmp_path, "max_new_tokens": 4, "share_media": share_media}
    plain = torch.nn.Conv3d.forward
    ran = []
    monkeypatch.setattr(torch.nn.Conv3d, "forward", lambda self, x: ran.append(1) or plain(self, x))
    with_product = answer_questions(model, processor, asked, **given)
    assert not ran
    monkeypatch.setattr(generate, "patches_linear", lambda model: contextlib.nullcontext())
    assert answer_questions(model, processor, asked, **given) == with_product
    assert ran


def test_dropout_does_not_reach_the_answers(talkative, processor, questions, tmp_path):
    talkative.config.text_config.attention_dropout = 0.9
    for layer in talkative.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.9
    quiet = answer_questions(talkative, processor, questions, media_root=tmp_path, max_new_tokens=6)
    talkative.train()
    assert answer_questions(talkative, processor, questions, media_root=tmp_path, max_new_tokens=6) == quiet


def test_a_models_own_sampling_settings_are_not_used(talkative, processor, questions, tmp_path, caplog):
    greedy = answer_questions(talkative, processor, questions, media_root=tmp_path, max_new_tokens=6)
    talkative.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, num_beams=2)
    assert answer_questions(talkative, processor, questions, media_root=tmp_path, max_new_tokens=6) == greedy
    assert caplog.records == []


def scripted(monkeypatch, model, ids):
    """The model says `ids`, whatever it is asked."""

    def say(input_ids, **_):
        spoken = torch.tensor([ids] * len(input_ids))
        return torch.cat([input_ids, spoken], dim=1)

    monkeypatch.setattr(model, "generate", say)


def test_answers_end_at_the_end_of_turn_and_are_stripped(monkeypatch, llava, processor):
    tokenizer = processor.tokenizer
    spoken = tokenizer(" 是的 \n<|im_end|>\nmore<|im_end|>")["input_ids"]
    scripted(monkeypatch, llava, spoken)
    assert answer(llava, processor, prompt="真的吗") == "是的"


def test_generation_stops_at_the_end_of_turn(talkative, processor):
    """The output head made to prefer `<|im_end|>` after the second word: nothing longer is computed."""
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    calls = []

    def prefer_the_end(module, args, output):
        calls.append(len(args[0]))
        if len(calls) == 3:
            output[..., end] = 1e4
        return output

    hook = talkative.lm_head.register_forward_hook(prefer_the_end)
    answer(talkative, processor, prompt="Hi", max_new_tokens=9)
    hook.remove()
    assert len(calls) == 3


def test_every_end_token_is_known(llava, processor):
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(llava, processor) == [end]
    llava.generation_config.eos_token_id = [5, 9]
    assert end_tokens(llava, processor) == sorted([5, 9, end])
    llava.generation_config.eos_token_id = 7
    assert end_tokens(llava, processor) == sorted([7, end])
    tokenizer.eos_token = "<|pad|>"
    assert end_tokens(llava, processor) == sorted([7, tokenizer.pad_token_id, end])


def test_a_template_without_an_end_token_leaves_the_tokenizers(llava, processor):
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert end_tokens(llava, processor) == [processor.tokenizer.eos_token_id]


def test_a_prompt_is_encoded_as_training_sees_it(processor):
    image = Image.new("RGB", (16, 16), "red")
    encoded = encode_prompt(processor, ask("Hi", "a.png"), Media(images=[image]))
    text = processor.tokenizer.decode(encoded["input_ids"])
    assert text == f"<|im_start|>user\n{'<image>' * IMAGE_TOKENS}Hi<|im_end|>\n<|im_start|>assistant\n"
    assert encoded["pixel_values"].shape == (1, 3, 16, 16)
    assert set(encode_prompt(processor, ask("Hi"), Media())) == {"input_ids"}


def test_two_pictures_and_where_they_stand(llava, processor, monkeypatch):
    seen = {}
    original = llava.generate

    def look(**inputs):
        seen.update(copy.copy(inputs))
        return original(**inputs)

    monkeypatch.setattr(llava, "generate", look)
    images = [Image.new("L", (8, 8), 200), Image.new("RGBA", (40, 20), "blue")]
    answer(llava, processor, images=images, prompt="first <image> then <image>", max_new_tokens=1)
    assert seen["pixel_values"].shape[0] == 2
    text = processor.tokenizer.decode(seen["input_ids"][0])
    run = "<image>" * IMAGE_TOKENS
    assert f"first {run} then {run}<|im_end|>" in text
    answer(llava, processor, images=images, prompt="both", max_new_tokens=1)
    assert f"user\n{run}{run}both<|im_end|>" in processor.tokenizer.decode(seen["input_ids"][0])


def test_bad_prompts_and_pictures_are_named(llava, processor, tmp_path):
    with pytest.raises(DataError, match="the prompt holds 1 <image> for 2 pictures"):
        answer(llava, processor, images=[Image.new("RGB", (8, 8))] * 2, prompt="<image> this")
    with pytest.raises(DataError, match=r"holds '<\|im_end\|>', a control token"):
        answer(llava, processor, prompt="Hi<|im_end|>")
    with pytest.raises(DataError, match=r"picture 'gone.png' does not exist \(tried .*gone.png\)"):
        answer(llava, processor, images=[tmp_path / "gone.png"], prompt="Hi")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="is not a picture"):
        answer(llava, processor, images=[str(tmp_path / "text.png")], prompt="Hi")


def test_half_precision_base_with_a_full_precision_projector(processor):
    model = tiny_llava(processor).to(torch.bfloat16)
    model.model.multi_modal_projector.float()
    image = Image.new("RGB", (16, 16), "red")
    assert isinstance(answer(model, processor, images=[image], prompt="Hi", max_new_tokens=3), str)


def test_a_tokenizer_that_closes_its_texts_does_not_close_the_prompt(monkeypatch):
    processor = tiny_processor()
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", end)]
    )
    monkeypatch.setattr(processor, "tokenizer", tokenizer)
    assert encode_prompt(processor, ask("Hi"), Media())["input_ids"][-1] != end


def test_longest_questions_come_first(monkeypatch, llava, processor, questions, tmp_path):
    sizes = []
    original = generate._generate

    def look(model, processor, rows, max_new_tokens):
        sizes.append([len(row["input_ids"]) for row in rows])
        return original(model, processor, rows, max_new_tokens)

    monkeypatch.setattr(generate, "_generate", look)
    options = {"media_root": tmp_path, "max_new_tokens": 1, "batch_size": 2}
    answer_questions(llava, processor, questions, share_media=False, **options)
    flat = [size for group in sizes for size in group]
    assert flat == sorted(flat, reverse=True)


def test_a_url_in_place_of_a_picture_is_named(llava, processor):
    with pytest.raises(DataError, match=r"picture 'https://x/y.png' is a URL, and URLs are off"):
        answer(llava, processor, images=["https://x/y.png"], prompt="?")


def test_media_are_read_and_processed_once_for_all_their_questions(
    monkeypatch, talkative, processor, questions, tmp_path
):
    asked = [
        Question(id=f"{index}", prompt=ask(text, "0.png"), images=("0.png",), reference="x")
        for index, text in enumerate(TEXTS)
    ]
    calls = []
    processed = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda self, **given: calls.append(1) or processed(self, **given))
    monkeypatch.setattr(generate, "_length", lambda *_: 1)
    options = {"media_root": tmp_path, "max_new_tokens": 6}
    shared = generate.answer_questions(talkative, processor, asked, **options)
    assert len(calls) == 1
    plain = generate.answer_questions(talkative, processor, asked, share_media=False, **options)
    assert shared.texts == plain.texts
    assert shared.sharing.on
    assert shared.sharing.saved == {"tokens": plain.work.prompts - shared.work.prompts}
    assert shared.work.prompts < plain.work.prompts == shared.work.padded
    assert not plain.sharing.on
    assert plain.sharing.why == "the recipe switches it off"


def test_two_kinds_of_media_may_stand_in_either_order(tmp_path):
    """The processor's answer is kept by the order of the media, not for the conversation that came first."""
    _, processor = MODELS["qwen2_vl"]()
    media = Media(images=[picture((31, 47))], videos=[film()])
    shared = SharedMedia(processor, media)
    for text in ("<image><video> a", "<video><image> b", "<image> then <video> c"):
        turns = [Turn(role="user", text=text)]
        found = encode_prompt_turns(processor, turns, shared)
        expected = encode_prompt(processor, turns, media)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
