import logging

import pytest
import torch
from jinja2.exceptions import TemplateError

from mmpeft.core.errors import ModelError
from mmpeft.models.chat import ensure_image_token, ensure_pad_token, grow_embeddings, multimodal_chat_template
from mmpeft.models.compose import compose_model
from tests.models.parts import tiny_language
from tests.tiny import CHAT_TEMPLATE, tiny_clip, tiny_image_processor, tiny_llama, tiny_tokenizer

TEXT_ONLY = (
    "\n{% if messages[0]['role'] != 'system' %}{{ '[sys]be kind[/sys]' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']' + message['content'].strip() + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " 这是什么? "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "一只猫"}]},
]
PLAIN_CHAT = [{"role": "user", "content": "<image>\n 这是什么? "}, {"role": "assistant", "content": "一只猫"}]


def render(tokenizer, template, messages, **options):
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)


def test_lists_become_text_and_the_own_template_runs_unchanged():
    tokenizer = tiny_tokenizer(chat_template=TEXT_ONLY)
    wrapped = multimodal_chat_template(tokenizer)
    with pytest.raises(TemplateError):
        render(tokenizer, TEXT_ONLY, CHAT)
    for prompt in (False, True):
        expected = render(tokenizer, TEXT_ONLY, PLAIN_CHAT, add_generation_prompt=prompt)
        assert render(tokenizer, wrapped, CHAT, add_generation_prompt=prompt) == expected
        assert render(tokenizer, wrapped, PLAIN_CHAT, add_generation_prompt=prompt) == expected
    assert "[sys]be kind[/sys][user]<image>\n 这是什么?" in expected


def test_other_fields_of_a_message_stay():
    template = "{% for m in messages %}{{ m['name'] + ':' + m['content'] }}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template)
    messages = [{"role": "user", "name": "Li", "content": [{"type": "text", "text": "hi"}]}]
    assert render(tokenizer, multimodal_chat_template(tokenizer), messages) == "Li:hi"


def test_another_picture_token_with_quotes():
    tokenizer = tiny_tokenizer(chat_template=TEXT_ONLY)
    wrapped = multimodal_chat_template(tokenizer, image_token="<|'pic\"|>")
    assert "[user]<|'pic\"|>\n 这是什么?" in render(tokenizer, wrapped, CHAT)


def test_override_takes_the_place_of_the_own_template():
    tokenizer = tiny_tokenizer()
    wrapped = multimodal_chat_template(tokenizer, TEXT_ONLY)
    assert render(tokenizer, wrapped, CHAT) == render(tokenizer, TEXT_ONLY, PLAIN_CHAT)


def test_a_multimodal_template_may_be_wrapped_too():
    tokenizer = tiny_tokenizer()
    wrapped = multimodal_chat_template(tokenizer, CHAT_TEMPLATE)
    assert render(tokenizer, wrapped, CHAT) == render(tokenizer, CHAT_TEMPLATE, PLAIN_CHAT)


def test_no_template_gets_a_plain_one_with_the_own_end():
    tokenizer = tiny_tokenizer(chat_template=None)
    template = multimodal_chat_template(tokenizer)
    system = [{"role": "system", "content": "be kind"}]
    text = render(tokenizer, template, system + CHAT)
    assert text == "be kind\nUSER: <image>\n 这是什么? \nASSISTANT: 一只猫<|im_end|>\n"
    prompt = render(tokenizer, template, system + CHAT[:1], add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("\nASSISTANT:")


def test_a_tokenizer_that_begins_by_itself_begins_in_the_template():
    tokenizer = tiny_tokenizer(chat_template=None)
    assert not render(tokenizer, multimodal_chat_template(tokenizer), CHAT).startswith("<|im_start|>")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert render(tokenizer, multimodal_chat_template(tokenizer), CHAT).startswith("<|im_start|>USER: ")


def test_neither_template_nor_end():
    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a chat template nor an end-of-sequence token"):
        multimodal_chat_template(tokenizer)


def test_picture_token_is_added_once_and_never_split():
    tokenizer = tiny_tokenizer(image_token=False)
    size = len(tokenizer)
    token = ensure_image_token(tokenizer, "<image>")
    assert (token, len(tokenizer)) == (size, size + 1)
    assert ensure_image_token(tokenizer, "<image>") == token
    assert tokenizer.encode("a<image>b", add_special_tokens=False).count(token) == 1
    assert tokenizer.decode(tokenizer.encode("a<image>b"), skip_special_tokens=True) == "ab"


def test_a_picture_token_that_is_there_but_not_special_becomes_special():
    tokenizer = tiny_tokenizer(image_token=False)
    tokenizer.add_tokens(["<image>"])
    token = ensure_image_token(tokenizer, "<image>")
    assert tokenizer.added_tokens_decoder[token].special


def test_padding(caplog):
    caplog.set_level(logging.INFO, logger="mmpeft")
    tokenizer = tiny_tokenizer()
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert "no pad token; it pads with <|im_end|>" in caplog.text
    tokenizer.pad_token = tokenizer.eos_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token is not None
    assert tokenizer.eos_token is None


@pytest.mark.parametrize("language", ["llama", "qwen2", "gpt2", "phi"])
def test_new_rows_are_the_mean_of_the_old(language):
    tokenizer = tiny_tokenizer(image_token=False)
    model = tiny_language(language, tokenizer)
    old = model.get_input_embeddings().weight.detach().clone()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ensure_image_token(tokenizer, "<image>")
    grow_embeddings(model, tokenizer)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(module.weight) == len(tokenizer)
        torch.testing.assert_close(module.weight[-1], module.weight[:-1].mean(0))
    assert torch.equal(model.get_input_embeddings().weight[:-1], old)
    assert model.config.vocab_size == len(tokenizer)
    if model.get_output_embeddings().bias is not None:
        torch.testing.assert_close(
            model.get_output_embeddings().bias[-1], model.get_output_embeddings().bias[:-1].mean()
        )


def test_a_padded_vocabulary_does_not_shrink():
    tokenizer = tiny_tokenizer(image_token=False)
    model = tiny_llama(tokenizer)
    model.resize_token_embeddings(512, mean_resizing=False)
    composed, processor = compose_model(
        vision=tiny_clip(), language=model, tokenizer=tokenizer, image_processor=tiny_image_processor()
    )
    assert len(processor.tokenizer) == 260
    assert composed.get_input_embeddings().weight.shape[0] == 512


def test_composed_processor_and_tokenizer_carry_the_template():
    tokenizer = tiny_tokenizer(image_token=False, chat_template=TEXT_ONLY)
    _, processor = compose_model(
        vision=tiny_clip(), language=tiny_llama(tokenizer), tokenizer=tokenizer, image_processor=tiny_image_processor()
    )
    assert "[user]<image>\n 这是什么?" in processor.apply_chat_template(CHAT, tokenize=False)
    assert processor.tokenizer.chat_template == processor.chat_template
