"""A sample and its pictures as what the model's forward takes: `input_ids`, `labels`, `pixel_values`.

input_ids as tokenised   Describe <image> and <image> .
runs of two pictures              [p p p p]   [p p p p]
input_ids                Describe  p p p p  and  p p p p  .
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.chat import control_tokens, render_chat
from mmpeft.data.labels import LabelledTokens, count_pictures, label_turns, starts_with_bos
from mmpeft.data.types import Sample

__all__ = ["Encoded", "encode_sample", "lay_out", "picture_length", "render_chat", "starts_with_bos"]

_TEXT_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
_PROBES = ((64, 64), (512, 512), (640, 64), (64, 640))
_CACHED_SIZES = 4096

Encoded = dict[str, torch.Tensor]
"""`input_ids` and `labels` LongTensor [sequence]; with pictures, `pixel_values` [pictures, 3, height, width]."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A sample's tokens with its pictures' runs in place, cut to the longest length allowed.

    Attributes:
        input_ids, labels: of equal length.
        pictures: how many pictures, from the first, are still there in whole.
        length: tokens before the cut.
    """

    input_ids: list[int]
    labels: list[int]
    pictures: int
    length: int


def lay_out(tokens: LabelledTokens, runs: Sequence[Sequence[int]], *, image_id: int, max_length: int | None) -> Layout:
    """Put each picture's run in its token's place, and cut the tail to `max_length` tokens, no picture split.

    A cut that would fall inside a picture falls before it.

    Raises:
        DataError: no labelled token is left.
    """
    ids: list[int] = []
    labels: list[int] = []
    bounds: list[tuple[int, int]] = []
    for identifier, label in zip(tokens.input_ids, tokens.labels, strict=True):
        run = runs[len(bounds)] if identifier == image_id else (identifier,)
        if identifier == image_id:
            bounds.append((len(ids), len(ids) + len(run)))
        ids += run
        labels += [label] if len(run) == 1 else [IGNORE_INDEX] * len(run)
    cut = len(ids) if max_length is None else min(max_length, len(ids))
    cut = next((start for start, end in bounds if start < cut < end), cut)
    if all(label == IGNORE_INDEX for label in labels[:cut]):
        raise DataError(
            f"no answer token is left of its {len(ids)} tokens after the cut to max_length {max_length}; "
            "raise max_length, or shorten the sample"
        )
    whole = sum(end <= cut for _, end in bounds)
    return Layout(input_ids=ids[:cut], labels=labels[:cut], pictures=whole, length=len(ids))


def encode_sample(
    processor: Any, sample: Sample, images: Sequence[Image.Image], max_length: int | None = None
) -> Encoded:
    """Tokens, labels and pixels of one sample; only keys that the model's forward takes.

    Args:
        processor: a transformers processor with a chat template and a fast tokenizer.
        sample: the conversation.
        images: its pictures (RGB), in order.
        max_length: longest row in tokens, pictures included; the tail is cut, never inside a picture, and a
            picture behind the cut goes with its pixels.

    Raises:
        DataError: a control token in a text, a template that does not fit, or no label left after the cut.
        ModelError: the processor's output cannot be told apart by picture.
    """
    tokens = label_turns(processor, sample.turns)
    count_pictures(processor, tokens, len(images))
    runs, media = _expand(processor, images) if images else ([], {})
    layout = lay_out(tokens, runs, image_id=control_tokens(processor).image_id, max_length=max_length)
    encoded = {"input_ids": torch.tensor(layout.input_ids), "labels": torch.tensor(layout.labels)}
    if layout.pictures:
        encoded |= {key: value[: layout.pictures] for key, value in media.items()}
    return encoded


def _expand(processor: Any, images: Sequence[Image.Image]) -> tuple[list[list[int]], Encoded]:
    """Each picture's run of tokens, and the tensors of all pictures, by the processor itself."""
    token = control_tokens(processor).image
    found = processor(text=[token] * len(images), images=[[image] for image in images], add_special_tokens=False)
    runs = [list(run) for run in found["input_ids"]]
    media = {}
    for key, value in found.items():
        if key in _TEXT_KEYS:
            continue
        if len(value) != len(images):
            raise ModelError(f"the processor gives {len(value)} `{key}` for {len(images)} pictures; expected one each")
        media[key] = torch.stack([torch.as_tensor(item) for item in value])
    return runs, media


def picture_length(processor: Any, size: tuple[int, int]) -> int:
    """Tokens that a picture of (width, height) pixels takes, without its pixels."""
    fixed = _fixed_picture_length(processor)
    return _picture_length(processor, size) if fixed is None else fixed


@functools.lru_cache(maxsize=16)
def _fixed_picture_length(processor: Any) -> int | None:
    """Tokens of any picture, where pictures of very unlike shapes all take the same number; else None."""
    lengths = {_picture_length(processor, size) for size in _PROBES}
    return lengths.pop() if len(lengths) == 1 else None


@functools.lru_cache(maxsize=_CACHED_SIZES)
def _picture_length(processor: Any, size: tuple[int, int]) -> int:
    return len(_expand(processor, [Image.new("RGB", size)])[0][0])
