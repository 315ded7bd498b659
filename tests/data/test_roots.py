import base64
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.errors import DataError
from mmpeft.data import embedded
from mmpeft.data.audio import check_audio, load_audio
from mmpeft.data.media import load_image
from mmpeft.data.roots import resolve_inside
from mmpeft.data.video import check_video, load_video
from tests.data.files import picture
from tests.data.films import film, recording

PNG = "data:image/png;base64,"


def url_of(path, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def failure(name, root, kind="picture"):
    with pytest.raises(DataError) as caught:
        resolve_inside(name, root=root, kind=kind)
    return str(caught.value)


def archive(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            if isinstance(content, tuple):
                member.type, member.linkname = content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def test_a_file_url_is_the_path_it_names(tmp_path):
    path = picture(tmp_path / "数 据/a b.png")
    for name in (path.as_uri(), f"file://localhost{path}", "file:数 据/a%20b.png"):
        assert resolve_inside(name, root=tmp_path, kind="picture") == path


@pytest.mark.parametrize(
    "name", ["file:///etc/passwd", "file:../secret.png", "FILE:///etc/passwd", "file://host/a.png", "file:%2e%2e/s.png"]
)
def test_a_file_url_leads_no_further_than_the_root(tmp_path, name):
    assert "lies outside the media root" in failure(name, tmp_path)


def test_a_picture_in_a_data_url_is_read(tmp_path):
    path = picture(tmp_path / "a.png", size=(7, 5))
    assert load_image(url_of(path), root=tmp_path).size == (7, 5)
    quoted = url_of(path).replace("=", "%3D")
    assert load_image(quoted, root=tmp_path).size == (7, 5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:text/html;base64,AAAA", "is of type 'text/html;base64'; expected image/…"),
        ("data:audio/wav;base64,AAAA", "expected image/…"),
        ("data:image/png,AAAA", "is no base64 data: URL"),
        ("data:", "is no base64 data: URL"),
        (f"{PNG}A", "is no valid base64"),
        (f"{PNG}AA AA", "is no valid base64"),
        (PNG, "is empty (0 bytes)"),
    ],
)
def test_other_data_urls_are_refused(tmp_path, url, message):
    assert message in failure(url, tmp_path)


def test_a_data_url_is_measured_before_it_is_decoded_and_never_shown_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    message = failure(PNG + "A" * (embedded.MAX_MEDIUM_BYTES * 4 // 3 + 8), tmp_path)
    assert f"at most {embedded.MAX_MEDIUM_BYTES} are read" in message
    assert len(message) < 300


def test_a_broken_picture_in_a_data_url_is_named_by_its_beginning(tmp_path):
    with pytest.raises(DataError) as caught:
        load_image(PNG + base64.b64encode(b"no picture" * 1000).decode(), root=tmp_path)
    assert "is not a picture" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_archives_member_is_read_where_it_lies(tmp_path):
    content = picture(tmp_path / "a.png", size=(9, 4)).read_bytes()
    archive(tmp_path / "s.tar", first__txt=b"x" * 600, cat__png=content)
    assert load_image("s.tar::cat.png", root=tmp_path).size == (9, 4)
    member = resolve_inside("s.tar::cat.png", root=tmp_path, kind="picture")
    assert member.stat().st_size == len(content)
    with member.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        assert (file.read(100), file.tell()) == (content[-8:], len(content))
        file.seek(0)
        assert file.read() == content


def test_links_and_strangers_in_an_archive_are_refused(tmp_path):
    secret = tmp_path / "secret.png"
    picture(secret)
    root = tmp_path / "root"
    root.mkdir()
    archive(root / "s.tar", link__png=(tarfile.SYMTYPE, str(secret)), hard__png=(tarfile.LNKTYPE, "../secret.png"))
    archive(tmp_path / "out.tar", a__png=secret.read_bytes())
    for name in ("link.png", "hard.png", "../secret.png", "gone.png"):
        assert "holds no regular file" in failure(f"s.tar::{name}", root)
    assert "lies outside the media root" in failure("../out.tar::a.png", root)
    (root / "linked.tar").symlink_to(tmp_path / "out.tar")
    assert "lies outside the media root" in failure("linked.tar::a.png", root)


def test_a_damaged_archive_is_named(tmp_path):
    content = picture(tmp_path / "a.png").read_bytes()
    whole = archive(tmp_path / "s.tar", a__png=content).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:520])
    assert "s.tar::a.png" in failure("s.tar::a.png", tmp_path)
    (tmp_path / "t.tar").write_bytes(b"rubbish" * 200)
    assert "t.tar::a.png cannot be read" in failure("t.tar::a.png", tmp_path)


def test_a_file_that_is_called_like_a_member_is_itself(tmp_path):
    path = picture(tmp_path / "s.tar::a.png")
    assert resolve_inside("s.tar::a.png", root=tmp_path, kind="picture") == path


@given(st.text(max_size=40))
def test_no_name_leads_out_of_the_root(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "only"
    root.mkdir(exist_ok=True)
    for text in (name, f"file:{name}", f"data:{name}", f"s.tar::{name}"):
        with pytest.raises(DataError):
            resolve_inside(text, root=root, kind="picture")


def test_films_and_recordings_in_archives_and_urls_are_read(tmp_path):
    sound = recording(tmp_path / "a.wav", seconds=0.5).read_bytes()
    other = recording(tmp_path / "a.flac", seconds=0.5).read_bytes()
    moving = film(tmp_path / "b.mp4", frames=10, sound=0.4).read_bytes()
    archive(tmp_path / "s.tar", a__wav=sound, a__flac=other, b__mp4=moving)
    for name in ("s.tar::a.wav", "s.tar::a.flac", url_of(tmp_path / "a.wav", "audio/wav")):
        assert check_audio(name, root=tmp_path).duration == 0.5
        assert len(load_audio(name, root=tmp_path).samples) == 8000
    for name in ("s.tar::b.mp4", url_of(tmp_path / "b.mp4", "video/mp4")):
        facts = check_video(name, root=tmp_path)
        assert (facts.frames, facts.has_audio) == (10, True)
        video = load_video(name, root=tmp_path, with_audio=True)
        assert (video.total_frames, video.audio is not None) == (10, True)
    assert "is of type 'audio/wav" in failure(url_of(tmp_path / "a.wav", "audio/wav"), tmp_path, kind="video")
