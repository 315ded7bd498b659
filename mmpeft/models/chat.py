"""What a language model's tokenizer needs before pictures can stand in its text: a token, padding, a chat template."""

import json
import logging
from typing import Any

import torch
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from mmpeft.core.errors import ModelError

logger = logging.getLogger(__name__)

_PAD = "<|pad|>"

_FLATTEN = r"""{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string or message['content'] is none or message['content'] is undefined -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set part = namespace(text='') -%}
    {%- for item in message['content'] -%}
      {%- if item['type'] == 'image' -%}
        {%- set part.text = part.text + IMAGE_TOKEN + '\n' -%}
      {%- else -%}
        {%- set part.text = part.text + item['text'] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=part.text)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}{{- '' }}"""

_PLAIN = """\
{{- BEGIN }}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}{{ message['content'] + '\n' }}
  {%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + '\n' }}
  {%- else -%}{{ 'ASSISTANT: ' + message['content'] + END + '\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"""


def ensure_image_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Make `token` one special token of the tokenizer, and give its id.

    Raises:
        ModelError: the tokenizer still splits it.
    """
    known = tokenizer.added_tokens_encoder.get(token)
    if known is None or not tokenizer.added_tokens_decoder[known].special:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        logger.info("added the picture token %s to the tokenizer", token)
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(f"{token!r} is {len(ids)} tokens to {type(tokenizer).__name__}; choose another image_token")
    return ids[0]


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a pad token its end-of-sequence token, or where that lacks too, a new one.

    The end-of-sequence token stays what it is; padding is told from it by the attention mask and the labels.
    """
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.add_special_tokens({"pad_token": _PAD})
    logger.info("the tokenizer had no pad token; it pads with %s", tokenizer.pad_token)


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model a row for every token, if it lacks one; a matrix padded beyond the tokenizer is left as it is.

    New rows of embeddings and head are the mean of those that were there; tied weights stay tied.
    """
    old = _rows(model.get_input_embeddings()).shape[0]
    if len(tokenizer) <= old:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    head: Any = model.get_output_embeddings()
    matrices = [_rows(model.get_input_embeddings()), _rows(head)]
    if head.bias is not None:
        matrices.append(head.bias)
    with torch.no_grad():
        for matrix in matrices:
            matrix[old:] = matrix[:old].float().mean(0).to(matrix.dtype)
    logger.info("grew the embeddings from %d to %d rows", old, len(tokenizer))


def _rows(module: Any) -> torch.Tensor:
    """The matrix of an embedding or a head, a row a token."""
    return module.weight


def multimodal_chat_template(
    tokenizer: PreTrainedTokenizerBase, override: str | None = None, *, image_token: str = "<image>"
) -> str:
    r"""A Jinja chat template that takes content as text or as a list of pictures and texts.

    The language model's own template runs unchanged after a preamble that turns lists into text:

        [{"type": "image"}, {"type": "text", "text": "What is it?"}]  ->  "<image>\nWhat is it?"

    The newline behind a picture is LLaVA's: its data holds `<image>\n`, so a prompt at inference is then the text
    that was trained on.

    A tokenizer without a template gets a plain one, with its own end-of-sequence token (and its beginning-of-
    sequence token, if it writes one by itself):

        {system}\n
        USER: {text}\n
        ASSISTANT: {text}{eos}\n

    Args:
        override: a text-only or multimodal template in place of the tokenizer's own; wrapped the same way.

    Raises:
        ModelError: no template, and no end-of-sequence token to build one with.
    """
    own = override or tokenizer.chat_template
    if isinstance(own, dict):
        own = own["default"] if "default" in own else next(iter(own.values()))
    preamble = _FLATTEN.replace("IMAGE_TOKEN", json.dumps(image_token, ensure_ascii=False))
    return preamble + (own if own else _plain_template(tokenizer))


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    if end is None:
        raise ModelError(
            "the tokenizer has neither a chat template nor an end-of-sequence token, so answers would never end; "
            "set tokenizer.eos_token, or give chat_template="
        )
    encoded = tokenizer("x").input_ids
    begins = tokenizer.bos_token is not None and encoded[:1] == [tokenizer.bos_token_id]
    begin = tokenizer.bos_token if begins else ""
    logger.info("the tokenizer had no chat template; it got the plain USER/ASSISTANT one, ending turns with %s", end)
    return _PLAIN.replace("BEGIN", json.dumps(begin, ensure_ascii=False)).replace(
        "END", json.dumps(end, ensure_ascii=False)
    )
