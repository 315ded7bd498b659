"""The simulated NPU itself. It is a simulation: nothing here ran on Ascend hardware."""

import subprocess
import sys
from pathlib import Path

from tests.npu_sim.process import simulated

INSIDE = Path(__file__).parent / "inside.py"


def test_the_simulation_keeps_its_word(npu_library):
    """All of inside.py, in one process that has the device."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(INSIDE)]
    done = subprocess.run(
        words,
        cwd=INSIDE.parents[2],
        env=simulated(npu_library, NPU_SIM_DEVICES="2"),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_device_is_found_where_torch_does_not_look_for_it(npu_library):
    """With torch's own import of backends switched off."""
    program = (
        "import torch\n"
        "from mmpeft.models.devices import pick_device\n"
        "assert not hasattr(torch, 'npu')\n"
        "print(pick_device('npu'), pick_device('auto'), pick_device('npu:1'))\n"
    )
    env = simulated(npu_library, NPU_SIM_DEVICES="2", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["npu", "npu", "npu:1"], done.stderr[-2000:]
