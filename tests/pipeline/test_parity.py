"""What a device is compared by: nothing differs on the CPU, rounding passes, and wrong arithmetic does not."""

import json
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from mmpeft.cli.main import app
from mmpeft.models import tree_attention
from mmpeft.models.devices import DTYPES
from mmpeft.pipeline import parity
from mmpeft.pipeline.parity import CHECKS, TOLERANCES, compare, judge, numbers_in

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def references():
    return {name: check(CPU, torch.float32) for name, check in CHECKS.items()}


def test_on_the_cpu_nothing_differs_and_the_report_says_so(tmp_path):
    file = tmp_path / "parity.json"
    before = torch.get_rng_state()
    done = CliRunner().invoke(app, ["doctor", "--npu-parity", "--device", "cpu", "--output", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert torch.equal(torch.get_rng_state(), before)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert {(check["check"], check["precision"]) for check in found["checks"]} == {
        (name, precision) for name in CHECKS for precision in TOLERANCES
    }
    for check in found["checks"]:
        assert (check["absolute"], check["relative"], check["passed"], check["error"]) == (0, 0, True, "")
    assert found["passed"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["device"] == "cpu"


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_rounding_takes_less_than_half_of_the_tolerance_and_more_than_nothing(references, precision):
    for name, check in CHECKS.items():
        found = judge(name, precision, references[name], check(CPU, DTYPES[precision]))
        assert 0 < found.relative < TOLERANCES[precision] / 2, found


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_mask_that_is_lost_is_found(monkeypatch, precision):
    def without_mask(query, key, value, *args, **kwargs):
        return scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])

    expected = {name: CHECKS[name](CPU, DTYPES[precision]) for name in ("linear, norm, attention", "packed rows")}
    monkeypatch.setattr(parity, "scaled_dot_product_attention", without_mask)
    monkeypatch.setattr(tree_attention, "scaled_dot_product_attention", without_mask)
    monkeypatch.setattr(tree_attention, "blocks_pay", lambda query: False)
    for name, reference in expected.items():
        assert not judge(name, precision, reference, CHECKS[name](CPU, DTYPES[precision])).passed


def test_a_decay_that_is_lost_is_found(monkeypatch, references):
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kwargs: adamw(*args, **kwargs | {"weight_decay": 0}))
    found = judge("AdamW steps", "float32", references["AdamW steps"], CHECKS["AdamW steps"](CPU, torch.float32))
    assert not found.passed
    assert found.worst == "weights"


def test_what_is_no_number_fails_and_what_the_device_raises_is_the_result():
    one, nan = {"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.tensor([1, math.nan]), "b": torch.ones(2)}
    assert not judge("x", "float32", one, nan).passed
    assert not judge("x", "float32", nan, nan).passed
    assert judge("x", "float32", one, one).passed

    def refuses(device, dtype):
        raise RuntimeError("no such kernel")

    found = compare("x", refuses, "float32", CPU)
    assert (found.passed, found.error) == (False, "RuntimeError: no such kernel")


def test_numbers_are_the_same_bits_on_every_machine():
    values = numbers_in(2, 3, salt=0)
    assert (values * 2**23).long().tolist() == NUMBERS
    many = numbers_in(100_000, salt=5)
    assert many.abs().max() <= 1
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.square().mean()) - 1 / 3) < 0.01


NUMBERS = [[-2574169, -6350030, -6011515], [1536576, 4255776, -4067306]]


def test_a_device_that_is_not_here_is_named(tmp_path):
    arguments = ["doctor", "--npu-parity", "--device", "npu", "--output", str(tmp_path / "x.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert "install mmpeft[npu] and CANN" in str(done.exception)
    assert not (tmp_path / "x.json").exists()
