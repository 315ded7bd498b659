import json
import subprocess
import sys

import pytest

FORKS = """
import json, os, sys, threading, time
sys.version_info = {version}
from mmpeft.core.forks import settle_before_forks

done, ready = [], threading.Event()

def finish():
    ready.wait()
    # As long as a thread needs that has to wait for the interpreter first.
    time.sleep(0.002)
    done.append(True)

settle_before_forks()
settle_before_forks()
threading.Thread(target=finish).start()
start = time.perf_counter()
ready.set()
child = os.fork()
if child == 0:
    os._exit(0 if done else 1)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - start]))
"""


@pytest.mark.parametrize(("version", "settled"), [((3, 11, 7), True), ((3, 11, 8), False)])
def test_threads_finish_before_a_fork_where_a_child_could_hang(version, settled):
    code = FORKS.format(version=version)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, seconds = json.loads(done.stdout)
    assert status == (0 if settled else 1)
    assert not settled or seconds >= 0.05
