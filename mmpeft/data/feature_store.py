"""What frozen towers made of samples' media, kept on disk for later epochs, stages and runs.

    <directory>/features/ab/abcdef….safetensors      one entry: the features, and what the processor wrote

An entry appears whole or not at all, whoever is killed and however many write at once; each time that it is read, a
hash of all its content is compared. What is broken, or stands under another's name, is removed and made anew.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmpeft.core.types import Modality
from mmpeft.data.join_features import Shape
from mmpeft.data.store_room import SUFFIX, Room

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{32,128}")
_FEATURE, _SMALL = "feature:", "small:"
_COUNTED = ("hits", "misses", "written", "broken", "refused")


@dataclass(frozen=True, kw_only=True)
class KeptExpansion:
    """What a processor made of a sample's media, without pixels and sounds.

    Attributes:
        replacements: the text in the place of each medium, in order.
        modalities: of each replacement.
        tensors: grids, sizes and the like, as the forward names them.
        shapes: of the tensors that are not kept, for the towers alone read them.
    """

    replacements: tuple[str, ...]
    modalities: tuple[Modality, ...]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    shapes: Mapping[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is kept of one sample's media.

    Attributes:
        tensors: features by name.
        expansion: what the processor made of the media.
    """

    tensors: Mapping[str, torch.Tensor]
    expansion: KeptExpansion


class FeatureStore:
    """Entries by key, in a directory that other processes and runs may use at the same time.

    Goes with a data set into the workers of a loader; what they count is counted here too.

    Args:
        directory: the cache's directory; made when the first entry is written.
        limit_bytes: bytes that all entries may take together. When they are reached, the oldest that no run has used
            since this one began are removed; if there are none, nothing more is taken in.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory = directory / "features"
        self.limit_bytes = limit_bytes
        self.off: str | None = None
        self._room = Room(self.directory, limit_bytes)
        self._swept = False
        self._counts = torch.zeros(len(_COUNTED), dtype=torch.int64).share_memory_()

    def read(self, key: str) -> Entry | None:
        """The entry of `key`; None if there is none that can be used."""
        path = self._path(key)
        try:
            entry = _read(path, key)
            if entry is None:
                # safetensors opens a file twice; another process may have put its own in its place between.
                entry = _read(path, key)
        except FileNotFoundError:
            self._count("misses")
            return None
        except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            if os.path.isfile(path):
                self._broken(path, str(error) or type(error).__name__)
            else:  # another process has removed it since it was opened
                self._count("misses")
            return None
        if entry is None:
            self._broken(path, "its content is not what was written under this key")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        self._count("hits")
        return entry

    def has(self, key: str) -> bool:
        """Whether there is an entry of `key`, unread."""
        path = self._path(key)
        # os.path takes a place that this user may not look into for one without the file; pathlib raises.
        return os.path.isfile(path) and not os.path.islink(path.parent)

    def write(self, key: str, entry: Entry) -> bool:
        """Keep an entry, unless it is there; a failure turns the store off, with a warning, and is no error.

        Returns:
            Whether it is there now.
        """
        if self.off is not None:
            return False
        if self.has(key):
            return True
        size = _most_bytes(entry)
        path = self._path(key)
        temporary = path.with_name(f".{key}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            if not self._swept:
                self._swept = True
                self._room.sweep()
            if not self._room.make(size):
                self._count("refused")
                return False
            self._make_folder(path.parent)
            _save(temporary, key, entry)
            written = temporary.stat().st_size
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.off = f"{self.directory} cannot be written ({error})"
            logger.warning("the feature cache is off from here on: %s", self.off)
            return False
        self._room.add(written)
        self._count("written")
        return True

    def figures(self) -> dict[str, int]:
        """How often entries were found, missing, written, broken, evicted or refused, and their bytes on disk."""
        counts = dict(zip(_COUNTED, self._counts.tolist(), strict=True))
        return {**counts, "evicted": self._room.evicted, "bytes": self._room.bytes()}

    def free_bytes(self) -> int:
        """Of the disk, less what is left for other files; 0 where it cannot be asked."""
        try:
            return max(0, self._room.free())
        except OSError:
            return 0

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"feature key {key!r}; expected 32 to 128 hexadecimal digits")
        return self.directory / key[:2] / f"{key}{SUFFIX}"

    def _make_folder(self, folder: Path) -> None:
        """The folder of an entry, for this user alone; a link is none, for it may lead elsewhere."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link", str(folder))

    def _count(self, name: str) -> None:
        self._counts[_COUNTED.index(name)] += 1

    def _broken(self, path: Path, why: str) -> None:
        logger.warning("the feature cache's entry %s cannot be used and is made anew: %s", path, why)
        with contextlib.suppress(OSError):
            path.unlink()
        self._count("broken")
        self._count("misses")


def default_directory() -> Path:
    """Where caches are kept unless a recipe says otherwise."""
    if given := os.environ.get("MMPEFT_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser() / "mmpeft" if home else Path.home() / ".cache" / "mmpeft"


def _described(expansion: KeptExpansion) -> str:
    shapes = {
        name: [list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in expansion.shapes.items()
    }
    return json.dumps([list(expansion.replacements), list(expansion.modalities), shapes], sort_keys=True)


def _named(entry: Entry) -> dict[str, torch.Tensor]:
    tensors = {f"{_FEATURE}{name}": tensor for name, tensor in entry.tensors.items()}
    tensors |= {f"{_SMALL}{name}": tensor for name, tensor in entry.expansion.tensors.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _most_bytes(entry: Entry) -> int:
    """Bytes that an entry takes on disk, a little more rather than less."""
    named = _named(entry).values()
    return sum(tensor.nbytes for tensor in named) + 2 * len(_described(entry.expansion)) + 200 * (len(named) + 1)


def _digest(key: str, entry: Entry) -> str:
    """Of all that an entry holds."""
    digest = hashlib.blake2b(f"{key}\n{_described(entry.expansion)}".encode(), digest_size=16)
    for name, tensor in sorted(_named(entry).items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _save(path: Path, key: str, entry: Entry) -> None:
    facts = {"expansion": _described(entry.expansion), "digest": _digest(key, entry)}
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    save_file({name: tensor.clone() for name, tensor in _named(entry).items()}, path, metadata=facts)


def _read(path: Path, key: str) -> Entry | None:
    """An entry; None if it is not what was written under this key."""
    if path.parent.is_symlink():
        # What lies elsewhere is neither used nor removed.
        raise FileNotFoundError(path)
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is no regular file")
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    replacements, modalities, shapes = json.loads(facts["expansion"])
    expansion = KeptExpansion(
        replacements=tuple(replacements),
        modalities=tuple(modalities),
        tensors={n.removeprefix(_SMALL): t for n, t in tensors.items() if n.startswith(_SMALL)},
        shapes={name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in shapes.items()},
    )
    features = {n.removeprefix(_FEATURE): t for n, t in tensors.items() if n.startswith(_FEATURE)}
    entry = Entry(tensors=features, expansion=expansion)
    return entry if _digest(key, entry) == facts["digest"] else None
