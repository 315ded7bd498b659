import pytest
import torch

from mmpeft.core.errors import ModelError
from mmpeft.models.devices import pick_device, pick_dtype

CPU = torch.device("cpu")


def test_cpu_and_auto():
    assert pick_device("cpu") == CPU
    assert pick_device(CPU) == CPU
    expected = torch.accelerator.current_accelerator(check_available=True) or CPU
    assert pick_device("auto").type == expected.type


def test_unknown_name():
    with pytest.raises(ModelError, match="device 'gpu' is not known; use auto, cpu, cuda, npu"):
        pick_device("gpu")


@pytest.mark.parametrize(("device", "advice"), [("npu", r"mmpeft\[npu\] and CANN"), ("cuda:1", "torch built for cuda")])
def test_absent_accelerator_says_what_to_install(device, advice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if device == "npu" and hasattr(torch, "npu"):
        pytest.skip("this torch has an NPU backend")
    with pytest.raises(ModelError, match=f"device '{device}' was asked for, but torch sees none; install.*{advice}"):
        pick_device(device)


def test_index_beyond_the_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0").index == 0
    with pytest.raises(ModelError, match="'cuda:1' was asked for, but torch sees 1, numbered from 0"):
        pick_device("cuda:1")


def test_dtype():
    assert pick_dtype("auto", CPU) is torch.float32
    assert pick_dtype(None, torch.device("cuda")) == "auto"
    assert pick_dtype("bfloat16", CPU) is torch.bfloat16
    assert pick_dtype(torch.float16, CPU) is torch.float16
    with pytest.raises(ModelError, match="dtype 'bfloat' is not known; did you mean 'bfloat16'"):
        pick_dtype("bfloat", CPU)
