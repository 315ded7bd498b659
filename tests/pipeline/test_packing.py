"""Runs on packed rows: the losses of padded batches, fewer tokens, and an error where it would not be exact."""

import json

import pytest
from transformers import TrainingArguments

import mmpeft
from mmpeft import MultimodalCollator, MultimodalTrainer, Recipe
from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.core.files import read_json
from mmpeft.data.encode import encode_sample
from mmpeft.data.packing import PackedCollator
from mmpeft.data.types import Media
from mmpeft.pipeline.packing import packs_rows
from mmpeft.training.callbacks import read_metrics
from tests.families.qwen import tiny_qwen3_5
from tests.families.samples import picture, sample_of
from tests.models.test_tree_attention import llava_around
from tests.project import TWO_STAGES, write_data, write_project
from tests.tiny import tiny_llava, tiny_processor


def questions(folder, per_picture):
    """The project's training file with several questions on each of its pictures."""
    file = folder / "data" / "train.json"
    rows = json.loads(file.read_text(encoding="utf-8"))[:6]
    many = []
    for row in rows:
        for number in range(per_picture):
            question = f"<image>\nbright? {'really? ' * number}"
            turns = [{"from": "human", "value": question}, row["conversations"][1]]
            many.append({**row, "id": f"{row['id']}-{number}", "conversations": turns})
    file.write_text(json.dumps(many), encoding="utf-8")


def run(folder, **batch):
    path = write_project(folder, batch={"size": 8, "micro": 4, **batch})
    questions(folder, 4)
    mmpeft.run(Recipe.from_yaml(path))
    stages = sorted((folder / "run" / "stages").iterdir())
    losses = [[row["loss"] for row in read_metrics(stage / "metrics.jsonl")] for stage in stages]
    return losses, [read_json(stage / "stage.json")["figures"] for stage in stages]


def test_packed_rows_follow_the_losses_of_padded_batches_and_compute_less(tmp_path):
    padded, before = run(tmp_path / "padded", packing=False, balance=False)
    packed, after = run(tmp_path / "packed", share_media=False, balance=False)
    for one, other in zip(packed, padded, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert [figures["tokens_computed"] == figures["tokens_padded"] for figures in before] == [True, True]
    for one, other in zip(before, after, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["samples"] == other["samples"]
        assert other["tokens_computed"] < other["tokens_padded"] == one["tokens_computed"]


def test_questions_on_one_picture_share_what_they_begin_with(tmp_path):
    _, figures = run(tmp_path)
    for stage in figures:
        assert stage["tokens_computed"] < 0.8 * stage["tokens"]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "of a padded batch&#39;s computed" in report or "of a padded batch's computed" in report


def test_a_family_that_cannot_be_packed_is_padded_and_says_so_when_asked_to(tmp_path):
    model, processor = tiny_qwen3_5()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    stages = [{**TWO_STAGES[1], "max_steps": 1}]
    write_data(tmp_path / "data")
    path = write_project(tmp_path, model=str(tmp_path / "base"), stages=stages)

    mmpeft.run(Recipe.from_yaml(path))
    figures = read_json(next((tmp_path / "run" / "stages").iterdir()) / "stage.json")["figures"]
    assert figures["tokens_computed"] == figures["tokens_padded"]
    with pytest.raises(RecipeError, match=r"batch.packing: samples of the family qwen3_5 cannot share a row"):
        mmpeft.run(Recipe.from_yaml(path, ("batch.packing=true", f"output={tmp_path / 'other'}")))


@pytest.mark.parametrize("model_type", ["stablelm", "qwen3_5_text"])
def test_a_language_model_that_would_let_samples_see_each_other_is_padded(tmp_path, model_type):
    model = llava_around(model_type, tiny_processor())
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    path = write_project(tmp_path)
    assert packs_rows(Recipe.from_yaml(path), tiny_llava(), args)
    assert not packs_rows(Recipe.from_yaml(path), model, args)
    with pytest.raises(RecipeError, match=rf"batch.packing: .* a language model of type '{model_type}'"):
        packs_rows(Recipe.from_yaml(path, ("batch.packing=true",)), model, args)


def test_evaluating_packed_rows_outside_training_gives_the_loss_of_padded_batches(tmp_path):
    processor = tiny_processor()
    shown = Media(images=[picture((24, 24))])
    rows = [encode_sample(processor, sample_of(f"<image>\n{n}?", "yes " * (n + 1), images=1), shown) for n in range(4)]
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4)
    losses = [
        MultimodalTrainer(
            model=llava_around("llama", processor), args=args, eval_dataset=rows, data_collator=collator
        ).evaluate()["eval_loss"]
        for collator in (MultimodalCollator(processor), PackedCollator(processor))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_packed_row_under_another_attention_is_refused(tmp_path):
    processor = tiny_processor()
    model = tiny_llava(processor)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    rows = [encode_sample(processor, sample_of("1 + 1?", "2"), Media())] * 2
    trainer = MultimodalTrainer(model=model, args=args, data_collator=PackedCollator(processor))
    with pytest.raises(ModelError, match=r"needs mmpeft\.models\.tree_attention"):
        trainer.compute_loss(model, PackedCollator(processor)(rows))


def test_the_stage_says_what_packing_saved(tmp_path):
    _, figures = run(tmp_path)
    for stage in figures:
        rows = {row["name"]: row for row in stage["speedups"]}
        packing, sharing = rows["batch.packing"], rows["batch.share_media"]
        assert packing["on"]
        assert packing["saved"]["tokens"] == stage["tokens_padded"] - stage["tokens"]
        assert sharing["on"]
        assert sharing["saved"]["tokens"] == stage["tokens"] - stage["tokens_computed"] > 0
