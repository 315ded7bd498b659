"""Sending files to the Hub: one commit that holds all of them, tried again where the network or the Hub fails."""

import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import httpx, validate_repo_id

from mmpeft.core.errors import HubError
from mmpeft.core.files import read_json
from mmpeft.core.hashing import hash_bytes, hash_file

logger = logging.getLogger(__name__)

MANIFEST = "mmpeft_files.json"
"""What a push wrote: `{"files": {name: {"size", "sha256"}}}`. The next one removes what it does not write again."""

ATTEMPTS = 6
LONGEST_WAIT = 60.0
"""Seconds."""

_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""Answers that a later attempt may not meet again; 409 and 412 of a commit: another one came between."""

Sent = Path | bytes
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was sent.

    Attributes:
        created: whether the repository is new.
        private: whether only its owners see it.
        removed: names of files of an earlier push that are not part of this one.
    """

    repo: str
    url: str
    commit: str
    created: bool
    private: bool
    removed: Sequence[str]


def check_repo(repo: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        HubError: says what is wrong with it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(f"{repo!r} is no name of a repository ({error}); expected OWNER/NAME") from error
    if repo.count("/") != 1:
        raise HubError(f"{repo!r} is no name of a repository; expected OWNER/NAME")


def check_login(repo: str) -> None:
    """Refuse to begin what could not be pushed: no token, or one that may not write.

    Raises:
        HubError: says which, and what to do.
    """
    check_repo(repo)
    found = _persistently(lambda: HfApi().whoami(), repo)
    role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(_no_permission(repo))


def manifest(files: Mapping[str, Sent]) -> bytes:
    """Content of the manifest of these files."""
    rows = {
        name: {"size": size_of(source), "sha256": hash_file(source) if isinstance(source, Path) else hash_bytes(source)}
        for name, source in sorted(files.items())
    }
    return (json.dumps({"files": rows}, indent=2, ensure_ascii=False) + "\n").encode()


def size_of(source: Sent) -> int:
    """Bytes of a file."""
    return source.stat().st_size if isinstance(source, Path) else len(source)


def send(files: Mapping[str, Sent], repo: str, *, private: bool, message: str) -> Pushed:
    """Put all files into the newest commit of `repo`; it has them all, or none of them.

    Large files go first, and do not show until the commit names them; those that the Hub has already are not sent
    again, so a push that broke off goes on where it stopped.

    Args:
        private: of a repository that does not exist yet; that of one that does stays as it is.

    Raises:
        HubError: not logged in, no permission, a card that is refused, or a Hub that fails in every attempt.
    """
    api = HfApi()
    files = {**files, MANIFEST: manifest(files)}
    created = not _persistently(lambda: api.repo_exists(repo), repo)
    _persistently(lambda: api.create_repo(repo, private=private, exist_ok=True), repo)

    def commit() -> tuple[Any, list[str]]:
        info = api.model_info(repo)
        removed = _outdated(api, repo, set(files))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(
                CommitOperationAdd(name, str(source) if isinstance(source, Path) else source)
                for name, source in files.items()
            ),
            *(CommitOperationDelete(name) for name in removed),
        ]
        return api.create_commit(repo, operations, commit_message=message, parent_commit=info.sha), removed

    made, removed = _persistently(commit, repo)
    return Pushed(
        repo=repo,
        url=f"{api.endpoint}/{repo}",
        commit=made.oid,
        created=created,
        private=bool(_persistently(lambda: api.model_info(repo), repo).private),
        removed=removed,
    )


def _outdated(api: HfApi, repo: str, names: set[str]) -> list[str]:
    """Files that an earlier push wrote and that are still there; others' files are left alone."""
    there = set(api.list_repo_files(repo))
    if MANIFEST not in there:
        return []
    file = Path(api.hf_hub_download(repo, MANIFEST))
    try:
        written = dict(read_json(file)["files"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s: its %s is damaged (%s), so no file of an earlier push is removed", repo, MANIFEST, error)
        return []
    return sorted((set(written) & there) - names)


def has_same_weights(repo: str, folder: Path) -> bool | None:
    """Whether the safetensors files of a repository are those of a directory; None where there is no repository.

    Raises:
        HubError: the Hub does not say.
    """
    api = HfApi()
    if not _persistently(lambda: api.repo_exists(repo), repo):
        return None
    rows = _persistently(lambda: list(api.list_repo_tree(repo, recursive=True)), repo)
    there = {row.path: row.lfs.sha256 for row in rows if isinstance(row, RepoFile) and row.lfs is not None}
    here = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    if {name for name in there if name.endswith(".safetensors")} != set(here):
        return False
    return all(there[name] == hash_file(file) for name, file in here.items())


def _persistently(action: Callable[[], T], repo: str) -> T:
    """The result of `action`, which may fail some times for reasons that pass.

    Raises:
        HubError: it fails for one that does not, or in every attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except (HfHubHTTPError, ValueError, OSError, RuntimeError, httpx.HTTPError) as error:
            cause = _cause(error)
            if not _passes(cause):
                raise _explained(cause, repo) from error
            if attempt == ATTEMPTS:
                raise HubError(
                    f"{repo}: the Hub did not take it in {ATTEMPTS} attempts ({_short(cause)}); nothing of it shows "
                    "there. Give the same command again later: large files that arrived are not sent again"
                ) from error
            wait = _wait(cause, attempt)
            logger.warning("%s: %s; attempt %d of %d in %.0f s", repo, _short(cause), attempt + 1, ATTEMPTS, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _cause(error: BaseException) -> BaseException:
    """The error of the request: that of an upload stands behind a RuntimeError."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in _PASSING
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # An error page in place of JSON, what a broken connection raises, and all that hf_xet does.
    return isinstance(
        error, json.JSONDecodeError | httpx.TransportError | ConnectionError | TimeoutError | RuntimeError
    )


def _wait(error: BaseException, attempt: int) -> float:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    if re.fullmatch(r"\d+", asked):
        return min(float(asked), LONGEST_WAIT)
    return min(2.0 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _short(error: BaseException) -> str:
    response = getattr(error, "response", None)
    text = " ".join(str(error).split())[:200]
    return f"answer {response.status_code}" if response is not None else f"{type(error).__name__}: {text}"


def _no_permission(repo: str) -> str:
    return (
        f"{repo}: this token may not write there; make one with the role `write` on huggingface.co/settings/tokens, "
        "and log in with it: `hf auth login`, or HF_TOKEN"
    )


def _explained(error: BaseException, repo: str) -> HubError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and get_token() is None):
        return HubError(f"{repo}: not logged in; `hf auth login`, or set HF_TOKEN to a token with the role `write`")
    if status == 403:
        return HubError(_no_permission(repo))
    if status == 401:
        return HubError(f"{repo}: the Hub does not know this token; log in again: `hf auth login`, or set HF_TOKEN")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"{repo}: there is no such repository, or this token does not see it")
    text = " ".join(str(error).split())[:600]
    if "Invalid metadata in README.md" in text:
        return HubError(f"{repo}: the Hub refuses the card, nothing was sent: {text}")
    if isinstance(error, OfflineModeIsEnabled):
        return HubError(f"{repo}: HF_HUB_OFFLINE is set; unset it to push")
    return HubError(f"{repo}: the Hub refuses: {text}")
