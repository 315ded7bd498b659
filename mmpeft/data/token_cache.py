"""Texts that were laid out and tokenised before: the same conversation comes up again in every epoch and stage.

    turns                            ->  the chat template's text, and where answers and media stand in it
    turns, what replaces the media   ->  input_ids, which of them are labelled, where media stand

Both depend on nothing else but the processor, whose chat template is part of the key. So an alternative wording, or a
picture that takes another number of tokens, has a place of its own, and a cut to `max_length` comes afterwards.
"""

import hashlib
import json
import zlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from mmpeft.data.labels import (
    Conversation,
    LabelledTokens,
    answers_of,
    conversation_of,
    expanded,
    label_conversation,
)
from mmpeft.data.shared_table import SharedTable
from mmpeft.data.types import Turn

LIMIT_BYTES = 256 << 20
"""Memory of what a training process and its workers keep together, compressed: some 350,000 samples of 250 tokens."""

_SLOTS = 65
"""Processes that count apart: the training process and 64 workers."""


class TokenCache:
    """What one data file's texts become: each is laid out and tokenised by one worker, for all workers and epochs.

    A training process and the workers that it forks share one `SharedTable`; spawned workers have each their own.
    Once `limit_bytes` are taken nothing more is kept and nothing is given up: samples come round in turn, so that
    what was given up for another would be the next to be asked for.

    Args:
        limit_bytes: memory of all these processes together.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self._table = SharedTable(limit_bytes)
        # Found and not found, a row a process: shared memory in which none writes where another does.
        self._counts = torch.zeros(_SLOTS, 2, dtype=torch.int64).share_memory_()

    @property
    def limit_bytes(self) -> int:
        """Memory that it may take."""
        return self._table.size

    @property
    def held_bytes(self) -> int:
        """Memory that it takes, in all processes together."""
        return self._table.held_bytes

    @property
    def full(self) -> bool:
        """Whether anything found no room."""
        return self._table.refused > 0

    def counts(self) -> tuple[int, int]:
        """Of all processes that hold this cache: texts whose tokens were there, and texts that were tokenised."""
        found, new = self._counts.sum(dim=0).tolist()
        return found, new

    def restart_counts(self) -> None:
        """Count from zero."""
        self._counts.zero_()

    def conversation(self, processor: Any, turns: Sequence[Turn]) -> Conversation:
        """As `conversation_of`, errors included."""
        key = _key(processor, turns)
        known = self._get(key)
        if known is not None:
            text, spans, media = known
            return Conversation(text=text, spans=_pairs(spans), media=_pairs(media))
        found = conversation_of(processor, turns)
        self._put(key, (found.text, found.spans, found.media))
        return found

    def labelled(
        self, processor: Any, turns: Sequence[Turn], conversation: Conversation, replacements: Sequence[str]
    ) -> LabelledTokens:
        """The tokens of a conversation whose media are replaced so; errors as `label_conversation`."""
        key = _key(processor, turns, tuple(replacements))
        known = self._get(key)
        self._count(known is not None)
        if known is not None:
            ids, labels, media = known
            return LabelledTokens(input_ids=ids, labels=labels, media=_pairs(media))
        tokens = label_conversation(processor, expanded(conversation, replacements), answers_of(turns))
        self._put(key, (tokens.input_ids, tokens.labels, tokens.media))
        return tokens

    def _get(self, key: bytes) -> list[Any] | None:
        value = self._table.get(key)
        return None if value is None else json.loads(zlib.decompress(value))

    def _put(self, key: bytes, value: tuple[Any, ...]) -> None:
        # A picture's tokens are one token many times over.
        self._table.put(key, zlib.compress(json.dumps(value, separators=(",", ":")).encode(), level=1))

    def _count(self, found: bool) -> None:
        info = get_worker_info()
        self._counts[0 if info is None else 1 + info.id % (_SLOTS - 1), int(not found)] += 1


def _pairs(found: list[list[int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, end) for start, end in found)


def _key(processor: Any, turns: Sequence[Turn], *more: Hashable) -> bytes:
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    what = (template, len(processor.tokenizer), [(turn.role, turn.text) for turn in turns], more)
    return hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
