"""Samples whose media's features are kept: encoded without a picture being opened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.expand import Encoded, Expansion
from mmpeft.data.feature_keys import FeatureKeys, Named, feature_keys
from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
from mmpeft.data.join_features import HEAVY
from mmpeft.data.labels import Conversation
from mmpeft.data.load_media import MediaLimits


class NotKeptError(Exception):
    """Nothing is kept of a sample's media; they have to be decoded."""


class KeptFeatures:
    """What is kept of the media of one data file's samples, and under which keys.

    Args:
        processor: encodes the samples.
        store: where features are kept.
        root: the folder that media names are relative to.
        limits: how much of each medium is decoded.
        identity: of the weights that make the features (`FeaturePlan.identity`).
    """

    def __init__(self, processor: Any, store: FeatureStore, *, root: Path, limits: MediaLimits, identity: str) -> None:
        self.store = store
        self.keys: FeatureKeys = feature_keys(processor, root=root, limits=limits, identity=identity)

    def of(self, media: Sequence[Named]) -> "KeptMedia":
        """The media of one sample, in the order of its text."""
        return KeptMedia(self.store, self.keys, media)

    def wanted(self, media: Sequence[Named], expansion: Expansion | None) -> dict[str, Any]:
        """What a sample has to say so that features are kept which are not yet: `features_key`, `features_rest`."""
        if not media or expansion is None:
            return {}
        heavy = {name: (tuple(t.shape), t.dtype) for name, t in expansion.tensors.items() if name in HEAVY}
        rest = KeptExpansion(
            replacements=expansion.replacements,
            modalities=expansion.modalities,
            tensors={name: tensor for name, tensor in expansion.tensors.items() if name not in HEAVY},
            shapes=heavy,
        )
        return {"features_key": self.keys.of(media), "features_rest": rest}

    def keep_texts(self, media: Sequence[Named], whole: Expansion | None) -> None:
        """Keep the texts in the place of a sample's media, some of which lie behind its cut.

        Features are kept of those before it alone, and where it falls, the texts of all of them decide.
        """
        if whole is not None:
            texts = KeptExpansion(replacements=whole.replacements, modalities=whole.modalities)
            self.store.write(self.keys.of(media, texts=True), Entry(tensors={}, expansion=texts))


class KeptMedia:
    """A `MediaSource` that reads what is kept."""

    def __init__(self, store: FeatureStore, keys: FeatureKeys, media: Sequence[Named]) -> None:
        self._store, self._keys, self._media = store, keys, media
        self._key = ""
        self._entry: Entry | None = None
        self._whole: tuple[str, ...] = ()

    @property
    def counts(self) -> Mapping[Modality, int]:
        """How many media there are of each kind."""
        return {modality: sum(kind == modality for kind, _ in self._media) for modality in MODALITIES}

    def expansion(self, conversation: Conversation, kept: int | None) -> Expansion:
        """See `MediaSource`.

        Raises:
            NotKeptError: nothing is kept of these media.
        """
        media = self._media if kept is None else self._media[:kept]
        if not media:
            return Expansion(replacements=(), tensors={})
        self._key = self._keys.of(media)
        self._entry = found = self._store.read(self._key)
        if found is None and kept is None:
            found = self._texts()
        if found is None:
            raise NotKeptError
        rest = found.expansion
        if kept is None:
            self._whole = rest.replacements
        elif rest.replacements != self._whole[:kept]:
            # They are encoded together, and cannot be cut apart: that is for whoever decodes them to say.
            raise NotKeptError
        return Expansion(replacements=rest.replacements, tensors=dict(rest.tensors), modalities=rest.modalities)

    def _texts(self) -> Entry | None:
        key = self._keys.of(self._media, texts=True)
        return self._store.read(key) if self._store.has(key) else None

    def features(self, count: int) -> Encoded | dict[str, Any]:
        """What a sample has in the place of pixels: `features_key`, `features`, `features_shapes`; {} without media.

        Raises:
            NotKeptError: only the texts of all of its media are kept, and none of them lies behind the cut.
        """
        if not count:
            return {}
        if self._entry is None:
            raise NotKeptError
        return {
            "features_key": self._key,
            "features": dict(self._entry.tensors),
            "features_shapes": dict(self._entry.expansion.shapes),
        }
