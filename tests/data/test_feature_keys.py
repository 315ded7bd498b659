import base64
import dataclasses
import os
import tarfile

import pytest
from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data import feature_keys as module
from mmpeft.data.feature_keys import feature_keys, media_in_order
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.types import Sample, Turn
from tests.tiny import tiny_processor

ONE, TWO = ("image", "one.png"), ("image", "two.png")


@pytest.fixture
def root(tmp_path):
    for name, colour in (("one.png", "red"), ("two.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def key(processor, root, media=(ONE,), *, identity="weights", **limits):
    return feature_keys(processor, root=root, limits=MediaLimits(**limits), identity=identity).of(media)


def test_the_same_media_have_one_key_wherever_they_lie(processor, root):
    plain = key(processor, root)
    content = (root / "one.png").read_bytes()
    (root / "copy.png").write_bytes(content)
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.add(root / "one.png", "inside.png")
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    for name in ("copy.png", "a.tar::inside.png", url, (root / "one.png").as_uri()):
        assert key(processor, root, [("image", name)]) == plain


def test_other_bytes_order_or_number_of_media_have_other_keys(processor, root):
    keys = [key(processor, root, media) for media in ([ONE], [TWO], [ONE, TWO], [TWO, ONE], [ONE, ONE])]
    assert len(set(keys)) == len(keys)


def test_a_file_that_changes_gets_another_key_though_its_hash_is_remembered(processor, root):
    before = key(processor, root)
    facts = (root / "one.png").stat()
    Image.new("RGB", (8, 8), "green").save(root / "one.png")
    os.utime(root / "one.png", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert key(processor, root) != before


def test_other_weights_have_another_key(processor, root):
    assert key(processor, root, identity="other") != key(processor, root)


@pytest.mark.parametrize(
    "change",
    [
        lambda processor: setattr(processor.image_processor, "size", {"height": 24, "width": 24}),
        lambda processor: setattr(processor.image_processor, "image_mean", [0.4, 0.4, 0.4]),
        lambda processor: setattr(processor.image_processor, "resample", 0),
        lambda processor: setattr(processor, "patch_size", 99),
        lambda processor: setattr(processor, "num_additional_image_tokens", 7),
        lambda processor: setattr(processor, "image_token", "<picture>"),
    ],
)
def test_another_setting_of_the_processor_has_another_key(root, change):
    changed = tiny_processor()
    before = key(changed, root)
    change(changed)
    assert key(changed, root) != before


def test_another_chat_template_has_the_same_key(root):
    changed = tiny_processor()
    before = key(changed, root)
    changed.chat_template = "{{ messages }}"
    assert key(changed, root) == before


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(MediaLimits)])
def test_limits_count_for_the_media_that_they_bound(processor, root, field):
    for name in ("a.mp4", "a.wav"):
        (root / name).write_bytes(b"whatever")
    named = {"too_long": "cut", "use_audio_in_video": True, "frame_pixels": 64}
    other = named[field] if field in named else getattr(MediaLimits(), field) // 2
    bounded = {
        kind
        for kind, name in (("image", "one.png"), ("video", "a.mp4"), ("audio", "a.wav"))
        if key(processor, root, [(kind, name)]) != key(processor, root, [(kind, name)], **{field: other})
    }
    frames = {"fps", "max_frames", "frame_pixels", "use_audio_in_video"}
    expected = {"image"} if field == "max_image_pixels" else {"video"} if field in frames else {"video", "audio"}
    assert bounded == expected


def test_another_version_of_what_decodes_has_another_key(processor, root, monkeypatch):
    before = key(processor, root)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert key(processor, root) != before


def test_a_medium_outside_the_root_has_no_key(processor, root):
    with pytest.raises(DataError, match="outside the media root"):
        key(processor, root / "..", [("image", "../one.png")])
    with pytest.raises(DataError, match="does not exist"):
        key(processor, root, [("image", "none.png")])


def test_media_stand_in_the_order_of_the_text():
    turns = (
        Turn(role="user", text="<video> and <image>"),
        Turn(role="assistant", text="yes"),
        Turn(role="user", text="<image><audio>"),
        Turn(role="assistant", text="no"),
    )
    sample = Sample(id="0", turns=turns, images=("a", "b"), videos=("c",), audios=("d",), index=0, line=1)
    assert media_in_order(sample) == [("video", "c"), ("image", "a"), ("image", "b"), ("audio", "d")]
