r"""A conversation as tokens, and which of them the model is trained to write.

    tokens   <|im_start|> user \n <image> Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n
    labels        -        -   -     -     -      -      -       -          -      -  Hello <|im_end|> -

Supervised are the assistant's turns, each to the end of its end-of-turn token: not the role header before, nor
what the template writes behind (a newline). Where the template writes no end token behind the last answer
(LLaVA 1.5's `ASSISTANT: answer `), the white space it writes there gives way to the tokenizer's end-of-sequence
token, labelled, so that the model learns to stop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import IGNORE_INDEX, Modality
from mmpeft.data.chat import assistant_spans, check_texts, control_tokens, render_prompt
from mmpeft.data.types import Turn


@dataclass(frozen=True, kw_only=True)
class LabelledTokens:
    """Token ids and their labels.

    Attributes:
        input_ids, labels: of equal length; `IGNORE_INDEX` where nothing is learned.
        media: tokens [start, end) of each medium, in order.
    """

    input_ids: list[int]
    labels: list[int]
    media: tuple[tuple[int, int], ...] = ()


@dataclass
class _Tokens:
    """Ids of a text, and the characters [start, end) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def starts_with_bos(processor: Any, text: str) -> bool:
    """Whether a rendered text brings its own beginning-of-sequence token, so that none may be added to it."""
    bos = processor.tokenizer.bos_token
    return bool(bos) and text.startswith(bos)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A conversation's text.

    Attributes:
        text: as the chat template writes it, each medium as its token or as what replaces it.
        spans: characters [start, end) of each assistant turn.
        media: characters [start, end) of each medium.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    media: tuple[tuple[int, int], ...]


def conversation_of(processor: Any, turns: Sequence[Turn]) -> Conversation:
    """The text of a conversation with its answers, every medium as the one token that marks it.

    Raises:
        DataError: a control token in a text, or a chat template that does not fit (see `chat`).
    """
    check_texts(processor, turns)
    text, spans = assistant_spans(processor, turns)
    return Conversation(text=text, spans=tuple(spans), media=media_spans(processor, text))


def prompt_of(processor: Any, turns: Sequence[Turn], *, thinking: bool = False) -> Conversation:
    """The text before an answer, as at inference; with `thinking`, where the template can be told to think.

    Raises:
        DataError: as `conversation_of`.
    """
    check_texts(processor, turns)
    text = render_prompt(processor, turns, thinking=thinking)
    return Conversation(text=text, spans=(), media=media_spans(processor, text))


def media_spans(processor: Any, text: str) -> tuple[tuple[int, int], ...]:
    """Where media tokens stand in a text."""
    return tuple(found.span() for found in control_tokens(processor).media_pattern.finditer(text))


def expanded(conversation: Conversation, replacements: Sequence[str]) -> Conversation:
    """The conversation with each medium's token replaced by the text of all of its tokens.

    <image> What is it?   ->   <image><image><image><image> What is it?
    """
    pieces: list[str] = []
    media: list[tuple[int, int]] = []
    shifts: list[tuple[int, int]] = [(0, 0)]
    position = length = 0
    for (start, end), text in zip(conversation.media, replacements, strict=True):
        pieces += [conversation.text[position:start], text]
        begin = length + start - position
        length = begin + len(text)
        media.append((begin, length))
        position = end
        shifts.append((end, length - end))
    text = "".join([*pieces, conversation.text[position:]])

    def moved(place: int) -> int:
        return place + next(shift for from_, shift in reversed(shifts) if from_ <= place)

    spans = tuple((moved(start), moved(end)) for start, end in conversation.spans)
    return Conversation(text=text, spans=spans, media=tuple(media))


def label_turns(processor: Any, turns: Sequence[Turn]) -> LabelledTokens:
    """The tokens of a conversation and their labels, one token a medium.

    Raises:
        DataError, ModelError: as `conversation_of` and `label_conversation`.
    """
    return label_conversation(processor, conversation_of(processor, turns), answers_of(turns))


def answers_of(turns: Sequence[Turn]) -> list[str]:
    """The texts of the assistant's turns."""
    return [turn.text for turn in turns if turn.role == "assistant"]


def label_conversation(processor: Any, conversation: Conversation, answers: Sequence[str]) -> LabelledTokens:
    """The tokens of a conversation and their labels.

    The prompt before each answer is tokenised as at inference: where a template's last character would fuse with
    the answer's first into one token, the text is tokenised in two pieces there.

    Raises:
        ModelError: a tokenizer without offsets, or one without an end-of-sequence token where it is needed.
    """
    text, spans = conversation.text, conversation.spans
    tokens, begins = _tokenise_spans(processor, text, spans)
    labels = [IGNORE_INDEX] * len(tokens.ids)
    for number, (begin, span, answer) in enumerate(zip(begins, spans, answers, strict=True)):
        stop, ended = _stop(processor, tokens, text, begin, span, answer)
        labels[begin:stop] = tokens.ids[begin:stop]
        if number + 1 == len(spans) and not ended:
            eos = _eos(processor)
            tokens.ids, labels = [*tokens.ids[:stop], eos], [*labels[:stop], eos]
    return LabelledTokens(input_ids=tokens.ids, labels=labels, media=_tokens_of(tokens, conversation.media))


def prompt_tokens(processor: Any, prompt: Conversation) -> list[int]:
    """The ids of a prompt, tokenised as `label_conversation` tokenises what stands before an answer."""
    return _tokenise(processor, prompt.text, []).ids


def _tokens_of(tokens: _Tokens, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The tokens [start, end) that hold the characters of each span; a token across its bound counts as inside."""
    found, index = [], 0
    for start, end in spans:
        while index < len(tokens.offsets) and tokens.offsets[index][1] <= start:
            index += 1
        first = index
        while index < len(tokens.offsets) and tokens.offsets[index][0] < end:
            index += 1
        found.append((first, index))
    return tuple(found)


def _tokenise_spans(processor: Any, text: str, spans: Sequence[tuple[int, int]]) -> tuple[_Tokens, list[int]]:
    """The text's tokens, and for each span the number of tokens before it."""
    cuts: list[int] = []
    tokens = _tokenise(processor, text, cuts)
    begins = []
    for start, _ in spans:
        prompt = _tokenise(processor, text[:start], cuts).ids
        if tokens.ids[: len(prompt)] != prompt:
            cuts.append(start)
            tokens = _tokenise(processor, text, cuts)
        begins.append(len(prompt))
    return tokens, begins


def _tokenise(processor: Any, text: str, cuts: Sequence[int]) -> _Tokens:
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer")
    special = not starts_with_bos(processor, text)
    found = _Tokens([], [])
    for start, end in pairwise((0, *cuts, len(text))):
        encoded = tokenizer(
            text[start:end],
            add_special_tokens=special and start == 0,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        found.ids += encoded["input_ids"]
        found.offsets += [(first + start, last + start) for first, last in encoded["offset_mapping"]]
        # A tokenizer that closes every text with an end token of its own would close the prompt, too.
        while found.ids and found.ids[-1] == tokenizer.eos_token_id and len(set(found.offsets[-1])) == 1:
            found.ids.pop()
            found.offsets.pop()
    return found


def _stop(
    processor: Any, tokens: _Tokens, text: str, begin: int, span: tuple[int, int], answer: str
) -> tuple[int, bool]:
    """Where the label of one answer ends (a token index), and whether an end token closes it."""
    start, end = span
    stop = _first_past(tokens, begin, end)
    special = control_tokens(processor).ids
    last = next((index for index in range(stop - 1, begin - 1, -1) if tokens.ids[index] in special), None)
    if last is not None and not text[tokens.offsets[last][1] : end].strip():
        return last + 1, True
    at = text.rfind(answer, start, end)
    written = at + len(answer) if at >= 0 else start + len(text[start:end].rstrip())
    return _first_past(tokens, begin, written), False


def _first_past(tokens: _Tokens, begin: int, character: int) -> int:
    """Index of the first token from `begin` on that reaches beyond `character`."""
    for index in range(begin, len(tokens.ids)):
        if tokens.offsets[index][1] > character:
            return index
    return len(tokens.ids)


def _eos(processor: Any) -> int:
    eos = processor.tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the chat template writes no end-of-turn token and the tokenizer has no eos_token, so the model could "
            "not learn to stop; set tokenizer.eos_token"
        )
    return eos


def count_media(processor: Any, conversation: Conversation, counts: Mapping[Modality, int]) -> None:
    """Make sure that the text holds one token a medium.

    Raises:
        DataError: the chat template dropped or doubled a medium.
    """
    media = control_tokens(processor).media
    for modality, token in media.items():
        found = sum(conversation.text[start:end] == token for start, end in conversation.media)
        if found != counts.get(modality, 0):
            raise DataError(
                f"the chat template writes {found} {modality} tokens for {counts.get(modality, 0)} in the sample; use "
                f"one that writes {token!r} for each item {{'type': {modality!r}}}"
            )
