import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from mmpeft.core.errors import DataError
from mmpeft.data.load_media import MediaLimits, check_media, load_media
from mmpeft.data.types import Sample
from tests.data.files import picture
from tests.data.films import film, recording


@pytest.fixture
def sample(tmp_path):
    picture(tmp_path / "a.png")
    film(tmp_path / "a.mp4", sound=1.0)
    recording(tmp_path / "a.wav")
    return Sample(id="a", turns=(), images=("a.png",), videos=("a.mp4",), audios=("a.wav",), index=0, line=1)


def test_each_medium_is_decoded_within_its_limits(sample, tmp_path):
    limits = MediaLimits(max_frames=3, frame_pixels=32 * 24, sampling_rate=8000, use_audio_in_video=True)
    media = load_media(sample, root=tmp_path, limits=limits)
    assert [image.size for image in media.images] == [(16, 12)]
    assert media.videos[0].frames.shape == (3, 24, 32, 3)
    assert media.videos[0].audio.sampling_rate == media.audios[0].sampling_rate == 8000
    facts = check_media(sample, root=tmp_path, limits=limits)
    assert (facts.images, facts.videos[0].frames, facts.audios[0].duration) == (((16, 12),), 50, 1.0)


def test_a_medium_beyond_its_limit_is_named(sample, tmp_path):
    with pytest.raises(DataError, match=r"'a\.png' is 16 x 12 pixels"):
        load_media(sample, root=tmp_path, limits=MediaLimits(max_image_pixels=10))
    with pytest.raises(DataError, match=r"'a\.wav' lasts 1\.0 s"):
        load_media(sample, root=tmp_path, limits=MediaLimits(max_seconds=0.5))


def test_it_travels_to_workers_and_runs_in_threads(sample, tmp_path):
    load = pickle.loads(pickle.dumps(partial(load_media, root=tmp_path, limits=MediaLimits())))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(load, [sample] * 8))
    for media in found:
        np.testing.assert_array_equal(media.videos[0].frames, found[0].videos[0].frames)
