"""Media that several conversations are about, processed once for all of them."""

from collections.abc import Mapping
from typing import Any

from mmpeft.core.types import Modality
from mmpeft.data.encode import DecodedMedia
from mmpeft.data.expand import Expansion
from mmpeft.data.labels import Conversation
from mmpeft.data.types import Media


class SharedMedia:
    """A `MediaSource` that runs the processor once for all conversations that name its media in the same order."""

    def __init__(self, processor: Any, media: Media) -> None:
        self._decoded = DecodedMedia(processor, media)
        self._made: dict[tuple[str, ...], Expansion] = {}

    @property
    def counts(self) -> Mapping[Modality, int]:
        """How many media there are of each kind."""
        return self._decoded.counts

    def expansion(self, conversation: Conversation, kept: int | None) -> Expansion:
        """What the processor makes of the media; see `mmpeft.data.encode.MediaSource`."""
        if kept is not None:
            return self._decoded.expansion(conversation, kept)
        # What takes a medium's place depends on the order of their kinds, and on nothing else of the text.
        order = tuple(conversation.text[start:end] for start, end in conversation.media)
        if order not in self._made:
            self._made[order] = self._decoded.expansion(conversation, None)
        return self._made[order]
