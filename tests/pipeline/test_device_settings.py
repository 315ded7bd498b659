"""Variables that a device reads when it is first used; on the simulated NPU see tests/npu_sim/test_recipe.py."""

import os

import pytest
import torch

from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.pipeline.device_settings import device_settings, repeatable, set_device

CUDA = torch.device("cuda")
NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_cpu_has_none():
    assert device_settings(torch.device("cpu"), deterministic=True) == {}


def test_memory_grows_in_place_and_deterministic_adds_cublas():
    assert device_settings(CUDA) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    set_device(CUDA, deterministic=True)
    assert {name: os.environ.get(name) for name in NAMES} == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_CUDA_ALLOC_CONF": None,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_is_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = dict(os.environ)
    set_device(CUDA, deterministic=True)
    assert dict(os.environ) == before
    assert device_settings(CUDA) == {name: "max_split_size_mb:64"}


def test_other_systems_keep_their_allocator(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert device_settings(CUDA) == {}


def test_a_variable_that_says_the_opposite_is_an_error(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert "CUBLAS_WORKSPACE_CONFIG" not in device_settings(CUDA)
    with pytest.raises(
        RecipeError, match=r"deterministic: the environment has CUBLAS_WORKSPACE_CONFIG=:0:0, .*:4096:8"
    ):
        device_settings(CUDA, deterministic=True)


def test_a_device_in_use_is_named(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_device(CUDA)
    assert "without effect in this process: PYTORCH_ALLOC_CONF=expandable_segments:True" in caplog.text


def test_algorithms_are_deterministic_while_it_lasts():
    with repeatable(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_has_no_such_algorithm_is_an_error():
    with pytest.raises(ModelError, match=r"^deterministic: put_ does not have a deterministic impl.*; leave"):
        _fail("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms'.")
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"):
        _fail("another")


def _fail(message):
    with repeatable(True):
        raise RuntimeError(message)
