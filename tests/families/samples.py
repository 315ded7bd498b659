"""Samples with pictures, films and recordings made in memory, for any family."""

import numpy as np
from PIL import Image

from mmpeft.data.chat import control_tokens
from mmpeft.data.types import Audio, Media, Sample, Turn, Video
from mmpeft.families.registry import family_of

SIZES = ((31, 47), (64, 20), (17, 60), (40, 40))
"""Width and height of pictures, odd ones among them."""


def picture(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def sound(seconds=0.5, seed=0):
    samples = np.random.default_rng(seed).uniform(-1, 1, int(16_000 * seconds)).astype(np.float32)
    return Audio(samples=samples, sampling_rate=16_000)


def film(frames=4, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 36, 28, 3), dtype=np.uint8)
    return Video(frames=pixels, indices=tuple(range(0, 12 * frames, 12)), fps=24.0, total_frames=12 * frames)


def sample_of(*texts, **media):
    roles = ("user", "assistant")
    turns = tuple(Turn(role=roles[number % 2], text=text) for number, text in enumerate(texts))
    return Sample(id="x", turns=turns, index=0, line=1, **{name: ("x",) * count for name, count in media.items()})


def first_medium(model, number=0):
    """A sample with one medium of the kind that the family is for, unlike the next one's."""
    if "image" in family_of(model).modalities:
        media = Media(images=[picture(SIZES[number % len(SIZES)], number)])
        return sample_of("<image>\nWhat is it?", "a cat " * (1 + number), images=1), media
    media = Media(audios=[sound(0.3 + 0.2 * number, number)])
    return sample_of("<audio>\nWhat is it?", "a cat " * (1 + number), audios=1), media


def every_medium(model, processor):
    """A sample for each modality that the family's processor takes, each with its media."""
    made = {
        "image": Media(images=[picture(SIZES[0])]),
        "video": Media(videos=[film()]),
        "audio": Media(audios=[sound()]),
    }
    return [
        (sample_of(f"<{name}>\nWhat is it?", "It is red.", **{f"{name}s": 1}), made[name])
        for name in family_of(model).modalities
        if name in control_tokens(processor).media
    ]
