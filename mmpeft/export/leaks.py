"""What must not leave this machine: secrets, and paths that name its folders. Found in files before they are sent."""

import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SECRETS: Mapping[str, str] = {
    "a Hugging Face token": r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)aws_secret_access_key[\"'\s:=]{1,6}[A-Za-z0-9/+=]{40}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{40,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key (sk-...)": r"\bsk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_]{20,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}",
    "a Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{10,}",
    "a PyPI token": r"\bpypi-AgE[A-Za-z0-9_-]{20,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^/\s:@\"'<>{}$]{1,64}:[^/\s:@\"'<>{}$]{3,128}@[\w.-]+",
}
"""Patterns by what they find, in the formats that their issuers document."""

_ROOTS = (
    "home|Users|Volumes|root|mnt|media|tmp|var|srv|opt|export|scratch|workspace|work|data|datasets|nfs|gpfs|lustre"
    "|private"
)
PATH = re.compile(
    rf"(?<![\w.~:/\\<-])/(?:{_ROOTS})\d*/[^\s\"'<>|:*?`,;)\]}}]+"
    r"|\bfile://[^\s\"'<>|*`,;)\]}]+"
    r"|(?<![\w/])[A-Za-z]:(?:\\{1,2}|/)(?!/)[\w.-]+(?:\\{1,2}|/)[^\s\"'<>|:*?`]*"
)
"""An absolute path below a folder where people keep files, of Linux, macOS or Windows; or a URL of such a file."""

_ESCAPED = re.compile(r"\\/|\\u00([2-7][0-9a-fA-F])")
"""What JSON may write in place of a character; none is the end of a line."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")

_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"})
"""Files that hold pieces of every kind of text: only this machine's own names are looked for in them."""

_VARIABLES = re.compile(r"(?i)token|secret|passw|api_?key|credential")
_SHORTEST_SECRET, _SHORTEST_TOKEN = 12, 8
_SHORTEST_FOLDER = 6
_CHUNK, _OVERLAP = 1 << 22, 4096
_GGUF_HEADER = 1 << 25
"""Bytes at the start of a GGUF file that are looked at: its metadata and vocabulary, not its weights."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Something that must not be published.

    Attributes:
        file: as it would be called in the repository.
        line: from 1; None in a binary file.
        what: kind of thing, with its beginning; of a secret no more than four characters.
    """

    file: str
    line: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Local:
    """What is known of this machine: literal secrets (by where they come from), and folders that name it."""

    secrets: Mapping[str, str]
    folders: tuple[str, ...]


def this_machine(*folders: Path, token: str | None = None) -> Local:
    """The secrets in this process's environment, and the folders that a path may betray.

    Args:
        folders: more of them: of the artefact, of the run.
        token: that the Hub is asked with.
    """
    secrets = {
        f"the value of {name}": value
        for name, value in os.environ.items()
        if _VARIABLES.search(name)
        and len(value) >= _SHORTEST_SECRET
        and re.search(r"\d", value)
        and not Path(value).exists()
    }
    if token and len(token) >= _SHORTEST_TOKEN:
        secrets["the token that this machine is logged in with"] = token
    found = {
        str(folder) for path in (Path.home(), Path.cwd(), *folders) for folder in (path.absolute(), path.resolve())
    }
    return Local(secrets=secrets, folders=tuple(sorted(one for one in found if len(one) >= _SHORTEST_FOLDER)))


def find_leaks(name: str, source: Path | bytes, local: Local) -> list[Leak]:
    """What a file must not be published with: in its name, a text, or what binary weights say of themselves."""
    return [*_in_name(name, local), *_in_content(name, source, local)]


def _in_name(name: str, local: Local) -> list[Leak]:
    found = _in_text("", name, local, lines=False)
    return [Leak(file=name, line=None, what=f"{leak.what}, in the name of the file") for leak in found]


def _in_content(name: str, source: Path | bytes, local: Local) -> list[Leak]:
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        return _in_text(name, _safetensors_header(source), local, lines=False)
    if suffix == ".gguf":
        return _in_text(name, _head(source, _GGUF_HEADER).decode("latin-1"), local, lines=False)
    if _head(source, 2) in _UTF16:
        whole = source if isinstance(source, bytes) else source.read_bytes()
        return _in_text(name, whole.decode("utf-16", errors="replace"), local, lines=True)
    found: list[Leak] = []
    before = 0
    for chunk, end in _chunks(source):
        text = chunk.decode("utf-8", errors="replace") if b"\0" not in chunk else chunk.decode("latin-1")
        binary = b"\0" in chunk
        found += _in_text(name, text, local, lines=not binary, before=before)
        before += chunk[:end].count(b"\n")
    return list(dict.fromkeys(found))


def _in_text(name: str, text: str, local: Local, *, lines: bool, before: int = 0) -> list[Leak]:
    text = _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else "/", text)
    spots: list[tuple[int, str]] = []
    for what, secret in local.secrets.items():
        spots += [(at, what) for at in _places(text, secret)]
    for what, pattern in SECRETS.items():
        spots += [(match.start(), f"{what} ({match[0][:4]}...)") for match in re.finditer(pattern, text)]
    for folder in local.folders:
        spots += [(at, f"a path of this machine ({folder})") for at in _places(text, folder)]
    if Path(name).name not in _VOCABULARIES:
        taken = {at for at, _ in spots}
        spots += [
            (match.start(), f"an absolute path ({match[0][:60]})")
            for match in PATH.finditer(text)
            if match.start() not in taken
        ]
    return [
        Leak(file=name, line=before + text.count("\n", 0, at) + 1 if lines else None, what=what)
        for at, what in sorted(spots)
    ]


def _places(text: str, word: str) -> Iterator[int]:
    at = text.find(word)
    while at >= 0:
        yield at
        at = text.find(word, at + len(word))


def _safetensors_header(source: Path | bytes) -> str:
    """The JSON at the start of a safetensors file (github.com/huggingface/safetensors, "Format")."""
    length = struct.unpack("<Q", _head(source, 8).ljust(8, b"\0"))[0]
    header = _head(source, 8 + min(length, 1 << 28))[8:]
    try:
        return json.dumps(json.loads(header).get("__metadata__", {}), ensure_ascii=False)
    except ValueError:
        return header.decode("utf-8", errors="replace")


def _head(source: Path | bytes, size: int) -> bytes:
    if isinstance(source, bytes):
        return source[:size]
    with source.open("rb") as file:
        return file.read(size)


def _chunks(source: Path | bytes) -> Iterable[tuple[bytes, int]]:
    """Pieces that overlap, each with the number of its bytes that do not come again in the next."""
    if isinstance(source, bytes):
        yield source, len(source)
        return
    with source.open("rb") as file:
        rest = b""
        while fresh := file.read(_CHUNK):
            piece = rest + fresh
            end = len(piece) if len(fresh) < _CHUNK else len(piece) - _OVERLAP
            yield piece, end
            rest = piece[end:]
