"""Liger's loss in place of PyTorch's, where it can be; its numbers are compared in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from mmpeft.models import head_loss, liger
from mmpeft.models.head_loss import head_loss_on
from mmpeft.models.liger import liger_takes
from tests.models.test_head_loss import batch, gradients, language


class OnCuda:
    """What is asked of hidden states, as if they were on a GPU."""

    device = torch.device("cuda")

    def __init__(self, dtype):
        self.dtype = dtype


@pytest.mark.parametrize(
    ("installed", "hidden", "head", "taken"),
    [
        (True, OnCuda(torch.bfloat16), torch.nn.Linear(4, 8, dtype=torch.bfloat16), True),
        (True, OnCuda(torch.float32), torch.nn.Linear(4, 8), True),
        (False, OnCuda(torch.float32), torch.nn.Linear(4, 8), False),
        (True, torch.zeros(2, 4), torch.nn.Linear(4, 8), False),
        (True, OnCuda(torch.float16), torch.nn.Linear(4, 8, dtype=torch.float16), False),
        (True, OnCuda(torch.bfloat16), torch.nn.Linear(4, 8), False),
        (True, OnCuda(torch.float32), torch.nn.Sequential(torch.nn.Linear(4, 8)), False),
    ],
    ids=["bfloat16", "float32", "not installed", "on a CPU", "float16", "another format", "no plain head"],
)
def test_it_computes_plain_heads_on_cuda_where_it_is_installed(monkeypatch, installed, hidden, head, taken):
    monkeypatch.setattr(liger, "_loss", lambda: object() if installed else None)
    assert liger_takes(head, hidden) is taken


def test_one_that_does_not_go_with_what_is_installed_is_named_and_left_out(monkeypatch, caplog):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(liger, "PACKAGE", "no_such_liger")
    liger._loss.cache_clear()
    try:
        assert not liger_takes(torch.nn.Linear(4, 8), OnCuda(torch.float32))
        assert "No module named 'no_such_liger'" in caplog.text
    finally:
        liger._loss.cache_clear()


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_logits_that_a_model_bends_or_scales_are_left_to_pytorch(monkeypatch, kind):
    monkeypatch.setattr(head_loss, "liger_takes", lambda head, hidden: True)
    model = language(kind)
    with head_loss_on(model, chunked=True) as figures:
        gradients(model, batch())
    assert figures.chunked
    assert not figures.liger


COMPARE = """
import torch
from mmpeft.models import head_loss
from tests.models.test_head_loss import VOCABULARY, batch, gradients, language

head_loss.liger_takes = lambda head, hidden: True
model, inputs = language("llama"), batch()
with head_loss.head_loss_on(model, chunked=True, liger=False) as figures:
    expected, wanted = gradients(model, inputs)
    assert not figures.liger
with head_loss.head_loss_on(model, chunked=True) as figures:
    loss, found = gradients(model, inputs)
    assert figures.liger
torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
assert found.keys() == wanted.keys()
for key in wanted:
    torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-7)
print("alike")
"""


@pytest.mark.skipif(find_spec("liger_kernel") is None or find_spec("triton") is None, reason="needs liger-kernel")
def test_its_loss_and_gradients_are_those_of_pytorch():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARE], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "alike", done.stderr[-3000:]
