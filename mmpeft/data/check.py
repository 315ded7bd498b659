"""A data file looked through from end to end: rows, pictures, duplicates, leaks, lengths, balance of answers."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.core.errors import DataError
from mmpeft.core.lazy import LazyModule
from mmpeft.data.boxes import boxes_said
from mmpeft.data.checks.balance import Balance
from mmpeft.data.checks.opened import Found, Opened, Seen
from mmpeft.data.checks.prints import NearTable, Place, PlaceTable, print_of
from mmpeft.data.checks.report import Report as Report
from mmpeft.data.embedded import shown
from mmpeft.data.formats import Description, Row, describe, read_rows, source_root
from mmpeft.data.load_media import MediaLimits, placed
from mmpeft.data.pictures import Medium, media_names
from mmpeft.data.problems import LISTED, Problem, shorten
from mmpeft.data.types import WORDS, Sample

# Lazy, for it brings torch, which a check without a model can do without.
lengths = LazyModule("mmpeft.data.checks.lengths")

EXTREME_ASPECT_RATIO = 10
"""Long side by short side from which little of a picture is left when it is scaled to a square."""

MOST_KINDS = 1000
"""Distinct kinds, and unknown keys, that a report counts apart."""

_NOTHING_LEFT = "no answer token is left"
_KINDS_OF_ERROR = {
    "placeholder": "placeholder",
    "both from": "turn order",
    "the first turn": "turn order",
    "the last turn": "turn order",
    "a system turn": "turn order",
    "empty": "empty",
}


def check_data(
    path: str | os.PathLike[str],
    media_root: str | os.PathLike[str] | None = None,
    *,
    eval_path: str | os.PathLike[str] | None = None,
    processor: Any = None,
    max_length: int | None = None,
    open_media: bool = True,
    limits: MediaLimits | None = None,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
) -> Report:
    """Check every row of a data source and decode every medium; memory stays far below the file's size.

    Nothing is raised for bad data: a file that cannot be read at all is an error of the report.

    Args:
        path: the data source (see `mmpeft.data.formats.read_rows`).
        media_root: folder that media paths are relative to; default: each source's own.
        eval_path: a held-out source; what stands in both is an error, pictures that look alike are a warning.
        processor: measures lengths in tokens, and its chat template and control tokens are checked.
        max_length: longest row in tokens (characters without a processor); longer ones are counted.
        open_media: decode media; without it their files are not looked for.
        limits: how much of each medium training decodes; default: `MediaLimits()`.
        workers: threads that decode; default: one a core, 8 at most.
        on_progress: called with the number of rows done and the line that the last of them begins in.
        columns, question: as `read_rows`, for both sources.
    """
    path = Path(path)
    root = Path(media_root) if media_root is not None else None
    held_out = _HeldOut(open_media, limits, workers) if eval_path is not None else None
    report = Report(source=_described(path, columns, question))
    own = Path(report.source.root) if report.source else path.parent
    media = Opened(root or own, limits=limits, workers=workers)
    check = _Check(path, report, media, held_out, processor, max_length)
    done = 0
    try:
        if held_out is not None and eval_path is not None:
            held_out.read(Path(eval_path), root, columns, question)
        for window, new in media.windows(read_rows(path, columns=columns, question=question), opened=open_media):
            check.looks(new)
            for row in window:
                check.row(row)
            done += len(window)
            if on_progress:
                on_progress(done, max((place.line for place in map(_place, window) if place), default=0))
    except DataError as error:
        report.error("file", str(error))
    check.finish()
    return report


def _described(path: Path, columns: Mapping[str, str] | None, question: str | None) -> Description | None:
    try:
        return describe(path, columns=columns, question=question)
    # Reading the rows raises it again, where it becomes an error of the report.
    except DataError:
        return None


def count_lines(path: Path) -> int | None:
    """Lines of a JSON or JSON Lines file, for a progress bar; None where lines do not tell how far one has come."""
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return None
    return lines or None


def _place(row: Row) -> Sample | Problem | None:
    return row.sample or row.problem


class _HeldOut:
    """Prints of a held-out file's questions and pictures."""

    def __init__(self, opened: bool, limits: MediaLimits | None, workers: int | None) -> None:
        self.opened, self.limits, self.workers = opened, limits, workers
        self.questions, self.near = PlaceTable(), NearTable()
        self.path = Path()

    def read(self, path: Path, root: Path | None, columns: Mapping[str, str] | None, question: str | None) -> None:
        self.path = path
        media = Opened(root or source_root(path), limits=self.limits, workers=self.workers)
        rows = read_rows(path, columns=columns, question=question)
        for window, new in media.windows(rows, opened=self.opened):
            for medium in new:
                seen = media.get(medium)
                if isinstance(seen, Seen) and seen.look is not None:
                    self.near.add(seen.look, shown(medium[1]))
            for sample in (row.sample for row in window if row.sample):
                self.questions.first(_question(sample, media), Place(sample.index, sample.line))


def _media(sample: Sample, media: Opened) -> list[str]:
    """A print of each picture's pixels where it was opened; of other media the name."""
    found = zip(media.of(sample), media_names(sample), strict=True)
    return [str(seen.pixels) if isinstance(seen, Seen) else name for seen, (_, name) in found]


def _question(sample: Sample, media: Opened) -> int:
    """A print of the media and of what the user says, letters' case and white space aside."""
    asked = [" ".join(turn.text.lower().split()) for turn in sample.turns if turn.role == "user"]
    return print_of(*asked, *_media(sample, media), *filter(None, [boxes_said(sample, "user")]))


class _Check:
    """Gathers a report row by row."""

    def __init__(
        self,
        path: Path,
        report: Report,
        media: Opened,
        held_out: _HeldOut | None,
        processor: Any,
        max_length: int | None,
    ) -> None:
        self.path, self.report, self.media, self.held_out = path, report, media, held_out
        self.processor, self.max_length = processor, max_length
        self.ids, self.conversations = PlaceTable(), PlaceTable()
        self.kinds: Counter[str] = Counter()
        self.ignored: dict[str, int] = {}
        self.lengths, self.balance = array("I"), Balance()
        self.cut, self.longest = 0, (0, 0)
        # What is to be said of pictures, where a usable sample names them first.
        self.shapes: dict[str, str] = {}
        self.likes: dict[str, str] = {}

    def looks(self, new: list[Medium]) -> None:
        """Judge pictures that were just read: their shape, and whether they look like held-out ones."""
        for medium in new:
            seen = self.media.get(medium)
            if not isinstance(seen, Seen):
                continue
            name = shown(medium[1])
            if max(seen[:2]) > EXTREME_ASPECT_RATIO * min(seen[:2]):
                self.shapes[medium[1]] = f"picture {name!r} is {seen.width} x {seen.height}, an extreme shape"
            near = self.held_out.near.find(seen.look) if self.held_out and seen.look is not None else None
            if near and self.held_out:
                self.likes[medium[1]] = (
                    f"picture {name!r} looks like {near[0]!r} of {self.held_out.path} "
                    f"({near[1]} of 64 bits differ); leave it out of one of the two"
                )

    def row(self, row: Row) -> None:
        place = _place(row)
        for key in row.ignored:
            if key in self.ignored or len(self.ignored) < MOST_KINDS:
                self.ignored.setdefault(key, place.line if place else 0)
        if row.problem:
            kinds = (kind for words, kind in _KINDS_OF_ERROR.items() if words in row.problem.reason)
            self.report.error(next(kinds, "row"), row.problem.located(self.path))
        if row.sample:
            self._sample(row.sample)

    def _sample(self, sample: Sample) -> None:
        where = f"{self.path}:{sample.line}: sample {sample.index} (id {shorten(sample.id)!r})"
        media = self.media.of(sample)
        if faults := [
            (medium[0], found)
            for medium, found in zip(media_names(sample), media, strict=True)
            if isinstance(found, str)
        ]:
            more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
            reasons = "; ".join(reason for _, reason in faults[:LISTED])
            self.report.error(WORDS[faults[0][0]], f"{where}: {reasons}{more}")
            return
        if sample.boxes and None not in media:
            try:
                placed(sample, root=self.media.root, limits=self.media.limits)
            except DataError as error:
                self.report.error("box", f"{where}: {error}")
                return
        self.report.boxes += len(sample.boxes)
        for note in self.media.notes(sample):
            self.report.warn(note.kind, f"{where}: {note.text}")
        try:
            self._measure(sample, media)
        except DataError as error:
            self.report.error("cut" if _NOTHING_LEFT in str(error) else "chat template", f"{where}: {error}")
            return
        self.report.samples += 1
        self.report.turns += sum(turn.role != "system" for turn in sample.turns)
        self.kinds[sample.kind if sample.kind in self.kinds or len(self.kinds) < MOST_KINDS else "(others)"] += 1
        self._repeats(sample, where)
        for name in sample.images if self.shapes else ():
            if text := self.shapes.pop(name, ""):
                self.report.warn("extreme shape", f"{where}: {text}")
        for number, turn in enumerate(sample.turns):
            if turn.role != "assistant":
                continue
            self.balance.add(turn.text)
            if turn.text != turn.text.strip():
                self.report.warn("white space", f"{where}: the answer of turn {number} begins or ends with white space")

    def _repeats(self, sample: Sample, where: str) -> None:
        place = Place(sample.index, sample.line)
        if first := self.ids.first(print_of(sample.id), place):
            self.report.warn("same id", f"{where}: the same id as {first}")
        said = (part for turn in sample.turns for part in (turn.role, turn.text))
        print_ = print_of(*said, *_media(sample, self.media), *map(repr, sample.boxes))
        if first := self.conversations.first(print_, place):
            self.report.warn("duplicate", f"{where}: the same pictures and conversation as {first}")
        if self.held_out is None:
            return
        if held := self.held_out.questions.get(_question(sample, self.media)):
            self.report.error(
                "leak",
                f"{where}: the same pictures and question as {held} of {self.held_out.path}; remove one of them",
            )
            return
        for name in sample.images if self.likes else ():
            if text := self.likes.pop(name, ""):
                self.report.warn("looks held out", f"{where}: {text}")

    def _measure(self, sample: Sample, media: Sequence[Found | None]) -> None:
        tokens = self._tokens(sample, media) if self.processor is not None else None
        length = sum(len(turn.text) for turn in sample.turns) if tokens is None else len(tokens.input_ids)
        self.lengths.append(length)
        self.longest = max(self.longest, (length, -sample.line))
        if self.max_length is not None and length > self.max_length:
            self.cut = self.cut or sample.line
            if tokens is not None:
                lengths.check_cut(self.processor, tokens, self.max_length)

    def _tokens(self, sample: Sample, media: Sequence[Found | None]) -> Any:
        if sample.boxes and None not in media:
            self.report.convention = lengths.box_convention(self.processor)
            sample = lengths.spelt_out(self.processor, sample, root=self.media.root, limits=self.media.limits)
        return lengths.sample_tokens(self.processor, sample, media)

    def finish(self) -> None:
        report = self.report
        report.kinds = dict(sorted(self.kinds.items()))
        counts = self.media.counts
        report.pictures, report.videos, report.audios = counts["image"], counts["video"], counts["audio"]
        for key, line in self.ignored.items():
            report.warn(
                "unknown key", f"{self.path}:{line}: the key {shorten(key)!r} is not known and not used (here first)"
            )
        for message in self.balance.warnings():
            report.warn("balance", f"{self.path}: {message}")
        report.answers = self.balance.top()
        report.lengths = self._distribution()
        if cut := report.lengths.get("cut"):
            longest, line = self.longest
            are = f"{cut} of {len(self.lengths)} samples {'is' if cut == 1 else 'are'}"
            report.warn(
                "cut",
                f"{self.path}:{self.cut}: {are} longer than "
                f"{self.max_length} {report.lengths['unit']} (here first; the longest, of {longest}, in line {-line}): "
                "training cuts their ends off",
            )
        if not report.samples and not report.error_count:
            report.error("file", f"{self.path}: holds no sample")

    def _distribution(self) -> dict[str, Any]:
        if not self.lengths:
            return {}
        values = np.frombuffer(self.lengths, dtype=np.uint32)
        cut = {} if self.max_length is None else {"cut": int((values > self.max_length).sum())}
        median, p95 = (int(value) for value in np.percentile(values, (50, 95), method="higher"))
        unit = "characters" if self.processor is None else "tokens"
        return {"unit": unit, "min": int(values.min()), "median": median, "p95": p95, "max": int(values.max()), **cut}
