"""A data file looked through from end to end, every picture decoded, without a model."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.core.hashing import hash_value
from mmpeft.data.formats import Row, read_rows, read_samples
from mmpeft.data.pictures import Picture, read_picture, with_pictures
from mmpeft.data.types import Sample

EXTREME_ASPECT_RATIO = 10
"""Long side by short side from which little of a picture is left when it is scaled to a square."""


@dataclass(kw_only=True)
class Report:
    """What `check_data` found.

    Attributes:
        samples: usable rows; `errors` counts the others.
        pictures: distinct pictures that were decoded.
        turns: human and gpt turns of the usable rows.
        kinds: usable rows by their `kind`; "" for those without.
        errors: what keeps samples, or the file, from being used, each with file and line.
        warnings: what can be used and may not be meant.
    """

    samples: int = 0
    pictures: int = 0
    turns: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_data(path: str | os.PathLike[str], media_root: str | os.PathLike[str] | None = None) -> Report:
    """Check every row of a data file and decode every picture.

    `media_root` is the folder that picture paths are relative to; default: the file's own. Nothing is raised
    for bad data: a file that cannot be read at all is an error of the report.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else path.parent
    report = Report()
    check = _Check(path, report)
    pictures: dict[str, Picture] = {}
    try:
        for window, known in with_pictures(read_rows(path), partial(read_picture, "decode", root)):
            pictures = known
            for row in window:
                check.row(row, pictures)
    except DataError as error:
        report.errors.append(str(error))
    check.finish(pictures)
    return report


class _Check:
    """Gathers a report row by row."""

    def __init__(self, path: Path, report: Report) -> None:
        self.path, self.report = path, report
        self.ids: dict[str, Sample] = {}
        self.conversations: dict[str, Sample] = {}
        self.kinds: Counter[str] = Counter()
        self.ignored: dict[str, int] = {}

    def row(self, row: Row, pictures: dict[str, Picture]) -> None:
        place = row.sample or row.problem
        for key in row.ignored:
            self.ignored.setdefault(key, place.line if place else 0)
        if row.problem:
            self.report.errors.append(row.problem.located(self.path))
        if row.sample:
            self._sample(row.sample, pictures)

    def _sample(self, sample: Sample, pictures: dict[str, Picture]) -> None:
        where = f"{self.path}:{sample.line}: sample {sample.index} (id {sample.id!r})"
        unreadable = [found for name in sample.images if isinstance(found := pictures[name], str)]
        if unreadable:
            self.report.errors.append(f"{where}: {'; '.join(unreadable)}")
            return
        self.report.samples += 1
        self.report.turns += sum(turn.role != "system" for turn in sample.turns)
        self.kinds[sample.kind] += 1
        first = self.ids.setdefault(sample.id, sample)
        if first is not sample:
            self.report.warnings.append(f"{where}: the same id as {_place(first)}")
        said = hash_value([[turn.role, turn.text] for turn in sample.turns] + list(sample.images))
        first = self.conversations.setdefault(said, sample)
        if first is not sample:
            self.report.warnings.append(f"{where}: the same pictures and conversation as {_place(first)}")
        for number, turn in enumerate(sample.turns):
            if turn.role == "assistant" and turn.text != turn.text.strip():
                self.report.warnings.append(f"{where}: the answer of turn {number} begins or ends with white space")

    def finish(self, pictures: dict[str, Picture]) -> None:
        report = self.report
        report.kinds = dict(sorted(self.kinds.items()))
        sizes = {name: found for name, found in pictures.items() if not isinstance(found, str)}
        report.pictures = len(sizes)
        for name, (width, height) in sizes.items():
            if max(width, height) > EXTREME_ASPECT_RATIO * min(width, height):
                report.warnings.append(f"{self.path}: picture {name!r} is {width} x {height}, an extreme shape")
        for key, line in self.ignored.items():
            report.warnings.append(f"{self.path}:{line}: the key {key!r} is not known and not used (here first)")
        if not report.samples and not report.errors:
            report.errors.append(f"{self.path}: holds no sample")


def _place(sample: Sample) -> str:
    return f"sample {sample.index} in line {sample.line}"


def describe_samples(
    path: str | os.PathLike[str], media_root: str | os.PathLike[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The samples of a data file as plain values, each picture with its size, or with why it is not readable.

    Raises:
        DataError: the file cannot be read, or a row is no sample.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else path.parent
    for sample in read_samples(path):
        pictures = [(name, read_picture("header", root, name)) for name in sample.images]
        yield asdict(sample) | {
            "images": [
                {"name": name, "error": found}
                if isinstance(found, str)
                else {"name": name, "width": found[0], "height": found[1]}
                for name, found in pictures
            ]
        }
