"""torchvision and torchaudio beside a CPU build of torch: import it before a program that imports them.

Where an index has CUDA builds of them alone, they cannot load their operators. torchvision's transforms need none of
these, so mmpeft's way (mmpeft/core/torchvision.py, read from its file, for this environment has no mmpeft) serves here
too. torchaudio opens and resamples recordings, of which the workloads have none: an empty module takes its place.
"""

import contextlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def _let_torchvision_be_imported():
    file = Path(__file__).parents[2] / "mmpeft" / "core" / "torchvision.py"
    spec = importlib.util.spec_from_file_location("mmpeft_torchvision", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # it holds the declarations, which go with it
    spec.loader.exec_module(module)
    module.make_importable()


def _replace_torchaudio():
    name = "torchaudio"
    if importlib.util.find_spec(name) is None:
        return
    with contextlib.suppress(OSError):
        importlib.import_module(name)
        return
    for broken in [each for each in sys.modules if each.partition(".")[0] == name]:
        del sys.modules[broken]
    empty = ModuleType(name)
    empty.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = empty


_let_torchvision_be_imported()
_replace_torchaudio()
