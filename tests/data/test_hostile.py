"""Bad input that no small file can hold: links, pipes, devices, bombs, endless rows; what is opened, memory, time."""

import base64
import ctypes
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.check import check_data
from mmpeft.data.dataset import load_dataset
from mmpeft.data.mend import mend_data
from mmpeft.data.reading import read_objects
from mmpeft.data.show import describe_samples
from tests.data.files import gpt, human, picture, row, write_lines
from tests.data.films import film, recording
from tests.tiny import tiny_processor

PLACES = {"image": "a.png", "video": "a.mp4", "audio": "a.wav"}


def errors(path, root=None):
    return check_data(path, root).errors


def unreadable(path):
    with pytest.raises(DataError) as caught:
        list(read_objects(path))
    return str(caught.value)


def test_data_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "one.json").symlink_to(tmp_path / "two.json")
    (tmp_path / "two.json").symlink_to(tmp_path / "one.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nothing.json")
    (tmp_path / "null.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.json"))
    wanted = {
        "pipe.json": "is no regular file but a pipe or device",
        "null.json": "is no regular file but a pipe or device",
        "socket.json": "is no regular file but a pipe or device",
        "loop.json": "is a link to",
        "one.json": "is a link to",
        "gone.json": "nothing.json, which leads to no file",
        "no\0.json": "no such file",
        "n" * 300 + ".json": "is no usable path",
    }
    for name, part in wanted.items():
        assert unreadable(tmp_path / name).startswith(f"{tmp_path / name}: ")
        assert part in unreadable(tmp_path / name)
        (message,) = errors(tmp_path / name)
        assert part in message
        with pytest.raises(DataError, match="json"):
            load_dataset(tmp_path / name, processor=tiny_processor())
    with pytest.raises(DataError, match=r"folder\.json"):
        load_dataset(tmp_path / "folder.json", processor=tiny_processor())


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights away, which only root may")
def test_a_file_without_permission_is_named(tmp_path):
    """As another user, in a child: root may read everything."""
    film_row = row(human("<video>q"), gpt("a"), video="a.mp4")
    sound_row = row(human("<audio>q"), gpt("a"), audio="a.wav")
    path = write_lines(tmp_path / "a.jsonl", [row(image="a.png"), film_row, sound_row])
    for file in (picture(tmp_path / "a.png"), film(tmp_path / "a.mp4", frames=3), recording(tmp_path / "a.wav")):
        file.chmod(0)
    code = (
        "import json, os, sys; from mmpeft.data.check import check_data\n"
        "os.chdir(sys.argv[1]); check_data('a.jsonl'); check_data('c.jsonl')\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "first = check_data('a.jsonl').errors\n"
        "print(json.dumps([first, check_data('b.jsonl').errors]))"
    )
    write_lines(tmp_path / "b.jsonl", [row()]).chmod(0)
    write_lines(tmp_path / "c.jsonl", [row()])
    for folder in (tmp_path, *tmp_path.parents):
        # Those that pytest made, one more of them under pytest-xdist.
        if folder.name.startswith(("test_", "pytest-", "popen-")):
            folder.chmod(0o755)
    first, second = child(code, str(tmp_path))
    assert first == [
        "a.jsonl:1: sample 0 (id '0'): picture 'a.png' cannot be read: Permission denied",
        "a.jsonl:2: sample 1 (id '1'): video 'a.mp4' cannot be read: Permission denied",
        "a.jsonl:3: sample 2 (id '2'): audio file 'a.wav' cannot be read: Permission denied",
    ]
    assert second == ["b.jsonl: cannot be read: Permission denied"]
    assert path.is_file()


def test_media_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "one.png").symlink_to("two.png")
    (tmp_path / "two.png").symlink_to("one.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.truncate(os.open(tmp_path / "sparse.png", os.O_CREAT | os.O_WRONLY), 300 << 20)
    os.truncate(os.open(tmp_path / "sparse.mp4", os.O_CREAT | os.O_WRONLY), 9 << 30)
    wanted = {
        "pipe.png": "is no regular file",
        "loop.png": "is no usable path: Symlink loop",
        "one.png": "is no usable path: Symlink loop",
        "gone.png": "does not exist",
        "zero.png": "lies outside the media root",
        "sparse.png": "it looks like nothing but zero bytes",
    }
    rows = [row(image=name) for name in wanted] + [row(human("<video>q"), gpt("a"), video="sparse.mp4")]
    found = errors(write_lines(tmp_path / "a.jsonl", rows))
    for number, (message, part) in enumerate(zip(found, [*wanted.values(), "the limit is 8"], strict=True), start=1):
        assert message.startswith(f"{tmp_path / 'a.jsonl'}:{number}: ")
        assert part in message


def outside_and_inside(folder: Path) -> tuple[Path, list[dict]]:
    """A folder of secrets, and rows that try to have them opened from the media root beside it."""
    secret, root = folder / "secret", folder / "root"
    for place in (secret, root / "deep"):
        place.mkdir(parents=True)
    picture(secret / "a.png")
    film(secret / "a.mp4", frames=5)
    recording(secret / "a.wav")
    with tarfile.open(secret / "a.tar", "w") as tar:
        tar.add(secret / "a.png", "a.png")
    with tarfile.open(root / "links.tar", "w") as tar:
        for name in PLACES.values():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, str(secret / name)
            tar.addfile(link)
    (root / "folder").symlink_to(secret)
    (root / "deep" / "up").symlink_to("../..")
    (root / "tar.tar").symlink_to(secret / "a.tar")
    rows = []
    for key, name in PLACES.items():
        path = secret / name
        (root / f"link-{name}").symlink_to(secret / name)
        (root / f"chain-{name}").symlink_to(f"link-{name}")
        (root / f"list-{name}").write_text(f"#EXTM3U\n#EXTINF:1,\n{path}\n#EXT-X-ENDLIST\n")
        (root / f"cat-{name}").write_text(f"ffconcat version 1.0\nfile '{path}'\n")
        (root / f"page-{name}").write_text(f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{path}"/></svg>')
        (root / f"script-{name}").write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({path}) run\n")
        names = [
            *(
                f"../secret/{name}",
                f"deep/../../secret/{name}",
                f"../root/../secret/{name}",
                f"{root}/../secret/{name}",
            ),
            *(str(path), f"//{path}", f"/proc/self/cwd/../{path}", f"~/{name}", f"..\\secret\\{name}"),
            *(f"file://{path}", f"FILE://localhost{path}", f"file:../secret/{name}", f"file:%2e%2e/secret/{name}"),
            *(f"%2e%2e/secret/{name}", f"link-{name}", f"chain-{name}", f"folder/{name}", f"deep/up/secret/{name}"),
            *(f"links.tar::{name}", f"links.tar::../secret/{name}", "tar.tar::a.png", f"{secret}/a.tar::a.png"),
            *(f"list-{name}", f"cat-{name}", f"page-{name}", f"script-{name}", f"http://127.0.0.1:9/{name}"),
            *(f"subfile,,start,0,end,0,,:{path}", f"concat:{path}", f"pipe:{path}", "../secret/a.tar::a.png"),
        ]
        rows += [row(human(f"<{key}>q"), gpt("a"), **{key: name}) for name in names]
    return secret, rows


class Watched:
    """What is opened or read of a folder and its files, by the kernel's own word, until it is closed."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.watch = libc.inotify_init1(os.O_NONBLOCK)
        opened_or_read = 0x20 | 0x01
        for place in (folder, *folder.iterdir()):
            assert libc.inotify_add_watch(self.watch, os.fsencode(place), opened_or_read) > 0

    def seen(self) -> bytes:
        """The kernel's notices since the last call; names of files stand in them."""
        try:
            return os.read(self.watch, 4096)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self.watch)


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify, which sees what C libraries open, is Linux's")


@only_linux
def test_nothing_outside_the_media_root_is_opened_by_the_process(tmp_path):
    secret, rows = outside_and_inside(tmp_path)
    path = write_lines(tmp_path / "root" / "a.jsonl", rows)
    with closing(Watched(secret)) as watched:
        report = check_data(path)
        with pytest.raises(DataError, match=f"{len(rows)} samples"):
            load_dataset(path, processor=tiny_processor(), verify="decode")
        mend_data(path, tmp_path / "root" / "mended.jsonl")
        list(describe_samples(path))
        assert not watched.seen()
        (secret / "a.png").read_bytes()
        assert watched.seen()
    assert (report.samples, report.error_count) == (0, len(rows))


def folders(tmp_path: Path) -> list[Path]:
    """Folders and files of other layouts that name or link to what lies outside them."""
    secret, _ = outside_and_inside(tmp_path)
    (secret / "words.txt").write_text("secret words")
    (secret / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "secret"}) + "\n")
    linked, named, classes = (tmp_path / name for name in ("linked", "named", "classes"))
    for place in (linked, named, classes):
        place.mkdir()
        picture(place / "good.png")
        (place / "good.txt").write_text("good")
    (linked / "a.png").symlink_to(secret / "a.png")
    (linked / "a.txt").write_text("a")
    picture(linked / "b.png")
    (linked / "b.txt").symlink_to(secret / "words.txt")
    (named / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": name, "text": "t"}) + "\n" for name in ("../secret/a.png", str(secret / "a.png"))
        )
    )
    (classes / "cats").symlink_to(secret)
    (classes / "metadata.jsonl").symlink_to(secret / "metadata.jsonl")
    table = tmp_path / "root" / "t.csv"
    table.write_text(f"image,question,answer\n../secret/a.png,q,a\n{secret}/a.png,q,a\n")
    pointed = tmp_path / "root" / "pointed.tar"
    pointed.symlink_to(secret / "a.tar")
    return [linked, named, classes, table]


@only_linux
def test_folders_and_tables_lead_to_nothing_outside_either(tmp_path):
    paths = folders(tmp_path)
    with closing(Watched(tmp_path / "secret")) as watched:
        for path in paths:
            report = check_data(path)
            assert not watched.seen(), path
            assert report.samples <= 1, path
            assert all("secret words" not in message for message in report.errors)
            with pytest.raises(DataError):
                load_dataset(path, processor=tiny_processor(), verify="decode")
            assert not watched.seen(), path


def child(code: str, *arguments: str) -> object:
    """What a Python program prints as JSON on its last line."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_python_opens_only_the_data_file_and_what_lies_in_the_root_and_no_connection(tmp_path):
    secret, rows = outside_and_inside(tmp_path)
    write_lines(tmp_path / "root" / "a.jsonl", rows)
    code = (
        "import json, os, sys; from mmpeft.data.check import check_data\n"
        "seen = []\n"
        "def hook(event, arguments):\n"
        "    if event == 'open' or event.startswith(('socket.', 'subprocess.', 'os.exec', 'os.system', 'os.posix')):\n"
        "        seen.append([event, str(arguments[0])])\n"
        "from mmpeft.data import audio; import av, soundfile, soxr\n"
        "sys.addaudithook(hook)\n"
        "report = check_data(sys.argv[1])\n"
        "print(json.dumps([report.samples, seen]))"
    )
    samples, seen = child(code, str(tmp_path / "root" / "a.jsonl"))
    assert samples == 0
    assert {event for event, _ in seen} == {"open"}
    opened = {Path(name).resolve() for _, name in seen if name.startswith("/")}
    assert (tmp_path / "root" / "a.jsonl").resolve() in opened
    assert not [path for path in opened if path.is_relative_to(secret)]
    assert not [path for path in opened if path.is_relative_to("/proc")]


# VmHWM, for getrusage's ru_maxrss begins with the peak of the process that started this one.
MEASURED = (
    "import json, re, sys, time; from mmpeft.data.check import check_data\n"
    "from mmpeft.data import audio; import av, soundfile\n"
    "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024\n"
    "before, start = peak(), time.perf_counter()\n"
    "report = check_data(sys.argv[1], workers=2)\n"
    "print(json.dumps({'mib': peak() - before, 'seconds': time.perf_counter() - start, 'samples': report.samples,\n"
    "                  'errors': report.errors, 'count': report.error_count, 'warnings': report.warnings}))"
)


def endless_line(path: Path) -> Path:
    """300 MiB in one line between two good rows."""
    with path.open("w") as file:
        file.write(json.dumps(row(id="first")) + '\n{"id": "')
        for _ in range(300):
            file.write("a" * (1 << 20))
        file.write('"}\n' + json.dumps(row(id="last")) + "\n")
    return path


def test_a_line_of_300_mib_costs_no_more_than_the_longest_row(tmp_path):
    found = child(MEASURED, str(endless_line(tmp_path / "a.jsonl")))
    assert (found["samples"], found["count"]) == (2, 1)
    assert f"{tmp_path / 'a.jsonl'}:2: sample 1: the line has more than 67108864 characters" in found["errors"][0]
    assert found["mib"] < 400, found
    assert found["seconds"] < 60, found


@pytest.mark.slow
def test_an_array_of_one_sample_of_300_mib_costs_no_more_than_the_longest_row(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + endless_line(tmp_path / "a.jsonl").read_text().replace("\n", ",\n"))
    found = child(MEASURED, str(path))
    assert (found["samples"], found["count"]) == (1, 1)
    assert f"{path}:2: sample 1, which starts here, has more than 67108864 characters" in found["errors"][0]
    assert found["mib"] < 600, found
    assert found["seconds"] < 60, found


def test_a_conversation_of_a_million_turns_is_refused_in_bounded_memory(tmp_path):
    pair = json.dumps(human("q")) + ", " + json.dumps(gpt("a"))
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write(
            '{"id": "long", "conversations": [' + ", ".join([pair] * 500_000) + "]}\n" + json.dumps(row()) + "\n"
        )
    found = child(MEASURED, str(path))
    assert (found["samples"], found["count"]) == (1, 1)
    assert f"{path}:1: sample 0 (id 'long'): 1000000 turns; expected at most 10000" in found["errors"][0]
    assert found["mib"] < 800, found
    assert found["seconds"] < 60, found


@pytest.mark.parametrize("value", ["[]", "{}", "0"])
def test_a_row_of_millions_of_values_is_refused_in_bounded_memory(tmp_path, value):
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('{"id": [' + ",".join([value] * 9_000_000) + "]}\n" + json.dumps(row()) + "\n")
    found = child(MEASURED, str(path))
    assert (found["samples"], found["count"]) == (1, 1)
    assert "has more than 4000000 values" in found["errors"][0]
    assert found["mib"] < 400, found


def test_sparse_data_files_are_no_trouble(tmp_path):
    for name in ("a.json", "a.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(200 << 20)
        found = child(MEASURED, str(tmp_path / name))
        assert found["count"] == 1
        assert found["mib"] < 400, found


def test_pictures_that_unpack_to_far_more_than_their_files_stay_within_the_limit(tmp_path):
    """Three pictures of 64 megapixels in 1 bit: a few KiB each on disk, 256 MiB each as RGB in PIL; two at a time."""
    rows = []
    for number in range(3):
        Image.new("1", (8000, 7999 + number % 2), number % 2).save(tmp_path / f"{number}.png")
        rows.append(row(image=f"{number}.png"))
    assert max((tmp_path / f"{number}.png").stat().st_size for number in range(3)) < 100_000
    found = child(MEASURED, str(write_lines(tmp_path / "a.jsonl", rows)))
    assert (found["samples"], found["count"]) == (3, 0), found["errors"]
    assert found["mib"] < 1000, found
    assert found["seconds"] < 60, found


def test_an_animation_of_many_frames_costs_as_much_as_one(tmp_path):
    Image.new("P", (1000, 1000)).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.new("P", (1000, 1000), n % 2) for n in range(1, 60)]
    )
    found = child(MEASURED, str(write_lines(tmp_path / "a.jsonl", [row(image="a.gif")])))
    assert found["samples"] == 1
    assert "has 60 frames; the first is used" in found["warnings"][0]
    assert found["mib"] < 100, found
    assert found["seconds"] < 20, found


def test_a_file_name_that_is_no_text_is_named(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    path.write_text(json.dumps(row(image="no.png")) + "\n")
    program = "import sys; sys.argv[0] = 'mmpeft'; from mmpeft.cli.main import main; main()"
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", program, "data", "check", os.fsencode(path), *options],
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 3, done.stderr
        assert b"Traceback" not in done.stderr
        assert b"no.png" in done.stdout


def test_a_row_of_thousands_of_missing_pictures_gives_a_short_message(tmp_path):
    names = [f"{number}.png" for number in range(5_000)]
    rows = [row(human("<image>" * len(names)), gpt("a"), images=names), {f"key{number}": 1 for number in range(5_000)}]
    for message in errors(write_lines(tmp_path / "a.jsonl", rows)):
        assert len(message) < 5000


def test_media_inside_the_data_file_are_not_all_held_at_once(tmp_path):
    """120 pictures of 1 MiB each, as `data:` URLs."""
    path = tmp_path / "a.jsonl"
    chance = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(120):
            content = io.BytesIO()
            Image.fromarray(chance.integers(0, 255, (512, 512, 3), dtype=np.uint8)).save(
                content, "PNG", compress_level=0
            )
            url = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
            file.write(json.dumps(row(id=str(number), image=url)) + "\n")
    found = child(MEASURED, str(path))
    assert (found["samples"], found["count"]) == (120, 0)
    assert found["mib"] < 120, found
