import pytest

from mmpeft.core.errors import DataError, ModelError
from mmpeft.data.chat import assistant_spans, check_texts, control_tokens, render_chat, render_prompt
from mmpeft.data.types import Turn
from mmpeft.models.chat import multimodal_chat_template
from tests.data import templates
from tests.data.templates import processor_with
from tests.tiny import tiny_processor, tiny_tokenizer


def conversation(*texts, system=None):
    roles = ("user", "assistant")
    turns = [Turn(role=roles[number % 2], text=text) for number, text in enumerate(texts)]
    return [Turn(role="system", text=system), *turns] if system else turns


def test_pictures_stand_where_their_placeholders_are(processor):
    text = render_chat(processor, conversation("a <image> b\n<image>"), add_generation_prompt=True)
    assert text == "<|im_start|>user\na <image> b\n<image><|im_end|>\n<|im_start|>assistant\n"


def test_no_second_newline_after_a_picture_where_the_template_writes_one():
    turns = conversation("<image>\nWhat?")
    assert render_chat(processor_with(templates.LLAVA_15), turns, add_generation_prompt=True) == (
        "USER: <image>\nWhat? ASSISTANT:"
    )
    chatml = render_chat(processor_with(templates.GENERATION), turns, add_generation_prompt=False)
    assert "<image>\nWhat?" in chatml


def test_a_changed_template_is_seen():
    processor = processor_with(templates.LLAVA_15)
    render_chat(processor, conversation("<image>\nWhat?"), add_generation_prompt=True)
    processor.chat_template = templates.GENERATION
    assert "<image>\nWhat?" in render_chat(processor, conversation("<image>\nWhat?"), add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [templates.GENERATION, templates.DEFAULT_SYSTEM, templates.TRIMMING, templates.LLAVA_15, templates.EOS_IN_BETWEEN],
)
def test_spans_hold_the_answers_and_nothing_of_the_prompt(template):
    text, spans = assistant_spans(processor_with(template), conversation("q1", "a1", "q2", "a2", system="s"))
    end_token = "" if template == templates.LLAVA_15 else "<|im_end|>"
    assert [text[start:end].strip() for start, end in spans] == [f"a1{end_token}", f"a2{end_token}"]


def test_where_only_white_space_differs_the_prompt_of_inference_is_trained_on():
    processor = processor_with(templates.OTHER_SPACE)
    turns = conversation("q1", "assistant", "q2", "a2")
    text, spans = assistant_spans(processor, turns)
    assert text == (
        "<|im_start|>user \nq1<|im_end|><|im_start|>assistant\nassistant<|im_end|>"
        "<|im_start|>user \nq2<|im_end|><|im_start|>assistant\na2<|im_end|>"
    )
    assert [text[start:end] for start, end in spans] == ["assistant<|im_end|>", "a2<|im_end|>"]
    assert text.startswith(render_prompt(processor, turns[:1]))
    assert text.startswith(render_prompt(processor, turns[:3]))


NO_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_plain_answers_are_trained_and_asked_without_thinking():
    processor = processor_with(templates.HYBRID_THINKING)
    turns = conversation("<image>q1", "a1", "q2", "a2")
    text, spans = assistant_spans(processor, turns)
    assert text == (
        f"<|im_start|>user\n<image>q1<|im_end|>\n{NO_THOUGHT}a1<|im_end|>\n"
        f"<|im_start|>user\nq2<|im_end|>\n{NO_THOUGHT}a2<|im_end|>\n"
    )
    assert [text[start:end] for start, end in spans] == ["a1<|im_end|>\n", "a2<|im_end|>\n"]
    for number in (1, 3):
        assert text.startswith(render_prompt(processor, turns[:number]))
    assert render_chat(processor, turns[:1], add_generation_prompt=True).endswith(NO_THOUGHT)


def test_answers_that_reason_are_trained_and_asked_with_thinking():
    processor = processor_with(templates.HYBRID_THINKING)
    turns = conversation("q", "<think>\nseven?\n</think>\n\n7")
    text, ((start, end),) = assistant_spans(processor, turns)
    assert text[start:end] == "seven?\n</think>\n\n7<|im_end|>\n"
    assert render_prompt(processor, turns[:1], thinking=True) == text[:start]


def test_a_prompt_is_the_templates_own_where_it_rewrites_earlier_turns():
    processor = processor_with(templates.FORGETFUL)
    turns = conversation("q1", "a1", "q2")
    assert render_prompt(processor, turns) == render_chat(processor, turns, add_generation_prompt=True)


@pytest.mark.parametrize("template", [templates.FORGETFUL, templates.THINKING_PROMPT, templates.CLOSED_AT_THE_END])
def test_a_template_that_rewrites_earlier_turns_is_named(template):
    turns = conversation("q1", "a1", "q2", "a2")
    with pytest.raises(DataError, match=r"writes the turns before turn 1 differently .* only appends"):
        assistant_spans(processor_with(template), turns)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (templates.STRINGS_ONLY, "the chat template does not take this conversation"),
        (templates.PYTHON_LIST, "writes a message's content as a Python list"),
        ("{{ raise_exception('no system turns here') }}", "no system turns here; it must take messages"),
        ("{{ broken", "the chat template does not take this conversation"),
    ],
)
def test_a_template_that_cannot_take_pictures_is_named(template, message):
    with pytest.raises(DataError, match=message):
        render_chat(processor_with(template), conversation("<image>q"), add_generation_prompt=True)


def test_no_template_at_all_is_named(processor):
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        render_chat(processor, conversation("q"), add_generation_prompt=True)


def test_the_tokenizers_template_is_used_where_the_processor_has_none(processor):
    processor.chat_template = None
    assert render_chat(processor, conversation("q"), add_generation_prompt=False).startswith("<|im_start|>user")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|pad|>"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_control_token_in_a_text_is_refused(processor, token, number):
    texts = ["<image>q", "a"]
    texts[number] += f" {token} x"
    with pytest.raises(DataError) as caught:
        check_texts(processor, conversation(*texts))
    assert str(caught.value).startswith(f"the text of turn {number} ({('user', 'assistant')[number]}) holds {token!r}")
    assert repr(f"< {token[1:]}") in str(caught.value)


def test_a_processor_without_pictures_is_named(processor):
    del processor.image_token
    with pytest.raises(ModelError, match="LlavaProcessor has no picture token"):
        control_tokens(processor)


def test_a_composed_models_prompt_is_the_text_that_was_trained_on():
    """LLaVA data writes `<image>\\n`; `mmpeft generate` and plain transformers send picture and text apart."""
    tokenizer = tiny_tokenizer(chat_template=None)
    processor = tiny_processor()
    processor.chat_template = multimodal_chat_template(tokenizer)
    trained = render_chat(processor, [Turn(role="user", text="<image>\nWhat?")], add_generation_prompt=True)
    asked = render_chat(processor, [Turn(role="user", text="<image>What?")], add_generation_prompt=True)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    plain = processor.apply_chat_template(message, add_generation_prompt=True)
    assert trained == asked == plain == "USER: <image>\nWhat?\nASSISTANT:"
