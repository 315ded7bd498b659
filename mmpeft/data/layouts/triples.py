r"""A picture (video, recording), a question and an answer in a row; or a medium and what is said of it.

    image,question,answer            {"file_name": "a.png", "text": "a cat"}
    a.png,Which digit?,7             -> user "<image>\nDescribe the picture.", assistant "a cat"

The columns go by several names (`COLUMNS`). Of a list of answers the most frequent is taken, the first among
equals.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.layouts.base import Layout, Options
from mmpeft.data.rows import Draft, UnusableError, kind_of, paths_of, said
from mmpeft.data.suffixes import modality_of
from mmpeft.data.types import PLACEHOLDERS, WORDS, Turn

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "questionId"),
    "kind": ("kind",),
    "image": ("image", "images", "image_path", "image_file", "img", "picture"),
    "video": ("video", "videos", "video_path"),
    "audio": ("audio", "audios", "audio_path"),
    "file": ("file_name",),
    "question": ("question", "query", "prompt", "problem"),
    "answer": ("answer", "answers", "multiple_choice_answer", "response", "label", "target", "solution"),
    "caption": ("caption", "text", "captions", "label"),
}
"""What each column may be called, our own name first: where it is there, the others are not looked at."""

_MEDIA = ("image", "video", "audio", "file")
_MEDIA_NAMES = tuple(name for what in _MEDIA for name in COLUMNS[what])


def column(row: Mapping[str, Any], what: str) -> str | None:
    """The row's own name for one of `COLUMNS`; None if it has none.

    Raises:
        UnusableError: several of its columns could be meant.
    """
    found = [name for name in COLUMNS[what] if row.get(name) is not None]
    if len(found) > 1 and found[0] != COLUMNS[what][0]:
        raise UnusableError(
            f"the columns {' and '.join(f'`{name}`' for name in found)} could both be the {what}; say which: "
            f"columns: {{{what}: {found[0]}}}"
        )
    return found[0] if found else None


def triple_draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of question and answer, with or without a medium.

    Raises:
        UnusableError: the row is none.
    """
    turns = (
        Turn(role="user", text=said(_needed(row, "question"), "the question")),
        Turn(role="assistant", text=said(_answer(_needed(row, "answer")), "the answer")),
    )
    return _draft(row, turns, _media(row))


def caption_draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of a medium and what is said of it.

    Raises:
        UnusableError: the row is none.
    """
    media = _media(row)
    marks = "".join(PLACEHOLDERS[modality] * len(paths) for modality, paths in media.items())
    if not marks:
        raise UnusableError(f"no picture; expected it under one of {', '.join(_MEDIA_NAMES)}")
    first = next(modality for modality, paths in media.items() if paths)
    asked = f"What is in the {WORDS[first]}?" if column(row, "caption") == "label" else f"Describe the {WORDS[first]}."
    question = options.question or asked
    turns = (
        Turn(role="user", text=f"{marks}\n{question}"),
        Turn(role="assistant", text=said(_answer(_needed(row, "caption")), "the caption")),
    )
    return _draft(row, turns, media)


def _needed(row: Mapping[str, Any], what: str) -> Any:
    name = column(row, what)
    if name is None:
        raise UnusableError(f"no {what}; expected it under one of {', '.join(COLUMNS[what])}")
    return row[name]


def _answer(value: Any) -> Any:
    """One answer of those that a data set gives; numbers as text."""
    if isinstance(value, list):
        if not value:
            raise UnusableError("an empty list of answers; write an answer, or leave the sample out")
        answers = [_answer(item["answer"] if isinstance(item, dict) and "answer" in item else item) for item in value]
        if not all(isinstance(item, str) for item in answers):
            raise UnusableError(f"a list of answers holds {kind_of(value[0])}; expected strings")
        return Counter(answers).most_common(1)[0][0]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _media(row: Mapping[str, Any]) -> dict[Modality, tuple[str, ...]]:
    media: dict[Modality, tuple[str, ...]] = {}
    for modality in MODALITIES:
        name = column(row, modality)
        media[modality] = paths_of(row[name], name, modality) if name else ()
    file = column(row, "file")
    if file and not any(media.values()):
        for path in paths_of(row[file], file):
            found = modality_of(path)
            if found is None:
                raise UnusableError(f"`{file}` is {path!r}, whose ending tells of no picture, video or recording")
            media[found] = (*media[found], path)
    return media


def _draft(row: Mapping[str, Any], turns: tuple[Turn, ...], media: Mapping[Modality, tuple[str, ...]]) -> Draft:
    identity, kind = column(row, "id"), column(row, "kind")
    return Draft(
        id=row[identity] if identity else None,
        kind=row[kind] if kind else None,
        turns=turns,
        media=media,
    )


_KEPT = (*COLUMNS["id"], *COLUMNS["kind"], *_MEDIA_NAMES)

TRIPLES = Layout(
    name="question and answer columns",
    needs={"question": COLUMNS["question"], "answer": COLUMNS["answer"]},
    keys=(*_KEPT, *COLUMNS["question"], *COLUMNS["answer"]),
    draft=triple_draft,
)
CAPTIONS = Layout(
    name="a medium and its caption",
    needs={"picture": _MEDIA_NAMES, "caption": COLUMNS["caption"]},
    keys=(*_KEPT, *COLUMNS["caption"]),
    draft=caption_draft,
)
