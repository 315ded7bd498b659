"""Memory that does not suffice where processes wait for each other within a micro-batch: the stage begins again.

There (zero1 to fsdp2, and towers that train in full on several processes) a process that lacks memory cannot run its
micro-batch again by itself: others wait for it in the midst of a layer. So it ends the attempt, which ends the others,
and writes down what all of them do from the beginning of the next, which goes on from the newest checkpoint:

    stages/02-language/relief.json     {"key": "1f…", "micro": 2, "tokens": null, "checkpointing": false,
                                        "offload": null}

    micro-batches      half as large, again and again, down to one sample, or to the longest
    checkpointing      all layers are computed again in the backward
    offload            what the stage's strategy can keep in host memory, on an accelerator

`mmpeft run` starts its processes again by itself; other launchers take the same command once more. Steps have the same
samples however they are cut, so the losses stay the same.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mmpeft.config.distributed import SHARED_OUT, ZERO, Offload
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.core.errors import MemoryLackError, RunAgain
from mmpeft.core.files import read_json, write_json
from mmpeft.core.hashing import hash_value
from mmpeft.pipeline.arguments import data_processes, plan_batch
from mmpeft.pipeline.cutting import cuts_by_cost
from mmpeft.pipeline.data import TrainData, parts_of
from mmpeft.pipeline.directory import StageDirectory
from mmpeft.pipeline.strategy import pick_strategy
from mmpeft.training.main_process import on_main
from mmpeft.training.recompute import lacks_memory
from mmpeft.training.trainer import MultimodalTrainer


@dataclass(frozen=True, kw_only=True)
class Relief:
    """What a stage does otherwise than its recipe says, for memory did not suffice.

    Attributes:
        key: of what it was found with; with other inputs, batches or processes a stage begins without.
        micro: samples of a micro-batch; None: as the recipe says.
        tokens: the budget of tokens in its place; None: as the recipe says.
        checkpointing: whether all layers are recomputed.
        offload: what waits in host memory; None: as the recipe says.
    """

    key: str
    micro: int | None = None
    tokens: int | None = None
    checkpointing: bool = False
    offload: Offload | None = None

    @property
    def changes(self) -> tuple[str, ...]:
        """What it changes, as "micro-batches of 2 samples"; empty for nothing."""
        waiting = "optimizer states" if self.offload == "optimizer" else "weights and optimizer states"
        said = [
            (self.micro is not None, f"micro-batches of {self.micro} sample{'' if self.micro == 1 else 's'}"),
            (self.tokens is not None, f"micro-batches of {self.tokens} tokens"),
            (self.checkpointing, "all layers computed again in the backward"),
            (self.offload is not None, f"{waiting} in host memory"),
        ]
        return tuple(text for changed, text in said if changed)

    def applied(self, recipe: Recipe, stage: StageConfig) -> tuple[Recipe, StageConfig]:
        """What the stage runs by."""
        batch, compute = recipe.batch, recipe.compute
        if self.micro is not None:
            batch = batch.model_copy(update={"micro": self.micro, "tokens": None})
        if self.tokens is not None:
            batch = batch.model_copy(update={"tokens": self.tokens})
        if self.checkpointing:
            compute = compute.model_copy(update={"checkpointing": True})
        if self.offload is not None:
            chosen = pick_strategy(stage).model_copy(update={"offload": self.offload})
            stage = stage.model_copy(update={"distributed": chosen})
        return recipe.model_copy(update={"batch": batch, "compute": compute}), stage

    def write(self, file: Path) -> None:
        """Keep it for attempts to come, if it changes anything."""
        if self.changes:
            write_json(file, asdict(self))


def found_relief(folder: StageDirectory, recipe: Recipe, stage: StageConfig, input_hash: str) -> Relief:
    """What earlier attempts at a stage have found; each process has to ask."""
    key = hash_value(
        [
            input_hash,
            recipe.batch.model_dump(mode="json"),
            recipe.compute.model_dump(mode="json"),
            pick_strategy(stage).model_dump(mode="json"),
            PartialState().num_processes,
        ]
    )
    stored: Mapping[str, Any] = on_main(lambda: read_json(folder.relief) if folder.relief.exists() else {})
    return Relief(**stored) if stored.get("key") == key else Relief(key=key)


def further_relief(
    relief: Relief, recipe: Recipe, stage: StageConfig, *, processes: int, device_type: str, longest: int | None
) -> Relief | None:
    """What the next attempt does; None if nothing is left.

    Args:
        recipe, stage: as the attempt that failed ran by them.
        longest: tokens of the longest sample, where steps are cut by a budget of tokens.
    """
    batch, strategy = plan_batch(recipe, data_processes(stage, processes)), pick_strategy(stage)
    if longest is not None and batch.tokens is not None:
        if batch.tokens > longest:
            return replace(relief, tokens=max(longest, batch.tokens // 2))
    elif batch.micro > 1:
        share = batch.micro * batch.accumulation
        return replace(relief, micro=max(each for each in range(1, batch.micro // 2 + 1) if share % each == 0))
    said = {"activation_checkpointing", "gradient_checkpointing"}.intersection(stage.trainer)
    if recipe.compute.checkpointing == "auto" and not said and recipe.compute.compile is not True:
        return replace(relief, checkpointing=True)
    most: Offload = "all" if strategy.strategy in SHARED_OUT else "optimizer" if strategy.strategy in ZERO else "none"
    return None if most in (strategy.offload, "none") or device_type == "cpu" else replace(relief, offload=most)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a stage.

    Attributes:
        recipe, stage: what it runs by, with `relief` applied.
    """

    recipe: Recipe
    stage: StageConfig
    relief: Relief
    dataset: TrainData
    folder: StageDirectory

    def end(self, error: BaseException, trainer: MultimodalTrainer) -> None:
        """See to the next, where want of memory has ended this one and processes wait for each other.

        Raises:
            RunAgain: the same command goes on with what has been written down.
            MemoryLackError: nothing is left that would help; says what the recipe could change.
        """
        recipe, state = self.recipe, PartialState()
        if not trainer.computing.in_one_go or recipe.compute.checkpointing is False or not lacks_memory(error):
            return
        longest = None
        if recipe.batch.tokens is not None and cuts_by_cost(recipe, self.dataset):
            longest = max(int(part.lengths()["tokens"].max()) for part in parts_of(self.dataset))
        found = further_relief(
            self.relief,
            recipe,
            self.stage,
            processes=state.num_processes,
            device_type=state.device.type,
            longest=longest,
        )
        said = str(error).partition("\n")[0] or type(error).__name__
        where = (
            f"stage {self.stage.name!r}, step {trainer.state.global_step + 1}, process {state.process_index}: {said}"
        )
        if found is None:
            done = f" with {' and '.join(self.relief.changes)}" if self.relief.changes else ""
            raise MemoryLackError(
                f"memory does not suffice{done} ({where}), and nothing is left that would not change the result: make "
                "data.max_pixels, data.max_length or the LoRA's `r` smaller, use dtype: bfloat16, or share the work "
                "out over more devices (`processes`) by distributed: zero3 or fsdp2"
            ) from error
        found.write(self.folder.relief)
        fresh = [change for change in found.changes if change not in self.relief.changes]
        raise RunAgain(
            f"memory does not suffice ({where}); the same command goes on from the newest checkpoint with "
            f"{' and '.join(fresh)}, which changes no result (compute.checkpointing: false ends the run instead)"
        ) from error
