"""Memory that does not suffice in a run: micro-batches are cut, and its losses stay those of a run with enough."""

import pytest

import mmpeft
from mmpeft.config.recipe import Recipe
from mmpeft.core.files import read_json
from mmpeft.training.callbacks import read_metrics
from mmpeft.training.trainer import MultimodalTrainer
from tests.project import TWO_STAGES, write_project

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"


def run(folder, monkeypatch, *, packing, fits, steps=(0, 1, 2), **keys):
    """Losses, and what the record says of memory, of a run in which no more than `fits` samples fit at some steps."""
    whole = MultimodalTrainer.compute_loss
    tries = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        samples = inputs["tree"].samples if packing else len(inputs["input_ids"])
        tries.append(samples)
        if samples > fits and self.state.global_step in steps:
            raise RuntimeError(NO_MEMORY)
        return whole(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MultimodalTrainer, "compute_loss", compute_loss)
    stages = [{**TWO_STAGES[1], "max_steps": 3}]
    path = write_project(folder, stages=stages, batch={"size": 8, "micro": 4, "packing": packing}, **keys)
    mmpeft.run(Recipe.from_yaml(path, (f"output={folder / f'fits-{fits}'}",)))
    monkeypatch.undo()
    [stage] = (folder / f"fits-{fits}" / "stages").iterdir()
    figures = read_json(stage / "stage.json")["figures"]
    [record] = [each for each in figures["speedups"] if each["name"] == "compute.checkpointing"]
    return [row["loss"] for row in read_metrics(stage / "metrics.jsonl")], record["why"], tries, figures


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_micro_batches_are_cut_until_they_fit_and_count_the_same(tmp_path, monkeypatch, packing):
    plain, _, tries, expected = run(tmp_path, monkeypatch, packing=packing, fits=4)
    assert tries == [4, 4, 4, 4, 3, 3]
    losses, why, tries, figures = run(tmp_path, monkeypatch, packing=packing, fits=1)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert why == "memory did not suffice until micro-batches were cut into 4"
    # What was found for the first micro-batch holds for the others.
    assert tries == [4, 2] + [1] * 22
    assert {key: figures[key] for key in ("samples", "tokens")} == {key: expected[key] for key in ("samples", "tokens")}


@pytest.mark.parametrize("step", [0, 2], ids=["first", "last"])
def test_at_any_step(tmp_path, monkeypatch, step):
    plain, *_ = run(tmp_path, monkeypatch, packing=True, fits=4)
    losses, why, *_ = run(tmp_path, monkeypatch, packing=True, fits=2, steps=(step,))
    assert losses == pytest.approx(plain, rel=1e-5)
    assert why == "memory did not suffice until micro-batches were cut into 2"


@pytest.mark.parametrize(
    ("lacking", "advice"),
    [("torch.optim.AdamW.step", "offload: optimizer"), ("mmpeft.pipeline.run.evaluate_with", "evaluate.batch_size")],
)
def test_what_lacks_memory_elsewhere_says_what_would_help(tmp_path, monkeypatch, lacking, advice):
    def without_memory(*args, **kwargs):
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(lacking, without_memory)
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        mmpeft.run(Recipe.from_yaml(write_project(tmp_path, stages=TWO_STAGES[1:])))
    [note] = caught.value.__notes__
    assert advice in note


def test_what_one_sample_lacks_ends_the_run_with_what_would_help(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="allocate memory") as caught:
        run(tmp_path, monkeypatch, packing=True, fits=0)
    assert "make batch.micro or batch.tokens smaller" in "".join(caught.value.__notes__)


def test_switched_off_it_ends_the_run(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="allocate memory"):
        run(tmp_path, monkeypatch, packing=True, fits=2, compute={"checkpointing": False})
