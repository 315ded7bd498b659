"""Keys and values of many answers in the making: filled from a packed row, then grown by a token a step.

    packed row   p p p p a a a b b c c c c          two questions on one picture, and one on another

    slot 0       p p p p a a a y y . .              9 tokens: prompt and two of the answer
    slot 1       p p p p b b y y . . .              8
    slot 2       c c c c y y . . . . .              6

Tokens of a slot stand from the left on without a gap, so it can be emptied and filled again without touching another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_COLUMNS = 64
"""Slots are lengthened by so many tokens at once."""


class Seen:
    """What the newest token of each slot sees: its slot up to itself.

    Args:
        lengths: tokens of each slot, the newest among them.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.columns = max(lengths)
        # All layers of a device, and of a window, ask for the same.
        self._masks: dict[tuple[int | None, torch.device], torch.Tensor | None] = {}
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """LongTensor [slots]: each slot, and the column of its newest token."""
        if device not in self._places:
            lengths = torch.tensor(self.lengths, device=device)
            self._places[device] = torch.arange(len(lengths), device=device), lengths - 1
        return self._places[device]

    def mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """[slots, 1, 1, columns], True where seen; None where everything is.

        Args:
            window: how far back a layer with a sliding window sees.
        """
        key = (window, device)
        if key not in self._masks:
            self._masks[key] = self._mask(window, device)
        return self._masks[key]

    def _mask(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        narrow = window is not None and self.columns > window
        if not narrow and min(self.lengths) == self.columns:
            return None
        newest = self.places(device)[1][:, None]
        places = torch.arange(self.columns, device=device)
        seen = places <= newest
        if narrow and window is not None:
            seen &= places > newest - window
        return seen[:, None, None]


class Slots:
    """A cache of `count` slots, of which the first so many are in use.

        slots = Slots(layers=30, count=16)
        slots.fill(index, lengths); model(packed row, cache=slots.cache)
        seen = slots.advance();     model(newest token of each slot, cache=slots.cache, seen=seen)
        slots.drop([0, 2])

    Args:
        layers: of the language model.
        count: answers in the making at once.

    Attributes:
        cache: what the model's forward takes.
        lengths: tokens of each slot in use.
    """

    def __init__(self, *, layers: int, count: int) -> None:
        self.count = count
        self.lengths: list[int] = []
        self.index: torch.Tensor | None = None
        self.seen = Seen([0])
        self.columns = 0
        self._layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = Cache(layers=list(self._layers))

    def fill(self, index: torch.Tensor, lengths: Sequence[int]) -> None:
        """Take the next forward, of a packed row, into further slots.

        Args:
            index: LongTensor [prompts, columns], the place of each prompt's tokens in the row; behind its length any.
            lengths: tokens of each prompt.
        """
        self.index = index
        self.lengths += lengths
        self._make_room(index.shape[1])

    def advance(self) -> Seen:
        """Make room for one more token in each slot, which the next forward brings."""
        self.index = None
        self.lengths = [length + 1 for length in self.lengths]
        self._make_room(max(self.lengths))
        self.seen = Seen(self.lengths)
        return self.seen

    def drop(self, ended: Sequence[int]) -> list[int]:
        """Empty some slots; the last ones in use take their places.

        Returns:
            Which slot stands in each place now.
        """
        gone, used = set(ended), len(self.lengths)
        left = used - len(gone)
        holes = [slot for slot in range(left) if slot in gone]
        movers = [slot for slot in range(left, used) if slot not in gone]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            longest = max(self.lengths[mover] for mover in movers)
            for layer in self._layers:
                layer.move(movers, holes, longest)
        self.lengths = [self.lengths[slot] for slot in order]
        return order

    def _make_room(self, columns: int) -> None:
        if columns > self.columns:
            self.columns = -(-(columns + 1) // _COLUMNS) * _COLUMNS
            for layer in self._layers:
                layer.grow()


class SlotLayer(CacheLayerMixin):
    """The slots of one layer.

    Attributes:
        kept: keys and values, each [count, heads, columns, channels]; none before the first forward.
    """

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.kept: list[torch.Tensor] = []

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the slots, like these keys and values."""
        self.kept = [self._empty(key_states), self._empty(value_states)]
        self.is_initialized = True

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, for a masked value that is no number would still spoil the sum that it has no part in.
        return like.new_zeros(self.slots.count, like.shape[1], self.slots.columns, like.shape[3])

    def grow(self) -> None:
        """As many columns as the slots have now."""
        for number, before in enumerate(self.kept):
            self.kept[number] = self._empty(before)
            self.kept[number][:, :, : before.shape[2]] = before

    def move(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy slots, of so many columns, over others."""
        for kept in self.kept:
            kept[targets, :, :columns] = kept[sources, :, :columns]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a forward's keys and values.

        Args:
            key_states, value_states: [1, heads, row, channels] of a packed row, after `Slots.fill`; else [slots, heads,
                1, channels].

        Returns:
            What the forward's tokens attend to: the row, or [slots, heads, columns, channels].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.slots
        pairs = list(zip(self.kept, (key_states, value_states), strict=True))
        used = len(slots.lengths)
        if slots.index is not None:
            index = slots.index.to(key_states.device)
            for kept, states in pairs:
                kept[used - len(index) : used, :, : index.shape[1]] = states[0][:, index].transpose(0, 1)
            return key_states, value_states
        rows, places = slots.seen.places(key_states.device)
        for kept, states in pairs:
            kept[rows, :, places] = states[:, :, 0]
        keys, values = (kept[:used, :, : slots.seen.columns] for kept in self.kept)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of the longest slot."""
        return max(self.slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a forward attends to, and where they begin."""
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """-1: slots grow."""
        return -1
