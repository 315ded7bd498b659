"""The files that ship with mmpeft beside its code: adapters/, recipes/ and hub_cards/.

In an installed wheel they lie in `mmpeft/_assets/`, in a source checkout beside the package.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal


def asset_directory(kind: Literal["adapters", "recipes", "hub_cards"]) -> Path:
    """The directory that holds the shipped files of one kind."""
    package = Path(str(files("mmpeft")))
    installed = package / "_assets" / kind
    return installed if installed.is_dir() else package.parent / kind
