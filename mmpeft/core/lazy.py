"""Modules that are imported when first used, so that `mmpeft --help` costs neither torch nor transformers."""

import importlib
from typing import Any


class LazyModule:
    """Stands for a module of mmpeft until one of its names is asked for.

    Used by the command line alone, whose files name what they call at their top and still start quickly.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
