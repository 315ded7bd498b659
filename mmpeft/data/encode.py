"""A sample and its media as what the model's forward takes: `input_ids`, `labels`, `pixel_values` and the like.

as the template writes it   Describe <image> and <image> .
replaced, by the processor  Describe <image><image><image><image> and <image><image><image><image> .
input_ids                   Describe  p p p p  and  p p p p  .
labels                         -      - - - -   -   - - - -  .      (where the assistant speaks)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from mmpeft.core.errors import DataError
from mmpeft.core.types import IGNORE_INDEX, MODALITIES, Modality
from mmpeft.data.box_text import with_boxes
from mmpeft.data.chat import control_tokens
from mmpeft.data.expand import Encoded, Expansion, expand
from mmpeft.data.labels import (
    Conversation,
    LabelledTokens,
    answers_of,
    conversation_of,
    count_media,
    expanded,
    label_conversation,
    prompt_of,
    prompt_tokens,
)
from mmpeft.data.token_cache import TokenCache
from mmpeft.data.types import Media, Sample, Turn
from mmpeft.families.registry import family_of_processor

__all__ = [
    "DecodedMedia",
    "Encoded",
    "MediaSource",
    "cut_before_media",
    "encode_prompt",
    "encode_sample",
    "encode_turns",
]


def encode_sample(
    processor: Any, sample: Sample, media: Media, max_length: int | None = None, cache: TokenCache | None = None
) -> Encoded:
    """Tokens, labels and media tensors of one sample; only keys that the model's forward takes.

    Args:
        processor: a transformers processor with a chat template and a fast tokenizer.
        sample: the conversation; its boxes are written as the processor's family writes them.
        media: what its placeholders stand for, decoded.
        max_length: longest row in tokens, media included; the tail is cut, never inside a picture, video or
            recording, and one behind the cut goes with its tensors.
        cache: texts that were tokenised before; what is not there is added.

    Returns:
        `input_ids` and `labels` LongTensor [sequence]; `mm_token_type_ids` or `token_type_ids` [sequence] where the
        forward wants them; media tensors as the processor makes them for one sample, pictures, patches or tiles
        in the first dimension.

    Raises:
        DataError: a control token in a text, a template that does not fit, no label left after the cut, or a box
            that lies outside its picture.
        ModelError: the processor does not say what takes a medium's place.
    """
    turns = with_boxes(processor, sample.turns, sample.boxes, [image.size for image in media.images])
    return encode_turns(processor, turns, DecodedMedia(processor, media), max_length, cache)[0]


class MediaSource(Protocol):
    """Where the media of a conversation come from: decoded, or kept from before."""

    @property
    def counts(self) -> Mapping[Modality, int]:
        """How many there are of each kind."""

    def expansion(self, conversation: Conversation, kept: int | None) -> Expansion:
        """What the processor makes of the conversation's media, of the first `kept` alone if that is not None."""


class DecodedMedia:
    """Media that the processor is run over.

    Attributes:
        whole: what it made of all of them.
        used: what it made of those that `expansion` was asked for last.
    """

    def __init__(self, processor: Any, media: Media) -> None:
        self.processor, self.media = processor, media
        self.whole: Expansion | None = None
        self.used: Expansion | None = None

    @property
    def counts(self) -> Mapping[Modality, int]:
        """How many media there are of each kind."""
        return {"image": len(self.media.images), "video": len(self.media.videos), "audio": len(self.media.audios)}

    def expansion(self, conversation: Conversation, kept: int | None) -> Expansion:
        """See `MediaSource`; errors as `expand`."""
        if kept is None or self.used is None:
            self.used = self.whole = expand(self.processor, conversation.text, self.media)
        else:
            self.used = _of_the_first(self.processor, conversation, self.media, self.used, kept)
        return self.used


def encode_turns(
    processor: Any,
    turns: Sequence[Turn],
    media: MediaSource,
    max_length: int | None = None,
    cache: TokenCache | None = None,
) -> tuple[Encoded, int]:
    """As `encode_sample`, of turns whose boxes are written, with media from anywhere and texts from `cache`.

    Returns:
        The tensors, and how many media are left after the cut.
    """
    conversation = conversation_of(processor, turns) if cache is None else cache.conversation(processor, turns)
    count_media(processor, conversation, media.counts)
    expansion = media.expansion(conversation, None)
    if cache is None:
        tokens = label_conversation(processor, expanded(conversation, expansion.replacements), answers_of(turns))
    else:
        tokens = cache.labelled(processor, turns, conversation, expansion.replacements)
    cut = cut_before_media(tokens, max_length, control_tokens(processor).ids)
    kept = sum(end <= cut for _, end in tokens.media)
    if kept < len(tokens.media):
        expansion = media.expansion(conversation, kept)
    encoded = {"input_ids": torch.tensor(tokens.input_ids[:cut]), "labels": torch.tensor(tokens.labels[:cut])}
    return encoded | token_types(processor, encoded) | expansion.tensors, kept


def encode_prompt(processor: Any, turns: Sequence[Turn], media: Media, *, thinking: bool = False) -> Encoded:
    """A prompt as the model's forward takes it, tokenised as training sees it.

    Args:
        thinking: ask for reasoning, where the chat template can be told to (`enable_thinking`).

    Returns:
        As `encode_sample`, without labels.

    Raises:
        DataError: a text that holds a control token, or turns that the chat template refuses.
    """
    return encode_prompt_turns(processor, turns, DecodedMedia(processor, media), thinking=thinking)


def encode_prompt_turns(
    processor: Any, turns: Sequence[Turn], media: MediaSource, *, thinking: bool = False
) -> Encoded:
    """As `encode_prompt`, with media from anywhere."""
    prompt = prompt_of(processor, turns, thinking=thinking)
    count_media(processor, prompt, media.counts)
    expansion = media.expansion(prompt, None)
    ids = prompt_tokens(processor, expanded(prompt, expansion.replacements))
    encoded = {"input_ids": torch.tensor(ids)}
    return encoded | token_types(processor, encoded) | expansion.tensors


def cut_before_media(tokens: LabelledTokens, max_length: int | None, special: frozenset[int] = frozenset()) -> int:
    """How many tokens fit `max_length`; a cut that would fall inside a medium falls before it.

    With it goes what opens it: `special` tokens right before it (`<|vision_start|>`), which a model would take for
    the start of a medium that does not come.

    Raises:
        DataError: no labelled token is left.
    """
    cut = len(tokens.input_ids) if max_length is None else min(max_length, len(tokens.input_ids))
    cut = next((start for start, end in _blocks(tokens, special) if start < cut < end), cut)
    if all(label == IGNORE_INDEX for label in tokens.labels[:cut]):
        raise DataError(
            f"no answer token is left of its {len(tokens.input_ids)} tokens after the cut to max_length {max_length}; "
            "raise max_length, or shorten the sample"
        )
    return cut


def _blocks(tokens: LabelledTokens, special: frozenset[int]) -> Iterator[tuple[int, int]]:
    before = 0
    for start, end in tokens.media:
        opened = start
        while opened > before and tokens.input_ids[opened - 1] in special and tokens.labels[opened - 1] == IGNORE_INDEX:
            opened -= 1
        yield opened, end
        before = end


def _of_the_first(processor: Any, conversation: Conversation, media: Media, whole: Expansion, count: int) -> Expansion:
    """The tensors of the first `count` media alone."""
    marks = [conversation.text[start:end] for start, end in conversation.media[:count]]
    if not marks:
        return Expansion(replacements=(), tensors={})
    found: Mapping[Modality, int] = {
        modality: sum(kind == modality for kind in whole.modalities[:count]) for modality in MODALITIES
    }
    kept = Media(
        images=media.images[: found["image"]],
        videos=media.videos[: found["video"]],
        audios=media.audios[: found["audio"]],
    )
    part = expand(processor, "".join(marks), kept)
    if part.replacements != whole.replacements[:count]:
        raise DataError(
            f"its {len(whole.replacements)} media are encoded together and cannot be cut to the {count} that fit; "
            "raise max_length, or shorten the sample"
        )
    return part


def token_types(processor: Any, encoded: Encoded) -> Encoded:
    """`mm_token_type_ids` or `token_type_ids` [sequence], where the family's forward wants them."""
    if getattr(processor, "return_mm_token_type_ids", False):
        ids = processor.create_mm_token_type_ids([encoded["input_ids"].tolist()])[0]
        spec = family_of_processor(processor)
        name = "token_type_ids" if spec is not None and spec.token_types == "media" else "mm_token_type_ids"
        return {name: torch.tensor(ids, dtype=torch.long)}
    spec = family_of_processor(processor)
    if spec is not None and spec.token_types == "suffix":
        labels = encoded.get("labels", torch.full_like(encoded["input_ids"], IGNORE_INDEX))
        return {"token_type_ids": (labels != IGNORE_INDEX).long()}
    return {}
