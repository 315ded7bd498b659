"""Steps cut by cost: properties over random lengths, pictures, budgets and process counts."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from accelerate.data_loader import SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.data import cutting
from mmpeft.data.balancing import CostBatchSampler, Cut, Steps, fullest_step
from mmpeft.data.batching import GlobalBatchSampler
from mmpeft.data.cutting import Bounds, CostModel, MicroBatch, count_micro_batches, cut, items_of
from mmpeft.data.sample_lengths import LENGTHS

BUDGET = 400
WORLDS = (1, 2, 3)


@st.composite
def lengths(draw, most=60):
    """Text alone, and pictures that several samples ask about, with up to two beginnings each."""
    rows = []
    for _ in range(draw(st.integers(1, most))):
        picture = draw(st.integers(0, 6))
        beginning = draw(st.integers(0, 2)) if picture else 0
        shared = 40 + 10 * picture if beginning else 0
        tokens = draw(st.integers(max(2, shared + 2), BUDGET))
        rows.append((tokens, 40 if picture else 0, shared, picture, 10 * picture + beginning if shared else 0))
    return np.array(rows, dtype=LENGTHS)


BOUNDS = st.builds(
    Bounds,
    tokens=st.sampled_from([BUDGET, 2 * BUDGET, 5 * BUDGET]),
    packed=st.booleans(),
    share=st.just(False),
    spread=st.booleans(),
) | st.builds(Bounds, tokens=st.just(2 * BUDGET), packed=st.just(True), share=st.just(True), spread=st.booleans())


def samplers(lengths, *, size, bounds, world, epochs=2, micro=None, seed=0, longest_first=True):
    steps = Steps(
        lengths=lambda epoch: lengths,
        samples=len(lengths),
        size=size,
        seed=seed,
        share_media=bounds.share,
        longest_first=longest_first,
    )
    costs = CostModel()
    accumulation = size // (micro * world) if micro else -(-fullest_step(steps, bounds, costs, epochs) // world)
    plan = Cut(steps=steps, bounds=bounds, costs=costs, accumulation=accumulation)
    return [CostBatchSampler(plan, world=world, rank=rank) for rank in range(world)]


def epoch_of(samplers, epoch):
    """For each step, for each process, its micro-batches."""
    found = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        accumulation = sampler.accumulation
        found.append([batches[start : start + accumulation] for start in range(0, len(batches), accumulation)])
    assert len({len(rank) for rank in found}) == 1
    return list(zip(*found, strict=True))


def samples_of(step):
    return [index for rank in step for batch in rank for index in batch if index >= 0]


def held(lengths, batch, bounds):
    """Tokens that a micro-batch computes, worked out anew."""
    rows = [lengths[index if index >= 0 else -1 - index] for index in batch]
    if not bounds.packed:
        return len(rows) * max(int(row["tokens"]) for row in rows)
    total = sum(int(row["tokens"]) for row in rows)
    if bounds.share:
        for picture in {int(row["picture"]) for row in rows} - {0}:
            group = [row for row in rows if row["picture"] == picture]
            alike = len({int(row["beginning"]) for row in group}) == 1
            total -= int(group[0]["shared"]) * (len(group) - 1) if alike else 0
    return total


@settings(deadline=None, max_examples=60)
@given(lengths(), BOUNDS, st.integers(1, 24), st.sampled_from(WORLDS))
def test_micro_batches_stay_within_the_budget_and_hold_every_sample_once(lengths, bounds, size, world):
    ranks = samplers(lengths, size=size, bounds=bounds, world=world)
    for epoch in (0, 1):
        steps = epoch_of(ranks, epoch)
        assert sorted(index for step in steps for index in samples_of(step)) == list(range(len(lengths)))
        assert [len(samples_of(step)) for step in steps[:-1]] == [size] * (len(steps) - 1)
        for step in steps:
            assert {len(rank) for rank in step} == {ranks[0].accumulation}
            for batch in (batch for rank in step for batch in rank):
                assert held(lengths, batch, bounds) <= bounds.tokens
                assert len(batch) == 1 or min(batch) >= 0


def test_no_sample_is_lost_to_the_last_bit_of_a_cost():
    for longest in range(2, 400):
        rows = np.array([(longest, 0, 0, 0, 0)] + [(2, 0, 0, 0, 0)] * 4, dtype=LENGTHS)
        assert cut(items_of(rows), 1, Bounds(tokens=5 * BUDGET), CostModel()) == [[0, 1, 2, 3, 4]]


def test_too_few_micro_batches_are_named_before_a_sample_is_lost():
    rows = np.array([(300, 0, 0, 0, 0)] * 3, dtype=LENGTHS)
    with pytest.raises(ValueError, match="3 samples need 3 micro-batches; 2 were given"):
        cut(items_of(rows), 2, Bounds(tokens=BUDGET), CostModel())


@settings(deadline=None, max_examples=40)
@given(lengths(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from(WORLDS), st.booleans())
def test_without_a_budget_micro_batches_hold_as_many_samples_as_before(lengths, micro, accumulation, world, packed):
    size = micro * accumulation * world
    bounds = Bounds(samples=micro, packed=packed, share=packed)
    ranks = samplers(lengths, size=size, bounds=bounds, world=world, micro=micro)
    plain = [
        GlobalBatchSampler(length=len(lengths), micro=micro, accumulation=accumulation, world=world, rank=rank, seed=0)
        for rank in range(world)
    ]
    assert [len(rank) for rank in ranks] == [len(rank) for rank in plain]
    steps = epoch_of(ranks, 0)
    assert sorted(index for step in steps for index in samples_of(step)) == list(range(len(lengths)))
    assert {len(batch) for step in steps[: len(lengths) // size] for rank in step for batch in rank} <= {micro}


@settings(deadline=None, max_examples=40)
@given(lengths(), BOUNDS, st.integers(1, 24))
def test_a_step_holds_the_same_samples_on_any_number_of_processes_and_under_any_budget(lengths, bounds, size):
    tight = Bounds(tokens=BUDGET, packed=bounds.packed, share=bounds.share)
    for epoch in (0, 1):
        one = [
            sorted(samples_of(step)) for step in epoch_of(samplers(lengths, size=size, bounds=bounds, world=1), epoch)
        ]
        for world, other in ((2, bounds), (3, bounds), (1, tight)):
            ranks = samplers(lengths, size=size, bounds=other, world=world)
            assert [sorted(samples_of(step)) for step in epoch_of(ranks, epoch)] == one


def test_later_epochs_have_the_steps_of_plain_batches():
    lengths = np.array([(5 + index % 7, 0, 0, 0, 0) for index in range(50)], dtype=LENGTHS)
    ranks = samplers(lengths, size=8, bounds=Bounds(tokens=40), world=2)
    plain = GlobalBatchSampler(length=50, micro=8, accumulation=1, world=1, rank=0, seed=0)
    plain.set_epoch(1)
    assert [sorted(samples_of(step)) for step in epoch_of(ranks, 1)] == [sorted(batch) for batch in plain]


@settings(deadline=None, max_examples=20)
@given(lengths(), BOUNDS, st.integers(1, 12), st.sampled_from((1, 2)), st.integers(0, 8))
def test_going_on_in_the_middle_of_an_epoch_takes_what_would_have_come(lengths, bounds, size, world, done):
    for sampler in samplers(lengths, size=size, bounds=bounds, world=world):
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            whole = list(sampler)
            done = min(done, len(whole))
            assert list(SkipBatchSampler(sampler, skip_batches=done)) == whole[done:]
            assert list(islice(sampler, done)) == whole[:done]


@settings(deadline=None, max_examples=40)
@given(lengths(most=90), st.integers(1, 12), st.integers(0, 9))
def test_the_first_step_has_most_tokens_and_the_longest_sample(lengths, size, seed):
    steps = list(Steps(lengths=lambda epoch: lengths, samples=len(lengths), size=size, seed=seed).of(0))
    whole = steps[: len(lengths) // size]
    if whole and len(lengths) > size:
        totals = [int(lengths["tokens"][step].sum()) for step in whole]
        assert totals[0] == max(totals)
        assert lengths["tokens"][steps[0]].max() == lengths["tokens"].max()
    order = Steps(lengths=lambda epoch: lengths, samples=len(lengths), size=size, seed=seed, longest_first=False)
    plain = list(order.of(0))
    # One step moved, and two samples changed places.
    moved = sum(sorted(step) not in map(sorted, plain) for step in steps)
    assert moved <= 2


@pytest.mark.parametrize("packed", [False, True])
def test_memory_fails_at_the_first_step_if_it_fails(packed):
    """However a step is cut, no later micro-batch is more than a few per cent larger than the largest of the first."""
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.lognormal(5, 0.8, 4000).astype(int) + 2, 2000)
    lengths = np.array([(length, 0, 0, 0, 0) for length in tokens], dtype=LENGTHS)
    for bounds, micro in ((Bounds(samples=4, packed=packed), 4), (Bounds(tokens=4096, packed=packed), None)):
        steps = epoch_of(samplers(lengths, size=32, bounds=bounds, world=1, micro=micro, epochs=1), 0)
        largest = [max(held(lengths, batch, bounds) for batch in step[0]) for step in steps]
        assert largest[0] >= 0.97 * max(largest)


def test_shuffling_is_honest():
    """Another order each epoch; over many, each sample comes about as often in each part of an epoch."""
    lengths = np.array([(2 + index, 0, 0, 0, 0) for index in range(60)], dtype=LENGTHS)
    (sampler,) = samplers(lengths, size=6, bounds=Bounds(tokens=600), world=1, epochs=1)
    places = np.zeros((60, 10))
    seen = set()
    for epoch in range(1, 301):
        sampler.set_epoch(epoch)
        steps = [tuple(sorted(step)) for step in sampler.steps.of(epoch)]
        seen.add(tuple(steps))
        for number, step in enumerate(steps):
            places[list(step), number] += 1
    assert len(seen) == 300
    # 300 epochs, ten steps: 30 each, within five standard deviations.
    assert abs(places - 30).max() < 5 * (300 * 0.1 * 0.9) ** 0.5
    together = Counter(pair for steps in seen for step in steps for pair in [(0, 59)] if {0, 59} <= {*step})
    # Short and long share a step as often as chance has it: 5 of 59.
    assert together[0, 59] == pytest.approx(300 * 5 / 59, abs=20)


def uneven(batches, lengths, bounds, costs):
    prices = []
    for batch in batches:
        held = MicroBatch(bounds, costs)
        for item in items_of(lengths[list(batch)]):
            held.put([item])
        prices.append(held.cost)
    return max(prices) / np.mean(prices)


def test_micro_batches_cost_about_the_same_with_vision_counted_apart():
    """Pictures against texts of the same length: by tokens alone the towers' work would be left out."""
    rows = [(600, 576 * (number % 8 == 0), 0, 0, 0) for number in range(64)]
    lengths = np.array(rows, dtype=LENGTHS)
    costs, bounds = CostModel(vision=2.0), Bounds(tokens=8192, packed=True)
    items = items_of(lengths)
    batches = cut(items, 8, bounds, costs)
    assert uneven(batches, lengths, bounds, costs) < 1.05
    blind = cut(items, 8, bounds, CostModel(vision=0.0))
    assert uneven(blind, lengths, bounds, costs) > 1.05


def test_padded_batches_of_like_lengths_hold_little_padding():
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 1000, 64)
    lengths = np.array([(length, 0, 0, 0, 0) for length in tokens], dtype=LENGTHS)
    for bounds, micro in ((Bounds(samples=8), 8), (Bounds(tokens=8000), None)):
        ranks = samplers(lengths, size=64, bounds=bounds, world=2, micro=4 if micro else None, epochs=1)
        ranks[0].set_epoch(1)
        list(ranks[0])
        figures = ranks[0].figures
        assert figures.padding < 0.35 * figures.plain_padding
        assert figures.tokens == tokens.sum()
        assert 1 <= figures.imbalance < 1.25


def test_samples_on_a_picture_stay_together_and_are_counted_once():
    rows = [(600 + number, 576, 580, 1 + number // 8, 1 + number // 8) for number in range(32)]
    lengths = np.array(rows, dtype=LENGTHS)
    bounds = Bounds(tokens=1000, packed=True, share=True)
    items = items_of(lengths)
    assert count_micro_batches(items, bounds, CostModel()) == 4
    batches = cut(items, 4, bounds, CostModel())
    assert sorted(batches) == [list(range(start, start + 8)) for start in range(0, 32, 8)]
    # What does not fit beside its picture's others begins a micro-batch of its own.
    narrow = Bounds(tokens=700, packed=True, share=True)
    for batch in cut(items, count_micro_batches(items, narrow, CostModel()), narrow, CostModel()):
        assert held(lengths, batch, narrow) <= 700


def test_two_beginnings_of_a_picture_do_not_share_a_row():
    rows = [(100, 60, 70, 1, 5), (100, 60, 70, 1, 6), (100, 60, 70, 1, 5), (100, 60, 70, 1, 6)]
    bounds = Bounds(tokens=1000, packed=True, share=True)
    assert sorted(cut(items_of(np.array(rows, dtype=LENGTHS)), 2, bounds, CostModel())) == [[0, 2], [1, 3]]


def test_a_step_with_few_samples_has_blanks():
    lengths = np.array([(9, 0, 0, 0, 0), (5, 0, 0, 0, 0), (7, 0, 0, 0, 0)], dtype=LENGTHS)
    ranks = samplers(lengths, size=2, bounds=Bounds(tokens=12), world=2, longest_first=False)
    last = epoch_of(ranks, 0)[-1]
    (alone,) = samples_of(last)
    blanks = [index for rank in last for batch in rank for index in batch if index < 0]
    assert blanks == [-1 - alone]


def _of_all(items, count, bounds, costs):
    """Micro-batches as `cut` makes them of rows, by looking at every one of them for each unit."""
    units = cutting._dearest_first(items, bounds, costs)[::-1]
    found = [MicroBatch(bounds, costs) for _ in range(count)]
    while units and found is not None:
        unit = units.pop()
        homes = [batch for batch in found if batch.holds(unit)]
        if not homes and len(unit) > 1:
            units += [unit[len(unit) // 2 :], unit[: len(unit) // 2]]
            continue
        if not homes and bounds.samples is not None:
            homes = [batch for batch in found if len(batch.items) < bounds.samples]
        if not homes:
            found = None
        else:
            min(homes, key=lambda batch: batch.cost).put(unit)
    found = [batch for batch in found if batch.items] if found is not None else _first_fit(items, bounds, costs)
    while len(found) < count and any(len(batch.items) > 1 for batch in found):
        parted = max((batch for batch in found if len(batch.items) > 1), key=lambda batch: batch.cost)
        found.remove(parted)
        half = len(parted.items) // 2
        found += [cutting._filled(part, bounds, costs) for part in (parted.items[:half], parted.items[half:])]
    found.sort(key=lambda batch: -batch.cost)
    batches = [sorted(item.place for item in batch.items) for batch in found]
    return batches + [[] for _ in range(count - len(batches))]


def _first_fit(items, bounds, costs):
    found = []
    for unit in cutting._dearest_first(items, bounds, costs):
        home = next((batch for batch in found if batch.holds(unit)), None)
        if home is None:
            home = MicroBatch(bounds, costs)
            found.append(home)
        home.put(unit)
    return found


@settings(deadline=None, max_examples=150)
@given(lengths(), st.booleans(), st.sampled_from([None, 1, 2, 3]), st.sampled_from([1, 1.3, 4]), st.integers(0, 20))
def test_rows_are_those_that_looking_at_every_micro_batch_gives(lengths, share, samples, budget, more):
    bounds = Bounds(tokens=None if samples else int(BUDGET * budget), samples=samples, packed=True, share=share)
    items, costs = items_of(lengths), CostModel(attention=1e-2)
    fewest = _first_fit(items, bounds, costs)
    assert count_micro_batches(items, bounds, costs) == len(fewest)
    assert cut(items, len(fewest) + more, bounds, costs) == _of_all(items, len(fewest) + more, bounds, costs)


@pytest.mark.parametrize("bounds", [Bounds(samples=4, packed=True), Bounds(tokens=8 * BUDGET, packed=True)])
def test_cutting_for_ten_thousand_processes_looks_at_few_micro_batches_for_each_sample(monkeypatch, bounds):
    looked = 0
    holds = MicroBatch.holds

    def counting(self, *args):
        nonlocal looked
        looked += 1
        return holds(self, *args)

    monkeypatch.setattr(MicroBatch, "holds", counting)
    rng = np.random.default_rng(0)
    lengths = np.zeros(20_000, dtype=LENGTHS)
    lengths["tokens"] = rng.lognormal(4.5, 0.7, len(lengths)).clip(2, BUDGET)
    items = items_of(lengths)
    count = count_micro_batches(items, bounds, CostModel())
    cut(items, -(-count // 1000) * 1000, bounds, CostModel())
    assert looked < 10 * len(items)


def test_the_first_process_alone_counts_figures():
    lengths = np.array([(5 + index % 7, 0, 0, 0, 0) for index in range(50)], dtype=LENGTHS)
    ranks = samplers(lengths, size=8, bounds=Bounds(samples=4, packed=True), world=2, micro=4)
    epoch_of(ranks, 0)
    assert [rank.figures.steps for rank in ranks] == [7, 0]
    assert ranks[1].figures.imbalance == 0


@settings(deadline=None, max_examples=100)
@given(lengths(), st.sampled_from([None, 1, 3]), st.sampled_from([1, 2.5]), st.integers(1, 4000))
def test_neighbours_are_parted_where_a_micro_batch_holds_no_more(lengths, samples, budget, most):
    bounds, costs = Bounds(tokens=None if samples else int(BUDGET * budget), samples=samples), CostModel(attention=1e-2)
    ordered = cutting._longest_first(items_of(lengths))
    ends, batch = [], MicroBatch(bounds, costs)
    for place, item in enumerate(ordered):
        if place and not batch.holds([item], most):
            ends.append(place)
            batch = MicroBatch(bounds, costs)
        batch.put([item])
    assert cutting._ends(ordered, most, bounds, costs) == [*ends, len(ordered)]
