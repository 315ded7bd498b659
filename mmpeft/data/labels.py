r"""A conversation as tokens, and which of them the model is trained to write.

    tokens   <|im_start|> user \n <image> Hi <|im_end|> \n <|im_start|> assistant \n Hello <|im_end|> \n
    labels        -        -   -     -     -      -      -       -          -      -  Hello <|im_end|> -

Supervised are the assistant's turns, each to the end of its end-of-turn token: not the role header before, nor
what the template writes behind (a newline). Where the template writes no end token behind the last answer
(LLaVA 1.5's `ASSISTANT: answer `), the white space it writes there gives way to the tokenizer's end-of-sequence
token, labelled, so that the model learns to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.chat import assistant_spans, check_texts, control_tokens
from mmpeft.data.types import Turn


@dataclass(frozen=True, kw_only=True)
class LabelledTokens:
    """Token ids with one picture token a picture, and their labels (`IGNORE_INDEX` where none), of equal length."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class _Tokens:
    """Ids of a text, and the characters [start, end) of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def starts_with_bos(processor: Any, text: str) -> bool:
    """Whether a rendered text brings its own beginning-of-sequence token, so that none may be added to it."""
    bos = processor.tokenizer.bos_token
    return bool(bos) and text.startswith(bos)


def label_turns(processor: Any, turns: Sequence[Turn]) -> LabelledTokens:
    """The tokens of a conversation and their labels.

    The prompt before each answer is tokenised as at inference: where a template's last character would fuse with
    the answer's first into one token, the text is tokenised in two pieces there.

    Raises:
        DataError: a control token in a text, or a chat template that does not fit (see `chat`).
        ModelError: a tokenizer without offsets, or one without an end-of-sequence token where it is needed.
    """
    check_texts(processor, turns)
    text, spans = assistant_spans(processor, turns)
    tokens, begins = _tokenise_spans(processor, text, spans)
    labels = [IGNORE_INDEX] * len(tokens.ids)
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    for number, (begin, span, answer) in enumerate(zip(begins, spans, answers, strict=True)):
        stop, ended = _stop(processor, tokens, text, begin, span, answer)
        labels[begin:stop] = tokens.ids[begin:stop]
        if number + 1 == len(spans) and not ended:
            eos = _eos(processor)
            tokens.ids, labels = [*tokens.ids[:stop], eos], [*labels[:stop], eos]
    return LabelledTokens(input_ids=tokens.ids, labels=labels)


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


def count_pictures(processor: Any, tokens: LabelledTokens, pictures: int) -> None:
    """Make sure that the text holds one picture token a picture.

    Raises:
        DataError: the chat template dropped or doubled a picture.
    """
    found = tokens.input_ids.count(control_tokens(processor).image_id)
    if found != pictures:
        raise DataError(
            f"the chat template writes {found} picture tokens for {pictures} pictures; use one that writes "
            f"{control_tokens(processor).image!r} for each item {{'type': 'image'}}"
        )
