"""HCCL, carried by gloo."""

import os

from torch import distributed

from torch_npu.extension import device


def register():
    """Make the backend "hccl" known, that of npu tensors."""
    if distributed.is_available():
        distributed.Backend.register_backend("hccl", _create, devices=["npu"])


found = {}
"""What the first group found in the environment."""


def _create(store, rank, size, timeout):
    found.setdefault("HCCL_DETERMINISTIC", os.environ.get("HCCL_DETERMINISTIC"))
    return device.hccl(distributed.ProcessGroupGloo(store, rank, size, timeout=timeout))
