"""The hub as a server on a free port of this machine, and processes that are its clients.

Its clients are processes of their own (`LocalHub.python`): huggingface_hub reads its environment when it is imported.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.hub.app import hub_app
from tests.hub.store import TOKEN, Store

_ROOT = Path(__file__).parent.parent.parent
_SITE = Path(torch.__file__).parent.parent


class LocalHub(Store):
    """A hub that listens."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._connections: dict[Any, asyncio.BaseTransport] = {}
        connections = self._connections

        class Protocol(H11Protocol):
            """HTTP whose connections can be found, to be dropped."""

            def connection_made(self, transport: Any) -> None:
                super().connection_made(transport)
                connections[transport.get_extra_info("peername")] = transport

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = hub_app(self, self._drop)
        self.server = uvicorn.Server(uvicorn.Config(app, http=Protocol, log_config=None, lifespan="off"))

    def _drop(self, scope: Any) -> None:
        self._connections[tuple(scope["client"])].abort()

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Of a process that uses this hub, with its cache in `home`."""
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": TOKEN,
            # A service on the internet that transformers would ask to turn a pickle into safetensors.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            **changes,
        }

    def python(
        self, program: str, *arguments: object, home: Path, mmpeft: bool = True, timeout: float = 240, **changes: str
    ) -> str:
        """What a program prints that runs in a process of its own; `mmpeft=False` leaves it only other packages."""
        command = [sys.executable]
        if not mmpeft:
            # -S leaves out the .pth file by which an editable install of mmpeft is found; -I leaves out this checkout.
            command += ["-I", "-S"]
            program = f"import sys; sys.path.insert(0, {str(_SITE)!r})\n{textwrap.dedent(program)}"
        done = subprocess.run(
            [*command, "-c", textwrap.dedent(program), *map(str, arguments)],
            env=self.environment(home, **changes),
            cwd=_ROOT if mmpeft else home,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def mmpeft(
        self, *words: object, home: Path, cwd: Path | None = None, timeout: float = 240, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """`mmpeft WORDS` as a process of its own, however it ends."""
        home.mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [sys.executable, "-m", "mmpeft", *map(str, words)],
            env=self.environment(home, **changes),
            cwd=cwd or home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@contextlib.contextmanager
def local_hub(folder: Path) -> Iterator[LocalHub]:
    """A hub that runs until the block ends."""
    hub = LocalHub(folder)
    thread = threading.Thread(target=hub.server.run, kwargs={"sockets": [hub.socket]}, daemon=True)
    thread.start()
    while not hub.server.started:
        time.sleep(0.01)
    try:
        yield hub
    finally:
        hub.server.should_exit = True
        thread.join()
        hub.socket.close()
