"""A graph on disk, and what runs it: ONNX Runtime, with tensors that it and torch share."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mmpeft.core.errors import ModelError
from mmpeft.core.optional import require

EXTRA = "onnx"


def check_installed() -> None:
    """Raise unless what writes graphs is installed.

    Raises:
        MissingDependencyError: names the extra.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, extra=EXTRA)


class OnnxGraph:
    """A graph that runs on this machine's CPU, on as many threads as torch.

    Args:
        file: `*.onnx`.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ModelError: the file is not there or not whole.
    """

    def __init__(self, file: Path) -> None:
        self._runtime = require("onnxruntime", extra=EXTRA)
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # A graph's idle threads would keep cores busy that the next graph, and torch, compute on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not file.is_file():
            raise ModelError(f"{file}: not there; export or copy the model again")
        try:
            self._session = self._runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # ONNX Runtime's own exceptions have no common base but this.
            raise ModelError(f"{file}: cannot be read ({error}); export or copy the model again") from error
        self.inputs = [each.name for each in self._session.get_inputs()]
        self.outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs by name; inputs that the graph does not read are left out."""
        names = [name for name in self.inputs if name in tensors]
        found = self.run([(name, self.shared(tensors[name])) for name in names])
        return dict(zip(self.outputs, map(torch.from_dlpack, found), strict=True))

    def shared(self, tensor: torch.Tensor) -> Any:
        """ONNX Runtime's view of a tensor."""
        tensor = tensor.detach().contiguous()
        if not tensor.numel() or tensor.dtype == torch.bool:
            # Neither goes through DLPack: ONNX Runtime refuses null pointers, and takes truths for small integers.
            return self._runtime.OrtValue.ortvalue_from_numpy(tensor.numpy())
        return self._runtime.OrtValue.from_dlpack(tensor)

    def run(self, inputs: Iterable[tuple[str, Any]]) -> list[Any]:
        """Outputs in order; both as ONNX Runtime has them."""
        binding = self._session.io_binding()
        for name, value in inputs:
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        values: list[Any] = binding.get_outputs()
        return values
