"""From a sample as it stands in a file to what the model takes: media opened, varied where asked, encoded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.data.augment import Augmentation, AugmentSettings, augment, augmentation_of, varies_media
from mmpeft.data.box_text import spelt_out
from mmpeft.data.chat import check_texts
from mmpeft.data.encode import DecodedMedia, Encoded, encode_sample, encode_turns
from mmpeft.data.feature_keys import media_in_order
from mmpeft.data.feature_store import FeatureStore
from mmpeft.data.kept import KeptFeatures, NotKeptError
from mmpeft.data.load_media import MediaLimits, load_media, placed
from mmpeft.data.problems import Problem
from mmpeft.data.token_cache import TokenCache
from mmpeft.data.types import Media, Sample, Turn


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
        kept: features of frozen towers that are kept; None if none are.
        texts: what was tokenised before; None to tokenise every time.
    """

    processor: Any
    path: Path
    media_root: Path
    limits: MediaLimits
    max_length: int | None = None
    augmentation: Augmentation | None = None
    augment_seed: int = 0
    kept: KeptFeatures | None = None
    texts: TokenCache | None = None

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary samples from epoch to epoch from now on; see `MultimodalDataset.augment_with`."""
        augmentation = augmentation_of(settings)
        for options in augmentation.paraphrases.values() if augmentation is not None else ():
            check_texts(self.processor, [Turn(role="user", text=option) for option in options])
        self.augmentation, self.augment_seed = augmentation, seed

    def keep_features(self, store: FeatureStore | None, identity: str = "") -> None:
        """Take what is kept of samples' media from now on; see `MultimodalDataset.keep_features`."""
        self.kept = None
        if store is not None:
            self.kept = KeptFeatures(self.processor, store, root=self.media_root, limits=self.limits, identity=identity)

    def __call__(self, sample: Sample, *, epoch: int) -> Encoded:
        """The sample, encoded, as epoch `epoch` (from 0) has it.

        Raises:
            DataError: its media cannot be decoded, or it cannot be encoded: names file, line, sample and reason.
        """
        try:
            if self.kept is not None and any(sample.media.values()) and not varies_media(self.augmentation):
                return self._with_kept(self.kept, sample, epoch)
            return encode_sample(self.processor, *self._decoded(sample, epoch), self.max_length, self.texts)
        except DataError as error:
            problem = Problem(index=sample.index, line=sample.line, id=sample.id, reason=str(error))
            raise DataError(problem.located(self.path)) from error

    def _decoded(self, sample: Sample, epoch: int) -> tuple[Sample, Media]:
        media = load_media(sample, root=self.media_root, limits=self.limits)
        sample = placed(sample, root=self.media_root, limits=self.limits)
        return self._varied(sample, media, epoch)

    def _varied(self, sample: Sample, media: Media, epoch: int) -> tuple[Sample, Media]:
        if self.augmentation is None:
            return sample, media
        return augment(sample, media, self.augmentation, seed=self.augment_seed, epoch=epoch)

    def _with_kept(self, kept: KeptFeatures, sample: Sample, epoch: int) -> Encoded:
        """The sample from what is kept of its media; where nothing is, as ever, with the key to keep it under."""
        names = media_in_order(sample)
        text, _ = self._varied(sample, Media(), epoch)
        turns = spelt_out(self.processor, text, root=self.media_root, limits=self.limits).turns
        media = kept.of(names)
        try:
            encoded, count = encode_turns(self.processor, turns, media, self.max_length, self.texts)
            return encoded | media.features(count)
        except NotKeptError:
            decoded = DecodedMedia(self.processor, self._decoded(sample, epoch)[1])
            encoded, count = encode_turns(self.processor, turns, decoded, self.max_length, self.texts)
            if count < len(names):
                kept.keep_texts(names, decoded.whole)
            return encoded | kept.wanted(names[:count], decoded.used)
