"""`torch.npu.amp`."""

import functools

import torch

autocast = functools.partial(torch.amp.autocast, "npu")
GradScaler = functools.partial(torch.amp.GradScaler, "npu")
