"""Other ways to say what a user says: lists of texts, and the text of a turn changed for one of them."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticCustomError

from mmpeft.config.augment import paraphrase_table
from mmpeft.core.errors import DataError
from mmpeft.data.types import BOX_PLACEHOLDER, PLACEHOLDERS

_MARK = "|".join(re.escape(mark) for mark in PLACEHOLDERS.values())
_FRAMED = re.compile(rf"(?P<before>(?:\s|{_MARK})*)(?P<said>.*?)(?P<after>(?:\s|{_MARK})*)", re.DOTALL)


def read_paraphrases(path: Path) -> dict[str, tuple[str, ...]]:
    """The table of a YAML or JSON file: texts with lists of alternatives, or lists of texts that mean the same.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        value: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid YAML or JSON: {error}") from error
    try:
        return paraphrase_table(value)
    except PydanticCustomError as error:
        raise DataError(f"{path}: {error.message()}") from None


def check_placeholders(table: Mapping[str, tuple[str, ...]]) -> None:
    """Make sure that a text and what takes its place hold the same placeholders.

    Raises:
        DataError: they do not.
    """
    for text, options in table.items():
        for option in options:
            for mark in (*PLACEHOLDERS.values(), BOX_PLACEHOLDER):
                if text.count(mark) != option.count(mark):
                    raise DataError(
                        f"augment.paraphrase: {text!r} holds {text.count(mark)} {mark} and its alternative {option!r} "
                        f"{option.count(mark)}; write as many"
                    )


def paraphrased(text: str, table: Mapping[str, tuple[str, ...]], choose: Callable[[int], int]) -> str:
    """A turn's text, said as one of its alternatives; placeholders and white space around it stay where they are.

    Args:
        table: as `paraphrase_table` makes it; a text that it does not have stays.
        choose: given the number of alternatives, says which, from 0.
    """
    if text.strip() in table:
        options = table[text.strip()]
        return text.replace(text.strip(), options[choose(len(options))])
    found = _FRAMED.fullmatch(text)
    if found is None or found["said"] not in table:
        return text
    options = table[found["said"]]
    return found["before"] + options[choose(len(options))] + found["after"]
