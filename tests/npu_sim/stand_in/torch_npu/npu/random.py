"""`torch.npu.random`: a generator for each device."""

import torch

from torch_npu.extension import device as _device


def _generator(device="npu"):
    index = device if isinstance(device, int) else torch.device(device).index
    return _device.default_generator(_device.current_device() if index is None else index)


def get_rng_state(device="npu"):
    return _generator(device).get_state()


def set_rng_state(state, device="npu"):
    _generator(device).set_state(state)


def get_rng_state_all():
    return [get_rng_state(index) for index in range(_device.device_count())]


def set_rng_state_all(states):
    for index, state in enumerate(states):
        set_rng_state(state, index)


def manual_seed(seed):
    _generator().manual_seed(int(seed))


def manual_seed_all(seed):
    for index in range(_device.device_count()):
        _generator(index).manual_seed(int(seed))


def seed():
    _generator().seed()


def seed_all():
    manual_seed_all(_generator().seed())


def initial_seed():
    return _generator().initial_seed()
