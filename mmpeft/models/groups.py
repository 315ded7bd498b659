"""A group of processes that run the same samples together, and what they send one another of their rows.

Who shares what out in it: `mmpeft.models.tensor_parallel` matrices, `mmpeft.models.context_parallel` tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from mmpeft.models.base import base_of

Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Group:
    """Processes that run the same samples, and this one's place among them.

    Attributes:
        degree: processes of the group.
        rank: of this process in it, from 0.
        group: what they send over; None where a share is looked at by itself: shapes are those of a process of a
            group, and nothing is sent.
    """

    degree: int
    rank: int
    group: Any = None

    @property
    def together(self) -> int:
        """Processes that run the same samples."""
        return 1 if self.group is None else self.degree

    def share(self, size: int) -> slice:
        """This process's part of so many rows or columns."""
        width = size // self.degree
        return slice(self.rank * width, (self.rank + 1) * width)

    def send(self, collective: Callable[..., Any], *tensors: torch.Tensor) -> None:
        """Run one of torch.distributed's collectives over the group."""
        if self.group is not None:
            collective(*tensors, group=self.group)


def group_of(model: Any) -> Group | None:
    """Those with whom this process runs a model's samples; None where it runs its own."""
    found: Group | None = vars(base_of(model)).get("_group")
    return found


def form_group(model: Any, group: Group) -> None:
    """Let a model know with whom its samples are run."""
    base_of(model)._group = group


class Rows:
    """What a group does with rows [rows, tokens, channels]; each forward's are of one length.

    Rows are filled up to a multiple of the group's size where each process takes its part.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.length = group, 0

    def same_sum(self, x: torch.Tensor) -> torch.Tensor:
        """The same; of gradients the sum."""
        return sent(x, _same, self._sum)

    def sum_same(self, x: torch.Tensor) -> torch.Tensor:
        """The sum; of gradients the same."""
        return sent(x, self._sum, _same)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """This process's part of rows that all have whole."""
        self.length = x.shape[1]
        return sent(x, self._own, self._gather)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of which each has a part; their gradient is whole in all."""
        return sent(x, self._gather, self._own)

    def gather_sum(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of which each has a part; of gradients the sum, in parts."""
        return sent(x, self._gather, self._sum_parts)

    def scatter_sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum, in parts; gradients are gathered."""
        return sent(x, self._sum_parts, self._gather)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        summed = x.clone(memory_format=torch.contiguous_format)
        self.group.send(distributed.all_reduce, summed)
        return summed

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return filled(x, self.group.degree).chunk(self.group.degree, dim=1)[self.group.rank].contiguous()

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.transpose(0, 1).contiguous()
        rows = parts.new_empty(len(parts) * self.group.degree, *parts.shape[1:])
        self.group.send(distributed.all_gather_into_tensor, rows, parts)
        return rows.transpose(0, 1)[:, : self.length].contiguous()

    def _sum_parts(self, x: torch.Tensor) -> torch.Tensor:
        rows = filled(x, self.group.degree).transpose(0, 1).contiguous()
        own = rows.new_empty(len(rows) // self.group.degree, *rows.shape[1:])
        self.group.send(distributed.reduce_scatter_tensor, own, rows)
        return own.transpose(0, 1).contiguous()


def filled(x: torch.Tensor, degree: int) -> torch.Tensor:
    """[..., tokens, channels] with zeros behind, up to a multiple of `degree` tokens."""
    lacking = -x.shape[-2] % degree
    return nn.functional.pad(x, (0, 0, 0, lacking)) if lacking else x


def entering(change: Change, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A hook before a layer or a block: what it does to the hidden states that go in."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def leaving(change: Change, module: nn.Module, args: Any, output: Any) -> Any:
    """A hook behind one: what it does to those that come out."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def sent(x: torch.Tensor, there: Change, back: Change) -> torch.Tensor:
    """Do one thing with what goes forward, another with its gradient."""
    found: torch.Tensor = _Sent.apply(x, there, back)
    return found


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


class _Sent(torch.autograd.Function):
    """The autograd of `sent`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Any, back: Any) -> torch.Tensor:
        ctx.back = back
        found: torch.Tensor = there(x)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.back(gradient), None, None
