"""A step's samples cut into micro-batches of about equal cost.

    packed    units (samples on one picture stay together), dearest first, each to the micro-batch that costs least
    padded    samples by length, cut into neighbours, so that little is padded

    lengths 9 8 5 4 2 2 1 1, four micro-batches      packed  9 | 8 | 5 2 1 | 4 2 1      padded  9 | 8 | 5 4 | 2 2 1 1

What a micro-batch costs, in tokens of a language model without attention:

    tokens + attention * (pairs of tokens that see each other) + vision * (tokens that stand for media)
"""

import bisect
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from mmpeft.data.sample_lengths import Lengths

HIDDEN_SIZE = 2048
"""Of a language model of which nothing else is known."""

_EXACT = 0.01
"""How near the dearest of neighbours comes to the least that it could cost."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What a sample costs beside its tokens, in the cost of one token in the language model's matrix products.

    Attributes:
        attention: of two tokens that see each other. A layer of hidden size h spends 24 h^2 FLOP on a token (12 h^2
            weights) and 4 h on a pair (one product for the score, one for the value): 1 / 6 h.
        vision: of a token that stands for media, in the towers; by weights, the share of the towers' in the language
            model's times the patches that become one token. 0 where the towers' outputs come from a cache.
    """

    attention: float = 1 / (6 * HIDDEN_SIZE)
    vision: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a micro-batch may hold.

    Attributes:
        tokens: most tokens, of a row those computed, of a padded batch rows x longest; None for no limit.
        samples: most samples; None for no limit.
        packed: whether samples go through the model as a row without padding.
        share: whether samples in a row that begin alike on the same media run that beginning once.
        spread: whether samples are spread by cost; else micro-batches are filled in the order of the step.
    """

    tokens: int | None = None
    samples: int | None = None
    packed: bool = False
    share: bool = False
    spread: bool = True


@dataclass(frozen=True)
class Item:
    """A sample of a step, by its place in it; numbers as in `mmpeft.data.sample_lengths.LENGTHS`."""

    place: int
    tokens: int
    media: int
    shared: int = 0
    picture: int = 0
    beginning: int = 0


def items_of(lengths: Lengths) -> list[Item]:
    """The samples of a step, given the lengths [samples] of them."""
    return [Item(place, *row) for place, row in enumerate(lengths.tolist())]


@dataclass(eq=False)
class MicroBatch:
    """A micro-batch as it grows; where a beginning is shared, more tokens than are computed may be counted.

    Attributes:
        items: its samples.
        tokens: what `Bounds.tokens` bounds.
        pairs: of tokens that see each other.
        media: tokens that the towers make.
        pictures: of each picture the beginning that samples here share, 0 where they share none.
    """

    bounds: Bounds
    costs: CostModel
    items: list[Item] = field(default_factory=list)
    tokens: int = 0
    pairs: float = 0.0
    media: int = 0
    longest: int = 0
    pictures: dict[int, int] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """See `CostModel`."""
        return self.tokens + self.costs.attention * self.pairs + self.costs.vision * self.media

    def holds(self, unit: Sequence[Item], most: float = math.inf) -> bool:
        """Whether a unit may come in, too, at a cost of at most `most` (of padded batches alone)."""
        bounds, rows = self.bounds, len(self.items) + len(unit)
        if bounds.samples is not None and rows > bounds.samples:
            return False
        if bounds.packed:
            # A row shares of one picture what all of its samples on it begin with: two beginnings would share little.
            alike = not bounds.share or self.pictures.get(unit[0].picture, unit[0].beginning) == unit[0].beginning
            return alike and (bounds.tokens is None or self.tokens + self._added(unit) <= bounds.tokens)
        longest = max(self.longest, *(item.tokens for item in unit))
        media = self.media + sum(item.media for item in unit)
        cost = rows * (longest + self.costs.attention * longest**2 / 2) + self.costs.vision * media
        return cost <= most and (bounds.tokens is None or rows * longest <= bounds.tokens)

    def put(self, unit: Sequence[Item]) -> None:
        """Take a unit's samples in."""
        for item in unit:
            spared = self._spared(item)
            self.tokens += item.tokens - spared
            self.pairs += (item.tokens**2 - spared**2) / 2
            self.media += 0 if spared else item.media
            self.longest = max(self.longest, item.tokens)
            self.items.append(item)
            if self.bounds.share and item.picture:
                known = self.pictures.setdefault(item.picture, item.beginning)
                self.pictures[item.picture] = known if known == item.beginning else 0
        if not self.bounds.packed:
            self.tokens = len(self.items) * self.longest
            self.pairs = len(self.items) * self.longest**2 / 2

    def _spared(self, item: Item) -> int:
        """Tokens of a sample that the row holds already."""
        known = self.bounds.share and self.pictures.get(item.picture) == item.beginning
        return item.shared if known else 0

    def _added(self, unit: Sequence[Item]) -> int:
        """What a unit adds to a row: of what its samples share, it holds the first one's, if that."""
        spared = sum(item.shared for item in unit[1:]) + self._spared(unit[0])
        return sum(item.tokens for item in unit) - spared


def units_of(items: Sequence[Item], bounds: Bounds) -> list[list[Item]]:
    """Samples that should not be parted: those that begin alike on the same media, as many as a micro-batch holds."""
    if not (bounds.packed and bounds.share):
        return [[item] for item in items]
    groups: dict[object, list[Item]] = {}
    for item in items:
        key = (item.picture, item.beginning) if item.shared else ("alone", item.place)
        groups.setdefault(key, []).append(item)
    return [unit for group in groups.values() for unit in _parted(group, bounds)]


def _parted(group: Sequence[Item], bounds: Bounds) -> Iterable[list[Item]]:
    unit: list[Item] = []
    tokens = 0
    for item in group:
        added = item.tokens - (item.shared if unit else 0)
        full = bounds.samples is not None and len(unit) == bounds.samples
        if unit and (full or (bounds.tokens is not None and tokens + added > bounds.tokens)):
            yield unit
            unit, tokens, added = [], 0, item.tokens
        unit.append(item)
        tokens += added
    yield unit


def count_micro_batches(items: Sequence[Item], bounds: Bounds, costs: CostModel) -> int:
    """How many micro-batches of a step's samples suffice for `cut` on one process."""
    return len(_fewest(items, bounds, costs))


def cut(items: Sequence[Item], count: int, bounds: Bounds, costs: CostModel) -> list[list[int]]:
    """The places of a step's samples in `count` micro-batches, the dearest first; some are empty if samples are few.

    Args:
        items: the step's samples.
        count: at least `count_micro_batches(items, bounds, costs)`.

    Raises:
        ValueError: they are too few, and samples would be lost.
    """
    if not bounds.spread:
        found = _fewest(items, bounds, costs)
    elif bounds.packed:
        found = _spread(items, count, bounds, costs) or _fewest(items, bounds, costs)
    else:
        found = _neighbours(items, count, bounds, costs)
    if len(found) > count:
        raise ValueError(f"{len(items)} samples need {len(found)} micro-batches; {count} were given")
    found = sorted(_halved(found, count, bounds, costs), key=lambda batch: -batch.cost)
    batches = [sorted(item.place for item in batch.items) for batch in found]
    return batches + [[] for _ in range(count - len(batches))]


def _halved(found: Sequence[MicroBatch], count: int, bounds: Bounds, costs: CostModel) -> Iterable[MicroBatch]:
    """As many as `count`, as far as there are samples: the dearest of several samples is cut in two, and so on."""
    whole = dict(enumerate(found))
    dearest = [(-batch.cost, place) for place, batch in whole.items() if len(batch.items) > 1]
    heapq.heapify(dearest)
    place = len(whole)
    while len(whole) < count and dearest:
        items = whole.pop(heapq.heappop(dearest)[1]).items
        for part in (items[: len(items) // 2], items[len(items) // 2 :]):
            whole[place] = _filled(part, bounds, costs)
            if len(part) > 1:
                heapq.heappush(dearest, (-whole[place].cost, place))
            place += 1
    return whole.values()


def _filled(items: Sequence[Item], bounds: Bounds, costs: CostModel) -> MicroBatch:
    batch = MicroBatch(bounds, costs)
    for item in items:
        batch.put([item])
    return batch


def _dearest_first(items: Sequence[Item], bounds: Bounds, costs: CostModel) -> list[list[Item]]:
    priced = [(_filled(unit, bounds, costs).cost, unit) for unit in units_of(items, bounds)]
    return [unit for _, unit in sorted(priced, key=lambda pair: (-pair[0], pair[1][0].place))]


def _fewest(items: Sequence[Item], bounds: Bounds, costs: CostModel) -> list[MicroBatch]:
    """As few micro-batches as a simple way finds: of rows the first that a unit fits into, else the last one."""
    found: list[MicroBatch] = []
    if bounds.packed and bounds.spread:
        units = _dearest_first(items, bounds, costs)
        rooms = _Rooms(len(units))
        holders: dict[int, list[int]] = {}
        for unit in units:
            # A micro-batch that holds the unit's picture may spare some of it; in the others it takes all of its room.
            sparing = holders.setdefault(unit[0].picture, []) if bounds.share and unit[0].picture else []
            places = [place for place in sparing if found[place].holds(unit)][:1]
            needed = sum(item.tokens for item in unit) - sum(item.shared for item in unit[1:])
            place = rooms.first(needed)
            while place is not None and not found[place].holds(unit):
                place = rooms.first(needed, place + 1)
            places += [] if place is None else [place]
            if not places:
                places = [len(found)]
                found.append(MicroBatch(bounds, costs))
            found[min(places)].put(unit)
            rooms.leave(min(places), _room(found[min(places)]))
            if min(places) not in sparing:
                bisect.insort(sparing, min(places))
        return found
    for item in _longest_first(items) if bounds.spread else items:
        if not found or not found[-1].holds([item]):
            found.append(MicroBatch(bounds, costs))
        found[-1].put([item])
    return found


def _room(batch: MicroBatch) -> float:
    """Tokens that may still come in; below 0 if no sample may."""
    if batch.bounds.samples is not None and len(batch.items) >= batch.bounds.samples:
        return -1
    return math.inf if batch.bounds.tokens is None else batch.bounds.tokens - batch.tokens


class _Rooms:
    """The room that each of many places has, and the first place with enough, found in the logarithm of their number.

                 7                each node: the most that its places have
              3     7
    places   3 1   0 7            the first with room for 2 behind the first: the last
    """

    def __init__(self, places: int) -> None:
        self._size = 1 << max(0, places - 1).bit_length()
        self._most: list[float] = [-1] * (2 * self._size)

    def leave(self, place: int, room: float) -> None:
        """A place has so much room from now on."""
        node = place + self._size
        self._most[node] = room
        while node := node // 2:
            self._most[node] = max(self._most[2 * node], self._most[2 * node + 1])

    def first(self, needed: float, start: int = 0) -> int | None:
        """The first place from `start` on with room for as much; None if there is none."""
        if start >= self._size:
            return None
        node = start + self._size
        while self._most[node] < needed:
            while node % 2:
                node //= 2
            if not node:
                return None
            node += 1
        while node < self._size:
            node *= 2
            if self._most[node] < needed:
                node += 1
        return node - self._size


def _longest_first(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (-item.tokens, item.place))


def _spread(items: Sequence[Item], count: int, bounds: Bounds, costs: CostModel) -> list[MicroBatch] | None:
    """Units, dearest first, each where it costs least; None if one does not fit anywhere."""
    found = [MicroBatch(bounds, costs) for _ in range(count)]
    # Of equal cost the first; those without room for any sample are left out for good.
    cheapest = [(0.0, place) for place in range(count)]
    units = _dearest_first(items, bounds, costs)[::-1]
    while units:
        unit = units.pop()
        place = _taken(cheapest, found, unit)
        if place is None and len(unit) > 1:
            units += [unit[len(unit) // 2 :], unit[: len(unit) // 2]]
            continue
        if place is None and bounds.samples is not None and cheapest:
            # Two beginnings of one picture in a row: they share less, but there is no other room.
            place = heapq.heappop(cheapest)[1]
        if place is None:
            return None
        found[place].put(unit)
        if bounds.samples is None or len(found[place].items) < bounds.samples:
            heapq.heappush(cheapest, (found[place].cost, place))
    return [batch for batch in found if batch.items]


def _taken(cheapest: list[tuple[float, int]], found: Sequence[MicroBatch], unit: Sequence[Item]) -> int | None:
    """The cheapest place that holds a unit, taken out of the heap; None if none does."""
    aside = []
    chosen = None
    while cheapest and chosen is None:
        entry = heapq.heappop(cheapest)
        if found[entry[1]].holds(unit):
            chosen = entry[1]
        else:
            aside.append(entry)
    for entry in aside:
        heapq.heappush(cheapest, entry)
    return chosen


def _neighbours(items: Sequence[Item], count: int, bounds: Bounds, costs: CostModel) -> list[MicroBatch]:
    """Samples by length, cut into `count` runs of neighbours at most whose dearest is as cheap as can be."""
    ordered = _longest_first(items)
    low, high = 0.0, _filled(ordered, bounds, costs).cost
    # Without a limit: a cost summed in another order may lie above `high` by the last bit.
    best = _ends(ordered, math.inf, bounds, costs)
    while high - low > max(1.0, _EXACT * high):
        middle = (low + high) / 2
        found = _ends(ordered, middle, bounds, costs)
        if len(found) <= count:
            best, high = found, middle
        else:
            low = middle
    return [_filled(ordered[start:end], bounds, costs) for start, end in pairwise([0, *best])]


def _ends(ordered: Sequence[Item], most: float, bounds: Bounds, costs: CostModel) -> list[int]:
    """Where runs of neighbours end that each hold as many as they may at a cost of `most`: see `MicroBatch.holds`."""
    rows_allowed = math.inf if bounds.samples is None else bounds.samples
    tokens_allowed = math.inf if bounds.tokens is None else bounds.tokens
    ends: list[int] = []
    rows, media, longest, row = 0, 0, 0, 0.0
    for place, item in enumerate(ordered):
        media += item.media
        rows += 1
        cost = rows * row + costs.vision * media
        if rows > 1 and (rows > rows_allowed or cost > most or rows * longest > tokens_allowed):
            ends.append(place)
            rows = 1
        if rows == 1:
            # The longest comes first.
            media, longest = item.media, item.tokens
            row = longest + costs.attention * longest**2 / 2
    return [*ends, len(ordered)]
