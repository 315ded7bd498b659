"""`torch.npu`: what torch, accelerate, transformers and DeepSpeed ask of it."""

import contextlib
from types import SimpleNamespace

import torch

from torch_npu.extension import device as _device
from torch_npu.npu import amp, random  # noqa: F401
from torch_npu.npu.random import (  # noqa: F401
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)

_NAMES = {
    "BFloat16Tensor": torch.bfloat16,
    "BoolTensor": torch.bool,
    "ByteTensor": torch.uint8,
    "DoubleTensor": torch.float64,
    "FloatTensor": torch.float32,
    "HalfTensor": torch.float16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
}


def __getattr__(name):
    if name in _NAMES:
        return lambda *data: torch.tensor(*data, dtype=_NAMES[name], device="npu")
    if name == "default_generators":
        return tuple(_device.default_generator(index) for index in range(device_count()))
    raise AttributeError(f"the stand-in's torch.npu has no {name}")


def _index(device=None):
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current_device() if index is None else index


def _is_in_bad_fork():
    return False


def _lazy_call(call):
    call()


def _lazy_init():
    pass


def init():
    pass


def is_initialized():
    return bool(_device.found_at_first())


def is_available():
    return device_count() > 0


def device_count():
    return _device.device_count()


def current_device():
    return _device.current_device()


def set_device(device):
    _device.set_device(_index(device))


def get_device_name(device=None):
    return f"simulated NPU {_index(device)}"


def get_device_properties(device=None):
    return SimpleNamespace(name=get_device_name(device), total_memory=mem_get_info(device)[1])


def get_device_capability(device=None):
    return None


def is_bf16_supported():
    return True


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16]


def is_autocast_enabled():
    return torch.is_autocast_enabled("npu")


def get_autocast_dtype():
    return torch.get_autocast_dtype("npu")


@contextlib.contextmanager
def device(index):
    before = current_device()
    set_device(index)
    try:
        yield
    finally:
        _device.set_device(before)


# --- streams and events


class Stream(torch.Stream):
    def __new__(cls, device=None, priority=0, **words):
        if "stream_id" in words:
            return super().__new__(cls, **words)
        return super().__new__(cls, device=torch.device("npu", _index(device)), priority=priority)


def Event(enable_timing=False, blocking=False, interprocess=False):  # noqa: N802
    return torch.Event("npu", enable_timing=enable_timing)


def current_stream(device=None):
    return torch._C._accelerator_getStream(_index(device))


def default_stream(device=None):
    found = current_stream(device)
    return torch.Stream(stream_id=0, device_index=found.device_index, device_type=found.device_type)


def set_stream(stream):
    if stream is not None:
        torch.accelerator.set_stream(stream)


class StreamContext:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.before = current_stream()
        set_stream(self.stream)

    def __exit__(self, *error):
        set_stream(self.before)


def stream(stream):
    return StreamContext(stream)


def synchronize(device=None):
    torch.accelerator.synchronize(_index(device))


# --- memory


def memory_stats(device=None):
    return torch.accelerator.memory_stats(_index(device))


def memory_allocated(device=None):
    return memory_stats(device)["allocated_bytes.all.current"]


def max_memory_allocated(device=None):
    return memory_stats(device)["allocated_bytes.all.peak"]


def memory_reserved(device=None):
    return memory_stats(device)["reserved_bytes.all.current"]


def max_memory_reserved(device=None):
    return memory_stats(device)["reserved_bytes.all.peak"]


memory_cached, max_memory_cached = memory_reserved, max_memory_reserved


def reset_peak_memory_stats(device=None):
    torch.accelerator.reset_peak_memory_stats(_index(device))


reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def empty_cache():
    pass


def mem_get_info(device=None):
    return torch.accelerator.get_memory_info(_index(device))
