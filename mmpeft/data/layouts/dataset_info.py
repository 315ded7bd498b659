"""LLaMA-Factory's `dataset_info.json`: what it says of the data file beside it.

    {"receipts": {"file_name": "receipts.json", "formatting": "sharegpt",
                  "columns": {"messages": "chat", "images": "pictures"},
                  "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"}}}

Its names are mapped to ours (`conversations`, `instruction`, `images` …), so that the layouts need not know it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.data.layouts.alpaca import ALPACA
from mmpeft.data.layouts.base import Layout, Tags
from mmpeft.data.layouts.llava import LLAVA

NAME = "dataset_info.json"
MAX_BYTES = 16 << 20

_MEDIA = {"images": "images", "videos": "videos", "audios": "audios", "system": "system"}
_SHAREGPT = {"messages": "conversations", **_MEDIA}
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "history": "history", **_MEDIA}


@dataclass(frozen=True, kw_only=True)
class Described:
    """What `dataset_info.json` says of a file.

    Attributes:
        name: the entry's name.
        layout: the layout that it names.
        columns: the file's own keys by ours.
        tags: names inside a conversation.
    """

    name: str
    layout: Layout
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Tags = field(default_factory=Tags)


def described_by_info(path: Path) -> Described | None:
    """What the `dataset_info.json` beside a data file says of it; None if there is none, or it does not name it.

    Raises:
        DataError: it names the file and cannot be followed.
    """
    info = path.parent / NAME
    if path.name == NAME or not info.is_file() or info.stat().st_size > MAX_BYTES:
        return None
    try:
        entries = json.loads(info.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{info}: cannot be read ({error}); correct it, or move it away from {path.name}") from error
    if not isinstance(entries, dict):
        return None
    named = [(name, entry) for name, entry in entries.items() if _names(entry, path.name)]
    if not named:
        return None
    name, entry = named[0]
    if len({json.dumps(entry, sort_keys=True) for _, entry in named}) > 1:
        names = ", ".join(name for name, _ in named)
        raise DataError(f"{info}: {names} all describe {path.name}, and differ; keep one, or give `columns`")
    return _described(name, entry, info)


def _names(entry: Any, file_name: str) -> bool:
    return isinstance(entry, dict) and entry.get("file_name") == file_name


def _described(name: str, entry: Mapping[str, Any], info: Path) -> Described:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise DataError(f"{info}: {name} has the formatting {formatting!r}; expected alpaca or sharegpt")
    if entry.get("ranking") is True:
        raise DataError(f"{info}: {name} is preference data (ranking), which is not trained on; use another file")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    for what, value in (("columns", columns), ("tags", tags)):
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise DataError(f"{info}: {name}: `{what}` is no map of names to names; correct it")
    sharegpt = formatting == "sharegpt"
    ours = _SHAREGPT if sharegpt else _ALPACA
    return Described(
        name=name,
        layout=LLAVA if sharegpt else ALPACA,
        columns={ours[key]: value for key, value in columns.items() if key in ours},
        tags=Tags(
            speaker=tags.get("role_tag", "from"),
            text=tags.get("content_tag", "value"),
            roles={
                "user": tags.get("user_tag", "human"),
                "assistant": tags.get("assistant_tag", "gpt"),
                "system": tags.get("system_tag", "system"),
            },
        ),
    )
