"""Media decoded ahead by a loader's workers: what comes out is what one process makes, in every epoch."""

import json
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
import yaml
from torch.utils.data import get_worker_info

import mmpeft
from mmpeft import MultimodalCollator, MultimodalTrainer, Recipe, get_peft_model, load_dataset
from mmpeft.core.errors import DataError
from mmpeft.pipeline.workers import auto_workers, prefetch_factor
from mmpeft.training.callbacks import read_metrics
from tests.data.films import film
from tests.families.qwen import tiny_qwen2_5_vl
from tests.project import write_data
from tests.tiny import tiny_llava
from tests.training.test_trainer import arguments

AUGMENT = {"colour": {"brightness": 0.4}, "flip": {"probability": 0.5}}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    model, processor = tiny_qwen2_5_vl()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = []
    for number in range(8):
        film(folder / f"{number}.mp4", frames=30 + number)
        turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": f"film {number}"}]
        rows.append({"id": str(number), "video": f"{number}.mp4", "conversations": turns})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def losses(films, output, **data):
    recipe = {
        "model": str(films / "base"),
        "data": {"train": str(films / "train.jsonl"), "media": {"max_frames": 4}, **data},
        "stages": [
            {
                "name": "stage",
                "train": {"projector": "full", "language": {"r": 4}},
                "learning_rate": 1e-2,
                "max_steps": 8,
            }
        ],
        "batch": {"size": 2},
        "output": str(output),
        "device": "cpu",
    }
    mmpeft.run(Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe))))
    return [row["loss"] for row in read_metrics(output / "stages" / "01-stage" / "metrics.jsonl")]


@pytest.mark.parametrize(
    "data",
    [
        {"augment": AUGMENT},
        {"augment": AUGMENT, "streaming": True, "shuffle_buffer": 3},
    ],
    ids=["indexed", "streamed"],
)
def test_workers_make_what_one_process_makes_in_every_epoch(films, tmp_path, data):
    """Two epochs of four steps; workers live through both, and augmentation differs in them."""
    alone = losses(films, tmp_path / "alone", workers=0, **data)
    assert losses(films, tmp_path / "workers", workers=2, **data) == alone
    assert losses(films, tmp_path / "auto", **data) == alone
    plain = losses(films, tmp_path / "plain", workers=0, **{**data, "augment": None})
    assert plain != alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_film_that_goes_while_training_is_named(films, tmp_path, workers):
    processor = mmpeft.load_model(str(films / "base"), device="cpu")[1]
    copy = film(tmp_path / "a.mp4")
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a film"}]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"id": "gone", "video": "a.mp4", "conversations": turns}]), encoding="utf-8")
    dataset = load_dataset(path, processor=processor)
    copy.unlink()
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_qwen2_5_vl()[0], {"projector": "full"}),
        args=arguments(tmp_path / "out", dataloader_num_workers=workers),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
    )
    with pytest.raises(DataError, match=r"^/.*train\.json:1: sample 0 \(id 'gone'\): video 'a\.mp4' does not exist"):
        trainer.train()


@pytest.mark.parametrize(
    ("device", "cores", "media", "count"),
    [
        ("cpu", 2, True, 1),
        ("cpu", 64, True, 1),
        ("cpu", 64, False, 0),
        ("cuda", 1, True, 1),
        ("cuda", 4, True, 3),
        ("npu", 48, True, 8),
        ("npu", 48, False, 1),
    ],
)
def test_auto_leaves_a_cpu_to_training_and_uses_what_is_idle_elsewhere(device, cores, media, count):
    assert auto_workers(device=device, cores=cores, media=media) == count


@pytest.mark.parametrize(("workers", "accumulation", "factor"), [(1, 1, 2), (1, 8, 8), (4, 8, 2), (1, 64, 16)])
def test_the_next_step_is_made_ahead_as_far_as_memory_should_go(workers, accumulation, factor):
    assert prefetch_factor(workers=workers, accumulation=accumulation) == factor


@pytest.mark.parametrize(("workers", "count"), [("auto", 1), (2, 2), (0, 0)])
def test_a_stage_says_how_it_was_served(films, tmp_path, workers, count):
    losses(films, tmp_path / "run", workers=workers, cache={"tokens": bool(count)})
    figures = json.loads((tmp_path / "run" / "stages" / "01-stage" / "stage.json").read_text())["figures"]
    (told,) = [speedup for speedup in figures["speedups"] if speedup["name"] == "data.workers"]
    assert told["on"] == bool(count)
    assert f": {count} worker(s); training waited {figures['data_waits']} times," in told["why"]
    assert figures["data_wait_seconds"] > 0
    assert ("samples have media" in told["why"]) == (workers == "auto")
    (kept,) = [speedup for speedup in figures["speedups"] if speedup["name"] == "data.cache.tokens"]
    assert kept["on"] == bool(count)
    # Eight samples, and eight steps of two.
    if count:
        assert 8 <= kept["saved"]["texts"] <= 12  # a worker may be ahead when training ends
        assert kept["why"].startswith("8 of ")
    else:
        assert kept["why"] == "data.cache.tokens is false"


class Deadly:
    """A data set whose last sample ends the worker that takes it, as a machine without memory does."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index == len(self) - 1 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.dataset[index]


# Python's own multiprocessing leaves its socket open where the other side dies in the middle of a handshake.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_is_killed_ends_training_with_advice(tmp_path, processor, workers):
    data = write_data(tmp_path / "data")
    dataset = load_dataset(data / "train.json", media_root=data / "images", processor=processor)
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_llava(processor), {"projector": "full"}),
        args=arguments(tmp_path / "out", dataloader_num_workers=workers),
        train_dataset=Deadly(dataset),
        data_collator=MultimodalCollator(processor),
    )
    with pytest.raises(DataError, match=r"\(pid\S* \d+.*\) has gone: .*use a smaller data\.workers"):
        trainer.train()


def test_a_data_set_goes_to_a_worker_without_its_rows(tmp_path, processor):
    """Where workers are spawned it is pickled: what travels names the file of rows, and holds none of them."""
    sizes = []
    for rows in (20, 2000):
        turns = [{"from": "human", "value": "say it " + "again " * 40}, {"from": "gpt", "value": "it"}]
        path = tmp_path / f"{rows}.json"
        path.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(rows)]))
        dataset = load_dataset(path, processor=processor)
        expected = dataset[rows - 1]
        path.unlink()
        packed = pickle.dumps(dataset)
        sizes.append(len(packed))
        assert torch.equal(pickle.loads(packed)[rows - 1]["input_ids"], expected["input_ids"])
    assert sizes[1] - sizes[0] < 1000


def test_workers_are_gone_when_training_ends(tmp_path, processor):
    data = write_data(tmp_path / "data")
    dataset = load_dataset(data / "train.json", media_root=data / "images", processor=processor)
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_llava(processor), {"projector": "full"}),
        args=arguments(tmp_path / "out", dataloader_num_workers=1, dataloader_persistent_workers=True),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
    )
    before = set(multiprocessing.active_children())
    trainer.train()
    assert set(multiprocessing.active_children()) <= before
