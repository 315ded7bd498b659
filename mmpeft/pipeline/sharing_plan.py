"""What `distributed: auto` stands for where no launcher has settings of its own: the first way to share that fits.

    adapters           ddp      fsdp2     context_parallel    fsdp2 with it     tensor_parallel     fsdp2, on the host
    towers in full     ddp      zero2     zero2, optimizer states on the host

They come in the order of what they cost in time. Memory is estimated by formula, in every process alike: those of a
run do not wait for a rehearsal.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import replace

from mmpeft.config.device_table import DeviceFacts
from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import StageConfig
from mmpeft.core import units
from mmpeft.core.errors import ModelError
from mmpeft.methods.attach import trains_tower
from mmpeft.pipeline.arguments import data_processes, plan_batch
from mmpeft.pipeline.memory_plan import shared
from mmpeft.pipeline.planning import ROOM, Given, estimate_memory, held, model_of, room_here
from mmpeft.pipeline.strategy import launcher_strategy
from mmpeft.training.main_process import on_main

logger = logging.getLogger(__name__)


def is_open(stage: StageConfig, processes: int) -> bool:
    """Whether it is the planner's to say how a stage's processes share the work."""
    chosen = stage.distributed
    return processes > 1 and chosen == DistributedConfig() and launcher_strategy() is None


def pick_sharing(given: Given, processes: int, facts: DeviceFacts | None) -> tuple[DistributedConfig, str]:
    """The first way that fits, and why it is that one.

    Args:
        given: of a stage that `is_open`.
        facts: of the device; None: that at hand.
    """
    room = on_main(lambda: room_here(processes)) if facts is None else round(ROOM * (facts.memory - facts.overhead))
    tried: list[str] = []
    chosen, peak = DistributedConfig(strategy="ddp"), 0
    for candidate in _candidates(given, processes):
        try:
            chosen, peak = candidate, _peak(given, candidate, processes)
        except ModelError:
            # Its matrices cannot be shared by so many.
            continue
        if peak <= room:
            break
        tried.append(f"{candidate.describe()} takes {units.size(peak)}")
    else:
        logger.warning(
            "stage %s: no way to share it over %d processes fits, for there is room for %s: %s",
            given.stage.name,
            processes,
            units.size(room),
            ", ".join(tried),
        )
        return chosen, f"nothing fits {units.size(room)}: {', '.join(tried)}"
    rest = f"; {', '.join(tried)}" if tried else ""
    return chosen, f"takes about {units.size(peak)} of {units.size(room)}{rest}"


def _candidates(given: Given, processes: int) -> Iterator[DistributedConfig]:
    yield DistributedConfig(strategy="ddp")
    if trains_tower(given.stage.train):
        if importlib.util.find_spec("deepspeed") is not None:
            yield DistributedConfig(strategy="zero2")
            yield DistributedConfig(strategy="zero2", offload="optimizer")
        return
    quantized = given.recipe.quantization != "none"
    if not quantized:
        yield DistributedConfig(strategy="fsdp2")
    # Groups that send so much are of one machine.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    degrees = [degree for degree in (2, 4, 8) if here % degree == 0]
    for degree in degrees:
        yield DistributedConfig(strategy="ddp", context_parallel=degree)
        if not quantized:
            yield DistributedConfig(strategy="fsdp2", context_parallel=degree)
    if quantized:
        # Whole in each process, which bitsandbytes needs.
        return
    for degree in degrees:
        yield DistributedConfig(strategy="ddp", tensor_parallel=degree)
    yield DistributedConfig(strategy="fsdp2", offload="all")


def _peak(given: Given, strategy: DistributedConfig, processes: int) -> int:
    """Bytes of a process's tensors where the stage is shared so."""
    stage = given.stage.model_copy(update={"distributed": strategy})
    own = replace(given, stage=stage, batch=plan_batch(given.recipe, data_processes(stage, processes)))
    model, dtype = model_of(own)
    plan = estimate_memory(own, model, dtype, overhead=0, why="for distributed: auto")
    return shared(plan, strategy, processes, held(model, dtype)).peak
