"""A sample as the model sees it: its tokens in pieces, what is trained on, and its pictures as resized."""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.chat import control_tokens
from mmpeft.data.encode import Encoded, encode_sample
from mmpeft.data.formats import read_rows
from mmpeft.data.media import load_image
from mmpeft.data.types import Media, Sample

LONGEST_SIDE = 384
"""Pixels to which a picture is scaled where the processor's own tensors are no plain pictures."""


def view_samples(
    path: str | os.PathLike[str], processor: Any, media_root: str | os.PathLike[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Every row as `index`, `line`, `id`, `pieces`, `pictures` (data URIs), or with `error` instead of the last two.

    A piece is a run of tokens: `role` (system, user, assistant or media), `text`, `tokens` and `trained`.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else path.parent
    for row in read_rows(path):
        if row.sample is None:
            if row.problem is not None:
                yield {"index": row.problem.index, "line": row.problem.line, "error": row.problem.located(path)}
            continue
        sample = row.sample
        view: dict[str, Any] = {"index": sample.index, "line": sample.line, "id": sample.id}
        try:
            images = [load_image(name, root=root) for name in sample.images]
            encoded = _encoded(processor, sample, images)
            view |= {"pieces": _pieces(processor, sample, encoded), "pictures": _pictures(processor, encoded, images)}
        except (DataError, ModelError) as error:
            view["error"] = f"{path}:{sample.line}: sample {sample.index}: {error}"
        yield view


def _encoded(processor: Any, sample: Sample, images: Sequence[Image.Image]) -> Encoded:
    if sample.videos or sample.audios:
        raise DataError("holds video or audio, which `show` does not open; leave --model out to see its turns")
    return encode_sample(processor, sample, Media(images=images))


def _pieces(processor: Any, sample: Sample, encoded: Encoded) -> list[dict[str, Any]]:
    media = {identifier: name for name, identifier in control_tokens(processor).media_ids.items()}
    pairs = zip(encoded["input_ids"].tolist(), encoded["labels"].tolist(), strict=True)
    pieces: list[dict[str, Any]] = []
    for (medium, trained), run in groupby(pairs, lambda pair: (media.get(pair[0]), pair[1] != IGNORE_INDEX)):
        ids = [identifier for identifier, _ in run]
        text = f"<{medium}> x {len(ids)}" if medium else processor.tokenizer.decode(ids)
        role = "media" if medium else "assistant" if trained else "user"
        pieces.append({"role": role, "text": text, "tokens": len(ids), "trained": trained})
    if sample.turns[0].role == "system" and pieces[0]["role"] == "user":
        said = sample.turns[0].text.strip()
        end = pieces[0]["text"].find(said) + len(said) if said in pieces[0]["text"] else 0
        if end:
            first = pieces[0]
            rest = {**first, "text": first["text"][end:]}
            pieces[:1] = [{**first, "role": "system", "text": first["text"][:end], "tokens": 0}, rest]
    return pieces


def _pictures(processor: Any, encoded: Encoded, images: Sequence[Image.Image]) -> list[str]:
    pixels, worker = encoded.get("pixel_values"), getattr(processor, "image_processor", None)
    mean, std = getattr(worker, "image_mean", None), getattr(worker, "image_std", None)
    if pixels is not None and pixels.ndim == 4 and pixels.shape[1] == 3 and mean and std:
        shape = (1, 3, 1, 1)
        plain = pixels.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        values = (plain.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return [_data_uri(Image.fromarray(np.ascontiguousarray(value))) for value in values]
    scaled = [image.copy() for image in images]
    for image in scaled:
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return [_data_uri(image) for image in scaled]


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
