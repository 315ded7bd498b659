"""Our own files as they read on any machine: no absolute path, the base model by its name on the Hub."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

REWRITTEN = frozenset(
    {
        "adapter_config.json",
        "config.json",
        "evaluation.json",
        "mmpeft.json",
        "parity.json",
        "processor_config.json",
        "recipe.yaml",
        "tokenizer_config.json",
    }
)
"""Files whose paths are rewritten; any other that holds one is refused."""

_SNAPSHOT = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/[0-9a-f]+/?")
"""A repository of the Hub, as its cache lies on disk."""


def cached_id(path: str) -> str | None:
    """`owner/name` of a path into the Hub's cache."""
    found = _SNAPSHOT.fullmatch(path)
    return f"{found['owner']}/{found['name']}" if found else None


class Portable:
    """Rewrites paths of this machine.

    /srv/me/project/data/train.json    below a root: data/train.json
    /mnt/disk/base                     a name given for it: me/base
    .../models--o--n/snapshots/abc     the Hub's cache: o/n
    /elsewhere/pictures                its last part: pictures
    """

    def __init__(self, *, roots: Sequence[Path], names: Mapping[str, str]) -> None:
        self._roots = sorted({str(root).rstrip("/") for root in roots if len(root.parts) > 1}, key=len, reverse=True)
        self._names = {path.rstrip("/"): name for path, name in names.items()}

    def text(self, value: str) -> str:
        """One string, which may be a path or hold some."""
        plain = value.rstrip("/")
        if plain in self._names:
            return self._names[plain]
        if "\n" not in value and _is_absolute(value):
            below = next((root for root in self._roots if plain == root or plain.startswith(f"{root}/")), None)
            if found := cached_id(plain):
                return found
            if below is not None:
                return plain[len(below) + 1 :] or "."
            return PureWindowsPath(plain).name if "\\" in plain else PurePosixPath(plain).name
        for path, name in self._names.items():
            value = re.sub(rf"{re.escape(path)}(?![\w.-])", name, value)
        for root in self._roots:
            value = value.replace(f"{root}/", "")
        return value

    def value(self, value: Any) -> Any:
        """Every string in a plain value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(entry) for entry in value]
        return value

    def file(self, path: Path) -> bytes | None:
        """The new content of one of our files; None where it stays as it is."""
        if path.name not in REWRITTEN:
            return None
        text = path.read_text(encoding="utf-8")
        before = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        after = self.value(before)
        if after == before:
            return None
        if path.suffix == ".yaml":
            return str(yaml.safe_dump(after, sort_keys=False, allow_unicode=True)).encode()
        return (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()


def _is_absolute(text: str) -> bool:
    if text.startswith("/"):
        parts = PurePosixPath(text).parts
        # An answer such as "/yes/no" is none: its first folder is not there.
        return len(parts) > 2 and Path(*parts[:2]).exists()
    return bool(re.match(r"[A-Za-z]:[\\/]", text)) and PureWindowsPath(text).is_absolute()


def project_root(values: Sequence[str]) -> Path | None:
    """The folder that the absolute paths of a recipe have in common; None where there is none but `/` or a home."""
    folders = [PurePosixPath(value).parent for value in values if value.startswith("/")]
    if not folders:
        return None
    common = folders[0]
    while not all(folder.is_relative_to(common) for folder in folders):
        common = common.parent
    found = Path(common)
    return None if len(found.parts) < 3 else found
