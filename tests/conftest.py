"""Fixtures shared by all tests: no network, no progress bars, a home of its own for caches."""

import os
import tempfile

# Set before any Hugging Face library is imported: nothing may reach a hub, nothing may land in the user's caches.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="mmpeft-tests-"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

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
