"""Two and four real processes over gloo: losses and adapters are those of one, whichever way they share the work."""

import json
import os
import signal
import subprocess
import time
from itertools import chain

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import mmpeft
from mmpeft.config.recipe import Recipe
from mmpeft.core.files import read_json
from tests.processes import TORCHRUN, accelerate, command, environment, figures, losses, run_recipe
from tests.project import make_mostly_text, write_project

MATRICES = "{tensor_parallel: 2}"
TOKENS = "{context_parallel: 2}"
TOKENS_AND_LAYERS = "{strategy: fsdp2, context_parallel: 2}"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A recipe whose data is text alone for two samples of three, and what one process makes of it.

    22 samples in steps of 8: the third step of an epoch has six, which four processes cannot share evenly.
    """
    folder = tmp_path_factory.mktemp("project")
    path = write_project(folder, batch={"size": 8, "micro": 1})
    make_mostly_text(folder / "data" / "train.json")
    mmpeft.run(Recipe.from_yaml(path, (f"output={folder / 'one'}",)))
    return path


def shared(path, name, first, second, *overrides, processes=2, launcher=(), **options):
    """The output of a run whose two stages share the work in these ways."""
    output = path.parent / name
    done = run_recipe(
        path,
        f"output={output}",
        f"stages.0.distributed={first}",
        f"stages.1.distributed={second}",
        *([] if launcher else [f"processes={processes}"]),
        *overrides,
        launcher=launcher,
        **options,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Nothing that worries and is about nothing.
    assert "mismatch" not in done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    return output


def assert_same_as_one(output, path):
    one = path.parent / "one"
    for ours, theirs in zip(losses(output), losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert [each["steps"] for each in figures(output)] == [4, 6]
    weights, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (output, one))
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    # Each question answered once, in the same words.
    assert answers(output) == answers(one)
    # Without mmpeft.
    base = LlavaForConditionalGeneration.from_pretrained(path.parent / "base")
    loaded = PeftModel.from_pretrained(base, output / "adapter")
    assert any(parameter.abs().sum() > 0 for name, parameter in loaded.named_parameters() if "lora_B" in name)


def answers(output):
    return {name: entry["predictions"] for name, entry in read_json(output / "evaluation.json").items()}


def test_two_processes_share_gradients_then_layers_and_follow_one(project):
    output = shared(project, "zero2-fsdp2", "zero2", "fsdp2")
    assert_same_as_one(output, project)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "launcher"),
    [
        ("zero1", "zero3", TORCHRUN),
        ("auto", "auto", accelerate("cpu_ddp")),
        ("auto", "auto", accelerate("cpu_zero2")),
        ("auto", "auto", accelerate("cpu_zero3")),
        ("auto", "auto", accelerate("cpu_fsdp2")),
    ],
    ids=["zero1-zero3-torchrun", "ddp", "zero2", "zero3", "fsdp2"],
)
def test_every_way_of_sharing_and_of_launching_follows_one_process(project, first, second, launcher, request):
    output = shared(project, request.node.callspec.id, first, second, launcher=launcher)
    assert_same_as_one(output, project)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("ddp", "fsdp2"), ("zero2", "zero3"), (TOKENS, MATRICES), ("fsdp2", TOKENS_AND_LAYERS)]
)
def test_four_processes_that_cannot_share_a_step_evenly_follow_one(project, first, second):
    output = shared(project, f"four-{len(first)}-{len(second)}", first, second, processes=4)
    assert_same_as_one(output, project)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2", MATRICES, TOKENS_AND_LAYERS])
def test_packed_rows_and_kept_features_follow_one_process(project, strategy):
    name = strategy.strip("{}").replace(": ", "").replace(", ", "-")
    cache = project.parent / f"cache-{name}"
    output = shared(
        project,
        f"packed-{name}",
        strategy,
        strategy,
        "batch.micro=4",
        "batch.packing=true",
        "data.cache.features=true",
        f"data.cache.directory={cache}",
    )
    assert_same_as_one(output, project)
    speedups = [{each["name"]: each for each in stage["speedups"]} for stage in figures(output)]
    assert all(stage["batch.packing"]["on"] and stage["data.cache.features"]["on"] for stage in speedups)
    assert list(cache.rglob("*"))


@pytest.mark.slow
def test_two_processes_share_matrices_and_follow_one(project):
    """Each takes all samples: the third step's six of an epoch are no multiple of anything."""
    output = shared(project, "tensor", "ddp", MATRICES, "stages.1.trainer={eval_strategy: steps}")
    assert_same_as_one(output, project)


@pytest.mark.slow
def test_two_processes_share_tokens_and_follow_one(project):
    """Each has half of the tokens of every sample, as a launcher's `ParallelismConfig` says."""
    told = {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_CP_SIZE": "2",
        "PARALLELISM_CONFIG_CP_BACKEND": "torch",
    }
    output = shared(project, "tokens", "auto", "auto", "stages.1.trainer={eval_strategy: steps}", env=told)
    assert_same_as_one(output, project)
    assert [stage["shared_as"] for stage in figures(output)] == ["context_parallel: 2"] * 2


@pytest.mark.slow
def test_half_precision_follows_one_process_in_half_precision(project):
    one = project.parent / "half"
    mmpeft.run(Recipe.from_yaml(project, (f"output={one}", "dtype=bfloat16")))
    ways_by_name = {
        "half-zero": ("zero2", "zero3"),
        "half-shared": (MATRICES, "fsdp2"),
        "half-tokens": (TOKENS, TOKENS_AND_LAYERS),
    }
    for name, ways in ways_by_name.items():
        output = shared(project, name, *ways, "dtype=bfloat16")
        for ours, theirs in zip(losses(output), losses(one), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-2)
        weights = load_file(output / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        named = {each["name"]: each for each in figures(output)[1]["speedups"]}
        assert named["compute.spare_casts"]["on"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_find_a_budget_of_tokens_and_are_planned_and_measured(project, strategy):
    output = shared(project, f"budget-{strategy[:5]}", strategy, strategy, "batch={size: 8, tokens: auto}")
    for ours, theirs in zip(losses(output), losses(project.parent / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for row, stage in zip(read_json(output / "plan.json")["stages"], figures(output), strict=True):
        assert row["batch"]["tokens"] % 64 == 0
        assert row["batch"]["tokens_auto"].startswith("all samples of a step")
        assert row["memory"]["how"] == stage["memory"]["how"] == "rehearsed"
        assert stage["memory"]["planned_bytes"] == row["memory"]["growth"]
        assert stage["memory"]["measured_bytes"] > 0


@pytest.mark.slow
def test_the_planner_shares_what_does_not_fit(project, tmp_path):
    """Of a device so small that one process has no room for the whole model."""
    (tmp_path / "sitecustomize.py").write_text(
        "import mmpeft\nfrom mmpeft.pipeline import sharing_plan\nsharing_plan.room_here = lambda processes: 700_000\n"
    )
    output = shared(project, "planned", "auto", "auto", env={"PYTHONPATH": str(tmp_path)})
    assert_same_as_one(output, project)
    rows = read_json(output / "plan.json")["stages"]
    assert [row["distributed"]["as"]["context_parallel"] for row in rows] == [2, 2]


@pytest.mark.slow
def test_processes_that_share_a_model_out_answer_every_question_together(project):
    output = shared(project, "answers", "ddp", "fsdp2", "evaluate.share_weights=true")
    assert answers(output) == answers(project.parent / "one")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "offload",
    ["{strategy: zero2, offload: optimizer}", "{strategy: zero3, offload: all}", "{strategy: fsdp2, offload: all}"],
)
def test_what_waits_in_host_memory_changes_nothing(project, offload, processes):
    output = shared(project, f"offload-{offload[11:16]}-{processes}", offload, offload, processes=processes)
    assert_same_as_one(output, project)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_run_goes_on_from_a_checkpoint_of_two_processes(project, strategy):
    """Interrupted in its second stage; the same command goes on, and the losses are those of one process."""
    output = project.parent / f"resumed-{strategy}"
    overrides = [f"stages.{number}.distributed={strategy}" for number in (0, 1)]
    words = command(project, f"output={output}", "processes=2", *overrides)
    running = subprocess.Popen(words, cwd=project.parent, env=environment(), stderr=subprocess.PIPE, text=True)
    rows = output / "stages" / "02-language" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (rows.exists() and rows.read_text()):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stderr.read()[-3000:]
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=120)
    assert running.returncode == 130
    assert read_json(rows.with_name("stage.json"))["status"] == "interrupted"
    done = run_recipe(project, f"output={output}", "processes=2", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "language: goes on from step" in done.stdout
    assert_same_as_one(output, project)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_run_with_its_own_traceback(project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import torch\n"
        "    def step(*args, **kwargs):\n"
        "        raise ArithmeticError('one process alone')\n"
        "    torch.optim.AdamW.step = step\n"
    )
    start = time.monotonic()
    done = run_recipe(
        project, f"output={project.parent / 'failed'}", "processes=2", env={"PYTHONPATH": str(tmp_path)}, timeout=90
    )
    assert done.returncode == 1
    assert "ArithmeticError: one process alone" in done.stderr
    assert time.monotonic() - start < 60


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(project):
    words = command(project, f"output={project.parent / 'killed'}", "processes=2", "stages.0.max_steps=500")
    running = subprocess.Popen(words, cwd=project.parent, env=environment(), stderr=subprocess.PIPE, text=True)
    rows = project.parent / "killed" / "stages" / "01-projector" / "metrics.jsonl"
    while not (rows.exists() and rows.read_text()):
        assert running.poll() is None, running.stderr.read()[-3000:]
        time.sleep(0.05)
    children = f"/proc/{running.pid}/task/{running.pid}/children"
    with open(children) as file:
        workers = [int(pid) for pid in file.read().split()]
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "was ended by SIGKILL" in errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in chain(workers))


@pytest.mark.slow
def test_stdout_carries_the_json_object_alone(project):
    done = run_recipe(project, f"output={project.parent / 'zero2-fsdp2'}", "processes=2", json=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [stage["name"] for stage in json.loads(done.stdout)["stages"]] == ["projector", "language"]


@pytest.mark.slow
def test_bad_data_is_told_once_and_with_its_status(project, tmp_path):
    rows = json.loads((project.parent / "data" / "train.json").read_text())
    rows[0]["image"] = "lost.png"
    (tmp_path / "lost.json").write_text(json.dumps(rows))
    done = run_recipe(
        project, f"output={tmp_path / 'run'}", "processes=2", f"data.train={tmp_path / 'lost.json'}", timeout=120
    )
    assert done.returncode == 3
    assert done.stderr.count("sample 0 (id 'train-0')") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_process_whose_memory_does_not_suffice_cuts_its_micro_batches(project, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from mmpeft.training.trainer import MultimodalTrainer\n"
        "    whole = MultimodalTrainer.compute_loss\n"
        "    def compute_loss(self, model, inputs, *args, **kwargs):\n"
        "        if inputs['tree'].samples > 1:\n"
        '            raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory")\n'
        "        return whole(self, model, inputs, *args, **kwargs)\n"
        "    MultimodalTrainer.compute_loss = compute_loss\n"
    )
    words = ("batch.micro=4", "batch.packing=true")
    output = shared(project, "relief", "ddp", "ddp", *words, env={"PYTHONPATH": str(tmp_path)})
    assert_same_as_one(output, project)


@pytest.mark.slow
def test_a_tower_that_trains_in_full_is_written_whole(project):
    models = []
    for processes in (1, 2):
        output = project.parent / f"tower-{processes}"
        words = ("stages.0.train={vision: full}", "stages.0.learning_rate=1e-3", "stages.0.distributed=zero2")
        changes = [word for override in words for word in ("--set", override)]
        done = subprocess.run(
            [*command(project, f"output={output}", f"processes={processes}"), *changes, "--stage", "projector"],
            cwd=project.parent,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        models.append(load_file(output / "stages" / "01-projector" / "model" / "model.safetensors"))
    one, two = models
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
