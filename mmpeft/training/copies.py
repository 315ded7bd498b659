"""The next micro-batch goes to an accelerator while it computes this one, on a stream of its own.

    host            takes 2, copies 3                  takes 3, copies 4
    own stream      ...... 3 ......                    ...... 4 ......
    computing       forward and backward of 2          (waits for 3) forward and backward of 3

On the stream that computes, a copy stands behind all that was asked of it before, and what comes next behind the copy.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

KINDS = ("cuda", "npu")
"""Devices with streams, to which pinned memory is copied without the host."""


class CopiesAhead:
    """The micro-batches of a step, each copied when the one before it is taken.

    Attributes:
        count: micro-batches that were copied so.

    Args:
        device: where they go.
        move: what copies a value of a batch there, nested as it may be, without waiting where its memory is pinned.
    """

    def __init__(self, device: torch.device, move: Callable[[Any], Any]) -> None:
        self.device, self.move, self.count = device, move, 0
        self._coming: deque[Mapping[str, Any]] = deque()
        self._stream: Any = None
        # The host's batch keeps its pinned memory until the copy is taken.
        self._copied: tuple[Mapping[str, Any], dict[str, Any]] | None = None

    def expect(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Those of a step that begins; the first is copied now, behind the step before."""
        self._coming, self._copied = deque(batches), None
        self._copy_next()

    def take(self, batch: Mapping[str, Any]) -> dict[str, Any] | None:
        """What `batch` has on the device, for the current stream; None for one that is not copied. Copies the next."""
        copied, self._copied = self._copied, None
        moved = None
        if copied is not None and copied[0] is batch:
            current = torch.get_device_module(self.device).current_stream()
            current.wait_stream(self._stream)
            # What was keys when it was copied may have been taken out.
            moved = {key: copied[1][key] for key in batch}
            for tensor in _tensors(moved):
                # Its memory is the other stream's, which may not use it again before this one has.
                tensor.record_stream(current)
        self._copy_next()
        return moved

    def forget(self) -> None:
        """Give up what was copied and not taken."""
        self._coming.clear()
        self._copied = None

    def _copy_next(self) -> None:
        if not self._coming:
            return
        batch = self._coming.popleft()
        if not any(tensor.is_pinned() for tensor in _tensors(batch) if tensor.device.type == "cpu"):
            return
        module = torch.get_device_module(self.device)
        self._stream = self._stream or module.Stream()
        with module.stream(self._stream):
            self._copied = batch, {key: self.move(value) for key, value in batch.items()}
        self.count += 1


def _tensors(data: Any) -> Iterator[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _tensors(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _tensors(value)
