import os

import pytest
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import Recipe
from mmpeft.config.shipped import find_recipe
from mmpeft.core.errors import RecipeError
from mmpeft.pipeline.arguments import data_processes
from mmpeft.pipeline.launch import processes_to_start
from mmpeft.pipeline.strategy import launcher_strategy, pick_strategy, told

STAGE = {"name": "one", "train": {"projector": "full"}}


def recipe(distributed=None, **keys):
    stage = STAGE | ({"distributed": distributed} if distributed else {})
    return Recipe.from_dict({"model": "m", "data": {"train": "t"}, "stages": [stage], "device": "cpu"} | keys)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    for name in list(os.environ):
        if name.startswith(
            (
                "ACCELERATE_DEEPSPEED",
                "ACCELERATE_USE_DEEPSPEED",
                "ACCELERATE_USE_FSDP",
                "FSDP_",
                "ACCELERATE_USE_PARALLEL",
                "PARALLELISM_CONFIG_",
            )
        ):
            monkeypatch.delenv(name)
    launcher_strategy.cache_clear()
    yield
    launcher_strategy.cache_clear()


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ({}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ("zero2", "none")),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("zero3", "none")),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            },
            ("zero2", "optimizer"),
        ),
        (
            {
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
            },
            ("zero3", "all"),
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, ("fsdp2", "all")),
    ],
)
def test_what_accelerate_was_told_is_taken_from_its_environment(monkeypatch, settings, strategy):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = launcher_strategy()
    assert found == (strategy and DistributedConfig(strategy=strategy[0], offload=strategy[1]))
    assert not any(name in os.environ for name in settings)


def test_one_process_has_nobody_to_share_with():
    PartialState(cpu=True)
    for name in ("auto", "ddp", "zero2", "zero3", "fsdp2"):
        assert pick_strategy(recipe(name).stages[0]) == DistributedConfig(strategy="ddp")
    with pytest.raises(RecipeError, match="needs a launcher, on one process as well; use `mmpeft run`"):
        pick_strategy(recipe({"strategy": "zero2", "offload": "optimizer"}).stages[0])


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_a_whole_model_is_not_written_of_shares(name):
    stage = STAGE | {"train": {"vision": "full"}, "distributed": name}
    with pytest.raises(RecipeError, match=f"distributed: {name} is for adapters.*use zero1 or zero2"):
        pick_strategy(recipe(stages=[stage]).stages[0])


@pytest.mark.parametrize(("field", "value"), [("use_dora", True), ("lora_bias", True), ("init_lora_weights", "pissa")])
def test_lora_that_reads_whole_matrices_is_not_trained_where_they_are_shared_out(field, value):
    train = {"language": {"r": 4, field: value}}
    stage = {"name": "one", "train": train, "distributed": {"tensor_parallel": 2}}
    with pytest.raises(RecipeError, match=rf"stages.one.train.language.{field}: .* reads whole matrices"):
        pick_strategy(recipe(stages=[stage]).stages[0])


def test_processes_that_share_matrices_take_their_samples_together():
    stage = recipe({"tensor_parallel": 2}).stages[0]
    assert [data_processes(stage, processes) for processes in (1, 2, 8)] == [1, 1, 4]
    with pytest.raises(RecipeError, match="3 processes do not make groups of 2; use a divisor of 3"):
        data_processes(stage, 3)


def test_launchers_settings_and_shared_matrices_exclude_each_other(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="is for ddp, and the launcher's settings say fsdp2"):
        pick_strategy(recipe({"tensor_parallel": 2}).stages[0])


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"TP": 2}, {"tensor_parallel": 2}),
        ({"CP": 4}, {"context_parallel": 4}),
        ({"SP": 2, "DP_SHARD": 4}, {"strategy": "fsdp2", "context_parallel": 2}),
        ({"DP_REPLICATE": 2, "DP_SHARD": 2}, {"strategy": "fsdp2"}),
    ],
)
def test_accelerates_parallelism_config_is_read_and_taken(monkeypatch, sizes, found):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name, size in sizes.items():
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", str(size))
    expected = DistributedConfig(**{"strategy": "ddp", **found})
    assert told(recipe().stages[0]) == expected
    assert data_processes(recipe().stages[0], 8) == 8 // expected.together
    assert not any(name.startswith(("PARALLELISM_CONFIG_", "ACCELERATE_USE_PARALLEL")) for name in os.environ)
    # What a stage says of its own goes before it.
    assert told(recipe("zero2").stages[0]).strategy == "zero2"


def test_launchers_parallelism_that_excludes_itself_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    for name in ("TP", "CP"):
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}_SIZE", "2")
    with pytest.raises(RecipeError, match=r"the launcher's settings.*exclude each other"):
        launcher_strategy()


def test_shared_tokens_go_with_shared_layers_and_not_with_deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    stage = recipe({"context_parallel": 2}).stages[0]
    assert told(stage) == DistributedConfig(strategy="fsdp2", context_parallel=2)
    assert told(stage).describe() == "fsdp2 with context_parallel: 2"
    launcher_strategy.cache_clear()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RecipeError, match="is for ddp and fsdp2, and the launcher's settings say zero2"):
        told(stage)
    launcher_strategy.cache_clear()
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    whole = recipe(stages=[STAGE | {"train": {"vision": "full"}, "distributed": {"context_parallel": 2}}]).stages[0]
    with pytest.raises(RecipeError, match="context_parallel: is for adapters"):
        pick_strategy(whole)


def test_processes_are_started_where_a_recipe_asks_and_nobody_has(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes_to_start(recipe()) == 0
    assert processes_to_start(recipe("zero2")) == 0  # a CPU is one device
    assert processes_to_start(recipe("zero2", processes=2)) == 2
    assert processes_to_start(recipe(processes=3)) == 3
    assert processes_to_start(recipe({"strategy": "zero2", "offload": "optimizer"})) == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert processes_to_start(recipe("zero2", processes=2)) == 0


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_each_of_accelerates_settings_is_read_by_its_launcher(device, strategy):
    """As `accelerate launch` reads them; on two machines by the words of their third line."""
    path = find_recipe(f"accelerate/{device}_{strategy}").path
    words = path.read_text().splitlines()[2].split(": ", 1)[1].replace("(1 on the other) ", "").split()
    for several in ([], words):
        args = launch_command_parser().parse_args(["--config_file", str(path), *several, "-m", "mmpeft", "run", "r"])
        args, _, _ = _validate_launch_command(args)
        assert args.use_deepspeed is (strategy in ("zero2", "zero3"))
        assert not args.use_deepspeed or args.zero_stage == int(strategy[-1])
        assert args.use_fsdp is (strategy == "fsdp2")
        assert not args.use_fsdp or int(args.fsdp_version) == 2
        assert args.multi_gpu is (strategy == "ddp")
        assert args.use_cpu is (device == "cpu")
        assert args.num_machines == (2 if several else 1)
        assert args.num_processes == (2 if device == "cpu" else 8) * args.num_machines
