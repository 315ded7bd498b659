"""Versions that do not go together: rows of the table, and what libraries say of one another."""

from importlib.metadata import version

import pytest
import torch
from packaging.specifiers import SpecifierSet

from mmpeft.pipeline.doctor import diagnose
from mmpeft.pipeline.known_bad import KNOWN_BAD, known_bad, unmet


def fixes(**found):
    return [row.fix for row in known_bad({name.replace("_", "-"): value for name, value in found.items()})]


@pytest.mark.parametrize(
    ("found", "fix"),
    [
        ({"torch": "2.9.1+cu130", "torchvision": "0.23.0"}, "run: pip install 'torchvision==0.24.*'"),
        ({"torch": "2.13.0", "torch_npu": "2.12.0"}, "run: pip install 'torch==2.12.*'"),
        ({"torch": "2.7.0", "torch_npu": "2.7.1.post2"}, None),
        ({"torch": "2.9.0", "torch_npu": "2.9.0.post2", "CANN": "8.5.0"}, "install CANN 9.0.0, or the torch-npu that"),
        ({"torch": "2.8.0", "torch_npu": "2.8.0", "CANN": "8.3.RC1"}, None),
        ({"torch": "2.6.0", "deepspeed": "0.14.2"}, "run: pip install -U 'mmpeft[deepspeed]'"),
        ({"torch": "2.6.0", "deepspeed": "0.18.0", "torchvision": "0.21.0+cpu"}, None),
        ({"torch": "2.6.0", "torchvision": None}, None),
        ({"torch": "2.6.0", "torchvision": "unknown"}, None),
    ],
)
def test_pairs(found, fix):
    assert [text[: len(fix)] for text in fixes(**found)] == [fix] if fix else not fixes(**found)


def test_a_driver_that_is_older_than_its_cuda_needs():
    assert [row.reason for row in known_bad({"CUDA": "12.8", "NVIDIA driver": "470.57.02"})] == [
        "CUDA 12 needs a driver of 525 or newer"
    ]
    assert not known_bad({"CUDA": "12.8", "NVIDIA driver": "550.54"})


def test_every_row_says_what_to_do_and_where_it_is_written():
    for row in KNOWN_BAD:
        assert len(row.versions) == (1 if "python" in row.versions else 2)
        assert all(SpecifierSet(text) for text in row.versions.values())
        assert row.source.startswith("https://")
        assert row.reason
        assert row.fix


def test_what_is_installed_here_has_no_broken_pair_and_every_requirement():
    found = diagnose()
    assert not [line for line in found.broken if "requires" in line or "(see https" in line]
    assert not list(unmet(found.versions))


def test_a_requirement_that_is_not_met_is_named():
    found = {name: version(name) for name in ("mmpeft", "torch", "transformers", "peft", "accelerate")}
    lines = dict(unmet({**found, "torch": "2.5.1", "deepspeed": "0.17.0"}))
    assert set(lines) == {"mmpeft", "transformers"}
    assert lines["transformers"].endswith("and 2.5.1 is installed; run: pip install 'torch>=2.6'")
    assert any(
        line.startswith("mmpeft 0.1.0 requires deepspeed>=0.18") for _, line in unmet(found | {"deepspeed": "0.17.0"})
    )
    assert torch.__version__.startswith(found["torch"].partition("+")[0])
