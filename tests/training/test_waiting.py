import threading
import time

import pytest
from accelerate import Accelerator
from transformers import TrainerCallback

from mmpeft import MultimodalCollator, MultimodalTrainer, get_peft_model, load_dataset
from mmpeft.training.callbacks import MetricsFile, read_metrics
from mmpeft.training.waiting import DataWaits
from tests.project import write_data
from tests.tiny import tiny_llava
from tests.training.test_trainer import arguments

SLOW = 0.02


class Slow:
    """A data set of which one sample takes its time."""

    def __init__(self, dataset, slow):
        self.dataset, self.slow = dataset, slow

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index == self.slow:
            time.sleep(SLOW)
        return self.dataset[index]


class Batches:
    """Micro-batches that take so many seconds each, by a clock of their own."""

    def __init__(self, *seconds):
        self.seconds, self.now = list(seconds), 0.0

    def __iter__(self):
        return self

    def __next__(self):
        self.now += 5  # an end is no wait, however long it takes to be found
        if not self.seconds:
            raise StopIteration
        self.now += self.seconds[0] - 5
        return self.seconds.pop(0)


def waits_of(batches):
    return DataWaits(clock=lambda: batches.now)


def test_what_is_there_at_once_is_no_wait():
    batches = Batches(0.0, 0.0009, 0.0005)
    waits = waits_of(batches)
    assert list(waits.watch(batches)) == [0.0, 0.0009, 0.0005]
    assert (waits.fetches, waits.waits, waits.seconds) == (3, 0, 0)


def test_waits_are_counted_by_window_and_in_all():
    batches = Batches(0.0, 0.5, 0.0, 0.0, 0.25, 0.75)
    waits, accelerator = waits_of(batches), Accelerator(cpu=True)
    # One iterator, watched anew at each step, as the Trainer does.
    for _ in range(3):
        next(waits.watch(batches))
    assert waits.window(accelerator) == {"data_wait_seconds": 0.5, "data_waits": 1}
    assert waits.window(accelerator) == {"data_wait_seconds": 0, "data_waits": 0}
    assert len(list(waits.watch(batches))) == 3
    assert waits.window(accelerator) == {"data_wait_seconds": 1.0, "data_waits": 2}
    assert waits.total(accelerator) == {"data_wait_seconds": 1.5, "data_waits": 3}
    assert waits.fetches == 6


def test_metrics_say_in_which_step_training_waited(tmp_path, processor):
    data = write_data(tmp_path / "data")
    dataset = load_dataset(data / "train.json", media_root=data / "images", processor=processor)
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_llava(processor), {"projector": "full"}),
        args=arguments(tmp_path / "out", train_sampling_strategy="sequential", max_steps=2),
        train_dataset=Slow(dataset, 9),
        data_collator=MultimodalCollator(processor),
    )
    trainer.add_callback(MetricsFile(tmp_path / "metrics.jsonl"))
    trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(row["data_wait_seconds"] > 0 for row in rows)  # without workers, samples are made in these fetches
    assert sum(row["data_wait_seconds"] for row in rows) == pytest.approx(trainer.waits.seconds, rel=1e-5)
    assert sum(row["data_waits"] for row in rows) == trainer.waits.waits <= trainer.waits.fetches == 4
    assert trainer.waits.seconds >= SLOW


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_a_worker_has_made_is_not_waited_for(tmp_path, processor, accumulation):
    data = write_data(tmp_path / "data")
    dataset = load_dataset(data / "train.json", media_root=data / "images", processor=processor)
    args = arguments(
        tmp_path / "out",
        max_steps=5 // accumulation,  # within an epoch, which begins with a wait
        gradient_accumulation_steps=accumulation,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
    )
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_llava(processor), {"projector": "full"}),
        args=args,
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
        share_media=True,
    )
    trainer.add_callback(MetricsFile(tmp_path / "metrics.jsonl"))
    trainer.add_callback(Rest())
    trainer.train()
    first, *others = read_metrics(tmp_path / "metrics.jsonl")
    assert first["data_waits"] >= 1
    # Other programs may take the core from one fetch; connecting to the worker takes longer than a wait in all.
    assert sum(row["data_waits"] for row in others) <= 1
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


class Rest(TrainerCallback):
    """Steps that take longer than making their samples."""

    def on_step_end(self, args, state, control, **_):
        time.sleep(0.5)
