r"""LLaVA's and ShareGPT's rows: `id`, `image`, `conversations` (LLaMA-Factory's `sharegpt` too).

    {"id": "0", "image": "a.png", "kind": "digit",
     "conversations": [{"from": "human", "value": "<image>\nWhich digit is it?"},
                       {"from": "gpt", "value": "7"}]}

`image` (or `images`) is one path or a list of them. Every picture has its `<image>` in a human turn, in
order; only where a sample has exactly one picture and no `<image>` at all is the picture put before the first
human turn's text. `video` and `<video>`, `audio` and `<audio>` are the same for films and recordings, `boxes` and
`<box>` for boxes and points (see mmpeft.data.layouts.objects). `from` may also say `user` or `assistant`. `id`,
`kind` and `system` may be absent.
"""

from collections.abc import Mapping
from typing import Any

from mmpeft.config.names import did_you_mean, nearest
from mmpeft.data.layouts.base import Layout, Options, Tags
from mmpeft.data.layouts.objects import KEYS as BOX_KEYS
from mmpeft.data.layouts.objects import boxes_of
from mmpeft.data.rows import (
    MEDIA_KEYS,
    MEDIA_ROW_KEYS,
    Draft,
    UnusableError,
    check_count,
    kind_of,
    media_of,
    text_of,
    with_system,
)
from mmpeft.data.types import WORDS, Role, Turn

ROLES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
SPEAKERS: Mapping[Role, str] = {"user": "human", "assistant": "gpt", "system": "system"}
KEYS = ("id", *MEDIA_ROW_KEYS, *BOX_KEYS, "conversations", "system", "kind")


def draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of `conversations`.

    Raises:
        UnusableError: the row is none.
    """
    media = media_of(row)
    held = f"{_held(row)}, but " if any(media.values()) else ""
    turns = with_system(row, _turns(row, held, options.tags))
    own = options.tags.roles
    speakers: dict[Role, str] = {role: own.get(role, name) for role, name in SPEAKERS.items()}
    return Draft(
        id=row.get("id"), kind=row.get("kind"), turns=turns, media=media, boxes=boxes_of(row), speakers=speakers
    )


def _held(row: Mapping[str, Any]) -> str:
    """The first medium of a row, for a message."""
    return next(f"a {WORDS[name]}" for name, keys in MEDIA_KEYS.items() if any(row.get(key) for key in keys))


def _turns(row: Mapping[str, Any], held: str, tags: Tags) -> tuple[Turn, ...]:
    if row.get("conversations") is None:
        close = nearest("conversations", [key for key in row if key not in KEYS])
        hint = f"; did you mean `conversations` by `{close[0]}`?" if close else "; add human and gpt turns"
        raise UnusableError(f"{held}no `conversations`{hint}")
    conversations = row["conversations"]
    if not isinstance(conversations, list):
        raise UnusableError(f"`conversations` is {kind_of(conversations)}; expected a list of turns")
    if not conversations:
        raise UnusableError(f"{held}an empty conversation; expected at least a human turn and a gpt turn")
    check_count(conversations)
    return tuple(_turn(item, number, tags) for number, item in enumerate(conversations))


def _turn(item: Any, number: int, tags: Tags) -> Turn:
    expected = f"`{tags.speaker}` and `{tags.text}`"
    if not isinstance(item, dict):
        raise UnusableError(f"turn {number} is {kind_of(item)}; expected an object with {expected}")
    for key in (tags.speaker, tags.text):
        if key not in item:
            keys = ", ".join(f"`{key}`" for key in item) or "none"
            raise UnusableError(f"turn {number} has no `{key}` (its keys: {keys}); expected {expected}")
    speaker, value = text_of(item[tags.speaker], f"`{tags.speaker}` of turn {number}"), item[tags.text]
    roles: Mapping[str, Role] = {name: role for role, name in tags.roles.items()} or ROLES
    if speaker not in roles:
        raise UnusableError(f"turn {number} is from {speaker!r}{did_you_mean(speaker, roles)}")
    value = text_of(value, f"the text of turn {number}")
    if not value.strip():
        raise UnusableError(f"turn {number} (from {speaker}) has an empty text; write it, or leave the sample out")
    return Turn(role=roles[speaker], text=value)


LLAVA = Layout(name="LLaVA/ShareGPT", needs={"conversations": ("conversations",)}, keys=KEYS, draft=draft)
