"""Texts that were laid out and tokenised before: the same conversation comes up again in every epoch and stage.

    turns                            ->  the chat template's text, and where answers and media stand in it
    turns, what replaces the media   ->  input_ids (4 bytes a token), what is labelled (1), where media stand

Both depend on nothing else but the processor, whose chat template is part of the key. So an alternative wording, or a
picture that takes another number of tokens, has a place of its own, and a cut to `max_length` comes afterwards.
"""

import hashlib
import sys
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.labels import (
    Conversation,
    LabelledTokens,
    answers_of,
    conversation_of,
    expanded,
    label_conversation,
)
from mmpeft.data.types import Turn

LIMIT_BYTES = 256 << 20
"""Memory of what one process keeps: about 150,000 samples of 250 tokens."""

_SLOTS = 65
"""Processes that count apart: the training process and 64 workers."""

_OVERHEAD = 400
"""Bytes of an entry beside its text or tokens: key, tuples and places."""


class _Tokens(NamedTuple):
    input_ids: np.ndarray
    labelled: np.ndarray
    media: tuple[tuple[int, int], ...]


class TokenCache:
    """What one data file's texts become. Every process has its own; forked workers share what was there before.

    Once `limit_bytes` are taken nothing more is kept and nothing is given up: samples come round in turn, so that
    what was given up for another would be the next to be asked for.

    Args:
        limit_bytes: memory that a process keeps.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes, self.held_bytes = limit_bytes, 0
        self._conversations: dict[bytes, Conversation] = {}
        self._tokens: dict[bytes, _Tokens] = {}
        # Found and not found, a row a process: shared memory in which none writes where another does.
        self._counts = torch.zeros(_SLOTS, 2, dtype=torch.int64).share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: the counts, and nothing of what is kept."""
        return {**vars(self), "_conversations": {}, "_tokens": {}, "held_bytes": 0}

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
        known = self._conversations.get(key)
        if known is None:
            known = conversation_of(processor, turns)
            if self._takes(sys.getsizeof(known.text)):
                self._conversations[key] = known
        return known

    def labelled(
        self, processor: Any, turns: Sequence[Turn], conversation: Conversation, replacements: Sequence[str]
    ) -> LabelledTokens:
        """The tokens of a conversation whose media are replaced so; errors as `label_conversation`."""
        key = _key(processor, turns, tuple(replacements))
        known = self._tokens.get(key)
        self._count(known is not None)
        if known is not None:
            labels = np.where(known.labelled, known.input_ids, IGNORE_INDEX)
            return LabelledTokens(input_ids=known.input_ids.tolist(), labels=labels.tolist(), media=known.media)
        tokens = label_conversation(processor, expanded(conversation, replacements), answers_of(turns))
        ids = np.array(tokens.input_ids, dtype=np.int32)
        labelled = np.array(tokens.labels, dtype=np.int32) != IGNORE_INDEX
        if self._takes(ids.nbytes + labelled.nbytes):
            self._tokens[key] = _Tokens(ids, labelled, tokens.media)
        return tokens

    def _takes(self, size: int) -> bool:
        if self.held_bytes + size + _OVERHEAD > self.limit_bytes:
            return False
        self.held_bytes += size + _OVERHEAD
        return True

    def _count(self, found: bool) -> None:
        info = get_worker_info()
        self._counts[0 if info is None else 1 + info.id % (_SLOTS - 1), int(not found)] += 1


def _key(processor: Any, turns: Sequence[Turn], *more: Hashable) -> bytes:
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    what = (template, len(processor.tokenizer), [(turn.role, turn.text) for turn in turns], more)
    return hashlib.blake2b(repr(what).encode(), digest_size=16).digest()
