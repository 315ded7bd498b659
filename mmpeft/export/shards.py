"""A model's weights on disk as a stream: read tensor by tensor, and written shard by shard, whatever their size.

model/
  config.json
  model-00001-of-00002.safetensors      [8 bytes: length of header][header: JSON][numbers of each tensor]
  model-00002-of-00002.safetensors
  model.safetensors.index.json          {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

or one model.safetensors and no index. The layout is that of huggingface.co/docs/safetensors, the names are those of
transformers. Files are read by offset, not mapped into memory: a mapped shard counts as memory of this process.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.core.files import write_json, writing
from mmpeft.core.hashing import hash_value
from mmpeft.core.memory import returning_memory

SHARD_BYTES = 2 * 10**9
"""Most bytes of one shard, and so about the memory that writing takes."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Types of numbers by their names in a safetensors header."""

_HEADER_LIMIT = 100_000_000
"""Most bytes of a header that safetensors itself reads."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        file: name of the file in the model's directory.
        dtype: type of its numbers.
        shape: its shape.
        begin: offset of its first byte in the file.
        bytes: its length in bytes.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    bytes: int


class Checkpoint:
    """The weights of a model's directory, of which nothing is read but the headers until a tensor is asked for.

    Args:
        folder: a directory with `model.safetensors`, or with shards and their index.

    Attributes:
        folder: as given.
        files: names of its files, in the order of their names.
        tensors: by its name, where each tensor lies; in the order of files, in each in the order of its numbers.

    Raises:
        ModelError: no safetensors there, a shard that the index names is lacking or cut short, or a tensor is not in
            the shard that should hold it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        # transformers takes the single file where both are there.
        single = (self.folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file()
        where = {} if single else _weight_map(index)
        self.files = (SAFE_WEIGHTS_NAME,) if single else tuple(sorted(set(where.values())))
        lacking = [name for name in self.files if not (self.folder / name).is_file()]
        if lacking:
            raise ModelError(_lacking(self.folder, lacking, len(self.files), single=single))
        self.tensors: dict[str, StoredTensor] = {}
        for name in self.files:
            for tensor, stored in read_header(self.folder / name).items():
                if where.get(tensor, name) == name:
                    self.tensors[tensor] = stored
        absent = sorted(set(where) - set(self.tensors))
        if absent:
            raise ModelError(
                f"{self.folder / where[absent[0]]}: {absent[0]} is not in it, though {index.name} says so; "
                "fetch the file again"
            )

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.bytes for stored in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in memory of its own."""
        stored = self.tensors[name]
        with (self.folder / stored.file).open("rb") as file:
            return _read(file, self.folder / stored.file, stored)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name and tensor, one in memory at a time."""
        for file in self.files:
            path = self.folder / file
            with path.open("rb") as opened:
                for name, stored in self.tensors.items():
                    if stored.file == file:
                        yield name, _read(opened, path, stored)

    def layout_hash(self) -> str:
        """SHA-256 of all names and shapes: what an adapter has to fit, whatever the weights and their precision."""
        return hash_value(sorted((name, list(stored.shape)) for name, stored in self.tensors.items()))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # A name with a folder in it could lead anywhere.
        if all(isinstance(file, str) and Path(file).name == file for file in where.values()):
            return dict(where)
        raise ValueError("a shard's name is no plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors shards ({error}); fetch it again") from error


def _lacking(folder: Path, lacking: list[str], count: int, *, single: bool) -> str:
    if not single:
        return f"{folder}: {len(lacking)} of its {count} shards are lacking, first {lacking[0]}; fetch it again"
    pickled = any(folder.glob("pytorch_model*.bin"))
    return (
        f"{folder}: no {SAFE_WEIGHTS_NAME} there, and no {SAFE_WEIGHTS_INDEX_NAME}"
        + ("; pickled weights can run code when they are read and are refused" if pickled else "")
        + "; expected a model's directory with safetensors weights"
    )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their numbers; the file's length is checked against them.

    Raises:
        ModelError: not safetensors, or cut short.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError(f"its header should have {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin = 8 + length
        tensors = {name: _stored(path.name, begin, entry) for name, entry in header.items()}
        ordered = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
        end = max((stored.begin + stored.bytes for stored in ordered.values()), default=begin)
        if end != size:
            raise ValueError(f"it has {size} bytes, its header speaks of {end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from error
    return ordered


def _stored(file: str, begin: int, entry: Mapping[str, Any]) -> StoredTensor:
    first, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"numbers of type {entry['dtype']!r} are not known")
    dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
    if first < 0 or end - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} should have {math.prod(shape) * dtype.itemsize} bytes")
    return StoredTensor(file=file, dtype=dtype, shape=shape, begin=begin + first, bytes=end - first)


def _read(file: BinaryIO, path: Path, stored: StoredTensor) -> torch.Tensor:
    if not stored.bytes:
        return torch.empty(stored.shape, dtype=stored.dtype)
    numbers = bytearray(stored.bytes)
    file.seek(stored.begin)
    if file.readinto(numbers) != stored.bytes:  # type: ignore[attr-defined]
        raise ModelError(f"{path}: the file ends in the middle of a tensor; fetch or write it again")
    return torch.frombuffer(numbers, dtype=stored.dtype).reshape(stored.shape)


def shard_bytes(size: str | int) -> int:
    """Bytes of `2GB`, `500 MiB` or a number.

    Raises:
        RecipeError: it cannot be read, or is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", str(size), re.IGNORECASE)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS or not (found := int(float(match.group(1)) * _UNITS[unit])):
        raise RecipeError(f"shard size {size!r}: expected a size such as 2GB or 500MiB")
    return found


def write_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, *, max_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write a stream of tensors as `model.safetensors`, or as shards of at most `max_bytes` with their index.

    Memory holds one shard and the tensor that begins the next. A tensor larger than `max_bytes` has a shard alone.

    Args:
        tensors: names with tensors; what follows depends on no earlier one, so a generator may let go of each.
        folder: an existing directory; it should be one that takes its final name later (`artefact`).
        max_bytes: of the tensors of one shard.

    Returns:
        By the name of each tensor, the file that holds it.

    Raises:
        OutputError: the place is full or cannot be written.
        ModelError: a name came twice.
    """
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = filled = 0
    seen: set[str] = set()

    def close() -> None:
        with writing(folder):
            save_file(held, folder / _part(len(shards)), metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    with returning_memory():
        for name, tensor in tensors:
            if name in seen:
                raise ModelError(f"{name} came twice; each tensor of a model has a name of its own")
            seen.add(name)
            if held and filled + tensor.nbytes > max_bytes:
                close()
                filled = 0
            held[name] = tensor.contiguous()
            filled += tensor.nbytes
            total += tensor.nbytes
        if held or not shards:
            close()
    files = [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SAFE_WEIGHTS_NAME
        for i in range(len(shards))
    ]
    with writing(folder):
        for i, file in enumerate(files):
            (folder / _part(i)).rename(folder / file)
    where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    if len(files) > 1:
        ordered = dict(sorted(where.items()))
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": ordered})
    return where


def _part(number: int) -> str:
    return f"model-{number + 1:05d}.part.safetensors"
