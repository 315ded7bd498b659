"""A stage's `distributed` key: what several processes share of a model, and what waits in host memory."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mmpeft.config.block import Block, raise_all
from mmpeft.config.names import did_you_mean

Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
Offload = Literal["none", "optimizer", "all"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

ZERO: dict[Strategy, int] = {"zero1": 1, "zero2": 2, "zero3": 3}
"""DeepSpeed's number of a strategy."""

SHARED_OUT: tuple[Strategy, ...] = ("zero3", "fsdp2")
"""Strategies that give no process the whole model."""


class DistributedConfig(Block):
    """How the processes of a stage share the work; the losses are those of one process.

    ddp      every process has the whole model
    zero1    DeepSpeed: optimizer states are shared out
    zero2    DeepSpeed: and gradients
    zero3    DeepSpeed: and weights
    fsdp2    the language model's weights are shared out layer by layer and read so from disk; what trains in an
             adapter is whole in every process
    """

    strategy: Strategy = "auto"
    """`auto`: what the launcher's settings say, else the first that fits (`mmpeft.pipeline.sharing_plan`)."""
    offload: Offload = "none"
    """What waits in host memory between its uses: `optimizer` states (zero1 to zero3), or `all`: weights as well
    (zero3, fsdp2)."""
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    """Neighbouring processes that have a share of each of the language model's matrices and run the same samples
    together (ddp)."""
    sequence_parallel: bool = True
    """Whether each of those has a part of the tokens between a layer's blocks, not all of them."""
    context_parallel: Annotated[int, Field(ge=1)] = 1
    """Neighbouring processes that have a part of the tokens of each sample in the language model's layers, and run the
    same samples together (ddp, fsdp2)."""

    @property
    def together(self) -> int:
        """Processes that run the same samples."""
        return self.tensor_parallel * self.context_parallel

    @property
    def shares_weights(self) -> bool:
        """Whether no process has the whole model."""
        return self.strategy in SHARED_OUT or self.tensor_parallel > 1

    def describe(self) -> str:
        """In a recipe's words: `fsdp2`, `fsdp2 with offload: all`, `tensor_parallel: 2`."""
        if self.tensor_parallel > 1:
            return f"tensor_parallel: {self.tensor_parallel}"
        if self.context_parallel > 1:
            with_layers = "fsdp2 with " if self.strategy == "fsdp2" else ""
            return f"{with_layers}context_parallel: {self.context_parallel}" + self._offloading(" and")
        return self.strategy + self._offloading(" with")

    def _offloading(self, joint: str) -> str:
        return f"{joint} offload: {self.offload}" if self.offload != "none" else ""


def _named(value: Any) -> Any:
    """`zero2` is short for `{strategy: zero2}`."""
    fields = {"strategy": value} if isinstance(value, str) else value
    if isinstance(fields, Mapping):
        name = fields.get("strategy", "auto")
        if name not in STRATEGIES:
            raise PydanticCustomError(
                "mmpeft",
                "unknown strategy {value}{hint}",
                {"value": repr(name), "hint": did_you_mean(str(name), STRATEGIES)},
            )
        raise_all(distributed_problems(str(name), fields))
    return fields


def distributed_problems(strategy: str, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which fields of `DistributedConfig` do not go together, and why."""
    problems = []
    offload = fields.get("offload", "none")
    takes = {"optimizer": tuple(ZERO), "all": SHARED_OUT}.get(offload, STRATEGIES)
    if strategy not in takes:
        problems.append(("offload", f"{offload!r} is for {', '.join(takes)}; this stage has {strategy}"))
    matrices, tokens = fields.get("tensor_parallel", 1), fields.get("context_parallel", 1)
    if matrices != 1 and strategy not in ("auto", "ddp"):
        problems.append(("tensor_parallel", f"is for ddp; this stage has {strategy}"))
    if tokens != 1 and strategy not in ("auto", "ddp", "fsdp2"):
        problems.append(("context_parallel", f"is for ddp and fsdp2; this stage has {strategy}"))
    if tokens != 1 and matrices != 1:
        problems.append(("context_parallel", "and tensor_parallel exclude each other; leave one of the two out"))
    return problems


Distributed = Annotated[DistributedConfig, BeforeValidator(_named)]
