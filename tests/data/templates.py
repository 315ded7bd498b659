"""Chat templates as they occur, and processors that use them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE, PATCH_SIZE, tiny_image_processor, tiny_processor

_ITEMS = (
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}"
)

GENERATION = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}" + _ITEMS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{%- else -%}" + _ITEMS + "{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

OTHER_SPACE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'text' -%}{{ '\n' + item['text'] }}{%- endfor -%}"
    "{{ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""LLaVA-OneVision's: `assistant ` and a newline before an answer, `assistant` and a newline in the prompt."""

DEFAULT_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif -%}"
) + CHAT_TEMPLATE

TRIMMING = CHAT_TEMPLATE.replace("{{ item['text'] }}", "{{ item['text'] | trim }}")

LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

EOS_IN_BETWEEN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '[INST] ' }}" + _ITEMS + "{{ ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' }}" + _ITEMS + "{{ eos_token }}"
    "{%- else -%}" + _ITEMS + "{%- endif -%}"
    "{%- endfor -%}"
)

FORGETFUL = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + ('\n' if loop.last else '\n\n') }}",
)

THINKING_PROMPT = CHAT_TEMPLATE.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}")

HYBRID_THINKING = (
    "{%- set last = namespace(user=0) -%}"
    "{%- for message in messages if message['role'] == 'user' -%}{%- set last.user = messages.index(message) -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] | map(attribute='text', default='<image>') | join -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in content else '' -%}"
    "{%- set content = content.split('</think>')[-1] | trim -%}"
    "{%- if loop.index0 > last.user -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}{{ content }}"
    "{%- else -%}{{ content }}{%- endif -%}{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}"
    "{%- else -%}{{ '<think>\n' }}{%- endif -%}{%- endif -%}"
)
"""Qwen3.5's: thinking unless told otherwise, and answers further up lose what was thought."""

CLOSED_AT_THE_END = CHAT_TEMPLATE.replace(
    "{{ '<|im_end|>\n' }}",
    "{{ '<|im_end|>' + ('<|pad|>' if loop.last and message['role'] == 'assistant' else '\n') }}",
)

OPENED_BY_CONTROL = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'Q:' }}"
    "{%- else -%}{{ 'A:<|im_start|>' }}{%- endif -%}" + _ITEMS + "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'A:' }}{%- endif -%}"
)

STRINGS_ONLY = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"

PYTHON_LIST = "{% for message in messages %}{{ message['role'] }}{{ message['content'] | trim }}{% endfor %}"

PICTURELESS = CHAT_TEMPLATE.replace("{{ '<image>' }}", "")


def processor_with(template: str) -> LlavaProcessor:
    processor = tiny_processor()
    processor.chat_template = template
    return processor


def merging_processor() -> LlavaProcessor:
    """A tokenizer in which two newlines, and a colon with a newline, are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "ĊĊ", "ĊĠ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), ("Ċ", "Ġ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<image>"]},
    )
    return _llava(fast, CHAT_TEMPLATE)


def sentencepiece_processor() -> LlavaProcessor:
    """As LLaVA 1.5: words begin with their space, `<s>` is added in front, the template writes no `</s>`."""
    words = ["▁", "▁USER", "▁ASSISTANT", ":", "▁red", "▁What", "▁Two", "?", ".", "\n"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in (*words, *letters, *(f"<0x{byte:02X}>" for byte in range(256))):
        vocabulary.setdefault(piece, len(vocabulary))
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return _llava(fast, LLAVA_15)


def _llava(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=tiny_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
