"""Samples read as training goes on, for files that are too large to be read, indexed and verified first.

    rows in file order          a b c d e f g h …
    shuffle buffer of 3         b d a c f e …            the same in every process, by seed and epoch
    global batch of 4           b d a c | f e …          cut for processes by `StreamBatchSampler`

What travels through the buffer is where a row lies, not the row: in a JSON Lines file its byte offset, so that a
row is read and decoded, and its media opened, only by the worker that trains on it. Rows of other formats are
decoded on the way; their media are not.
"""

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import IterableDataset

from mmpeft.core.errors import DataError
from mmpeft.core.hashing import hash_value
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.augment import Augmentation, AugmentSettings
from mmpeft.data.encode import Encoded
from mmpeft.data.feature_store import FeatureStore
from mmpeft.data.formats import Row, fingerprint, read_rows, row_parser
from mmpeft.data.lines import LineAt, line_places, read_line
from mmpeft.data.mixture import naming_source
from mmpeft.data.prepare import Preparation
from mmpeft.data.problems import problems_error
from mmpeft.data.reading import Located
from mmpeft.data.types import SkippedSample
from mmpeft.data.verify import verify_rows

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 10_000
"""Rows among which the next one is drawn."""

HEAD = 100
"""Rows at the file's beginning that are verified before training."""

SKIP_GRACE = 1_000
"""A share of samples that may be skipped is taken of this many at least, until the file has been read to its end."""


class Place(NamedTuple):
    """A row and the epoch it is taken for; `blank` asks for it without a label.

    Attributes:
        source: which source of a `StreamedMixture`.
    """

    epoch: int
    row: LineAt | Row
    blank: bool = False
    source: int = 0


class Taken(list[Encoded]):
    """Encoded samples of one micro-batch, and those that were left out of it."""

    skipped: tuple[SkippedSample, ...] = ()


class StreamingDataset(IterableDataset[Encoded]):
    """Samples of one source, read while training; made by `load_dataset(…, streaming=True)`.

    `MultimodalTrainer` shares its rows out over processes and workers, each exactly once an epoch, and goes on
    from a checkpoint without opening the media of what it passes over. In a plain loader it is an
    `IterableDataset` that shares rows out over the loader's workers; the plain Trainer needs
    `accelerator_config={"dispatch_batches": False}` for it.

    Nothing is verified but the first `HEAD` rows. Under `on_error="skip"` a sample that cannot be used leaves its
    place in the batch empty: that step has one sample less.

    Attributes:
        path: the source.
        media_root: the folder that media paths are relative to.
        limits: how much of each medium is decoded.
        fingerprint: SHA-256 (hex) of the file's size and time of change, not of its content.
        head: the first rows, as far as they can be used.
        on_error, max_skipped, shuffle_buffer, seed: as given.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        preparation: Preparation,
        on_error: Literal["error", "skip"] = "error",
        max_skipped: float = 0.01,
        columns: Mapping[str, str] | None = None,
        question: str | None = None,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        seed: int = 0,
    ) -> None:
        self.path, self.media_root, self.limits = Path(path), preparation.media_root, preparation.limits
        self.on_error, self.max_skipped = on_error, max_skipped
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        self._source, self._prepare = path, preparation
        self._columns, self._question = columns, question
        self._parse: Callable[[Located, int], Row] | None = None
        self._filler: Encoded | None = None
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.fingerprint = self._identity()
        self.head = self._verified_head()

    def __getstate__(self) -> dict[str, Any]:
        # The parser holds functions that do not travel to a worker that is spawned; it is made anew there.
        return {**self.__dict__, "_parse": None}

    @property
    def augmentation(self) -> Augmentation | None:
        """How samples are varied; None if they are not."""
        return self._prepare.augmentation

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary samples from epoch to epoch; see `MultimodalDataset.augment_with`."""
        self._prepare.augment_with(settings, seed=seed)

    def keep_features(self, store: FeatureStore | None, identity: str = "") -> None:
        """Take what `store` keeps of samples' media; see `MultimodalDataset.keep_features`."""
        self._prepare.keep_features(store, identity)

    def set_epoch(self, epoch: int) -> None:
        """Take rows in the order of epoch `epoch` (from 0) in plain loaders; `MultimodalTrainer` counts by itself."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Encoded]:
        """All samples of the epoch; in a loader's worker those that are its own."""
        info = torch.utils.data.get_worker_info()
        step, first = (info.num_workers, info.id) if info is not None else (1, 0)
        for place in islice(self.places(int(self._epoch)), first, None, step):
            yield from self.take([place])

    def places(self, epoch: int) -> Iterator[Place]:
        """Every row once, in the order of epoch `epoch`; opens no media.

        Raises:
            DataError: the source cannot be read.
        """
        generator = random.Random(hash_value([self.seed, epoch]))
        for row in _shuffled(self._rows(), self.shuffle_buffer, generator):
            yield Place(epoch, row)

    def _rows(self) -> Iterator[LineAt | Row]:
        if self._has_lines():
            return line_places(self.path)
        return read_rows(self._source, columns=self._columns, question=self._question)

    def _has_lines(self) -> bool:
        return self.path.suffix == ".jsonl" and self.path.is_file()

    def row(self, place: Place) -> Row:
        """The row at a place, checked."""
        if isinstance(place.row, Row):
            return place.row
        if self._parse is None:
            self._parse = row_parser(self.path, columns=self._columns, question=self._question)
        return self._parse(read_line(self.path, place.row), place.row.number)

    def take(self, places: Sequence[Place]) -> Taken:
        """The samples at some places, encoded; those that cannot be used are left out under `on_error="skip"`.

        If none is left of a micro-batch, another sample stands in for them without a label.

        Raises:
            DataError: a sample cannot be used: names file, line, sample and reason.
        """
        return take_from([self], places)

    def usable(self, place: Place) -> Encoded | SkippedSample:
        """The sample at a place; or, where such samples are skipped, why it cannot be used.

        Raises:
            DataError: it cannot be used, and such samples are not skipped.
        """
        row = self.row(place)
        if row.sample is None:
            assert row.problem is not None
            if self.on_error == "error":
                raise problems_error(self.path, [row.problem], advice="correct the file, or use on_error: skip")
            return self._skipped(row.problem.index, row.problem.line, row.problem.reason)
        try:
            encoded = self._prepare(row.sample, epoch=place.epoch)
        except DataError as error:
            if self.on_error == "error":
                raise
            return self._skipped(row.sample.index, row.sample.line, str(error.__cause__ or error))
        return _without_labels(encoded) if place.blank else encoded

    def _skipped(self, index: int, line: int, reason: str) -> SkippedSample:
        return SkippedSample(file=str(self.path), index=index, line=line, reason=reason)

    def stand_in(self) -> Encoded:
        """The first sample that can be used, without a label.

        Raises:
            DataError: there is none.
        """
        if self._filler is None:
            usable = (self.usable(Place(0, row, blank=True)) for row in self._rows())
            self._filler = next((sample for sample in usable if not isinstance(sample, SkippedSample)), None)
        if self._filler is None:
            raise DataError(f"{self.path}: no sample can be used")
        return self._filler

    def count(self) -> int:
        """How many rows there are; reads the file, at some 600 MiB a second where it is JSON Lines."""
        return sum(1 for _ in self._rows())

    def allowed(self, seen: int) -> int:
        """How many samples may have been skipped after `seen` of them."""
        return math.floor(self.max_skipped * seen + 1e-9) if self.max_skipped < 1 else int(self.max_skipped)

    def _identity(self) -> str:
        state = self.path.stat() if self.path.is_file() else None
        # Archives and folders are known by their files' sizes and times already.
        content = [state.st_size, state.st_mtime_ns] if state else fingerprint(self._source)[0]
        return hash_value([content, dict(self._columns or {}), self._question, self.shuffle_buffer])

    def _verified_head(self) -> list[Row]:
        """The first rows; what is wrong in each file is often wrong in the first of them."""
        rows = list(islice(read_rows(self._source, columns=self._columns, question=self._question), HEAD))
        if not rows:
            raise DataError(f"{self.path}: holds no sample; expected a JSON array of samples, or one sample a line")
        prepare = self._prepare
        findings = verify_rows(
            rows,
            processor=prepare.processor,
            media_root=prepare.media_root,
            max_length=prepare.max_length,
            verify="header",
            limits=prepare.limits,
        )
        for key, line in findings.ignored.items():
            logger.warning("%s:%d: the key %r is not known and not used (here first)", self.path, line, key)
        bad = {problem.index for problem in findings.problems}
        if bad and (self.on_error == "error" or len(bad) == len(rows)):
            advice = "correct the file" + (", or use on_error: skip" if self.on_error == "error" else "")
            raise problems_error(
                self.path, findings.problems, advice=f"{advice} (the first {HEAD} rows were looked at)"
            )
        return [row for row in rows if row.sample is not None and row.sample.index not in bad]


def take_from(sources: Sequence[StreamingDataset], places: Sequence[Place], names: Sequence[str] = ()) -> Taken:
    """The samples at places of some sources; see `StreamingDataset.take`. Errors begin with the source's name."""
    taken, skipped = Taken(), []
    for place in places:
        with naming_source(names[place.source]) if names else contextlib.nullcontext():
            found = sources[place.source].usable(place)
        if isinstance(found, SkippedSample):
            skipped.append(found)
        else:
            taken.append(found)
    taken.skipped = tuple(skipped)
    if not taken:
        taken.append(sources[places[0].source].stand_in())
    return taken


def _without_labels(sample: Encoded) -> Encoded:
    return {**sample, "labels": torch.full_like(sample["labels"], IGNORE_INDEX)}


def _shuffled(rows: Iterable[Any], size: int, generator: random.Random) -> Iterator[Any]:
    """Rows in an order drawn with a buffer of `size`; their own order for a size of 0 or 1."""
    if size <= 1:
        yield from rows
        return
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        # `random()` is what Python promises to keep the same.
        slot = int(generator.random() * size)
        yield buffer[slot]
        buffer[slot] = row
    while buffer:
        slot = int(generator.random() * len(buffer))
        buffer[slot], buffer[-1] = buffer[-1], buffer[slot]
        yield buffer.pop()
