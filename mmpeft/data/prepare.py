"""From a sample as it stands in a file to what the model takes: media opened, varied where asked, encoded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.data.augment import Augmentation, AugmentSettings, augment, augmentation_of
from mmpeft.data.chat import check_texts
from mmpeft.data.encode import Encoded, encode_sample
from mmpeft.data.load_media import MediaLimits, load_media, placed
from mmpeft.data.problems import Problem
from mmpeft.data.types import Sample, Turn


@dataclass(kw_only=True)
class Preparation:
    """How the samples of one file are prepared; the same for all of them.

    Attributes:
        processor: a transformers processor with a chat template and a fast tokenizer.
        path: the data file, for messages.
        media_root: the folder that media paths are relative to.
        limits: how much of each medium is decoded.
        max_length: longest row in tokens; None for no limit.
        augmentation: how samples are varied (see `augment_with`); None if they are not.
        augment_seed: what is drawn depends on it, the sample and the epoch.
    """

    processor: Any
    path: Path
    media_root: Path
    limits: MediaLimits
    max_length: int | None = None
    augmentation: Augmentation | None = None
    augment_seed: int = 0

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary samples from epoch to epoch from now on; see `MultimodalDataset.augment_with`."""
        augmentation = augmentation_of(settings)
        for options in augmentation.paraphrases.values() if augmentation is not None else ():
            check_texts(self.processor, [Turn(role="user", text=option) for option in options])
        self.augmentation, self.augment_seed = augmentation, seed

    def __call__(self, sample: Sample, *, epoch: int) -> Encoded:
        """The sample, encoded, as epoch `epoch` (from 0) has it.

        Raises:
            DataError: its media cannot be decoded, or it cannot be encoded: names file, line, sample and reason.
        """
        try:
            media = load_media(sample, root=self.media_root, limits=self.limits)
            sample = placed(sample, root=self.media_root, limits=self.limits)
            if self.augmentation is not None:
                sample, media = augment(sample, media, self.augmentation, seed=self.augment_seed, epoch=epoch)
            return encode_sample(self.processor, sample, media, self.max_length)
        except DataError as error:
            problem = Problem(index=sample.index, line=sample.line, id=sample.id, reason=str(error))
            raise DataError(problem.located(self.path)) from error
