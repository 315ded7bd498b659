"""The part of the Hub's HTTP interface that pushing and loading models uses."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tests.hub.cards import problems
from tests.hub.store import NAMESPACES, ROLES, Store, blob_id, etag, files_of, is_large, sha256

REPO = "/{owner}/{name}"


class Refused(Exception):
    """An answer other than 200: status, the hub's code for it, a message, headers."""

    def __init__(self, status: int, code: str, message: str, *, url: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, "url": url}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


def hub_app(store: Store, drop: Callable[[Any], None]) -> Any:
    """The application; `drop` breaks the connection that a scope came by."""
    app = FastAPI(openapi_url=None)
    app.state.store = store
    app.include_router(router)

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    async def with_faults(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        fault = store.asked(scope["method"], scope["path"])
        if fault is None:
            return await app(scope, receive, send)
        if fault.carried_out:
            await app(scope, receive, _nowhere)
        if fault.status is not None:
            while (await receive()).get("more_body"):
                pass
            return await JSONResponse(fault.body, fault.status, fault.headers)(scope, receive, send)
        if not fault.carried_out:
            await receive()
        drop(scope)
        await asyncio.sleep(0.05)

    return with_faults


async def _nowhere(_: Any) -> None:
    """Where an answer goes that is lost."""


router = APIRouter()


def _store(request: Request) -> Store:
    return request.app.state.store


def _role(request: Request) -> str | None:
    """What the token of a request may do; None without one.

    Raises:
        Refused: there is no such token.
    """
    given = request.headers.get("authorization")
    if given is None:
        return None
    role = ROLES.get(given.removeprefix("Bearer "))
    if role is None:
        raise Refused(401, "Unauthorized", "Invalid username or password.")
    return role


def _may_write(request: Request, owner: str) -> None:
    role = _role(request)
    if role is None:
        raise Refused(401, "Unauthorized", "Invalid username or password.")
    if role != "write" or owner not in NAMESPACES:
        raise Refused(403, "Forbidden", f"You don't have the rights to write under the namespace {owner!r}")


def _files(request: Request, repo: str, revision: str | None) -> Path:
    store = _store(request)
    role = _role(request)
    if not (store.repos / repo).is_dir() or (store.is_private(repo) and role is None):
        raise Refused(404, "RepoNotFound", "Repository not found")
    folder = store.head(repo) if revision in (None, "main") else store.repos / repo / str(revision)
    if not folder.is_dir():
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return folder


def _endpoint(request: Request) -> str:
    return str(request.base_url).rstrip("/")


@router.get("/api/whoami-v2")
async def whoami(request: Request) -> Any:
    role = _role(request)
    if role is None:
        raise Refused(401, "Unauthorized", "Invalid username or password.")
    orgs = [{"name": name, "type": "org"} for name in NAMESPACES[1:]]
    return {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": {"role": role}}}


@router.post("/api/repos/create")
async def create(request: Request) -> Any:
    asked = await request.json()
    owner = asked.get("organization") or "me"
    repo = f"{owner}/{asked['name']}"
    _may_write(request, owner)
    url = f"{_endpoint(request)}/{repo}"
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    if not _store(request).create(repo, private=private):
        raise Refused(409, "Conflict", "You already created this model repo", url=url)
    return {"url": url, "name": repo}


@router.post("/api/validate-yaml")
async def validate(request: Request) -> Any:
    errors, warnings = problems((await request.json())["content"])
    body = {kind: [{"message": text} for text in said] for kind, said in (("errors", errors), ("warnings", warnings))}
    return JSONResponse(body, 400 if errors else 200)


@router.post("/api/models" + REPO + "/preupload/{revision}")
async def preupload(request: Request, owner: str, name: str, revision: str) -> Any:
    _may_write(request, owner)
    folder = _files(request, f"{owner}/{name}", revision)
    rows = []
    for file in (await request.json())["files"]:
        stored = folder / file["path"]
        mode = "lfs" if is_large(file["path"]) else "regular"
        oid = etag(stored) if stored.is_file() else None
        rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": rows, "commitOid": folder.name}


@router.post(REPO + ".git/info/lfs/objects/batch")
async def batch(request: Request, owner: str, name: str) -> Any:
    _may_write(request, owner)
    _files(request, f"{owner}/{name}", "main")
    rows = []
    for row in (await request.json())["objects"]:
        href = f"{_endpoint(request)}/objects/{row['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        stored = (_store(request).objects / row["oid"]).is_file()
        rows.append({"oid": row["oid"], "size": row["size"], **({} if stored else {"actions": actions})})
    return JSONResponse({"transfer": "basic", "objects": rows}, media_type="application/vnd.git-lfs+json")


@router.put("/objects/{oid}")
async def put(request: Request, oid: str) -> Response:
    store = _store(request)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=store.objects, prefix=".", delete=False) as file:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != oid:
        Path(file.name).unlink()
        raise Refused(400, "BadDigest", f"{oid} did not arrive whole")
    Path(file.name).rename(store.objects / oid)
    store.put.append(oid)
    return Response()


@router.post("/objects/{oid}/verify")
async def verify(request: Request, oid: str) -> Any:
    stored = _store(request).objects / oid
    if not stored.is_file() or stored.stat().st_size != (await request.json())["size"]:
        raise Refused(422, "BadObject", f"{oid} did not arrive whole")
    return {}


@router.post("/api/models" + REPO + "/commit/{revision}")
async def commit(request: Request, owner: str, name: str, revision: str) -> Any:
    _may_write(request, owner)
    repo, store = f"{owner}/{name}", _store(request)
    head = _files(request, repo, revision)
    operations = [json.loads(line) for line in (await request.body()).splitlines()]
    parent = operations[0]["value"].get("parentCommit")
    if parent and parent != head.name:
        raise Refused(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")

    def change(draft: Path) -> None:
        for operation in operations[1:]:
            key, value = operation["key"], operation["value"]
            target = draft / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if key == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                shutil.copyfile(store.objects / value["oid"], target)
            elif key == "deletedFile":
                target.unlink()
            else:
                raise Refused(400, "BadRequest", f"{key} is not part of this hub")

    made = store.commit(repo, change)
    return {"commitUrl": f"{_endpoint(request)}/{repo}/commit/{made}", "commitOid": made}


@router.get("/api/models" + REPO)
@router.get("/api/models" + REPO + "/revision/{revision}")
async def info(request: Request, owner: str, name: str, revision: str | None = None) -> Any:
    repo = f"{owner}/{name}"
    folder = _files(request, repo, revision)
    siblings = [{"rfilename": file} for file, _ in files_of(folder)]
    private = _store(request).is_private(repo)
    return {"id": repo, "sha": folder.name, "siblings": siblings, "private": private, "tags": []}


@router.get("/api/models" + REPO + "/tree/{revision}")
@router.get("/api/models" + REPO + "/tree/{revision}/{under:path}")
async def tree(request: Request, owner: str, name: str, revision: str, under: str = "") -> Any:
    rows: list[dict[str, Any]] = []
    for path, file in files_of(_files(request, f"{owner}/{name}", revision)):
        if under and not path.startswith(f"{under}/"):
            continue
        size = file.stat().st_size
        lfs = {"lfs": {"oid": sha256(file), "size": size, "pointerSize": 130}} if is_large(path) else {}
        rows.append({"type": "file", "path": path, "size": size, "oid": blob_id(file), **lfs})
    return rows


@router.api_route(REPO + "/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
async def resolve(request: Request, owner: str, name: str, revision: str, path: str) -> Response:
    repo = f"{owner}/{name}"
    folder = _files(request, repo, revision)
    if repo in _store(request).gated:
        raise Refused(403, "GatedRepo", f"Access to model {repo} is restricted")
    headers = {"X-Repo-Commit": folder.name}
    file = folder / path
    if not file.is_file():
        raise Refused(404, "EntryNotFound", "Entry not found", **headers)
    content, status = file.read_bytes(), 200
    headers |= {"ETag": f'"{etag(file)}"', "Accept-Ranges": "bytes"}
    if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range") or ""):
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        content, status = content[start : end + 1], 206
    return Response(content, status, headers, media_type="text/plain")


@router.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
async def other(request: Request, path: str) -> None:
    raise Refused(404, "NotFound", f"{request.method} /{path} is not part of this hub")
