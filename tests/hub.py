"""A Hugging Face Hub for tests: the part of its HTTP interface that pushing and loading models uses, on this machine.

    folder/
      objects/<sha256>            large files, as the LFS protocol puts them
      repos/<owner>/<name>/
        main                      the id of the newest commit
        <commit>/...              the files of a commit

Its clients are processes of their own (`LocalHub.python`): huggingface_hub reads its environment when it is imported.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

TOKEN = "dummy"
LARGE = (".safetensors", ".bin")
_SITE = Path(torch.__file__).parent.parent


class LocalHub:
    """A hub that listens on a free port of this machine.

    Attributes:
        requests: what it was asked for, as "GET /me/base/resolve/main/config.json".
        gated: repositories whose files it does not give.
    """

    def __init__(self, folder: Path) -> None:
        self.objects, self.repos = folder / "objects", folder / "repos"
        self.objects.mkdir(parents=True)
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def head(self, repo: str) -> Path:
        """The newest files of a repository."""
        return self.repos / repo / (self.repos / repo / "main").read_text()

    def commit(self, repo: str, change: Callable[[Path], None]) -> str:
        """A new commit: the files of the newest one, changed by `change`."""
        with self.lock:
            draft = self.repos / repo / "draft"
            shutil.copytree(self.head(repo), draft)
            change(draft)
            digest = hashlib.sha1(self.head(repo).name.encode())
            for name, file in _files(draft):
                digest.update(f"{name} {_blob(file)}\n".encode())
            draft.rename(self.repos / repo / digest.hexdigest())
            (self.repos / repo / "main").write_text(digest.hexdigest())
            return digest.hexdigest()

    def create(self, repo: str) -> bool:
        """An empty repository; false if there is one of this name."""
        with self.lock:
            if (self.repos / repo).exists():
                return False
            commit = hashlib.sha1(repo.encode()).hexdigest()
            (self.repos / repo / commit).mkdir(parents=True)
            (self.repos / repo / "main").write_text(commit)
            return True

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Of a process that uses this hub, with its cache in `home`."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
            # A service on the internet that transformers would ask to turn a pickle into safetensors.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            **changes,
        }

    def python(
        self, program: str, *arguments: object, home: Path, mmpeft: bool = True, timeout: float = 240, **changes: str
    ) -> str:
        """What a program prints that runs in a process of its own; `mmpeft=False` leaves it only other packages."""
        command = [sys.executable]
        if not mmpeft:
            # -S leaves out the .pth file by which an editable install of mmpeft is found; -I leaves out this checkout.
            command += ["-I", "-S"]
            program = f"import sys; sys.path.insert(0, {str(_SITE)!r})\n{textwrap.dedent(program)}"
        done = subprocess.run(
            [*command, "-c", textwrap.dedent(program), *map(str, arguments)],
            env=self.environment(home, **changes),
            cwd=Path(__file__).parent.parent if mmpeft else home,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


@contextlib.contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """A hub that runs until the block ends."""
    hub = LocalHub(folder)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


def _files(folder: Path) -> list[tuple[str, Path]]:
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [(file.relative_to(folder).as_posix(), file) for file in found]


def _blob(file: Path) -> str:
    """Git's id of a file's content."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(LARGE)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _etag(file: Path) -> str:
    return _sha256(file) if _is_large(file.name) else _blob(file)


class _Refused(Exception):
    """An answer other than 200: status, the hub's code for it, a message, headers."""

    def __init__(self, status: int, code: str, message: str, *, url: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, "url": url}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


class _Handler(BaseHTTPRequestHandler):
    """One request: the first route whose pattern fits its method and path answers it."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub
    routes: tuple[tuple[str, str, str], ...] = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/([0-9a-f]{64})", "put"),
        ("POST", r"/objects/([0-9a-f]{64})/verify", "verify"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for methods, pattern, name in self.routes:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods.split("|"):
                    if self.command == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}":
                        raise _Refused(401, "Unauthorized", "Invalid username or password.")
                    self.send(200, *getattr(self, f"do_{name}")(body, *found.groups()))
                    return
            raise _Refused(404, "NotFound", f"{self.command} {path} is not part of this hub")
        except _Refused as refusal:
            self.send(refusal.status, refusal.body, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(206 if "Content-Range" in headers else status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(payload))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: `LocalHub.requests` has it."""

    def files(self, repo: str, revision: str | None) -> Path:
        if not (self.hub.repos / repo).is_dir():
            raise _Refused(404, "RepoNotFound", "Repository not found")
        folder = self.hub.head(repo) if revision in (None, "main") else self.hub.repos / repo / str(revision)
        if not folder.is_dir():
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return folder

    def do_create(self, body: bytes) -> tuple[Any, dict[str, str]]:
        asked = json.loads(body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        if not self.hub.create(repo):
            raise _Refused(409, "Conflict", "You already created this model repo", url=url)
        return {"url": url, "name": repo}, {}

    def do_validate(self, body: bytes) -> tuple[Any, dict[str, str]]:
        return {"errors": [], "warnings": []}, {}

    def do_preupload(self, body: bytes, repo: str, revision: str) -> tuple[Any, dict[str, str]]:
        folder = self.files(repo, revision)
        rows = []
        for file in json.loads(body)["files"]:
            stored = folder / file["path"]
            mode = "lfs" if _is_large(file["path"]) else "regular"
            oid = _etag(stored) if stored.is_file() else None
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": rows, "commitOid": folder.name}, {}

    def do_batch(self, body: bytes, repo: str) -> tuple[Any, dict[str, str]]:
        self.files(repo, "main")
        rows = []
        for row in json.loads(body)["objects"]:
            href = f"{self.hub.endpoint}/objects/{row['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            stored = (self.hub.objects / row["oid"]).is_file()
            rows.append({"oid": row["oid"], "size": row["size"], **({} if stored else {"actions": actions})})
        return {"transfer": "basic", "objects": rows}, {"Content-Type": "application/vnd.git-lfs+json"}

    def do_put(self, body: bytes, oid: str) -> tuple[Any, dict[str, str]]:
        (self.hub.objects / oid).write_bytes(body)
        return b"", {}

    def do_verify(self, body: bytes, oid: str) -> tuple[Any, dict[str, str]]:
        stored = self.hub.objects / oid
        if not stored.is_file() or _sha256(stored) != oid or stored.stat().st_size != json.loads(body)["size"]:
            raise _Refused(422, "BadObject", f"{oid} did not arrive whole")
        return {}, {}

    def do_commit(self, body: bytes, repo: str, revision: str) -> tuple[Any, dict[str, str]]:
        self.files(repo, revision)
        operations = [json.loads(line) for line in body.splitlines()]

        def change(draft: Path) -> None:
            for operation in operations:
                key, value = operation["key"], operation["value"]
                if key == "header":
                    continue
                target = draft / value["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                if key == "file":
                    target.write_bytes(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    shutil.copyfile(self.hub.objects / value["oid"], target)
                else:
                    raise _Refused(400, "BadRequest", f"{key} is not part of this hub")

        commit = self.hub.commit(repo, change)
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit}", "commitOid": commit}, {}

    def do_info(self, body: bytes, repo: str, revision: str | None) -> tuple[Any, dict[str, str]]:
        folder = self.files(repo, revision)
        siblings = [{"rfilename": name} for name, _ in _files(folder)]
        return {"id": repo, "sha": folder.name, "siblings": siblings, "private": False, "tags": []}, {}

    def do_tree(self, body: bytes, repo: str, revision: str, under: str | None) -> tuple[Any, dict[str, str]]:
        folder = self.files(repo, revision)
        rows: list[dict[str, Any]] = []
        for name, file in _files(folder):
            if under and not name.startswith(f"{under}/"):
                continue
            size = file.stat().st_size
            lfs = {"lfs": {"oid": _sha256(file), "size": size, "pointerSize": 130}} if _is_large(name) else {}
            rows.append({"type": "file", "path": name, "size": size, "oid": _blob(file), **lfs})
        return rows, {}

    def do_resolve(self, body: bytes, repo: str, revision: str, name: str) -> tuple[Any, dict[str, str]]:
        folder = self.files(repo, revision)
        if repo in self.hub.gated:
            raise _Refused(403, "GatedRepo", f"Access to model {repo} is restricted")
        commit = {"X-Repo-Commit": folder.name}
        file = folder / name
        if not file.is_file():
            raise _Refused(404, "EntryNotFound", "Entry not found", **commit)
        content = file.read_bytes()
        headers = {**commit, "ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes", "Content-Type": "text/plain"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        return content, headers


def _handler_of(hub: LocalHub) -> type[_Handler]:
    return type("Handler", (_Handler,), {"hub": hub})
