"""The extension that simulates the device."""

import importlib.machinery
import importlib.util
import os

_loader = importlib.machinery.ExtensionFileLoader("_npu_sim", os.environ["NPU_SIM_LIBRARY"])
device = importlib.util.module_from_spec(importlib.util.spec_from_loader("_npu_sim", _loader))
_loader.exec_module(device)
