import json
import subprocess
import sys
import textwrap

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mmpeft.core.errors import DataError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data import prepare
from mmpeft.data.batching import GlobalBatchSampler, StreamBatchSampler, StreamCollator, StreamedRows
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.dataset import load_dataset
from mmpeft.data.formats import read_rows
from mmpeft.data.lines import line_places, read_line
from mmpeft.data.reading import read_objects
from mmpeft.data.stream import Place
from tests.data.files import gpt, human, picture, row, write_json, write_lines
from tests.plain import ENVIRONMENT
from tests.tiny import tiny_llava


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows(count):
    return [row(human(f"question {number}?"), gpt(f"answer {number}"), id=f"s{number}") for number in range(count)]


@pytest.fixture
def path(tmp_path):
    return write_lines(tmp_path / "a.jsonl", rows(37))


def stream(path, processor, **options):
    return load_dataset(path, processor=processor, streaming=True, **options)


def ids(dataset, epoch=0):
    return [dataset.row(place).sample.id for place in dataset.places(epoch)]


def test_each_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch(path, processor, cache):
    dataset = stream(path, processor, shuffle_buffer=8, seed=1)
    first = ids(dataset)
    assert sorted(first) == sorted(f"s{number}" for number in range(37))
    assert first != [f"s{number}" for number in range(37)]
    assert ids(dataset) == first == ids(stream(path, processor, shuffle_buffer=8, seed=1))
    assert ids(dataset, epoch=1) != first
    assert ids(stream(path, processor, shuffle_buffer=8, seed=2)) != first
    assert ids(stream(path, processor, shuffle_buffer=1)) == [f"s{number}" for number in range(37)]
    assert ids(stream(path, processor, shuffle_buffer=100)) != first
    assert not cache.exists()


def test_samples_are_those_of_the_indexed_data_set(tmp_path, processor):
    picture(tmp_path / "p.png")
    path = write_lines(tmp_path / "a.jsonl", [row(image="p.png"), *rows(2)])
    streamed, indexed = stream(path, processor, shuffle_buffer=1), load_dataset(path, processor=processor)
    for got, want in zip(streamed, [indexed[index] for index in range(3)], strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_other_formats_stream_too(tmp_path, processor, kind):
    if kind == "json":
        path = write_json(tmp_path / "a.json", rows(5))
    else:
        path = tmp_path / "a.csv"
        path.write_text("frage,antwort\n" + "".join(f"q{n},a{n}\n" for n in range(5)), encoding="utf-8")
    columns = {"question": "frage", "answer": "antwort"} if kind == "csv" else None
    dataset = stream(path, processor, columns=columns, shuffle_buffer=1)
    want = [row.sample for row in read_rows(path, columns=columns)]
    assert [dataset.row(place).sample for place in dataset.places(0)] == want
    assert len(list(dataset)) == 5


LINES = st.lists(
    st.sampled_from(['{"a": 1}', "", "  ", "[1, 2]", '"日本"', "null", '{"a": "' + "x" * 40 + '"}', "{"]), max_size=12
)


@given(LINES, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_places_lead_to_what_reading_the_whole_file_finds(tmp_path_factory, lines, end, last, mark):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = end.join(lines) + (end if last else "")
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
    try:
        want = list(read_objects(path))
    except DataError:
        return  # an object over several lines, which reading in one go refuses
    got = [read_line(path, place) for place in line_places(path)]
    assert [(each.line, each.value, bool(each.fault)) for each in got] == [
        (each.line, each.value, bool(each.fault)) for each in want
    ]
    assert [place.number for place in line_places(path)] == list(range(len(want)))


def test_lines_longer_than_a_chunk_are_found(tmp_path):
    values = ["x" * 1_500_000, "y", " " * 1_200_000, "z" * 1_048_576]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(values[0]), json.dumps(values[1]), values[2], json.dumps(values[3])]))
    places = list(line_places(path))
    assert [place.line for place in places] == [1, 2, 4]
    assert [read_line(path, place).value for place in places] == [values[0], values[1], values[3]]


def batches(dataset, micro, accumulation, world, steps=12):
    samplers = [
        StreamBatchSampler(dataset, steps=steps, micro=micro, accumulation=accumulation, world=world, rank=rank)
        for rank in range(world)
    ]
    out = [list(sampler) for sampler in samplers]
    assert {len(rank) for rank in out} == {len(samplers[0])} == {steps * accumulation}
    return out


def steps_of(ranks, accumulation):
    """For each step its samples, of all processes."""
    count = len(ranks[0]) // accumulation
    return [
        sorted(
            (place.epoch, place.row.number)
            for rank in ranks
            for batch in rank[step * accumulation : (step + 1) * accumulation]
            for place in batch
            if not place.blank
        )
        for step in range(count)
    ]


@pytest.mark.parametrize(("micro", "accumulation", "world"), [(1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_a_step_holds_the_same_samples_on_any_number_of_processes(path, processor, micro, accumulation, world):
    dataset = stream(path, processor, shuffle_buffer=8)
    want = steps_of(batches(dataset, 4, 1, 1), 1)
    got = batches(dataset, micro, accumulation, world)
    assert steps_of(got, accumulation) == want
    # Ten steps of four are an epoch of 37; the last of them has one sample.
    assert sorted(place for step in want[:10] for place in step) == [(0, number) for number in range(37)]
    assert [len(step) for step in want] == [4] * 9 + [1] + [4] * 2
    assert all(1 <= len(batch) <= micro for rank in got for batch in rank)


def test_in_file_order_steps_are_those_of_the_indexed_road(path, processor):
    dataset = stream(path, processor, shuffle_buffer=1)
    for rank in range(2):
        indexed = GlobalBatchSampler(length=37, micro=3, accumulation=1, world=2, rank=rank, seed=0, shuffle=False)
        streamed = StreamBatchSampler(dataset, steps=7, micro=3, accumulation=1, world=2, rank=rank)
        numbers = [
            [-1 - place.row.number if place.blank else place.row.number for place in batch] for batch in streamed
        ]
        assert numbers == list(indexed)
    assert streamed.rows == 37


def test_passing_over_samples_opens_nothing(tmp_path, processor, monkeypatch):
    picture(tmp_path / "p.png")
    path = write_lines(tmp_path / "a.jsonl", [row(image="p.png")] * 30)
    dataset = stream(path, processor, shuffle_buffer=4)
    opened = []
    whole = prepare.load_media
    monkeypatch.setattr(prepare, "load_media", lambda *args, **options: opened.append(1) or whole(*args, **options))
    sampler = StreamBatchSampler(dataset, steps=15, micro=2, accumulation=1, world=1, rank=0)
    left = list(sampler)[13:]
    assert not opened
    assert [len(dataset.take(places)) for places in left] == [2, 2]
    assert len(opened) == 4


def test_workers_share_the_rows_out(path, processor):
    dataset = stream(path, processor, shuffle_buffer=8)
    encoded = list(DataLoader(dataset, batch_size=None, num_workers=2))
    want = {tuple(sample["input_ids"].tolist()) for sample in dataset}
    assert len(encoded) == 37
    assert {tuple(sample["input_ids"].tolist()) for sample in encoded} == want
    sampler = StreamBatchSampler(dataset, steps=10, micro=4, accumulation=1, world=1, rank=0)
    collator = MultimodalCollator(processor)
    with_workers, without = (
        [
            batch["input_ids"]
            for batch in DataLoader(
                StreamedRows(dataset), batch_sampler=sampler, collate_fn=StreamCollator(collator), num_workers=workers
            )
        ]
        for workers in (2, 0)
    )
    assert all(torch.equal(got, want) for got, want in zip(with_workers, without, strict=True))


def test_the_plain_trainer_takes_a_stream(tmp_path, path, processor):
    options = {"max_steps": 6, "per_device_train_batch_size": 8, "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model=tiny_llava(processor),
        # Else accelerate fills the last batch up by joining tensors whose rows are no samples.
        args=TrainingArguments(str(tmp_path / "out"), accelerator_config={"dispatch_batches": False}, **options),
        train_dataset=stream(path, processor, shuffle_buffer=5),
        data_collator=MultimodalCollator(processor),
    )
    assert trainer.train().global_step == 6


def bad(number):
    return {"id": f"bad{number}"}


def test_the_first_rows_are_verified_before_anything_trains(tmp_path, processor):
    path = write_lines(tmp_path / "a.jsonl", [*rows(3), row(image="no.png")])
    with pytest.raises(DataError, match=r"a\.jsonl:4: sample 3 .*'no\.png' does not exist.*first 100 rows"):
        stream(path, processor)
    with pytest.raises(DataError, match="holds no sample"):
        stream(write_json(tmp_path / "empty.json", []), processor)
    with pytest.raises(DataError, match="no such file"):
        stream(tmp_path / "gone.jsonl", processor)


def test_a_row_that_cannot_be_used_is_an_error_when_it_is_taken(tmp_path, processor):
    path = write_lines(tmp_path / "a.jsonl", [*rows(110), bad(0)])
    dataset = stream(path, processor, shuffle_buffer=1)
    last = list(dataset.places(0))[-1]
    with pytest.raises(DataError, match=r"a\.jsonl:111: sample 110 \(id 'bad0'\): no `conversations`"):
        dataset.take([last])


def test_skipping_leaves_a_batch_smaller_and_says_what_was_left_out(tmp_path, processor):
    path = write_lines(tmp_path / "a.jsonl", [bad(0), *rows(2), bad(1), bad(2)])
    dataset = stream(path, processor, shuffle_buffer=1, on_error="skip")
    places = list(dataset.places(0))
    taken = dataset.take(places[:3])
    assert len(taken) == 2
    assert [(sample.index, sample.line) for sample in taken.skipped] == [(0, 1)]
    alone = dataset.take(places[3:])
    assert len(alone) == 1
    assert set(alone[0]["labels"].tolist()) == {IGNORE_INDEX}
    assert [sample.index for sample in alone.skipped] == [3, 4]
    batch = StreamCollator(MultimodalCollator(processor))(alone)
    assert batch["skipped"] == alone.skipped
    assert "skipped" not in StreamCollator(MultimodalCollator(processor))(dataset.take(places[1:3]))


def test_a_blank_is_a_sample_without_a_label(path, processor):
    dataset = stream(path, processor)
    place = next(dataset.places(0))
    [blank] = dataset.take([Place(place.epoch, place.row, blank=True)])
    assert set(blank["labels"].tolist()) == {IGNORE_INDEX}


def test_a_file_that_changes_has_another_fingerprint(path, processor):
    before = stream(path, processor).fingerprint
    assert stream(path, processor).fingerprint == before
    assert stream(path, processor, shuffle_buffer=3).fingerprint != before
    write_lines(path, rows(36))
    assert stream(path, processor).fingerprint != before


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_large_file_is_read_in_flat_memory(tmp_path, suffix):
    """200 MiB in 12,800 rows of 16 KiB; every row is decoded."""
    path = tmp_path / f"large.{suffix}"
    text = "word " * 3276
    with path.open("w") as file:
        file.write("[" if suffix == "json" else "")
        for number in range(12_800):
            comma = "," if suffix == "json" and number else ""
            file.write(comma + json.dumps(row(human(f"{number}?"), gpt(text), id=str(number))) + "\n")
        file.write("]" if suffix == "json" else "")
    assert path.stat().st_size > 200 * 2**20
    script = textwrap.dedent(f"""
        import resource, sys
        from tests.tiny import tiny_processor
        from mmpeft.data.dataset import load_dataset
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        dataset = load_dataset({str(path)!r}, processor=tiny_processor(), streaming=True, shuffle_buffer=1000)
        places, count = dataset.places(0), 0
        for place in places:
            count += dataset.row(place).sample is not None
            if count == 100:
                before = peak()
        assert count == 12_800, count
        print(before, peak())
    """)
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    print(f"{suffix}: {before} MiB after 100 rows, {after} MiB at the end")
    assert after - before < 40
