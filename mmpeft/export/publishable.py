"""What a directory holds that can be published: which kind, which files, and whether it is whole."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from mmpeft.core.errors import AdapterError, HubError, ModelError
from mmpeft.core.files import read_json
from mmpeft.export.artefact import BNB, GGUF, INT8, MERGED, ONNX
from mmpeft.export.merge import all_finite
from mmpeft.export.sources import check_single
from mmpeft.models.load import FACTS_NAME, PROCESSOR_FILES

Kind = Literal["adapter", "model", "merged", "int8", "bnb", "onnx", "gguf"]

PARITY_NAME = "parity.json"
QUANTISED = ("int8", "bnb", "onnx", "gguf")
"""Kinds whose answers can differ from their source's: they are compared with it before they are published."""

_ARTEFACTS: Mapping[str, Kind] = {
    MERGED: "merged",
    INT8: "int8",
    BNB: "bnb",
    ONNX: "onnx",
    GGUF: "gguf",
}
"""What mmpeft.json of an export calls it, as `artefact`."""

_WEIGHTS = (".onnx", ".onnx.data", ".gguf")
"""Ends of the names of weights that are no safetensors."""

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
_PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".npz", ".parquet", ".arrow")
"""Compressed, so that a secret in them would not be found."""

_LEFT_OUT = (
    "checkpoint-*",
    "*.tmp",
    "events.out.tfevents*",
    "__pycache__",
    "runs",
    "relief.json",
    "trainer_state.json",
)


@dataclass(frozen=True, kw_only=True)
class Publishable:
    """A directory that can be published.

    Attributes:
        files: to be published, by their name in the repository.
        left_out: names of the others, each with the reason.
        export: content of mmpeft.json of an export; empty for what is none.
        parity: content of parity.json; None where the export was not compared with its source.
    """

    path: Path
    kind: Kind
    files: Mapping[str, Path]
    left_out: Mapping[str, str]
    export: Mapping[str, Any]
    parity: Mapping[str, Any] | None


def open_publishable(path: Path, *, exclude: tuple[str, ...] = ()) -> Publishable:
    """What `path` holds; nothing is read but names and JSON.

    Args:
        exclude: patterns (`*.txt`, `notes/*`) of files to leave out.

    Raises:
        HubError: it is no adapter, model or export.
        AdapterError: it holds several adapters by names.
    """
    if not path.is_dir():
        raise HubError(f"{path}: no such directory; expected a run, an adapter, a model or an export")
    kind, export = _kind(path)
    parity = path / PARITY_NAME
    files, left_out = _files(path, exclude)
    return Publishable(
        path=path,
        kind=kind,
        files=files,
        left_out=left_out,
        export=export,
        parity=_compared(_json(parity)) if parity.is_file() else None,
    )


def _json(file: Path) -> Any:
    try:
        found = read_json(file)
    except ValueError as error:
        raise HubError(f"{file}: not valid JSON ({error}); make it again") from error
    if not isinstance(found, dict):
        raise HubError(f"{file}: holds a {type(found).__name__}, not entries by name; make it again")
    return found


def _compared(parity: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """None of an export that nobody wanted to be compared."""
    return parity if parity.get("metrics") or parity.get("agreement") else None


def _kind(path: Path) -> tuple[Kind, Mapping[str, Any]]:
    facts = _json(path / FACTS_NAME) if (path / FACTS_NAME).is_file() else {}
    if (kind := _ARTEFACTS.get(str(facts.get("artefact")))) is not None:
        return kind, facts
    if (path / "config.json").is_file():
        return "model", {}
    if (path / CONFIG_NAME).is_file():
        return "adapter", {}
    check_single(str(path))
    raise HubError(
        f"{path}: holds no {CONFIG_NAME}, no config.json and no {FACTS_NAME} of an export; expected a run that has "
        "ended, an adapter, a model or an export"
    )


def _files(path: Path, exclude: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, str]]:
    files, left_out = {}, {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_file():
            if file.is_symlink():
                left_out[name] = "a link to a folder, or to nothing"
            continue
        if any(part.startswith(".") for part in name.split("/")):
            left_out[name] = "hidden"
        elif any(fnmatch(part, pattern) for part in name.split("/") for pattern in _LEFT_OUT):
            left_out[name] = "left by training, no part of the result"
        elif file.suffix in _PICKLED:
            left_out[name] = "pickled: reading it can run code"
        elif file.suffix in _PACKED:
            left_out[name] = "packed: it cannot be searched for secrets"
        elif any(fnmatch(name, pattern) for pattern in exclude):
            left_out[name] = "as asked"
        else:
            files[name] = file
    return files, left_out


def check_whole(artefact: Publishable) -> None:
    """Refuse what would not load or not answer: lacking files, shards cut short, weights that are no numbers.

    Every tensor is read once.

    Raises:
        AdapterError, ModelError: names the file, and what to do.
    """
    failed = AdapterError if artefact.kind == "adapter" else ModelError
    wanted = _wanted(artefact)
    if lacking := [name for name in wanted if name not in artefact.files]:
        raise failed(f"{artefact.path}: no {' and no '.join(lacking)}; make it again, or copy the whole directory")
    if not any(name in artefact.files for name in PROCESSOR_FILES) and artefact.kind != "gguf":
        raise failed(
            f"{artefact.path}: no processor ({' or '.join(PROCESSOR_FILES)}), so pictures could not be prepared as in "
            "training; save it there: processor.save_pretrained(...)"
        )
    for name, file in artefact.files.items():
        try:
            _check_size(name, file, artefact.export.get("sizes") or {})
            if name.endswith(".safetensors"):
                _check_length(file)
                _check_finite(file)
            elif name.endswith(".gguf"):
                _check_begins(file, b"GGUF")
        except (ValueError, SafetensorError) as error:
            raise failed(f"{file}: {error}; make it again, or copy it anew") from error


def check_links(artefact: Publishable) -> None:
    """Refuse links to files elsewhere on this machine; those of the Hub's own cache lead to what it downloaded.

    Raises:
        HubError: names the first, and what to do.
    """
    folder = artefact.path.resolve()
    roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for name, file in artefact.files.items():
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise HubError(
                f"{file}: a link to {file.resolve()}, outside of what is published, so nothing was sent; put a copy of "
                f"the file in its place, or leave it out: --exclude {name}"
            )


def _wanted(artefact: Publishable) -> list[str]:
    """Names of the files without which it is not whole: of an export all weights that its exporter has written."""
    if artefact.kind == "adapter":
        return [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    if artefact.kind in ("onnx", "gguf"):
        found = any(name.endswith(f".{artefact.kind}") for name in artefact.files)
        listed = [name for name in artefact.export.get("files") or () if name.endswith(_WEIGHTS)]
        return listed or ([] if found else [f"*.{artefact.kind}"])
    index = "model.safetensors.index.json"
    if index not in artefact.files:
        return ["config.json", "model.safetensors"]
    shards = _json(artefact.files[index]).get("weight_map") or {}
    return ["config.json", *sorted(set(shards.values()))]


def _check_length(file: Path) -> None:
    """Whether a safetensors file is as long as its header says.

    Raises:
        ValueError: it is shorter.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
        if length > size:
            raise ValueError("cut short: its header is not whole")
        header = json.loads(stream.read(int(length)))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    whole = 8 + int(length) + max(ends, default=0)
    if size < whole:
        raise ValueError(f"cut short: it has {size:,} bytes of {whole:,}")


def _check_size(name: str, file: Path, sizes: Mapping[str, int]) -> None:
    """Whether weights without lengths of their own are as long as their exporter recorded.

    Raises:
        ValueError: they are not.
    """
    size = file.stat().st_size
    if name.endswith(_WEIGHTS) and name in sizes and size != sizes[name]:
        raise ValueError(f"cut short or changed: it has {size:,} bytes, {FACTS_NAME} says {sizes[name]:,}")


def _check_begins(file: Path, start: bytes) -> None:
    with file.open("rb") as stream:
        if stream.read(len(start)) != start:
            raise ValueError(f"it does not begin with {start!r}")


def _check_finite(file: Path) -> None:
    with safe_open(file, framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118
            if not all_finite(stream.get_tensor(name)):
                raise ValueError(f"{name} has values that are not finite (NaN or infinite)")
