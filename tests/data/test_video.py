import av
import numpy as np
import pytest

from mmpeft.core.errors import DataError
from mmpeft.data.video import check_video, load_video
from tests.data.files import picture
from tests.data.films import film, recording


def brightness(video):
    """Of each frame's middle, which says which frame of the film it is."""
    _, height, width, _ = video.frames.shape
    return video.frames[:, height // 2, width // 2, 0].astype(int).tolist()


def expected(indices):
    return [20 + 4 * index % 200 for index in indices]


def failure(name, root, function=load_video, **options):
    with pytest.raises(DataError) as caught:
        function(name, root=root, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts"])
def test_frames_are_uniform_in_time_and_are_those_that_the_indices_say(tmp_path, name):
    film(tmp_path / name)
    video = load_video(name, root=tmp_path, fps=2.0)
    assert video.indices == (0, 12, 25, 37)
    assert (video.frames.dtype, video.frames.shape) == (np.uint8, (4, 48, 64, 3))
    assert np.abs(np.subtract(brightness(video), expected(video.indices))).max() <= 2
    assert (video.total_frames, video.fps) == (50, 25.0)


def test_every_frame_is_the_same_by_seeking_and_by_decoding_all(tmp_path):
    film(tmp_path / "a.mp4")
    everything = load_video("a.mp4", root=tmp_path, fps=None, max_frames=1000)
    assert everything.indices == tuple(range(50))
    some = load_video("a.mp4", root=tmp_path, fps=None, max_frames=7)
    assert len(some.indices) == 7
    np.testing.assert_array_equal(some.frames, everything.frames[list(some.indices)])


def test_a_short_film_gives_one_frame(tmp_path):
    film(tmp_path / "a.mp4", frames=1)
    assert load_video("a.mp4", root=tmp_path, fps=0.1).indices == (0,)


def test_frames_are_scaled_down_to_the_pixel_limit(tmp_path):
    film(tmp_path / "a.mp4")
    assert load_video("a.mp4", root=tmp_path, max_pixels=64 * 48 // 4).frames.shape[1:] == (24, 32, 3)
    assert load_video("a.mp4", root=tmp_path, max_pixels=10**6).frames.shape[1:] == (48, 64, 3)


@pytest.mark.parametrize(("rotation", "corner"), [(90, "bottom left"), (-90, "top right"), (180, "bottom right")])
def test_a_rotated_film_is_upright(tmp_path, rotation, corner):
    film(tmp_path / "a.mp4", frames=3, rotation=rotation)
    frame = load_video("a.mp4", root=tmp_path, max_frames=1).frames[0]
    facts = check_video("a.mp4", root=tmp_path)
    assert frame.shape[:2] == (facts.height, facts.width) == ((48, 64) if rotation == 180 else (64, 48))
    rows, columns = corner.split()
    assert frame[-3 if rows == "bottom" else 2, 2 if columns == "left" else -3].min() > 220


def test_variable_frame_rate_goes_by_time(tmp_path):
    # ten frames in the first 10/25 s, then one every second
    film(tmp_path / "a.mp4", frames=14, times=[*range(10), 25, 50, 75, 100])
    assert load_video("a.mp4", root=tmp_path, fps=1.0).indices == (0, 10, 11, 12)


def test_the_facts_come_from_the_header(tmp_path):
    film(tmp_path / "a.mp4", sound=1.0)
    facts = check_video("a.mp4", root=tmp_path)
    assert (facts.fps, facts.frames, facts.width, facts.height, facts.has_audio) == (25.0, 50, 64, 48, True)
    assert facts.duration == pytest.approx(2.0, abs=0.05)


def test_the_audio_track_comes_where_it_is_asked_for(tmp_path):
    film(tmp_path / "a.mp4", sound=1.0)
    film(tmp_path / "silent.mp4")
    assert load_video("a.mp4", root=tmp_path).audio is None
    assert load_video("silent.mp4", root=tmp_path, with_audio=True).audio is None
    audio = load_video("a.mp4", root=tmp_path, with_audio=True, sampling_rate=8000).audio
    assert audio.sampling_rate == 8000
    assert len(audio.samples) == pytest.approx(8000, abs=1100)


def test_bad_files_are_named_with_the_fix(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"hello, world" * 100)
    whole = film(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    recording(tmp_path / "sound.wav")
    for function in (load_video, check_video):
        assert "video 'empty.mp4' is an empty file (0 bytes)" in failure("empty.mp4", tmp_path, function)
        assert "video 'text.mp4' is corrupt, truncated or of an unknown format" in failure(
            "text.mp4", tmp_path, function
        )
        assert "video 'cut.mp4' is corrupt, truncated" in failure("cut.mp4", tmp_path, function)
        assert "video 'sound.wav' has no video stream" in failure("sound.wav", tmp_path, function)
        assert "does not exist" in failure("no.mp4", tmp_path, function)


def test_nothing_else_is_opened(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    film(tmp_path / "secret.mp4")
    (root / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:2,\nfile://{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n")
    (root / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n")
    for name in ("list.m3u8", "list.mp4"):
        assert "unknown format" in failure(name, root)
    assert "lies outside the media root" in failure("../secret.mp4", root)
    assert "URLs are off" in failure("http://x/a.mp4", root)
    picture(root / "a.png")
    assert "unknown format" in failure("a.png", root)


def test_a_title_that_is_no_utf8_does_not_matter(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.metadata["title"] = "Cafe am Rhein"
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mkv").read_bytes()
    assert b"Cafe" in data
    (tmp_path / "a.mkv").write_bytes(data.replace(b"Cafe", "Café".encode("latin-1")))
    assert check_video("a.mkv", root=tmp_path).frames == 3
    assert len(load_video("a.mkv", root=tmp_path).frames) > 0
