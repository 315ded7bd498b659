"""What keeps samples from being used, found before training begins, in the same way by every process."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.core.types import Modality
from mmpeft.data.box_text import spelt_out
from mmpeft.data.chat import check_texts, control_tokens, render_chat
from mmpeft.data.encode import cut_before_media
from mmpeft.data.formats import Row
from mmpeft.data.labels import answers_of, conversation_of, count_media, label_conversation
from mmpeft.data.lengths import media_lengths, stretched
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.pictures import Found, Verify, media_names, read_medium, with_media
from mmpeft.data.problems import Problem
from mmpeft.data.types import PLACEHOLDERS, Sample


@dataclass(kw_only=True)
class Findings:
    """What `verify_rows` found.

    Attributes:
        problems: one for each sample that cannot be used, in order.
        ignored: the line where each unknown key of the file first stands.
        truncated: how many of the usable samples are longer than `max_length`.
        boxes: boxes and points of the usable samples.
    """

    problems: list[Problem] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    boxes: int = 0


def verify_rows(
    rows: Iterable[Row],
    *,
    processor: Any,
    media_root: Path,
    max_length: int | None,
    verify: Verify,
    limits: MediaLimits,
) -> Findings:
    """Check structure, texts, chat template, pictures and lengths of all rows.

    Media are read in threads, each file once. Texts are all searched for control tokens; the chat template is
    tried on one sample of every shape (roles, pictures a turn), on every sample only where the shape fails or
    where `max_length` asks for its length.
    """
    findings = Findings()
    texts = _Texts(processor, max_length)
    for window, media in with_media(rows, partial(read_medium, verify, media_root, limits)):
        for row in window:
            sample = row.sample
            place = sample or row.problem
            for key in row.ignored:
                findings.ignored.setdefault(key, place.line if place else 0)
            if sample is None:
                findings.problems += [row.problem] if row.problem else []
                continue
            try:
                found = [_readable(media[medium]) for medium in media_names(sample)]
                lengths = None if max_length is None else media_lengths(processor, found)
                written = spelt_out(processor, sample, root=media_root, limits=limits)
                findings.truncated += texts.check(written, lengths)
                findings.boxes += len(sample.boxes)
            except DataError as error:
                findings.problems.append(Problem(index=sample.index, line=sample.line, id=sample.id, reason=str(error)))
    return findings


def _readable(found: Found) -> Any:
    if isinstance(found, str):
        raise DataError(found)
    return found


class _Texts:
    """Checks the texts of samples, and how long they become."""

    def __init__(self, processor: Any, max_length: int | None) -> None:
        self.processor, self.max_length = processor, max_length
        self.good_shapes: set[tuple[tuple[str | int, ...], ...]] = set()
        # A normaliser may lengthen a text; without one no token is shorter than a byte.
        self.bytes_bound_tokens = processor.tokenizer.backend_tokenizer.normalizer is None

    def check(self, sample: Sample, lengths: Sequence[tuple[Modality, int]] | None) -> bool:
        """Whether the sample is longer than `max_length`; a DataError if it cannot be used.

        How many tokens a film or a recording takes is known once it is decoded; until then `lengths` is None, and
        `encode_sample` cuts the sample.
        """
        check_texts(self.processor, sample.turns)
        shape = tuple(
            (turn.role, *(turn.text.count(placeholder) for placeholder in PLACEHOLDERS.values()))
            for turn in sample.turns
        )
        if shape in self.good_shapes and (lengths is None or self._surely_fits(sample, lengths)):
            return False
        conversation = conversation_of(self.processor, sample.turns)
        count_media(self.processor, conversation, {name: len(paths) for name, paths in sample.media.items()})
        tokens = label_conversation(self.processor, conversation, answers_of(sample.turns))
        self.good_shapes.add(shape)
        if self.max_length is None or lengths is None:
            return False
        tokens = stretched(self.processor, tokens, lengths)
        cut_before_media(tokens, self.max_length, control_tokens(self.processor).ids)
        return len(tokens.input_ids) > self.max_length

    def _surely_fits(self, sample: Sample, lengths: Sequence[tuple[Modality, int]]) -> bool:
        if self.max_length is None:
            return True
        text = render_chat(self.processor, sample.turns, add_generation_prompt=False)
        added = 2  # a beginning and an end token that the text does not hold
        return (
            self.bytes_bound_tokens
            and len(text.encode()) + added + sum(length for _, length in lengths) <= self.max_length
        )
