"""Memory that does not suffice where processes wait for each other: the stage begins again with smaller micro-batches.

Real runs of two processes, of which one alone lacks memory in the midst of a micro-batch; losses are those of one
process that has enough.
"""

import pytest

from mmpeft.config.recipe import Recipe
from mmpeft.pipeline.relief import Relief, further_relief
from tests.pipeline.one_stage import assert_same, run_as, write_one_stage
from tests.processes import TORCHRUN, figures, injected, losses, run_recipe
from tests.project import TWO_STAGES, write_project

LACKING = """
import os
if os.environ.get("RANK") == "1":
    from mmpeft.models.base import base_of
    from mmpeft.training.trainer import MultimodalTrainer
    whole = MultimodalTrainer.training_step
    hooks = []
    def lack(*args):
        hooks.pop().remove()
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    def training_step(self, model, inputs, *args, **kwargs):
        samples = sum(number >= 0 for number in inputs["numbers"].values["numbers"])
        spared = self.args.activation_checkpointing or "CHECKPOINTED" not in os.environ
        if self.state.global_step == int(os.environ["AT"]) and (samples > int(os.environ["FITS"]) or not spared):
            layer = base_of(self.model).get_decoder().layers[1]
            hooks.append(getattr(layer, "register_" + os.environ["HOOK"])(lack))
        return whole(self, model, inputs, *args, **kwargs)
    MultimodalTrainer.training_step = training_step
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe, and what one process makes of it."""
    path = write_one_stage(tmp_path_factory.mktemp("project"))
    done = run_as(path, "one", "ddp", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def reliefs(folder, monkeypatch, strategy, *, device_type="cuda", longest=None, **keys):
    """What a stage is relieved by, one attempt after the other."""
    monkeypatch.setattr("mmpeft.pipeline.relief.pick_strategy", lambda stage: stage.distributed)
    stages = [{**TWO_STAGES[0], "distributed": strategy, **keys.pop("stage", {})}]
    recipe = Recipe.from_yaml(write_project(folder, stages=stages, **keys))
    found: Relief | None = Relief(key="")
    changes = []
    while found is not None:
        changes.append(found.changes)
        own, stage = found.applied(recipe, recipe.stages[0])
        found = further_relief(found, own, stage, processes=2, device_type=device_type, longest=longest)
    return changes[1:]


LAYERS = "all layers computed again in the backward"


def test_each_attempt_does_with_less_until_nothing_is_left(tmp_path, monkeypatch):
    batches = ("micro-batches of 3 samples",), ("micro-batches of 1 sample",)
    alone = batches[-1]
    assert reliefs(tmp_path, monkeypatch, "zero3", batch={"size": 12}) == [
        *batches,
        (*alone, LAYERS),
        (*alone, LAYERS, "weights and optimizer states in host memory"),
    ]
    assert reliefs(tmp_path, monkeypatch, "zero2", batch={"size": 12})[-1][-1] == "optimizer states in host memory"
    # On a CPU host memory is the device's own.
    assert reliefs(tmp_path, monkeypatch, "zero3", batch={"size": 12}, device_type="cpu")[-1] == (*alone, LAYERS)
    assert reliefs(tmp_path, monkeypatch, "ddp", batch={"size": 12})[-1] == (*alone, LAYERS)


def test_a_budget_of_tokens_is_halved_down_to_the_longest_sample(tmp_path, monkeypatch):
    found = reliefs(tmp_path, monkeypatch, "ddp", batch={"size": 8, "tokens": 1000}, longest=300)
    tokens = [f"micro-batches of {count} tokens" for count in (500, 300)]
    assert found == [(tokens[0],), (tokens[1],), (tokens[1], LAYERS)]


def test_what_the_recipe_says_of_checkpointing_is_left_as_it_is(tmp_path, monkeypatch):
    said = {"trainer": {"activation_checkpointing": False}}
    assert reliefs(tmp_path, monkeypatch, "ddp", batch={"size": 8, "micro": 1}, stage=said) == []
    asked = {"compute": {"checkpointing": True}}
    found = reliefs(tmp_path, monkeypatch, "fsdp2", batch={"size": 8, "micro": 1}, **asked)
    assert found == [("weights and optimizer states in host memory",)]


def lacking(path, *, at, fits, where="forward", checkpointed=False):
    return {
        **injected(path.parent / "lacking", LACKING),
        **{
            "AT": str(at),
            "FITS": str(fits),
            "HOOK": {"forward": "forward_pre_hook", "backward": "full_backward_hook"}[where],
        },
        **({"CHECKPOINTED": "1"} if checkpointed else {}),
    }


def record(output):
    [stage] = figures(output)
    return next(each for each in stage["speedups"] if each["name"] == "compute.checkpointing")


FOUR_THEN_TWO = ["micro-batches of 4 samples", "micro-batches of 2 samples"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "at", "where", "fits", "again"),
    [
        ("zero2", 0, "forward", 2, ["micro-batches of 2 samples"]),
        ("zero3", 5, "backward", 1, ["micro-batches of 2 samples", "micro-batches of 1 sample"]),
        ("fsdp2", 0, "backward", 2, ["micro-batches of 2 samples"]),
        # Both have all samples of a step.
        ("{tensor_parallel: 2}", 5, "backward", 2, FOUR_THEN_TWO),
        ("{strategy: fsdp2, context_parallel: 2}", 0, "forward", 2, FOUR_THEN_TWO),
    ],
)
def test_a_stage_begins_again_with_smaller_micro_batches(project, strategy, at, where, fits, again):
    name = f"{strategy.partition(':')[0].strip('{')}-{at}-{where}"
    done = run_as(project, name, strategy, 2, env=lacking(project, at=at, fits=fits, where=where))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert [f"from the newest checkpoint with {each}, which changes" in done.stderr for each in again] == [True] * len(
        again
    )
    assert done.stderr.count("the processes are started again") == len(again)
    assert ("goes on from step 4 of 6" in done.stdout) == (at == 5)
    assert_same(project.parent / name, project.parent / "one")
    assert record(project.parent / name)["why"] == f"memory did not suffice before: {again[-1]}"


@pytest.mark.slow
@pytest.mark.parametrize(("at", "where"), [(0, "forward"), (5, "backward")])
def test_with_adapters_under_ddp_the_process_runs_its_micro_batch_again_and_all_agree(project, at, where):
    name = f"ddp-{at}"
    done = run_as(project, name, "ddp", 2, env=lacking(project, at=at, fits=2, where=where))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "started again" not in done.stderr
    assert_same(project.parent / name, project.parent / "one")
    # The record is that of the first process; the second lacked memory.
    assert record(project.parent / name)["why"] == "memory did not suffice until micro-batches were cut into 2"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_then_with_all_layers_computed_again(project, strategy):
    name = f"{strategy}-checkpointed"
    env = lacking(project, at=2, fits=2, checkpointed=True)
    done = run_as(project, name, strategy, 2, "batch.micro=1", env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(project.parent / name, project.parent / "one")
    assert (
        record(project.parent / name)["why"]
        == "memory did not suffice before: all layers computed again in the backward"
    )


@pytest.mark.slow
def test_a_tower_that_trains_in_full_under_ddp_begins_again_too(project):
    """DDP sends its gradients in the midst of backward."""
    tower = ("stages.0.train={vision: full}", "stages.0.learning_rate=1e-3")
    one = run_as(project, "tower-one", "ddp", 1, *tower)
    assert one.returncode == 0, one.stderr[-3000:]
    done = run_as(project, "tower", "ddp", 2, *tower, env=lacking(project, at=5, fits=2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("the processes are started again") == 1
    [ours], [theirs] = losses(project.parent / "tower"), losses(project.parent / "tower-one")
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_where_nothing_is_left_the_error_says_what_would_help(project):
    done = run_as(project, "nothing", "zero2", 2, "batch.micro=2", env=lacking(project, at=0, fits=0))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    said = f"memory does not suffice with micro-batches of 1 sample and {LAYERS}"
    assert f"{said} (stage 'language', step 1, process 1: DefaultCPUAllocator: can't allocate memory)" in done.stderr
    assert "make data.max_pixels, data.max_length or the LoRA's `r` smaller" in done.stderr
    # The same command does not try it all over again.
    done = run_as(project, "nothing", "zero2", 2, "batch.micro=2", env=lacking(project, at=0, fits=0))
    assert done.returncode == 1
    assert "the processes are started again" not in done.stderr


@pytest.mark.slow
def test_under_another_launcher_the_same_command_goes_on(project):
    output = project.parent / "torchrun"
    words = (f"output={output}", "stages.0.distributed=zero2")
    env = lacking(project, at=3, fits=2)
    ended = run_recipe(project, *words, launcher=TORCHRUN, env=env)
    assert ended.returncode == 1
    assert "the same command goes on from the newest checkpoint with micro-batches of 2 samples" in ended.stderr
    done = run_recipe(project, *words, launcher=TORCHRUN, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "has micro-batches of 2 samples, for memory did not suffice" in done.stdout.replace("\n", " ")
    assert "goes on from step 2 of 6" in done.stdout
    assert_same(output, project.parent / "one")


@pytest.mark.slow
def test_switched_off_it_ends_the_run(project):
    words = ("compute.checkpointing=false",)
    done = run_as(project, "off", "fsdp2", 2, *words, env=lacking(project, at=0, fits=2))
    assert done.returncode == 1
    assert "make batch.micro or batch.tokens smaller" in done.stderr
    assert not list((project.parent / "off").rglob("relief.json"))
