"""A data file and its pictures as a torch data set of encoded samples."""

import logging
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch.utils.data import Dataset

from mmpeft.core.hashing import hash_value
from mmpeft.data.arrow import cached_rows, row_of
from mmpeft.data.augment import Augmentation, AugmentSettings
from mmpeft.data.box_text import box_convention, spelt_out, without_marks
from mmpeft.data.encode import Encoded
from mmpeft.data.feature_store import FeatureStore
from mmpeft.data.formats import source_root
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.mixture import MixedDataset, Source, naming_source, sources_of
from mmpeft.data.pictures import Verify
from mmpeft.data.prepare import Preparation
from mmpeft.data.problems import LISTED, Problem, problems_error
from mmpeft.data.sample_lengths import Lengths, cached_lengths
from mmpeft.data.stream import SHUFFLE_BUFFER, StreamingDataset
from mmpeft.data.stream_mixture import Stream, StreamedMixture
from mmpeft.data.token_cache import TokenCache
from mmpeft.data.types import PLACEHOLDERS, Question, Sample, SkippedSample
from mmpeft.data.verify import verify_rows
from mmpeft.families.spec import BoxConvention

logger = logging.getLogger(__name__)

_WINDOW = 1024
"""Rows that are read at once."""


class MultimodalDataset(Dataset[Encoded]):
    """Samples of one data file; pixels are opened and encoded when a sample is taken, so in a loader's workers.

    Made by `load_dataset`. What a sample becomes holds only what the model's forward takes (see
    `encode_sample`), so a plain `transformers.Trainer` leaves it whole.

    Attributes:
        path: the data file.
        media_root: the folder that media paths are relative to.
        limits: how much of each medium is decoded.
        fingerprint: SHA-256 (hex) of the data file's bytes, and of the column map and question where they were given.
        skipped: the samples that were left out, and why; empty under `on_error="error"`.
        truncated: how many samples are longer than `max_length` and lose their tail.
        boxes: how boxes and points are written, by the model's family; None where the file has none.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        *,
        path: Path,
        media_root: Path,
        processor: Any,
        max_length: int | None,
        limits: MediaLimits,
        fingerprint: str,
        skipped: Sequence[SkippedSample],
        truncated: int,
        boxes: BoxConvention | None = None,
    ) -> None:
        self.boxes = boxes
        self._rows = rows
        self._media_keys: array[int] | None = None
        self._media_kinds: array[int] | None = None
        self._lengths: Lengths | None = None
        self._prepare = Preparation(
            processor=processor, path=path, media_root=media_root, limits=limits, max_length=max_length
        )
        self.path, self.media_root, self.limits, self.fingerprint = path, media_root, limits, fingerprint
        self.skipped, self.truncated = list(skipped), truncated
        # Shared memory, so that a loader's workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def augmentation(self) -> Augmentation | None:
        """How samples are varied (see `augment_with`); None if they are not."""
        return self._prepare.augmentation

    @property
    def epoch(self) -> int:
        """The epoch that samples are taken for, from 0; the same in every worker of a loader."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Take samples as epoch `epoch` (from 0) has them from now on; `MultimodalTrainer` calls it."""
        self._epoch.fill_(epoch)

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary samples from epoch to epoch from now on; `sample` and `questions` stay as the file has them.

        Args:
            settings: such as `{"flip": True, "colour": {"brightness": 0.2}}` (see `AugmentConfig`); or None.
            seed: what is drawn depends on it, the sample and the epoch.

        Raises:
            RecipeError, DataError: as `augmentation_of`; or an alternative text holds a control token of the model.
        """
        self._prepare.augment_with(settings, seed=seed)
        self._lengths = None

    def keep_features(self, store: FeatureStore | None, identity: str = "") -> None:
        """Take what `store` keeps of samples' media from now on, in the place of pixels and sounds.

        Samples then hold `features` where they are kept, else `features_key` beside what they always hold (see
        `mmpeft.data.join_features`). Those whose pixels augmentation varies stay as they are.

        Args:
            store: where they are kept; None to take pixels and sounds again.
            identity: of the weights that make the features (`FeaturePlan.identity`).
        """
        self._prepare.keep_features(store, identity)

    def keep_tokens(self) -> TokenCache:
        """Tokenise each text once from now on; what is kept already stays, and its use is counted from here."""
        self._prepare.texts = self._prepare.texts or TokenCache()
        self._prepare.texts.restart_counts()
        return self._prepare.texts

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index`, encoded.

        Raises:
            DataError: its media cannot be decoded: names file, line, sample and reason.
        """
        return self.encoded(index, epoch=self.epoch)

    def encoded(self, index: int, *, epoch: int) -> Encoded:
        """Sample `index` as epoch `epoch` (from 0) has it, whichever it is now; errors as `dataset[index]`."""
        return self._prepare(self.sample(index), epoch=epoch)

    def media_key(self, index: int) -> int:
        """A number that samples on the same media have in common; 0 for one without any."""
        if self._media_keys is None:
            self._media_keys = array("q", (hash(row) or 1 if any(row) else 0 for row in self.media_names()))
        return self._media_keys[index]

    def media_kinds(self, index: int) -> int:
        """Which kinds of media a sample has: 1 for pictures, 2 for films, 4 for recordings, or their sum."""
        if self._media_kinds is None:
            kinds = (sum(bool(names) << bit for bit, names in enumerate(row)) for row in self.media_names())
            self._media_kinds = array("b", kinds)
        return self._media_kinds[index]

    def media_names(self) -> Iterator[tuple[tuple[str, ...], ...]]:
        """Of each sample in order, the names of its pictures, films and recordings."""
        columns = ["images", "videos", "audios"]
        rows = self._rows.select_columns(columns)
        # Many at once: a row by itself takes as long as a hundred of them.
        for start in range(0, len(rows), _WINDOW):
            window = rows[start : start + _WINDOW]
            yield from zip(*(map(tuple, window[name]) for name in columns), strict=True)

    def lengths(self, epoch: int = 0) -> Lengths:
        """How long its samples are in tokens (see `sample_lengths`), in every epoch; measured once a file.

        Raises:
            DataError: a sample that cannot be measured: names file, line, sample and reason.
        """
        if self._lengths is None:
            prepare = self._prepare
            self._lengths = cached_lengths(
                self._rows,
                fingerprint=self.fingerprint,
                processor=prepare.processor,
                root=self.media_root,
                path=self.path,
                limits=self.limits,
                max_length=prepare.max_length,
            )
            if self.augmentation is not None:
                # Each sample has a picture of its own then.
                self._lengths = self._lengths.copy()
                self._lengths["shared"] = 0
        return self._lengths

    def sample(self, index: int) -> Sample:
        """Sample `index` as it stands in the file; no picture is opened."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return _sample_of(self._rows[index % len(self)])

    def questions(self) -> list[Question]:
        """One question an assistant turn, in order; ids end in `#1`, `#2` … where a sample has several.

        Boxes stand in prompts and references as the model's family writes them.
        """
        samples = (
            spelt_out(self._prepare.processor, _sample_of(record), root=self.media_root, limits=self.limits)
            for record in self._rows
        )
        # References lose the marks around places, as answers do when they are decoded.
        return [
            replace(question, reference=without_marks(self._prepare.processor, question.reference))
            for sample in samples
            for question in questions_of(sample)
        ]


def _sample_of(record: Mapping[str, Any]) -> Sample:
    sample = row_of(record).sample
    assert sample is not None, "rows with a problem were left out"
    return sample


def questions_of(sample: Sample) -> list[Question]:
    """The questions of one sample, each with the pictures that its prompt shows."""
    answers = [number for number, turn in enumerate(sample.turns) if turn.role == "assistant"]
    questions = []
    for count, number in enumerate(answers, start=1):
        prompt = sample.turns[:number]
        shown = {
            modality: sum(turn.text.count(placeholder) for turn in prompt)
            for modality, placeholder in PLACEHOLDERS.items()
        }
        questions.append(
            Question(
                id=f"{sample.id}#{count}" if len(answers) > 1 else sample.id,
                prompt=prompt,
                images=sample.images[: shown["image"]],
                videos=sample.videos[: shown["video"]],
                audios=sample.audios[: shown["audio"]],
                reference=sample.turns[number].text,
                kind=sample.kind,
            )
        )
    return questions


def load_dataset(
    path: str | Path | Sequence[Source | Mapping[str, Any] | str | Path],
    *,
    media_root: str | Path | None = None,
    processor: Any,
    max_length: int | None = None,
    on_error: Literal["error", "skip"] = "error",
    max_skipped: float = 0.01,
    verify: Verify | None = None,
    limits: MediaLimits | None = None,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
    streaming: bool = False,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    seed: int = 0,
) -> MultimodalDataset | MixedDataset | Stream:
    """Samples in any format that is known, or several sources with weights, as what `transformers.Trainer` takes.

    Args:
        path: a data file, a folder, a pattern of shards or `hf://owner/name` (`mmpeft.data.formats` tells what a
            source may be); or a list of them, each a path or a mapping of `Source`'s fields
            (`[{"path": "vqa.json", "weight": 2.0}, "captions.jsonl"]`): see `MixedDataset` for what a weight means.
        media_root: folder that picture paths are relative to, and that none may leave; default: each source's own.
        processor: a transformers processor with a chat template and a fast tokenizer.
        max_length: longest row in tokens, pictures included; a longer one loses its tail, never half a picture.
        on_error: `error` raises if any sample cannot be used; `skip` leaves it out, logged and listed in
            `.skipped`.
        max_skipped: with `skip`, the most samples that may be left out of each file: a share below 1, else a count.
        verify: how far pictures are read up front: `header` (the default under `error`; a picture that is broken
            further on raises when it is taken) or `decode` (the default under `skip`, so that every process
            leaves out the same samples). Of a stream the first rows' headers are read, whatever it says.
        limits: how much of each medium is decoded (frames of a film, seconds of a recording); default: `MediaLimits()`.
        columns: the source's own names of columns, by ours: `{"question": "frage", "answer": "antwort"}`.
        question: the question of samples that have none, such as pictures with captions.
        streaming: read rows while training instead of before, for what is too large to be read first: see
            `StreamingDataset`, and of a list `StreamedMixture`.
        shuffle_buffer: rows among which a stream's next one is drawn; 1 keeps the file's order.
        seed: which samples of a source with a weight come up when, and the order of a stream.

    Raises:
        DataError: samples that cannot be used, listed together; too many of them; or none left. Of a list, the
            message begins with the source's name.
        OutputError: the datasets cache cannot be written.
    """
    if streaming:
        stream = partial(
            load_stream,
            media_root=media_root,
            processor=processor,
            max_length=max_length,
            limits=limits,
            on_error=on_error,
            max_skipped=max_skipped,
            shuffle_buffer=shuffle_buffer,
            seed=seed,
        )
        if isinstance(path, str | Path):
            return stream(Source(path=path, columns=columns, question=question))
        return StreamedMixture(_each(path, columns, question, stream))
    options: dict[str, Any] = {
        "media_root": media_root,
        "processor": processor,
        "max_length": max_length,
        "on_error": on_error,
        "max_skipped": max_skipped,
        "verify": verify,
        "limits": limits,
    }
    if isinstance(path, str | Path):
        return load_file(Source(path=path, columns=columns, question=question), **options)
    return MixedDataset(_each(path, columns, question, partial(load_file, **options)), seed=seed)


def _each(
    values: Sequence[Any], columns: Mapping[str, str] | None, question: str | None, load: Callable[[Source], Any]
) -> list[tuple[Source, Any]]:
    """The sources of a list, each with what `load` makes of it."""
    loaded = []
    for source in sources_of(values):
        whole = replace(source, columns=source.columns or columns, question=source.question or question)
        with naming_source(str(source.name)):
            loaded.append((whole, load(whole)))
    return loaded


def load_stream(
    source: Source,
    *,
    media_root: str | Path | None = None,
    processor: Any,
    max_length: int | None = None,
    on_error: Literal["error", "skip"] = "error",
    max_skipped: float = 0.01,
    limits: MediaLimits | None = None,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    seed: int = 0,
) -> StreamingDataset:
    """One source as a stream, whatever its weight; arguments and errors as `load_dataset`."""
    preparation = Preparation(
        processor=processor,
        path=Path(source.path),
        media_root=_root(source, media_root),
        limits=limits or MediaLimits(),
        max_length=max_length,
    )
    return StreamingDataset(
        source.path,
        preparation=preparation,
        on_error=on_error,
        max_skipped=max_skipped,
        columns=source.columns,
        question=source.question,
        shuffle_buffer=shuffle_buffer,
        seed=seed,
    )


def _root(source: Source, media_root: str | Path | None) -> Path:
    given = media_root if source.media_root is None else source.media_root
    return (Path(given) if given is not None else source_root(source.path)).resolve()


def load_file(
    source: Source,
    *,
    media_root: str | Path | None = None,
    processor: Any,
    max_length: int | None = None,
    on_error: Literal["error", "skip"] = "error",
    max_skipped: float = 0.01,
    verify: Verify | None = None,
    limits: MediaLimits | None = None,
) -> MultimodalDataset:
    """All samples of one source, whatever its weight; arguments and errors as `load_dataset`."""
    path = Path(source.path)
    root = _root(source, media_root)
    rows, fingerprint = cached_rows(source.path, columns=source.columns, question=source.question)
    if source.columns or source.question:
        fingerprint = hash_value([fingerprint, dict(source.columns or {}), source.question])
    limits = limits or MediaLimits()
    findings = verify_rows(
        map(row_of, rows),
        processor=processor,
        media_root=root,
        max_length=max_length,
        verify=verify or ("decode" if on_error == "skip" else "header"),
        limits=limits,
    )
    for key, line in findings.ignored.items():
        logger.warning("%s:%d: the key %r is not known and not used (here first)", path, line, key)
    if findings.truncated:
        logger.warning(
            "%s: %d of %d samples are longer than max_length %d and are cut at their end",
            path, findings.truncated, len(rows), max_length,
        )  # fmt: skip
    if findings.problems and on_error == "error":
        advice = "correct the file, or use on_error: skip to leave such samples out"
        raise problems_error(path, findings.problems, advice=advice)
    return MultimodalDataset(
        _without(rows, findings.problems, path=path, max_skipped=max_skipped),
        path=path,
        media_root=root,
        processor=processor,
        max_length=max_length,
        limits=limits,
        fingerprint=fingerprint,
        skipped=[
            SkippedSample(file=str(path), index=problem.index, line=problem.line, reason=problem.reason)
            for problem in findings.problems
        ],
        truncated=findings.truncated,
        boxes=box_convention(processor) if findings.boxes else None,
    )


def _without(
    rows: datasets.Dataset, problems: Sequence[Problem], *, path: Path, max_skipped: float
) -> datasets.Dataset:
    """The rows without those that have a problem, within the bound."""
    if not problems:
        return rows
    total = len(rows)
    if len(problems) == total:
        raise problems_error(path, problems, advice="no sample is left; correct the file")
    limit = math.floor(max_skipped * total + 1e-9) if max_skipped < 1 else int(max_skipped)
    if len(problems) > limit:
        advice = f"max_skipped allows {limit} of {total}: correct the file, or raise max_skipped"
        raise problems_error(path, problems, advice=advice)
    logger.warning("%s: %d of %d samples are skipped (at most %d may be)", path, len(problems), total, limit)
    for number, problem in enumerate(problems):
        logger.log(logging.WARNING if number < LISTED else logging.INFO, "skipped %s", problem.located(path))
    left_out = {problem.index for problem in problems}
    return rows.select([index for index in range(total) if index not in left_out])
