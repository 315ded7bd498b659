"""torchvision beside a torch that it was not built for.

A CUDA build of torchvision on CPU torch cannot load its operators, and `import torchvision` ends with "operator
torchvision::nms does not exist" (torchvision 0.28; transformers then says "Could not import module ..." of
anything). Its transforms need none of these operators, and they are all that image and video processors use: with
the two schemas declared beforehand, torchvision imports. `mmpeft doctor` names the combination, and the cure.
"""

import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

NAME = "torchvision"
OPERATORS = ("nms", "qnms")
"""Operators whose schemas torchvision's Python code expects its compiled part to have declared."""

_declared: list[object] = []


def built_for_other_torch() -> bool:
    """Whether torchvision is there, a CUDA build, and torch a CPU build; neither of them is imported for it."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        return False
    found = importlib.util.find_spec(NAME) if NAME not in sys.modules else sys.modules[NAME].__spec__
    if found is None or found.origin is None or not torch_version.endswith("+cpu"):
        return False
    facts = Path(found.origin).parent / "version.py"
    return facts.is_file() and re.search(r"\+cu\d+", facts.read_text(encoding="utf-8")) is not None


class _DeclareFirst:
    """A finder that finds nothing: when torchvision is first asked for, it declares what will be missing."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        if built_for_other_torch():
            _declare_operators()
        return None


def _declare_operators() -> None:
    # `import mmpeft` must not import torch.
    import torch  # noqa: PLC0415
    from torch.library import Library  # noqa: PLC0415

    if hasattr(torch.ops.torchvision, OPERATORS[0]):
        return  # the program has declared them itself
    library = Library(NAME, "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)  # the declarations go with the object


def make_importable() -> None:
    """See to it that a later `import torchvision` works; costs nothing until then."""
    if NAME not in sys.modules and not any(isinstance(finder, _DeclareFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareFirst())
