"""Every malformed file of tests/data/corpus, through `data check` and `load_dataset`; expected.yaml says what comes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmpeft.core.errors import DataError
from mmpeft.data.check import check_data
from mmpeft.data.dataset import load_dataset
from tests.data.files import gpt, human, row, write_lines
from tests.tiny import tiny_processor

CORPUS = Path(__file__).parent / "corpus"
EXPECTED = yaml.safe_load((CORPUS / "expected.yaml").read_text(encoding="utf-8"))
FILES, MEDIA = EXPECTED["files"], EXPECTED["media"]
BROKEN = sorted(name for name, case in FILES.items() if case["errors"])
WHOLE = sorted(set(FILES) - set(BROKEN))

MOST_BYTES, MOST_BYTES_IN_ALL, FEWEST_CASES = 4 << 10, 200 << 10, 60


@pytest.fixture(scope="module")
def reader():
    return tiny_processor()


def loaded(path, processor, **options):
    return load_dataset(path, media_root=CORPUS, processor=processor, verify="decode", **options)


def expectations(path, case):
    """(beginning, part) of each message."""
    return [(f"{path}:{line}: " if line else f"{path}: ", part) for line, part in case["errors"]]


def test_the_corpus_is_what_it_says():
    files = {path.relative_to(CORPUS).as_posix() for path in CORPUS.rglob("*") if path.is_file()}
    good = {".gitattributes", "expected.yaml", "media/good.png", "media/good.wav", "media/false.tar"}
    assert files - good == {*FILES, *(f"media/{name}" for name in MEDIA)}
    sizes = [(CORPUS / name).stat().st_size for name in files - {"expected.yaml"}]
    assert max(sizes) <= MOST_BYTES
    assert sum(sizes) <= MOST_BYTES_IN_ALL
    assert len(BROKEN) + len(MEDIA) >= FEWEST_CASES


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_reported_with_file_line_and_reason(name):
    path = CORPUS / name
    report = check_data(path, CORPUS)
    wanted = expectations(path, FILES[name])
    assert len(report.errors) == report.error_count == len(wanted)
    for message, (beginning, part) in zip(report.errors, wanted, strict=True):
        assert message.startswith(beginning)
        assert part in message
    assert FILES[name].get("samples", report.samples) == report.samples


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_not_loaded(name, reader):
    path = CORPUS / name
    wanted = expectations(path, FILES[name])
    with pytest.raises(DataError) as caught:
        loaded(path, reader)
    for beginning, part in wanted:
        assert beginning in str(caught.value)
        assert part in str(caught.value)
    with pytest.raises(DataError) as caught:
        list(load_dataset(path, media_root=CORPUS, processor=reader, streaming=True))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", WHOLE)
def test_an_odd_file_that_is_whole_is_read(name, reader):
    assert check_data(CORPUS / name, CORPUS).errors == []
    assert len(loaded(CORPUS / name, reader)) == FILES[name]["samples"]


def media_rows(folder, name):
    """A data file whose second row of three names a medium of the corpus."""
    ((key, part),) = MEDIA[name].items()
    middle = row(human(f"<{key}>q"), gpt("a"), id="bad", **{key: f"media/{name}"})
    return write_lines(folder / "a.jsonl", [row(id="first"), middle, row(id="last")]), part


@pytest.mark.parametrize("name", sorted(MEDIA))
def test_a_broken_medium_is_reported_with_the_line_that_names_it(tmp_path, name, reader):
    path, part = media_rows(tmp_path, name)
    report = check_data(path, CORPUS)
    assert (report.error_count, report.samples) == (1, 2)
    (message,) = report.errors
    assert message.startswith(f"{path}:2: sample 1 (id 'bad'): ")
    assert f"'media/{name}'" in message
    assert part in message
    with pytest.raises(DataError) as caught:
        loaded(path, reader)
    assert str(caught.value).startswith(message)
    assert len(loaded(path, reader, on_error="skip", max_skipped=1)) == 2


PROGRAM = "import sys; sys.argv[0] = 'mmpeft'; from mmpeft.cli.main import main; main()"


@pytest.mark.parametrize(
    ("name", "options"), [("cut_in_string.json", []), ("binary.json", []), ("path_up.jsonl", ["--json"])]
)
def test_the_program_ends_with_status_3_and_no_traceback(name, options):
    path = CORPUS / name
    command = [sys.executable, "-c", PROGRAM, "data", "check", str(path), "--media-root", str(CORPUS), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    errors = json.loads(done.stdout)["errors"] if options else [done.stdout]
    for beginning, part in expectations(path, FILES[name]):
        assert any(beginning in message and part in message for message in errors)
