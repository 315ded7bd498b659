r"""PaliGemma 1 and 2 (`PaliGemmaForConditionalGeneration`): a picture, a prefix, an answer; no conversation.

    <image> … <image><bos>answer en What is it?\na cat<eos>
    |---- prefix: attention goes both ways ----||suffix--|

`token_type_ids` are 1 over the suffix, and tell training from inference. Published checkpoints have no chat template;
this is the one that their processor writes, `suffix` included.
"""

from mmpeft.families.spec import FamilySpec

CHAT_TEMPLATE = (
    "{%- if messages | length > 2 or messages[0]['role'] != 'user' -%}"
    "{{ raise_exception('PaliGemma answers one question about its pictures: one human turn, one gpt turn') }}"
    "{%- endif -%}"
    "{%- for item in messages[0]['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ bos_token }}"
    "{%- for item in messages[0]['content'] -%}"
    "{%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ '\n' }}"
    "{%- if messages | length == 2 -%}"
    "{%- for item in messages[1]['content'] -%}{{ item['text'] }}{%- endfor -%}{{ eos_token }}"
    "{%- endif -%}"
)

SPEC = FamilySpec(
    name="paligemma",
    model_types=("paligemma",),
    processors=("PaliGemmaProcessor",),
    packable=True,
    parts={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    token_types="suffix",
    chat_template=CHAT_TEMPLATE,
    boxes="location_tokens",
    note="One question and one answer a sample; pictures stand before the question.",
)
