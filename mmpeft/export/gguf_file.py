"""One GGUF file, written tensor by tensor: what llama.cpp, Ollama and LM Studio read.

    [magic, version, counts][keys and values][each tensor's name, shape, type, offset][numbers, aligned to 32 bytes]

Names, shapes and types are known before the first weight is read, so numbers go to their place as they come by, in
any order. The layout is that of ggml-org/ggml, docs/gguf.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from mmpeft.core.errors import ModelError
from mmpeft.core.optional import require

Q8_BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""

Take = Callable[[torch.Tensor], torch.Tensor]
"""What a file's tensor is of a model's: itself, some of its rows, or its rows in another order."""


class OutType(StrEnum):
    """How matrices are written; what has one dimension is float32."""

    Q8_0 = "q8_0"
    F16 = "f16"
    BF16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor of the file.

    Attributes:
        source: name of the model's tensor that it is made of.
        name: its own.
        shape: of the model's tensor.
        take: what it is of that one.
        exact: whether it stays in float32 whatever the file's type.
        half: whether it is in 16 bits where the file's matrices are in int8.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    take: Take = lambda tensor: tensor
    exact: bool = False
    half: bool = False


def gguf_package() -> ModuleType:
    """The gguf package, whose names, numbers and quantiser these are.

    Raises:
        MissingDependencyError: it is not installed.
    """
    return require("gguf", extra="gguf")


class GgufFile:
    """A GGUF file that is being written; a context.

        with GgufFile(path, "llama", pieces, OutType.Q8_0) as file:
            file.writer.add_block_count(2)
            file.begin()
            for name, tensor in stream:
                file.take(name, tensor)

    Args:
        path: the file.
        arch: name of the architecture, as llama.cpp knows it.
        pieces: all tensors.
        outtype: of matrices.

    Attributes:
        writer: of keys and values, until `begin`.
        bytes: of all tensors.
    """

    def __init__(self, path: Path, arch: str, pieces: list[Piece], outtype: OutType) -> None:
        self._gguf = gguf_package()
        self.path, self.writer = path, self._gguf.GGUFWriter(path, arch)
        self._types = self._gguf.GGMLQuantizationType
        self._pieces: dict[str, list[Piece]] = {}
        self._offsets: dict[str, int] = {}
        self._kinds: dict[str, Any] = {}
        self._file: Any = None
        self.bytes = 0
        for piece in pieces:
            shape = tuple(piece.take(torch.empty(piece.shape, device="meta")).shape)
            kind = self._kind(piece, shape, outtype)
            block, size = self._gguf.GGML_QUANT_SIZES[kind]
            count = torch.Size(shape).numel() // block * size
            self.writer.add_tensor_info(piece.name, shape, np.dtype(np.float32), count, raw_dtype=kind)
            self._pieces.setdefault(piece.source, []).append(piece)
            self._offsets[piece.name], self._kinds[piece.name] = self.bytes, kind
            self.bytes += self.writer.ggml_pad(count, self.writer.data_alignment)

    def _kind(self, piece: Piece, shape: tuple[int, ...], outtype: OutType) -> Any:
        if piece.exact or len(shape) < 2:
            return self._types.F32
        if outtype is OutType.Q8_0 and (piece.half or shape[-1] % Q8_BLOCK):
            return self._types.F16
        return self._types[outtype.name]

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.writer.close()

    def begin(self) -> None:
        """Write all but the numbers."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self._file = self.writer.fout[0]
        self.writer.write_padding(self._file, self._file.tell())
        start = self._file.tell()
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        self._file.truncate(start + self.bytes)

    def take(self, source: str, tensor: torch.Tensor) -> None:
        """Write what is made of one tensor of the model, if anything is.

        Raises:
            ModelError: a number is too large for half precision.
        """
        for piece in self._pieces.pop(source, []):
            numbers = piece.take(tensor).float().contiguous().numpy()
            kind = self._kinds[piece.name]
            if kind is self._types.F16 and numbers.size and abs(numbers).max() > torch.finfo(torch.float16).max:
                raise ModelError(f"{source}: a weight is too large for half precision; take --outtype bf16")
            self._file.seek(self._offsets[piece.name])
            self._file.write(self._gguf.quants.quantize(numbers, kind).tobytes())

    def check_whole(self) -> None:
        """Refuse a file that lacks numbers.

        Raises:
            ModelError: names a tensor that the model did not have.
        """
        if self._pieces:
            raise ModelError(f"{min(self._pieces)}: the model has no such tensor; fetch it again")
