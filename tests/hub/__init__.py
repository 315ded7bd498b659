"""A Hugging Face Hub for tests: a real HTTP server on this machine, its clients the real huggingface_hub."""

from tests.hub.server import LocalHub, local_hub
from tests.hub.store import READER, TOKEN, Fault

__all__ = ["READER", "TOKEN", "Fault", "LocalHub", "local_hub"]
