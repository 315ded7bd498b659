import numpy as np
import pytest
import soundfile

from mmpeft.core.errors import DataError
from mmpeft.data.audio import audio_of_video, check_audio, load_audio
from tests.data.films import film, recording, tone


def failure(name, root, function=load_audio, **options):
    with pytest.raises(DataError) as caught:
        function(name, root=root, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_soundfile_formats_are_read_and_resampled(tmp_path, name):
    recording(tmp_path / name, seconds=1.0, rate=44_100, channels=2)
    facts = check_audio(name, root=tmp_path)
    assert (facts.sampling_rate, facts.channels) == (44_100, 2)
    assert facts.duration == pytest.approx(1.0, abs=0.1)
    audio = load_audio(name, root=tmp_path)
    assert (audio.sampling_rate, audio.samples.dtype, audio.samples.ndim) == (16_000, np.float32, 1)
    middle = audio.samples[4000:12_000]
    assert np.abs(np.fft.rfft(middle)).argmax() == 220  # 440 Hz, in bins of 2 Hz


def test_channels_are_averaged(tmp_path):
    left = tone(0.5)
    soundfile.write(tmp_path / "a.wav", np.stack([left, -left], axis=1), 16_000)
    assert np.abs(load_audio("a.wav", root=tmp_path).samples).max() < 1e-3


def test_pyav_reads_the_others(tmp_path):
    film(tmp_path / "a.mp4", sound=1.0)
    (tmp_path / "a.m4a").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert check_audio("a.m4a", root=tmp_path).sampling_rate == 16_000
    for function, name in ((load_audio, "a.m4a"), (audio_of_video, "a.mp4")):
        samples = function(name, root=tmp_path).samples
        assert np.abs(np.fft.rfft(samples[4000:12_000])).argmax() == 220


def test_the_length_limit_is_an_error_or_a_cut(tmp_path):
    recording(tmp_path / "a.wav", seconds=2.0)
    film(tmp_path / "a.mp4", sound=2.0)
    assert "'a.wav' lasts 2.0 s; the limit is 1 s: cut it" in failure("a.wav", tmp_path, max_seconds=1)
    assert "'a.mp4' lasts longer; the limit is 1 s" in failure("a.mp4", tmp_path, audio_of_video, max_seconds=1)
    for name in ("a.wav", "a.mp4"):
        assert len(load_audio(name, root=tmp_path, max_seconds=1, too_long="cut").samples) == 16_000


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.mp3").write_bytes(b"hello, world" * 100)
    (tmp_path / "cut.wav").write_bytes(recording(tmp_path / "a.wav").read_bytes()[:1000])
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16_000, subtype="FLOAT")
    film(tmp_path / "silent.mp4", frames=3)
    assert "audio file 'empty.wav' is an empty file" in failure("empty.wav", tmp_path)
    assert "'text.mp3' is corrupt, truncated or of an unknown format" in failure("text.mp3", tmp_path)
    assert "'cut.wav' is truncated: 1000 bytes of" in failure("cut.wav", tmp_path, check_audio)
    assert "'none.wav' holds no sound" in failure("none.wav", tmp_path)
    assert "'nan.wav' has samples that are NaN" in failure("nan.wav", tmp_path)
    assert "'silent.mp4' has no audio track" in failure("silent.mp4", tmp_path, audio_of_video)
    assert "lies outside the media root" in failure("../a.wav", tmp_path)
