"""Processes that have the simulated NPU."""

import os
from pathlib import Path

from tests.processes import environment

STAND_IN = Path(__file__).parent / "stand_in"


def simulated(library: Path, **changes: str) -> dict[str, str]:
    """The environment of a process in which `torch.npu` is there, as with torch-npu installed."""
    path = os.pathsep.join(filter(None, (str(STAND_IN), os.environ.get("PYTHONPATH"))))
    # CANN's set_env.sh sets it, and DeepSpeed fails without.
    return environment(PYTHONPATH=path, NPU_SIM_LIBRARY=str(library), ASCEND_HOME_PATH=str(STAND_IN), **changes)
