import struct
from pathlib import Path

import pytest

from mmpeft.export.leaks import Local, find_leaks, this_machine

HOME = "/" + "home/alice"
NOTHING = Local(secrets={}, folders=())
SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 11,
    "an AWS access key": "AKIA" + "ABCDEFGH12345678",
    "an AWS secret key": "aws_secret_access_key = " + "a1/+" * 10,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "an API key": "sk-proj-" + "abcD1234" * 4,
    "a Google API key": "AIza" + "a1B2c" * 7,
    "a Slack token": "xoxb-123456789012-abcdef",
    "a password in a URL": "postgres://user:hunter22@db.example.com/x",
    "a JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3In0.dozjgNryP4J3jVmN",
}
PATHS = [
    f"{HOME}/data/x.png",
    "/".join(["", "Users", "alice", "model"]),
    "/scratch/.cache/a",
    "C:\\Users\\alice\\x",
    "/mnt/nfs/set/train.json",
    "/gpfs01/alice/model",
    "/" + "Volumes/disk/model",
    "/export/home/al/x",
    f"file://{HOME}/x.png",
    f"{HOME}/data".replace("/", "\\/"),
    f"{HOME}/data".replace("/", "\\u002F"),
]


@pytest.mark.parametrize(("what", "secret"), SECRETS.items())
def test_a_secret_is_found_on_its_line_and_not_repeated(what, secret):
    text = f"first\nsecond\nkey: {secret}\n"
    found = find_leaks("notes.md", text.encode(), NOTHING)
    assert [leak.line for leak in found] == [3]
    assert found[0].what.startswith(what)
    assert str(found[0]).startswith("notes.md:3: ")
    assert secret not in str(found[0])


@pytest.mark.parametrize("path", PATHS)
def test_an_absolute_path_is_found(path):
    (found,) = find_leaks("config.json", f'{{\n  "a": "{path}"\n}}'.encode(), NOTHING)
    assert (found.line, found.what[:16]) == (2, "an absolute path")


def test_the_end_of_a_line_and_the_next_chunk_are_not_lost(tmp_path):
    """A secret on the border of what is read at once."""
    file = tmp_path / "long.txt"
    secret = SECRETS["a GitHub token"]
    for before in (4 * 2**20 - 20, 4 * 2**20 - 5000, 9 * 2**20):
        filler = ("x" * 99 + "\n") * (before // 100)
        file.write_text(filler + secret + "\nrest\n")
        found = find_leaks("long.txt", file, NOTHING)
        assert [(leak.line, leak.what[:14]) for leak in found] == [(before // 100 + 1, "a GitHub token")]


@pytest.mark.parametrize(
    "text",
    [
        "see https://huggingface.co/data/me and and/or/else",
        "a/data/train.json is relative, ../data/x too",
        "the answer is /yes/no",
        "hf_model_name, task-sk-1, AKIA",
        "\\u0120the \\\\/ \\u4f60",
        "<|im_start|>user\n</data>",
        "{{ '/' + message['role'] }}",
        "mmpeft push runs/receipts me/receipts",
    ],
)
def test_what_is_neither_is_left_alone(text):
    assert find_leaks("README.md", text.encode(), NOTHING) == []


def test_a_vocabulary_may_have_pieces_of_paths():
    text = b'{"/srv/user": 1, "/usr/local": 2}'
    assert find_leaks("tokenizer.json", text, NOTHING) == []
    assert find_leaks("sub/vocab.json", text, NOTHING) == []
    assert find_leaks("other.json", text, NOTHING) != []
    local = Local(secrets={}, folders=("/srv/user",))
    assert find_leaks("tokenizer.json", text, local) != []


def test_what_this_machine_is_logged_in_with_is_found_by_its_value(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "c0ffee-c0ffee")
    monkeypatch.setenv("SOME_PASSWORD_FILE", str(tmp_path))
    monkeypatch.setenv("SECRET_BACKEND", "gnome-keyring")
    local = this_machine(tmp_path, token="tok-123456")
    (found,) = find_leaks("a.txt", b"it is c0ffee-c0ffee", local)
    assert found.what == "the value of MY_SERVICE_TOKEN"
    assert find_leaks("a.txt", b"it is gnome-keyring", local) == []
    (found,) = find_leaks("a.txt", b"it is tok-123456", local)
    assert "logged in" in found.what
    assert find_leaks("a.txt", str(tmp_path).encode(), local)[0].what.startswith("a path of this machine")


def test_weights_are_not_searched_but_what_they_say_of_themselves_is(tmp_path):
    def weights(metadata: str) -> Path:
        header = f'{{"__metadata__": {{"from": "{metadata}"}}}}'.encode()
        file = tmp_path / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + f"{HOME}/x".encode())
        return file

    assert find_leaks("model.safetensors", weights("pt"), NOTHING) == []
    (found,) = find_leaks("model.safetensors", weights(f"{HOME}/run"), NOTHING)
    assert found.line is None


def test_a_graph_may_not_say_which_source_file_it_was_made_of():
    content = f"\x08\x0a\0\0stack: File {HOME}/venv/lib/torch/x.py, line 3\0\0".encode()
    (found,) = find_leaks("decoder.onnx", content, NOTHING)
    assert HOME in str(found)


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_text_of_two_bytes_a_letter_is_searched(coding):
    mark = {"utf-16": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}[coding]
    text = f"first\nkey: {SECRETS['a GitHub token']}\n"
    (found,) = find_leaks("notes.txt", mark + text.encode(coding), NOTHING)
    assert str(found).startswith("notes.txt:2: a GitHub token")


def test_a_name_is_searched_like_what_is_in_the_file():
    (found,) = find_leaks(f"sub/{SECRETS['a Hugging Face token']}.txt", b"x", NOTHING)
    assert found.what == "a Hugging Face token (hf_a...), in the name of the file"
    assert find_leaks("sub/data/home/x.txt", b"x", NOTHING) == []
