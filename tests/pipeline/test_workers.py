"""Media decoded ahead by a loader's workers: what comes out is what one process makes, in every epoch."""

import json

import pytest
import yaml

import mmpeft
from mmpeft import MultimodalCollator, MultimodalTrainer, Recipe, get_peft_model, load_dataset
from mmpeft.core.errors import DataError
from mmpeft.training.callbacks import read_metrics
from tests.data.films import film
from tests.families.qwen import tiny_qwen2_5_vl
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
    alone = losses(films, tmp_path / "alone", **data)
    assert losses(films, tmp_path / "workers", workers=2, **data) == alone
    plain = losses(films, tmp_path / "plain", **{**data, "augment": None})
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
