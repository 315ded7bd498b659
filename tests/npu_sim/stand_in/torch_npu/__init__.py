"""A stand-in for torch-npu on a simulated NPU, for tests: see tests/npu_sim/README.md. Not Ascend's torch-npu.

As the real one does since torch 2.5, it enters with `import torch`, by the entry point `torch.backends`. The extension
that it loads is what NPU_SIM_LIBRARY names.
"""

import sys

import torch

from torch_npu import npu
from torch_npu.fused import npu_fusion_attention, npu_rms_norm, npu_rotary_mul, npu_swiglu
from torch_npu.hccl import register
from torch_npu.simulation import start

__version__ = "2.13.0"
__all__ = ["npu", "npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"]


def _autoload():
    """What torch calls; the import has done it all."""


torch.utils.rename_privateuse1_backend("npu")
torch._register_device_module("npu", npu)
for name in ("amp", "random"):
    sys.modules[f"torch.npu.{name}"] = getattr(npu, name)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
register()
start()
