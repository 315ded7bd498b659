"""A sample as the model sees it: its tokens in pieces, what is trained on, and its pictures as resized.

Without a processor it is the turns and the pictures as they are; with augmentation, both before and after.
"""

import base64
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from mmpeft.core.errors import DataError, MissingDependencyError, ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.augment import Varied
from mmpeft.data.box_text import box_convention
from mmpeft.data.boxes import pixel_values
from mmpeft.data.chat import control_tokens
from mmpeft.data.encode import Encoded, encode_sample
from mmpeft.data.formats import read_rows, source_root
from mmpeft.data.load_media import MediaLimits, load_media, placed
from mmpeft.data.types import Box, Media, Sample

LONGEST_SIDE = 384
"""Pixels to which a picture is scaled where the processor's own tensors are no plain pictures."""

FRAMES_SHOWN = 4
"""Frames of a film that are shown, evenly spread."""

Vary = Callable[[Sample, Media], Varied]
"""What an epoch makes of a sample: `augment_with_notes` with its settings, seed and epoch."""


def view_samples(
    path: str | os.PathLike[str],
    processor: Any = None,
    media_root: str | os.PathLike[str] | None = None,
    *,
    vary: Vary | None = None,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Every row as `index`, `line`, `id`, `pieces`, `pictures` (data URIs), or with `error` instead of the last two.

    A piece is a run of tokens: `role` (system, user, assistant or media), `text`, `tokens` and `trained`; without a
    processor, a turn. Of a sample with boxes, `convention` says how they are written. With `vary` each has
    `augmented`: `pieces`, `pictures` and `notes` of what was done, or its own `error`.
    `columns` and `question` are as `mmpeft.data.formats.read_rows` takes them.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else source_root(path)
    for row in read_rows(path, columns=columns, question=question):
        if row.sample is None:
            if row.problem is not None:
                yield {"index": row.problem.index, "line": row.problem.line, "error": row.problem.located(path)}
            continue
        yield _view(row.sample, processor, root, path, vary)


def _view(sample: Sample, processor: Any, root: Path, path: Path, vary: Vary | None) -> dict[str, Any]:
    view: dict[str, Any] = {"index": sample.index, "line": sample.line, "id": sample.id}
    where = f"{path}:{sample.line}: sample {sample.index}"
    try:
        media = load_media(sample, root=root, limits=MediaLimits())
        sample = placed(sample, root=root, limits=MediaLimits())
        view |= _seen(processor, sample, media)
    except (DataError, ModelError, MissingDependencyError) as error:
        return {**view, "error": f"{where}: {error}"}
    if vary is None:
        return view
    try:
        varied = vary(sample, media)
        view["augmented"] = {**_seen(processor, varied.sample, varied.media), "notes": list(varied.notes)}
    except (DataError, ModelError) as error:
        view["augmented"] = {"error": f"{where}: {error}"}
    return view


def _seen(processor: Any, sample: Sample, media: Media) -> dict[str, Any]:
    """The pieces and pictures of a sample, and the convention of its boxes."""
    if processor is None:
        pieces = [
            {"role": turn.role, "text": f"{turn.text}\n", "tokens": 0, "trained": turn.role == "assistant"}
            for turn in sample.turns
        ]
        return {"pieces": pieces, "pictures": _thumbnails(media, sample.boxes)}
    encoded = encode_sample(processor, sample, media)
    told = {"convention": box_convention(processor)} if sample.boxes else {}
    pictures = _pictures(processor, encoded, media, sample.boxes)
    return {"pieces": _pieces(processor, sample, encoded), "pictures": pictures, **told}


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


def _pictures(processor: Any, encoded: Encoded, media: Media, boxes: Sequence[Box]) -> list[str]:
    pixels, worker = encoded.get("pixel_values"), getattr(processor, "image_processor", None)
    mean, std = getattr(worker, "image_mean", None), getattr(worker, "image_std", None)
    if pixels is not None and pixels.ndim == 4 and pixels.shape[1] == 3 and mean and std and not boxes:
        shape = (1, 3, 1, 1)
        plain = pixels.float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        values = (plain.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return [_data_uri(Image.fromarray(np.ascontiguousarray(value))) for value in values]
    return _thumbnails(media, boxes)


def _thumbnails(media: Media, boxes: Sequence[Box]) -> list[str]:
    """The pictures, and some frames of films, scaled down, with their boxes drawn on them."""
    found = []
    for number, image in enumerate(media.images):
        scaled = image.copy()
        scaled.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        for box in boxes:
            if box.picture == number:
                _draw(scaled, replace(box, values=pixel_values(box, size=image.size), unit="pixels"), image.size)
        found.append(scaled)
    for video in media.videos:
        for place in np.unique(np.linspace(0, len(video.frames) - 1, FRAMES_SHOWN).round().astype(int)):
            frame = Image.fromarray(video.frames[place])
            frame.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            found.append(frame)
    return [_data_uri(image) for image in found]


def _draw(image: Image.Image, box: Box, size: tuple[int, int]) -> None:
    """Outline a box, or ring a point, given in pixels of a picture of `size`."""
    values = [value * image.size[place % 2] / size[place % 2] for place, value in enumerate(box.values)]
    if len(values) == 2:
        values = [values[0] - 3, values[1] - 3, values[0] + 3, values[1] + 3]
        ImageDraw.Draw(image).ellipse(values, outline="red", width=2)
    else:
        ImageDraw.Draw(image).rectangle(values, outline="red", width=2)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
