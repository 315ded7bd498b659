r"""A conversation as the model's chat template writes it, and where the assistant's turns stand in that text.

    messages[:k], prompted   <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n
    messages[:k + 1]         <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
    the span, by difference                                                       ^^^^^^^^^^^^^^^^^

So the span is what the model writes at inference after the same prompt, whatever the template and whether or not
it marks `{% generation %}`.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.types import PLACEHOLDERS, Turn
from mmpeft.families.registry import family_of_processor

_PLACEHOLDER = re.compile("|".join(f"(?P<{modality}>{re.escape(text)})" for modality, text in PLACEHOLDERS.items()))

_CACHED = 16
"""Processors whose facts are kept; more than a process ever holds."""


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """The tokens of a tokenizer that no text of a data file may hold, for they would forge turns or pictures.

    Attributes:
        ids: of all special tokens.
        pattern: matches any of them in a text.
        media: the text by which a chat template marks a medium, by modality; those that the processor takes.
        media_ids: the id of each of these texts.
        media_pattern: matches any of them; the group that matched is the modality.
    """

    ids: frozenset[int]
    pattern: re.Pattern[str]
    media: Mapping[Modality, str]
    media_ids: Mapping[Modality, int]
    media_pattern: re.Pattern[str]


def control_tokens(processor: Any) -> ControlTokens:
    """The control tokens of a processor.

    Raises:
        ModelError: the processor has a token for no medium.
    """
    return _control_tokens(processor, len(processor.tokenizer))


@functools.lru_cache(maxsize=_CACHED)
def _control_tokens(processor: Any, vocabulary: int) -> ControlTokens:
    media = {modality: text for modality in MODALITIES if (text := getattr(processor, f"{modality}_token", None))}
    if not media:
        raise ModelError(
            f"{type(processor).__name__} has no picture token (`image_token`), nor one for video or audio; expected a "
            "multimodal processor"
        )
    added = processor.tokenizer.added_tokens_decoder
    texts = {token.content for token in added.values() if token.special}
    texts.update(processor.tokenizer.all_special_tokens, media.values())
    ids = {identifier for identifier, token in added.items() if token.special}
    ids.update(processor.tokenizer.all_special_ids)
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return ControlTokens(
        ids=frozenset(ids),
        pattern=re.compile("|".join(map(re.escape, longest_first))),
        media=media,
        media_ids={modality: processor.tokenizer.convert_tokens_to_ids(text) for modality, text in media.items()},
        media_pattern=re.compile("|".join(f"(?P<{name}>{re.escape(text)})" for name, text in media.items())),
    )


def check_texts(processor: Any, turns: Sequence[Turn]) -> None:
    """Refuse a text that holds a control token: tokenised, it would be a turn's end or a picture, not text.

    Raises:
        DataError: names the turn, the token and the fix.
    """
    pattern = control_tokens(processor).pattern
    for number, turn in enumerate(turns):
        for piece in _PLACEHOLDER.sub("\0", turn.text).split("\0"):
            if found := pattern.search(piece):
                token = found.group()
                raise DataError(
                    f"the text of turn {number} ({turn.role}) holds {token!r}, a control token of this model, which "
                    f"would forge a turn or a picture; write it otherwise (say {token[:1] + ' ' + token[1:]!r}), "
                    "or leave the sample out"
                )


def render_chat(processor: Any, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
    r"""The conversation as the processor's chat template writes it, one token a picture, video or recording.

    A newline of the data file after `<image>` is left out where the template itself writes one after a picture
    (LLaVA 1.5's does), so that `<image>\nWhat is it?` becomes what the model was trained on.

    Raises:
        DataError: the template refuses these turns, or writes a list of content as Python text.
        ModelError: the processor has no chat template.
    """
    template = _own_template(processor)
    used = {str(found.lastgroup) for turn in turns for found in _PLACEHOLDER.finditer(turn.text)}
    lacking = sorted(name for name in used if name not in control_tokens(processor).media)
    if lacking:
        raise DataError(
            f"the sample has {' and '.join(lacking)}, which {type(processor).__name__} does not take; leave it out, or "
            "choose a model that does"
        )
    newline = frozenset(name for name in used if _newline_after(processor, template, name))
    return _render(processor, [_message(turn, newline) for turn in turns], add_generation_prompt)


def _own_template(processor: Any) -> str:
    return str(getattr(processor, "chat_template", None))


def _message(turn: Turn, newline: frozenset[str]) -> dict[str, Any]:
    """A turn as a chat template takes it: its text cut at the placeholders."""
    items: list[dict[str, str]] = []
    position, drop = 0, False
    for found in (*_PLACEHOLDER.finditer(turn.text), None):
        piece = turn.text[position : found.start() if found else len(turn.text)]
        piece = piece.removeprefix("\n") if drop else piece
        if piece:
            items.append({"type": "text", "text": piece})
        if found:
            items.append({"type": str(found.lastgroup)})
            position, drop = found.end(), found.lastgroup in newline
    return {"role": turn.role, "content": items}


@functools.lru_cache(maxsize=_CACHED)
def _newline_after(processor: Any, template: str, modality: str) -> bool:
    # `template` is there for the cache: a processor whose template was changed is asked again.
    probe = Turn(role="user", text=f"<{modality}>x")
    text = _render(processor, [_message(probe, frozenset())], False)
    token = next(token for name, token in control_tokens(processor).media.items() if name == modality)
    return f"{token}\n" in text


def _render(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    template = None if getattr(processor, "chat_template", None) else _fallback_template(processor)
    if template is None and not getattr(processor, "chat_template", None):
        raise ModelError("the processor has no chat template; set processor.chat_template, or give one in the recipe")
    try:
        text = processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the chat template does not take this conversation: {error}; {_NEEDED}") from error
    if "{'type': 'text'" in text and not any(
        "{'type': 'text'" in item.get("text", "") for message in messages for item in message["content"]
    ):
        raise DataError(f"the chat template writes a message's content as a Python list; {_NEEDED}")
    return text


def _fallback_template(processor: Any) -> str | None:
    """The template of a processor that has none: its tokenizer's, or the one that the family is known by."""
    spec = family_of_processor(processor)
    return processor.tokenizer.chat_template or (spec.chat_template if spec else None)


_NEEDED = "it must take messages whose content is a list of {'type': 'image'} and {'type': 'text', 'text': …}"


def assistant_spans(processor: Any, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
    r"""The whole conversation's text, and the characters [start, end) of each assistant turn in it.

    Some templates write other white space before an answer than at the end of their generation prompt
    (LLaVA-OneVision's: `assistant \n` and `assistant\n`). What the prompt of inference has stands in the text, then.

    Raises:
        DataError: the template writes earlier turns differently once later ones follow, so that no prompt of
            inference is what the model would be trained on; or as `render_chat`.
    """
    text = render_chat(processor, turns, add_generation_prompt=False)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    position = length = 0
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        prompt = render_chat(processor, turns[:number], add_generation_prompt=True)
        whole = number + 1 == len(turns)
        answered = text if whole else render_chat(processor, turns[: number + 1], add_generation_prompt=False)
        history, begin = len(prompt), len(prompt)
        if not answered.startswith(prompt):
            history, begin = _other_white_space(processor, turns[: number + 1], prompt, answered)
        if begin < 0 or not text.startswith(answered):
            raise DataError(
                f"the chat template writes the turns before turn {number} differently once it has been answered "
                f"(around {_parting(answered, prompt, text)!r}); use a template that only appends"
            )
        pieces += [text[position:history], prompt[history:], answered[begin:]]
        length += history - position + len(prompt) - history
        spans.append((length, length + len(answered) - begin))
        position, length = len(answered), spans[-1][1]
    return "".join([*pieces, text[position:]]), spans


def render_prompt(processor: Any, turns: Sequence[Turn]) -> str:
    """The text before an answer, as at inference: earlier answers stand in it as `assistant_spans` writes them.

    Raises:
        DataError, ModelError: as `render_chat`.
    """
    prompt = render_chat(processor, turns, add_generation_prompt=True)
    if all(turn.role != "assistant" for turn in turns):
        return prompt
    history = render_chat(processor, turns, add_generation_prompt=False)
    try:
        text, _ = assistant_spans(processor, turns)
    except DataError:
        # A template that rewrites earlier turns cannot be trained on, but it does say what to ask.
        return prompt
    return text + prompt[len(history) :] if prompt.startswith(history) else prompt


def _other_white_space(processor: Any, turns: Sequence[Turn], prompt: str, answered: str) -> tuple[int, int]:
    """Characters of `answered` before the last turn, and before its answer; -1 where more than white space differs."""
    history = render_chat(processor, turns[:-1], add_generation_prompt=False)
    if not (prompt.startswith(history) and answered.startswith(history)):
        return 0, -1
    header = re.compile(r"\s*".join(map(re.escape, "".join(prompt[len(history) :].split()))) + r"\s*")
    found = header.match(answered, len(history))
    return len(history), found.end() if found else -1


def _parting(answered: str, prompt: str, text: str) -> str:
    """What stands where the texts part, for a message."""
    one, other = (answered, prompt) if not answered.startswith(prompt) else (text, answered)
    at = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return one[max(0, at - 15) : at + 15]
