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

PLACEHOLDER = re.compile("|".join(f"(?P<{modality}>{re.escape(text)})" for modality, text in PLACEHOLDERS.items()))
"""A medium's place in a turn's text; the group that matched is its kind."""

_CACHED = 16
"""Processors whose facts are kept; more than a process ever holds."""


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """The tokens of a tokenizer that no text of a data file may hold, for they would forge turns or pictures.

    Attributes:
        ids: of all special tokens.
        pattern: matches any of them in a text but the family's marks of places, which forge nothing.
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
    spec = family_of_processor(processor)
    texts -= set(spec.box_notation.marks) if spec is not None else set()
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
        for piece in PLACEHOLDER.sub("\0", turn.text).split("\0"):
            if found := pattern.search(piece):
                token = found.group()
                raise DataError(
                    f"the text of turn {number} ({turn.role}) holds {token!r}, a control token of this model, which "
                    f"would forge a turn or a picture; write it otherwise (say {token[:1] + ' ' + token[1:]!r}), "
                    "or leave the sample out"
                )


def render_chat(
    processor: Any, turns: Sequence[Turn], *, add_generation_prompt: bool, thinking: bool | None = None
) -> str:
    r"""The conversation as the processor's chat template writes it, one token a picture, video or recording.

    A template that can be told to think (Qwen3's and Qwen3.5's `enable_thinking`) is told not to, unless an answer
    of the conversation holds `</think>`, or `thinking` says so: a model that learns plain answers is to be asked for
    plain answers.

    A newline of the data file after `<image>` is left out where the template itself writes one after a picture
    (LLaVA 1.5's does), so that `<image>\nWhat is it?` becomes what the model was trained on.

    Raises:
        DataError: the template refuses these turns, or writes a list of content as Python text.
        ModelError: the processor has no chat template.
    """
    template = _own_template(processor)
    used = {str(found.lastgroup) for turn in turns for found in PLACEHOLDER.finditer(turn.text)}
    lacking = sorted(name for name in used if name not in control_tokens(processor).media)
    if lacking:
        raise DataError(
            f"the sample has {' and '.join(lacking)}, which {type(processor).__name__} does not take; leave it out, or "
            "choose a model that does"
        )
    newline = frozenset(name for name in used if _newline_after(processor, template, name))
    thinks = _thinks(turns) if thinking is None else thinking
    return _render(processor, [_message(turn, newline) for turn in turns], add_generation_prompt, thinks)


def _thinks(turns: Sequence[Turn]) -> bool:
    """Whether any answer holds reasoning."""
    return any(turn.role == "assistant" and "</think>" in turn.text for turn in turns)


def _own_template(processor: Any) -> str:
    return str(getattr(processor, "chat_template", None))


def _message(turn: Turn, newline: frozenset[str]) -> dict[str, Any]:
    """A turn as a chat template takes it: its text cut at the placeholders."""
    items: list[dict[str, str]] = []
    position, drop = 0, False
    for found in (*PLACEHOLDER.finditer(turn.text), None):
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
    text = _render(processor, [_message(probe, frozenset())], False, False)
    token = next(token for name, token in control_tokens(processor).media.items() if name == modality)
    return f"{token}\n" in text


def _render(processor: Any, messages: list[dict[str, Any]], add_generation_prompt: bool, thinking: bool) -> str:
    own = getattr(processor, "chat_template", None)
    template = None if own else _fallback_template(processor)
    if template is None and not own:
        raise ModelError("the processor has no chat template; set processor.chat_template, or give one in the recipe")
    options = {"enable_thinking": thinking} if "enable_thinking" in str(own or template) else {}
    try:
        text = processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, **options
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

    Some templates write something else before an answer than at the end of their generation prompt: other white
    space (LLaVA-OneVision's: `assistant \n` and `assistant\n`), or empty thinking (Qwen3.5's:
    `<think>\n\n</think>\n\n` in the prompt, nothing before answers further up). What the prompt of inference has
    stands in the text, then.

    Raises:
        DataError: the template writes earlier turns differently once later ones follow, so that no prompt of
            inference is what the model would be trained on; or as `render_chat`.
    """
    text = _without_empty_thinking(render_chat(processor, turns, add_generation_prompt=False))
    thinking = _thinks(turns)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    position = length = 0
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before, until = turns[:number], turns[: number + 1]
        history, header = _history_and_header(processor, before, thinking)
        answered = text
        if len(until) < len(turns):
            answered = _without_empty_thinking(
                render_chat(processor, until, add_generation_prompt=False, thinking=thinking)
            )
        begin = _answer_start(history, header, answered) if header is not None else -1
        if begin < 0 or not text.startswith(answered):
            raise DataError(
                f"the chat template writes the turns before turn {number} differently once it has been answered "
                f"(around {_parting(answered, history + (header or ''), text)!r}); use a template that only appends"
            )
        pieces += [text[position : len(history)], str(header), answered[begin:]]
        start = length + len(history) - position + len(str(header))
        spans.append((start, start + len(answered) - begin))
        position, length = len(answered), spans[-1][1]
    return "".join([*pieces, text[position:]]), spans


_EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")


def _without_empty_thinking(text: str) -> str:
    return _EMPTY_THINKING.sub("", text)


def _history_and_header(processor: Any, turns: Sequence[Turn], thinking: bool) -> tuple[str, str | None]:
    """The turns before an answer, and what the generation prompt adds to them; None if it changes them."""
    history = render_chat(processor, turns, add_generation_prompt=False, thinking=thinking)
    prompt = render_chat(processor, turns, add_generation_prompt=True, thinking=thinking)
    return _without_empty_thinking(history), prompt[len(history) :] if prompt.startswith(history) else None


def _answer_start(history: str, header: str, answered: str) -> int:
    """The character of `answered` at which the answer behind `history` begins; -1 if another header stands there.

    A header that differs in white space or empty thinking only is the same.
    """
    if answered.startswith(history + header):
        return len(history) + len(header)
    if not answered.startswith(history):
        return -1
    words = "".join(_without_empty_thinking(header).split())
    found = re.compile(r"\s*".join(map(re.escape, words)) + r"\s*").match(answered, len(history))
    return found.end() if found else -1


def render_prompt(processor: Any, turns: Sequence[Turn], *, thinking: bool = False) -> str:
    """The text before an answer, as at inference: earlier answers stand in it as `assistant_spans` writes them.

    Raises:
        DataError, ModelError: as `render_chat`.
    """
    thinks = thinking or _thinks(turns)
    prompt = render_chat(processor, turns, add_generation_prompt=True, thinking=thinks)
    if all(turn.role != "assistant" for turn in turns):
        return prompt
    try:
        text, _ = assistant_spans(processor, turns)
    except DataError:
        # A template that rewrites earlier turns cannot be trained on, but it does say what to ask.
        return prompt
    _, header = _history_and_header(processor, turns, thinks)
    return prompt if header is None else text + header


def _parting(answered: str, prompt: str, text: str) -> str:
    """What stands where the texts part, for a message."""
    one, other = (answered, prompt) if not answered.startswith(prompt) else (text, answered)
    at = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
    return one[max(0, at - 15) : at + 15]
