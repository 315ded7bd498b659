"""Rows of `messages` with `role` and `content`: OpenAI's chat format, and ms-swift's and LLaMA-Factory's.

    OpenAI     {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:…"}},
                                                          {"type": "text", "text": "Which digit?"}]}, …]}
    ms-swift   {"messages": [{"role": "user", "content": "<image>Which digit?"}, …], "images": ["a.png"],
                "objects": {"ref": ["the digit"], "bbox": [[1, 2, 30, 40]]}}

A content may be text or a list of parts in either; the parts become one text, a placeholder for each medium.
Media are paths, `file:` URLs (inside the media root) or `data:` URLs; nothing is fetched.
"""

from collections.abc import Mapping
from typing import Any

from mmpeft.config.names import did_you_mean
from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.layouts.base import Layout, Options
from mmpeft.data.layouts.objects import KEYS as BOX_KEYS
from mmpeft.data.layouts.objects import boxes_of, with_objects
from mmpeft.data.rows import MEDIA_ROW_KEYS, Draft, UnusableError, kind_of, media_of, text_of, with_system
from mmpeft.data.types import PLACEHOLDERS, Role, Turn

ROLES: Mapping[str, Role] = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
KEYS = ("id", "messages", *MEDIA_ROW_KEYS, *BOX_KEYS, "objects", "system", "kind")
PARTS: Mapping[str, Modality] = {
    "image_url": "image",
    "video_url": "video",
    "audio_url": "audio",
    "input_audio": "audio",
    "input_image": "image",
    "image": "image",
    "video": "video",
    "audio": "audio",
}
_TEXTS = ("text", "input_text", "output_text")
_WEIGHTS = ("loss", "loss_scale", "loss_weight", "weight")
_TOOLS = ("tool", "tool_call", "tool_response", "function", "observation")
_Found = dict[Modality, list[str]]


def draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of `messages`.

    Raises:
        UnusableError: the row is none.
    """
    if isinstance(row.get("label", row.get("kto_tag")), bool):
        raise UnusableError(
            "it rates its answer (`label`, for KTO), and every answer is trained on alike: keep the good ones alone, "
            "without the key"
        )
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise UnusableError(f"`messages` is {kind_of(messages)}; expected a list of messages")
    if not messages:
        raise UnusableError("an empty conversation; expected at least a user and an assistant message")
    inline: _Found = {modality: [] for modality in MODALITIES}
    turns = with_system(row, tuple(_turn(item, number, inline) for number, item in enumerate(messages)))
    listed = media_of(row)
    for modality in MODALITIES:
        if listed[modality] and inline[modality]:
            raise UnusableError(f"`{modality}s` and parts of the messages both name media; keep one of them")
    media = {modality: listed[modality] or tuple(inline[modality]) for modality in MODALITIES}
    own = boxes_of(row)
    turns, boxes = with_objects(turns, row.get("objects"))
    if own and boxes:
        raise UnusableError("both `boxes` and `objects` are given; keep one of them")
    return Draft(id=row.get("id"), kind=row.get("kind"), turns=turns, media=media, boxes=own or boxes)


def _turn(item: Any, number: int, media: _Found) -> Turn:
    if not isinstance(item, dict):
        raise UnusableError(f"message {number} is {kind_of(item)}; expected an object with `role` and `content`")
    for key in ("role", "content"):
        if key not in item:
            keys = ", ".join(f"`{key}`" for key in item) or "none"
            raise UnusableError(f"message {number} has no `{key}` (its keys: {keys}); expected `role` and `content`")
    role = text_of(item["role"], f"`role` of message {number}")
    if role in _TOOLS:
        raise UnusableError(f"message {number} is from {role!r}; tools are not trained on: leave the sample out")
    if role not in ROLES:
        raise UnusableError(f"message {number} is from {role!r}{did_you_mean(role, ROLES)}")
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            raise UnusableError(f"message {number} holds `{key}`; tools are not trained on: leave the sample out")
    for key in _WEIGHTS:
        if role == "assistant" and item.get(key) not in (None, True, 1):
            raise UnusableError(
                f"message {number} sets `{key}` to {item[key]!r}; every answer is trained on alike: remove the key, "
                "or leave the sample out"
            )
    content = item["content"]
    parts = content if isinstance(content, list) else [content]
    text = "".join(_part(part, number, media) for part in parts)
    if not text.strip():
        raise UnusableError(f"message {number} (from {role}) has an empty content; write it, or leave the sample out")
    return Turn(role=ROLES[role], text=text)


def _part(part: Any, number: int, media: _Found) -> str:
    what = f"the content of message {number}"
    if not isinstance(part, dict):
        return text_of(part, what)
    kind = part.get("type")
    if kind in _TEXTS:
        return text_of(part.get("text", part.get("value")), f"`text` in {what}")
    if not isinstance(kind, str) or kind not in PARTS:
        known = ("text", *PARTS)
        hint = did_you_mean(kind, known) if isinstance(kind, str) else f"; expected one of {', '.join(known)}"
        raise UnusableError(f"{what} holds a part of type {str(kind)[:40]!r}{hint}")
    reference = _reference(part, kind, number)
    if reference is not None:
        media[PARTS[kind]].append(reference)
    return PLACEHOLDERS[PARTS[kind]]


def _reference(part: Mapping[str, Any], kind: str, number: int) -> str | None:
    """Where a part's medium lies; None where the row's own list says it (`{"type": "image"}`)."""
    keys = (kind, "url", "path", "value", "source", "data")
    value = next((part[key] for key in keys if part.get(key) is not None), None)
    if value is None and kind in MODALITIES:
        return None
    what = f"`{kind}` of message {number}"
    if isinstance(value, dict) and "data" in value:
        data = text_of(value["data"], f"`data` of {what}")
        form = value.get("media_type") or f"{PARTS[kind]}/{value.get('format', 'wav')}"
        return f"data:{text_of(form, f'the format of {what}')};base64,{data}"
    url = value.get("url", value.get("path")) if isinstance(value, dict) else value
    return _local(text_of(url, f"the URL of {what}"), what)


def _local(url: str, what: str) -> str:
    if not url.strip():
        raise UnusableError(f"the URL of {what} is empty; write the medium's path, or remove the part")
    scheme, found, _ = url.partition("://")
    if found and scheme.isalnum() and scheme != "file":
        raise UnusableError(
            f"{what} is the {scheme} URL {url[:60]!r}, and URLs are off: download it and write its path"
        )
    return url


MESSAGES = Layout(
    name="chat messages (OpenAI, ms-swift, LLaMA-Factory)",
    needs={"messages": ("messages",)},
    keys=KEYS,
    draft=draft,
)
