"""`distributed: auto` without a launcher's settings: the first way to share a model that fits."""

import pytest

from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import Recipe
from mmpeft.pipeline import sharing_plan
from mmpeft.pipeline.run import plan
from tests.project import write_project

FULL = [{"name": "tower", "train": {"vision": "full"}, "max_steps": 2}]


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path, batch={"size": 8, "micro": 1})


def planned(path, monkeypatch, room, processes=4, **keys):
    monkeypatch.setattr(sharing_plan, "room_here", lambda processes: room)
    recipe = Recipe.from_dict(Recipe.from_yaml(path).to_dict() | keys)
    return plan(recipe, processes=processes)


def test_there_is_always_a_way_and_a_warning_where_none_fits(project, monkeypatch, caplog):
    ample = planned(project, monkeypatch, 2**40)
    assert [row["distributed"]["as"]["strategy"] for row in ample] == ["ddp", "ddp"]
    nothing = planned(project, monkeypatch, 1)[-1]["distributed"]
    assert nothing["as"] == DistributedConfig(strategy="fsdp2", offload="all").model_dump()
    tried = nothing["why"]
    ways = "ddp", "fsdp2", "context_parallel: 2", "tensor_parallel: 2", "fsdp2 with offload: all"
    order = [tried.index(f"{name} takes") for name in ways]
    assert order == sorted(order)
    assert "tensor_parallel: 4" not in tried  # It has two key-value heads.
    assert "no way to share it over 4 processes fits" in caplog.text


@pytest.mark.parametrize(
    ("room", "way", "processes"),
    [(10, "ddp", 4), (9, "fsdp2", 4), (8, "fsdp2 with context_parallel: 4", 1), (5, "tensor_parallel: 2", 2)],
)
def test_the_first_that_fits_is_taken(project, monkeypatch, room, way, processes):
    sizes = {"ddp": 10, "fsdp2": 9, "tensor_parallel: 2": 5, "fsdp2 with offload: all": 4}
    sizes["fsdp2 with context_parallel: 4"] = 8
    monkeypatch.setattr(sharing_plan, "_peak", lambda given, way, count: sizes.get(way.describe(), 9.5))
    row = planned(project, monkeypatch, room)[-1]
    assert DistributedConfig.model_validate(row["distributed"]["as"]).describe() == way
    assert row["batch"]["processes"] == processes


def test_sharing_takes_less_in_the_order_that_it_is_tried(project, monkeypatch):
    peaks = {}
    real = sharing_plan._peak

    def kept(given, way, processes):
        return peaks.setdefault(way.describe(), real(given, way, processes))

    monkeypatch.setattr(sharing_plan, "_peak", kept)
    planned(project, monkeypatch, 1)
    # Two layers are all that it has, and under fsdp2 both are whole while one runs.
    assert peaks["ddp"] == peaks["fsdp2"] > peaks["fsdp2 with offload: all"]
    assert peaks["context_parallel: 4"] < peaks["context_parallel: 2"] < peaks["ddp"]
    assert peaks["tensor_parallel: 2"] < peaks["ddp"]


def test_a_tower_in_full_is_shared_by_its_optimizer(project, monkeypatch):
    pytest.importorskip("deepspeed")
    row = planned(project, monkeypatch, 1, stages=FULL)[0]
    assert (row["distributed"]["as"]["strategy"], row["distributed"]["as"]["offload"]) == ("zero2", "optimizer")


def test_what_the_recipe_says_stays(project, monkeypatch):
    assert "distributed" not in planned(project, monkeypatch, 1, processes=1)[0]
    recipe = Recipe.from_yaml(project, ("stages.0.distributed=zero2", "stages.1.distributed=ddp"))
    assert not any("distributed" in row for row in plan(recipe, processes=4))
