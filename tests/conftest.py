"""Fixtures shared by all tests: no network, no progress bars, a home of its own for caches."""

import atexit
import os
import shutil
import signal
import tempfile

# Set before any Hugging Face library is imported: nothing may reach a hub, nothing may land in the user's caches.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mmpeft-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

# A shell that starts tests in its background lets them, and all programs that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from tests.tiny import tiny_llava, tiny_processor


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture
def llava(processor):
    return tiny_llava(processor)
