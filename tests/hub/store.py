"""What the hub of the tests keeps, on disk, and what it was told to break.

folder/
  objects/<sha256>            large files, as the LFS protocol puts them
  repos/<owner>/<name>/
    main                      the id of the newest commit
    private                   there where the repository is private
    <commit>/...              the files of a commit
"""

import hashlib
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

TOKEN, READER = "dummy", "reader"
ROLES = {TOKEN: "write", READER: "read"}
"""Tokens of the user `me`, and what they may do."""

NAMESPACES = ("me", "team")
"""Where `me` may create repositories."""

LARGE = (".safetensors", ".bin", ".onnx", ".onnx_data", ".gguf", ".pt")


@dataclass
class Fault:
    """What goes wrong with requests that match.

    Attributes:
        pattern: regular expression that finds "METHOD /path".
        status: the answer; None: the connection is dropped, a part of the request's body read.
        times: how many requests it happens to.
        carried_out: whether the request takes effect before its answer is lost.
        skip: requests that go through before.
    """

    pattern: str
    status: int | None = None
    times: int = 1
    carried_out: bool = False
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, str] = field(default_factory=lambda: {"error": "injected by a test"})

    def happens(self, request: str) -> bool:
        """Whether it does to this request; counts."""
        if self.times <= 0 or not re.search(self.pattern, request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Store:
    """Repositories and large files.

    Attributes:
        requests: what it was asked for, as "GET /me/base/resolve/main/config.json".
        put: ids of the large files that came in whole, one for each time.
        gated: repositories whose files it does not give.
        faults: what is to go wrong; the first that happens is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.objects, self.repos = folder / "objects", folder / "repos"
        self.objects.mkdir(parents=True)
        self.requests: list[str] = []
        self.put: list[str] = []
        self.gated: set[str] = set()
        self.faults: list[Fault] = []
        self.lock = threading.Lock()

    def asked(self, method: str, path: str) -> Fault | None:
        """Note a request; the fault that it meets."""
        request = f"{method} {unquote(path)}"
        with self.lock:
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.happens(request)), None)

    def head(self, repo: str) -> Path:
        """The newest files of a repository."""
        return self.repos / repo / (self.repos / repo / "main").read_text()

    def commits(self, repo: str) -> int:
        """How many commits a repository has, the first, empty one included."""
        return sum(re.fullmatch("[0-9a-f]{40}", path.name) is not None for path in (self.repos / repo).iterdir())

    def names(self, repo: str) -> set[str]:
        """Names of the newest files of a repository, but for the one that the Hub puts into each."""
        return {name for name, _ in files_of(self.head(repo))} - {".gitattributes"}

    def is_private(self, repo: str) -> bool:
        """Whether only `me` sees it."""
        return (self.repos / repo / "private").exists()

    def commit(self, repo: str, change: Callable[[Path], None]) -> str:
        """A new commit: the files of the newest one, changed by `change`."""
        with self.lock:
            draft = self.repos / repo / "draft"
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(self.head(repo), draft)
            change(draft)
            digest = hashlib.sha1(self.head(repo).name.encode())
            for name, file in files_of(draft):
                digest.update(f"{name} {blob_id(file)}\n".encode())
            draft.rename(self.repos / repo / digest.hexdigest())
            (self.repos / repo / "main").write_text(digest.hexdigest())
            return digest.hexdigest()

    def create(self, repo: str, *, private: bool = False) -> bool:
        """An empty repository; false if there is one of this name."""
        with self.lock:
            if (self.repos / repo).exists():
                return False
            commit = hashlib.sha1(repo.encode()).hexdigest()
            (self.repos / repo / commit).mkdir(parents=True)
            (self.repos / repo / commit / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            (self.repos / repo / "main").write_text(commit)
            if private:
                (self.repos / repo / "private").touch()
            return True


def files_of(folder: Path) -> list[tuple[str, Path]]:
    """Names and paths of all files below a folder, in order."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [(file.relative_to(folder).as_posix(), file) for file in found]


def blob_id(file: Path) -> str:
    """Git's id of a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    """Whether the hub keeps a file of this name as a large one."""
    return name.endswith(LARGE)


def sha256(file: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def etag(file: Path) -> str:
    """What the hub calls a file's content."""
    return sha256(file) if is_large(file.name) else blob_id(file)
