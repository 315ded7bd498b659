"""Data sets of the `datasets` library: a directory that `save_to_disk` wrote, or one of the Hugging Face hub.

    hf://owner/name                     the split "train"
    hf://owner/name/config@revision:test

No code of the data set is run. A hub data set is downloaded into the Hugging Face cache by `datasets`, which keeps
it as Arrow files; media in it are found under the names of those.
"""

import json
import re
from pathlib import Path

import datasets

from mmpeft.core.errors import DataError
from mmpeft.data.sources.base import Container, listing_digest, some
from mmpeft.data.sources.columnar import columnar_rows

_HUB = re.compile(
    r"hf:/{1,2}(?P<name>[^/@:]+(?:/[^/@:]+)?)(?:/(?P<config>[^/@:]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)
_STATE, _DICT, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"


def saved_dataset(folder: Path) -> Container:
    """The rows of a directory that `save_to_disk` wrote.

    Raises:
        DataError: it holds several splits, or is damaged.
    """
    try:
        if not (folder / _STATE).is_file():
            splits = list(json.loads((folder / _DICT).read_text(encoding="utf-8"))["splits"])
            if len(splits) == 1:
                return saved_dataset(folder / splits[0])
            raise DataError(f"{folder}: holds the splits {some(splits)}; name one: {folder / (splits or ['train'])[0]}")
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        # Names only: a state that somebody else wrote must not lead out of the folder.
        paths = [folder / Path(file["filename"]).name for file in state["_data_files"]]
        features = datasets.Features.from_dict(info["features"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: is no whole saved data set ({type(error).__name__}: {error}); save it again"
        ) from error
    return Container(
        name="a saved data set",
        root=folder,
        rows=lambda: columnar_rows(paths, root=folder, features=features),
        digest=lambda: listing_digest(paths, root=folder, read=[folder / _STATE]),
        anchor=folder.name,
    )


def hub_dataset(text: str) -> Container:
    """The rows of one split of a hub data set (or of a local folder that `datasets` reads, by a relative path).

    Raises:
        DataError: no such name, no such split, or no network and not in the cache.
    """
    found = _HUB.fullmatch(text)
    if found is None or "[" in (found["split"] or ""):
        raise DataError(
            f"{text!r} is no hub data set; expected hf://owner/name, or hf://owner/name/config@revision:split"
        )
    split = found["split"] or "train"
    try:
        loaded = datasets.load_dataset(found["name"], found["config"], split=split, revision=found["revision"])
    # The hub's errors, those of its HTTP client and those of a data set's own files are of many kinds.
    except Exception as error:
        offline = isinstance(error, ConnectionError)
        advice = (
            "it is not in the cache, and the network is off: download it first, or unset HF_HUB_OFFLINE"
            if offline
            else "correct the name or the split"
        )
        raise DataError(f"{text}: cannot be loaded ({type(error).__name__}: {_first_line(error)}); {advice}") from error
    paths = [Path(file["filename"]) for file in loaded.cache_files]
    if not paths:
        raise DataError(f"{text}: split {split!r} holds no row")
    return Container(
        name=f"the hub data set {found['name']}, split {split}",
        root=paths[0].parent,
        rows=lambda: columnar_rows(paths, root=paths[0].parent, features=loaded.features),
        digest=lambda: listing_digest(paths, root=paths[0].parent),
        anchor=text,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
