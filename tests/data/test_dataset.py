import inspect
import logging
import os
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from tokenizers import normalizers
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from mmpeft.core.errors import DataError, OutputError
from mmpeft.data import arrow
from mmpeft.data import dataset as dataset_module
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.dataset import load_dataset
from mmpeft.data.media import load_image
from mmpeft.data.types import Question, Turn
from tests.data.files import colour_set, gpt, human, picture, row, write_json, write_lines
from tests.data.templates import PICTURELESS
from tests.tiny import tiny_llava


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    return colour_set(tmp_path / "数据", count=5)


def broken_png(path: Path) -> Path:
    picture(path, size=(64, 64))
    path.write_bytes(path.read_bytes()[:60])
    return path


def test_samples_are_encoded_when_taken(path, processor):
    dataset = load_dataset(path, processor=processor)
    assert (len(dataset), dataset.path, dataset.media_root) == (5, path, path.parent)
    assert "pixel_values" in dataset[0]
    assert "pixel_values" not in dataset[4]
    assert torch.equal(dataset[-1]["input_ids"], dataset[4]["input_ids"])
    assert set(dataset[0]) <= set(inspect.signature(tiny_llava().forward).parameters)
    labels = dataset[1]["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "green<|im_end|>"
    with pytest.raises(IndexError, match="sample 5 of 5"):
        dataset[5]


def test_names_of_media_are_read_many_rows_at_once_in_the_order_of_the_samples(tmp_path, processor, monkeypatch):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    rows = [row(image="a.png"), row(), row(image="b.png"), row(image="a.png"), row(image="c.png")]
    monkeypatch.setattr(dataset_module, "_WINDOW", 2)
    dataset = load_dataset(write_lines(tmp_path / "train.jsonl", rows), processor=processor)
    assert list(dataset.media_names()) == [tuple(dataset.sample(index).media.values()) for index in range(5)]
    keys = [dataset.media_key(index) for index in range(5)]
    assert keys[0] == keys[3] != 0
    assert len(set(keys)) == 4
    assert keys[1] == 0
    assert [dataset.media_kinds(index) for index in range(5)] == [1, 0, 1, 1, 1]


def test_the_media_root_may_lie_elsewhere(tmp_path, processor):
    picture(tmp_path / "pictures/a.png")
    path = write_lines(tmp_path / "train.jsonl", [row(image="a.png")])
    assert len(load_dataset(path, media_root=tmp_path / "pictures", processor=processor)) == 1
    with pytest.raises(DataError, match=r"train\.jsonl:1: sample 0 \(id '0'\): picture 'a\.png' does not exist"):
        load_dataset(path, processor=processor)


def test_pixels_never_enter_arrow_and_rows_are_memory_mapped(tmp_path, processor, cache):
    for number in range(3):
        picture(tmp_path / f"{number}.png", size=(800, 800))
    path = write_lines(tmp_path / "a.jsonl", [row(image=f"{number % 3}.png") for number in range(300)])
    dataset = load_dataset(path, processor=processor)
    dataset[0]
    [entry] = (cache / "mmpeft").iterdir()
    table = datasets.Dataset.from_file(str(entry)).data.table
    kinds = str(table.schema.remove_metadata())
    assert "binary" not in kinds
    assert entry.stat().st_size < 300 * 300
    assert dataset._rows.cache_files == [{"filename": str(entry)}]
    with pa.memory_map(str(entry)) as mapped:
        assert pa.ipc.open_stream(mapped).read_all().num_rows == 300


def test_a_file_is_read_once_until_it_changes(path, processor, monkeypatch):
    reads = []
    whole = arrow.read_rows
    monkeypatch.setattr(arrow, "read_rows", lambda file, **options: reads.append(file) or whole(file, **options))
    first = load_dataset(path, processor=processor)
    again = load_dataset(path, processor=processor)
    assert len(reads) == 1
    assert first.fingerprint == again.fingerprint
    write_json(path, [row(id="new")])
    changed = load_dataset(path, processor=processor)
    assert (len(reads), len(changed), changed.sample(0).id) == (2, 1, "new")
    assert changed.fingerprint != first.fingerprint


def test_a_reader_of_another_version_does_not_use_the_entry(path, processor, monkeypatch, cache):
    load_dataset(path, processor=processor)
    monkeypatch.setattr(arrow, "READER_VERSION", arrow.READER_VERSION + 1)
    load_dataset(path, processor=processor)
    assert len(list((cache / "mmpeft").iterdir())) == 2


def test_no_half_written_entry_is_left(tmp_path, processor, cache):
    path = tmp_path / "a.json"
    path.write_text('[{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"id"')
    with pytest.raises(DataError, match="the file ends in the middle of sample 1"):
        load_dataset(path, processor=processor)
    assert not list((cache / "mmpeft").iterdir())


def test_a_cache_that_cannot_be_written_is_named(path, processor, cache):
    cache.write_text("a file where a folder should be")
    with pytest.raises(
        OutputError, match=r"cannot write the data cache .*; free space there, or set HF_DATASETS_CACHE"
    ):
        load_dataset(path, processor=processor)


def test_an_empty_file_and_a_missing_one_are_errors(tmp_path, processor):
    with pytest.raises(DataError, match="holds no sample"):
        load_dataset(write_json(tmp_path / "a.json", []), processor=processor)
    with pytest.raises(DataError, match=r"no such file; data files beside it: a\.json"):
        load_dataset(tmp_path / "b.json", processor=processor)


def test_all_problems_come_together_with_place_reason_and_count(tmp_path, processor):
    picture(tmp_path / "ok.png")
    rows = [row(id="good"), row(id="gone", image="no.png"), row(human("q")), row(gpt("a<|im_end|>"))]
    rows += [row(human("<|im_start|>"), gpt("x")), *({"id": f"e{number}", "conversations": []} for number in range(9))]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_dataset(path, processor=processor)
    message = str(caught.value).splitlines()
    assert message[0] == f"13 samples of {path} cannot be used:"
    assert f"{path}:2: sample 1 (id 'gone'): picture 'no.png' does not exist (tried {tmp_path}/no.png)" in message[1]
    assert "sample 2: the last turn is from human" in message[2]
    assert "sample 3: the first turn is from gpt" in message[3]
    assert "holds '<|im_start|>', a control token of this model" in message[4]
    assert message[11:] == ["  and 3 more", "correct the file, or use on_error: skip to leave such samples out"]


def test_skip_leaves_out_what_cannot_be_used_and_says_so(tmp_path, processor, caplog):
    picture(tmp_path / "ok.png")
    broken_png(tmp_path / "broken.png")
    rows = [row(id="a", image="ok.png"), row(id="b", image="broken.png"), {"id": "c"}, row(id="d")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(path, processor=processor, on_error="skip", max_skipped=2)
    assert [dataset.sample(index).id for index in range(len(dataset))] == ["a", "d"]
    assert [(skipped.file, skipped.index, skipped.line) for skipped in dataset.skipped] == [
        (str(path), 1, 2),
        (str(path), 2, 3),
    ]
    assert "picture 'broken.png' is corrupt or truncated" in dataset.skipped[0].reason
    assert f"{path}: 2 of 4 samples are skipped (at most 2 may be)" in caplog.text
    assert f"skipped {path}:3: sample 2 (id 'c'): no `conversations`" in caplog.text
    assert [question.id for question in dataset.questions()] == ["a", "d"]
    assert len([dataset[index] for index in range(2)]) == 2


@pytest.mark.parametrize(("bound", "allowed"), [(0, 0), (0.25, 1), (0.29, 1), (1, 1), (0.5, 2), (3, 3)])
def test_skipping_is_bounded_by_share_or_count(tmp_path, processor, bound, allowed):
    for bad in (allowed, allowed + 1):
        path = write_lines(tmp_path / "a.jsonl", [{"id": "bad"}] * bad + [row()] * (4 - bad))
        if bad <= allowed:
            assert len(load_dataset(path, processor=processor, on_error="skip", max_skipped=bound)) == 4 - bad
        elif bad < 4:
            with pytest.raises(DataError, match=f"max_skipped allows {allowed} of 4: correct the file, or raise"):
                load_dataset(path, processor=processor, on_error="skip", max_skipped=bound)


def test_a_data_set_with_no_sample_left_is_an_error(tmp_path, processor):
    path = write_lines(tmp_path / "a.jsonl", [{"id": "bad"}])
    with pytest.raises(DataError, match="no sample is left"):
        load_dataset(path, processor=processor, on_error="skip", max_skipped=5)


def test_a_picture_broken_behind_its_header_is_named_when_it_is_taken(tmp_path, processor):
    broken_png(tmp_path / "broken.png")
    path = write_lines(tmp_path / "a.jsonl", [row(), row(id="x", image="broken.png")])
    dataset = load_dataset(path, processor=processor)
    for loader in (dataset, DataLoader(dataset, batch_size=None, num_workers=1)):
        with pytest.raises(DataError, match=r"a\.jsonl:2: sample 1 \(id 'x'\): picture 'broken\.png' is corrupt"):
            list(loader[index] for index in (0, 1)) if loader is dataset else list(loader)
    with pytest.raises(DataError, match=r"a\.jsonl:2: sample 1 .*corrupt"):
        load_dataset(path, processor=processor, verify="decode")


def test_unknown_keys_are_logged_once_each_time_the_file_is_loaded(tmp_path, processor, caplog):
    path = write_lines(tmp_path / "a.jsonl", [row(), row(source="x"), row(source="y", weight=1)])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_dataset(path, processor=processor)
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}:2: the key 'source' is not known and not used (here first)",
            f"{path}:3: the key 'weight' is not known and not used (here first)",
        ]


@pytest.mark.parametrize("max_length", [None, 30, 35, 40, 45, 60, 500])
def test_truncated_samples_are_counted_without_their_pixels(path, processor, max_length, caplog):
    whole = load_dataset(path, processor=processor)
    longer = sum(len(whole[index]["input_ids"]) > (max_length or 10**9) for index in range(5))
    unusable = [index for index in range(5) if (whole[index]["labels"][:max_length] == -100).all()]
    with caplog.at_level(logging.WARNING):
        if len(unusable) == 5:
            with pytest.raises(DataError, match=r"no answer token is left .* after the cut to max_length"):
                load_dataset(path, processor=processor, max_length=max_length)
            return
        dataset = load_dataset(path, processor=processor, max_length=max_length, on_error="skip", max_skipped=4)
    assert dataset.truncated == longer - len(unusable)
    assert [skipped.index for skipped in dataset.skipped] == unusable
    assert ("are longer than max_length" in caplog.text) == bool(dataset.truncated)
    assert all(len(dataset[index]["input_ids"]) <= (max_length or 10**9) for index in range(len(dataset)))


def test_a_template_that_fails_is_found_before_training(path, processor):
    processor.chat_template = "{% if messages[0]['content'] | length > 1 %}{{ raise_exception('one item') }}{% endif %}"
    with pytest.raises(DataError, match=r"4 samples of .* cannot be used") as caught:
        load_dataset(path, processor=processor)
    assert "does not take this conversation: one item" in str(caught.value)


def test_a_template_that_drops_pictures_is_found_before_training(path, processor):
    processor.chat_template = PICTURELESS
    with pytest.raises(DataError, match="writes 0 image tokens for 1 in the sample"):
        load_dataset(path, processor=processor)


def test_samples_too_long_by_their_pictures_alone_are_counted(path, processor, monkeypatch):
    monkeypatch.setattr("mmpeft.data.lengths.picture_length", lambda processor, size: 100)
    dataset = load_dataset(path, processor=processor, max_length=120, on_error="skip", max_skipped=4)
    assert len(dataset.skipped) + dataset.truncated == 4


def test_samples_that_a_normaliser_makes_too_long_are_counted(tmp_path, processor):
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    ligatures = "\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}" * 50
    rows = [row(human("q"), gpt("a" * 20)), *[row(human("q"), gpt("a" + ligatures))] * 2]
    path = write_lines(tmp_path / "a.jsonl", rows)
    assert load_dataset(path, processor=processor, max_length=300).truncated == 2


def test_halves_of_surrogate_pairs_stop_no_reader(tmp_path, processor):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"\\ud83d": 1, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}\n'
        '{"id": "\\ud83d", "conversations": [{"\\ud83d": 1}]}\n'
    )
    dataset = load_dataset(path, processor=processor, on_error="skip", max_skipped=1)
    assert (len(dataset), [skipped.index for skipped in dataset.skipped]) == (1, [1])


def test_the_same_bytes_are_another_entry_under_another_suffix(tmp_path, processor):
    array = write_json(tmp_path / "a.json", [row()])
    assert len(load_dataset(array, processor=processor)) == 1
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(array.read_bytes())
    with pytest.raises(DataError, match="goes over several lines"):
        load_dataset(lines, processor=processor)


def test_one_question_an_answer_with_the_pictures_its_prompt_shows(tmp_path, processor):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    rows = [
        row(human("<image>1"), gpt("A"), human("<image>2"), gpt("B"), id="x", images=["a.png", "b.png"], kind="k"),
        row(human("3"), gpt("C"), id="y"),
    ]
    dataset = load_dataset(write_json(tmp_path / "a.json", rows), processor=processor)
    first, second, third = dataset.questions()
    assert first == Question(
        id="x#1", prompt=(Turn(role="user", text="<image>1"),), images=("a.png",), reference="A", kind="k"
    )
    assert (second.id, second.images, second.reference) == ("x#2", ("a.png", "b.png"), "B")
    assert [turn.text for turn in second.prompt] == ["<image>1", "A", "<image>2"]
    assert (third.id, third.images, third.reference, third.kind) == ("y", (), "C", "")


def test_workers_open_the_pictures(path, processor, monkeypatch):
    dataset = load_dataset(path, processor=processor)
    alone = list(DataLoader(dataset, batch_size=2, collate_fn=MultimodalCollator(processor)))
    parent = os.getpid()

    def only_in_workers(*arguments, **options):
        assert os.getpid() != parent
        return load_image(*arguments, **options)

    monkeypatch.setattr("mmpeft.data.load_media.load_image", only_in_workers)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=MultimodalCollator(processor))
    batches = list(loader)
    for one, other in zip(batches, alone, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_data_set_can_be_pickled(path, processor):
    dataset = load_dataset(path, processor=processor)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 100_000
    assert all(torch.equal(copy[0][key], dataset[0][key]) for key in dataset[0])


def test_the_plain_trainer_takes_it(path, processor, tmp_path):
    model = tiny_llava(processor)
    before = model.model.multi_modal_projector.linear_1.weight.clone()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=tmp_path / "out",
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1,
        ),
        train_dataset=load_dataset(path, processor=processor),
        data_collator=MultimodalCollator(processor),
    )
    assert trainer.args.remove_unused_columns
    trainer.train()
    assert not torch.equal(before, model.model.multi_modal_projector.linear_1.weight)
