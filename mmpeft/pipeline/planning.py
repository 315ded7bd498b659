"""A stage's memory, worked out before it runs: a rehearsal where the model takes one, else a formula; and `auto`."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel

from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import PartTraining
from mmpeft.core import units
from mmpeft.core.memory import available_memory, memory_in_use, total_memory
from mmpeft.core.types import Part
from mmpeft.data.stream_mixture import Stream
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.base import base_of
from mmpeft.models.context_parallel import ContextParallel, share_tokens
from mmpeft.models.quantized import quantizable, spared_bytes
from mmpeft.models.tensor_parallel import TensorParallel, share_adapters, share_layers
from mmpeft.pipeline.arguments import Batch, count_steps
from mmpeft.pipeline.base import base_precision, quantization_of, skeleton, stored_precision
from mmpeft.pipeline.data import TrainData
from mmpeft.pipeline.features import expects_features
from mmpeft.pipeline.memory_plan import LOST_ON_ACCELERATOR, LOST_ON_CPU, Held, MemoryPlan, Sizes, formula, shared
from mmpeft.pipeline.rehearsal import Rehearsal, Rehearsed, rehearse

logger = logging.getLogger(__name__)

ROOM = 0.9
"""Of a device's memory (a CPU's: of what is available), what `batch.tokens: auto` fills."""

_ZERO3_LIVE = 10**9
"""Weights that ZeRO-3 leaves whole where they run again soon: `stage3_max_live_parameters`, as DeepSpeed has it."""

_ROUND = 64
"""Tokens that `auto` is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a stage's plan is made from.

    Attributes:
        base: model directory or hub id.
        carried: how earlier stages trained parts of the adapter.
        samples: of an epoch; None where that is not known.
        batch: as `plan_batch` has it.
    """

    recipe: Recipe
    stage: StageConfig
    base: str
    processor: Any
    dataset: TrainData
    carried: Mapping[Part, PartTraining]
    samples: int | None
    batch: Batch


def model_of(given: Given) -> tuple[Any, torch.dtype]:
    """The stage's model on the meta device, in the precision that it is loaded in, and this."""
    model: Any = skeleton(given.base, trust_remote_code=given.recipe.trust_remote_code)
    dtype = base_precision(given.recipe, given.base)
    return get_peft_model(model.to(dtype), _without_init(given.stage.train), carried=given.carried), dtype


def plan_memory(given: Given, *, tokens: int | None = None, overhead: int | None = None) -> MemoryPlan:
    """The plan of one process that has the whole model, or its share of matrices or tokens.

    Args:
        tokens: a budget to fill with the longest samples, whatever the recipe says of the batch.
        overhead: bytes beside tensors; default: those that this process has now.
    """
    recipe = given.recipe
    if tokens is not None:
        changed = recipe.batch.model_copy(update={"tokens": tokens, "micro": None})
        recipe = recipe.model_copy(update={"batch": changed})
    accelerated = PartialState().device.type != "cpu"
    overhead = memory_in_use(PartialState().device.type) if overhead is None else overhead
    model, dtype = model_of(given)
    _take_share(given, model)
    alone = replace(given.batch, processes=1, tokens=tokens or given.batch.tokens)
    steps = count_steps(given.stage, given.samples, given.batch.size)
    rehearsed = Rehearsed(
        model=model,
        processor=given.processor,
        dtype=dtype,
        batch=alone,
        steps=steps,
        features=expects_features(recipe, given.stage, model, given.dataset),
    )
    try:
        found = rehearse(recipe, given.stage, rehearsed, given.dataset, tokens=tokens)
    except Exception as error:  # Whatever a family's forward cannot do without numbers; the run itself goes on.
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        logger.warning(
            "stage %s: its memory is estimated by a formula, for a rehearsal failed: %s", given.stage.name, why
        )
        logger.debug("the rehearsal", exc_info=True)
        return estimate_memory(given, model_of(given)[0], dtype, overhead=overhead, why=why, tokens=tokens)
    weights = sum(weight.nbytes for weight in model.parameters())
    plan = plan_of(found, accelerated=accelerated, overhead=overhead, read=_read(given, dtype, weights))
    return _quantized(given, dtype, plan)


def estimate_memory(
    given: Given, model: Any, dtype: torch.dtype, *, overhead: int, why: str, tokens: int | None = None
) -> MemoryPlan:
    """The plan as a formula has it.

    Args:
        model, dtype: of `model_of`; where matrices are shared out, this process's share is taken of it.
        overhead: bytes beside tensors.
        why: there is no rehearsal.
        tokens: a budget to fill.
    """
    text = base_of(model).config.get_text_config()
    longest = 1024 if isinstance(given.dataset, Stream) else int(given.dataset.lengths(0)["tokens"].max())
    _take_share(given, model)
    sizes = Sizes(
        weights=sum(weight.nbytes for weight in model.parameters()),
        trained=sum(weight.nbytes for weight in model.parameters() if weight.requires_grad),
        layers=int(text.num_hidden_layers),
        # Of a part of the channels, or of the tokens: as much.
        hidden=int(text.hidden_size) // given.stage.distributed.together,
        vocabulary=int(text.vocab_size),
        item=dtype.itemsize,
        samples=given.batch.micro,
        tokens=tokens or given.batch.tokens or given.batch.micro * longest,
    )
    plan = formula(sizes, why=why, accelerated=PartialState().device.type != "cpu", overhead=overhead)
    return _quantized(given, dtype, plan)


def _quantized(given: Given, dtype: torch.dtype, plan: MemoryPlan) -> MemoryPlan:
    """The plan with the language model's matrices in 8 or 4 bits, if the recipe asks for it."""
    kind = quantization_of(given.recipe)
    if kind is None:
        return plan
    model: Any = skeleton(given.base, trust_remote_code=given.recipe.trust_remote_code)
    spared = spared_bytes(model, kind, dtype)
    # While it multiplies, a matrix is there in the precision of the products.
    largest = max(model.get_submodule(name).weight.numel() for name in quantizable(model, kind)) * dtype.itemsize
    return replace(
        plan,
        weights=plan.weights - spared,
        activations=plan.activations + largest,
        update=max(0, plan.update - spared),
        # Each is quantized when it has been read.
        load=max(0, plan.load - spared),
    )


def _take_share(given: Given, model: Any) -> None:
    chosen = given.stage.distributed
    if chosen.tensor_parallel > 1:
        share_layers(base_of(model), TensorParallel(chosen.tensor_parallel, 0, tokens=chosen.sequence_parallel))
        share_adapters(model)
    if chosen.context_parallel > 1:
        share_tokens(model, ContextParallel(chosen.context_parallel, 0))


def held(model: Any, dtype: torch.dtype) -> Held:
    """What several processes can share out of a model of `model_of`."""
    layers = [
        sum(weight.nbytes for weight in layer.parameters() if not weight.requires_grad)
        for layer in getattr(base_of(model).get_decoder(), "layers", None) or ()
    ]
    return Held(
        trained=sum(weight.nbytes for weight in model.parameters() if weight.requires_grad),
        layers=sum(layers),
        layer=max(layers, default=0),
        live=_ZERO3_LIVE * next(model.parameters()).element_size(),
        adapter=isinstance(model, PeftModel),
        halved=sum(
            weight.nbytes
            for weight in model.parameters()
            if weight.requires_grad and weight.element_size() > dtype.itemsize
        ),
    )


def plan_of(rehearsal: Rehearsal, *, accelerated: bool, overhead: int, read: int) -> MemoryPlan:
    """The plan of one process that has the whole model.

    Args:
        accelerated: whether the device is an accelerator.
        overhead: bytes beside tensors.
        read: bytes of the checkpoint's file, where it is read in another precision; else 0.
    """
    step = rehearsal.step
    lost = LOST_ON_ACCELERATOR if accelerated else LOST_ON_CPU
    return MemoryPlan(
        how="rehearsed",
        weights=step["weights"],
        gradients=step["gradients"],
        optimizer=step["optimizer"],
        batch=step["batch"],
        activations=step["activations"],
        logits=step["logits"],
        fragmentation=round(lost * (step["activations"] + step["logits"])),
        overhead=overhead,
        update=sum(rehearsal.update.values()),
        load=0 if accelerated else rehearsal.weights + read,
        samples=rehearsal.samples,
        tokens=rehearsal.tokens,
        flop=rehearsal.flop,
    )


def _read(given: Given, dtype: torch.dtype, weights: int) -> int:
    """Bytes of the checkpoint's file where it holds another precision."""
    stored = stored_precision(given.recipe, given.base)
    return 0 if stored == dtype else weights * stored.itemsize // dtype.itemsize


def room_here(processes: int) -> int:
    """Bytes that tensors of each of so many processes may take on the device at hand."""
    kind = PartialState().device.type
    if kind != "cpu":
        return round(ROOM * total_memory(kind))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return round(ROOM * available_memory(kind) / here)


def fitting_tokens(given: Given, own: Held, *, room: int, processes: int = 1) -> tuple[int, str]:
    """The largest budget of tokens that fits a device's memory, and why it is that one.

    Two micro-batches are rehearsed, and a third of what a line through them says; a budget beyond what a step of one
    process holds would change nothing, so that is the most.

    Args:
        own: what processes can share out of its model.
        room: bytes that tensors may take, see `room_here`.
        processes: that share the work as the stage says.
    """

    def peak(tokens: int) -> int:
        plan = plan_memory(given, tokens=tokens, overhead=0)
        return shared(plan, given.stage.distributed, processes, own).peak

    lengths = sorted(given.dataset.lengths(0)["tokens"].tolist(), reverse=True)  # type: ignore[union-attr]
    longest = int(lengths[0])
    share = -(-given.batch.size // given.batch.processes)
    most = _rounded_up(longest * min(share, len(lengths)))
    least = _rounded_up(longest)
    taken = {least: peak(least)}
    if taken[least] > room:
        logger.warning(
            "stage %s: a single sample of %d tokens takes %s, and there is room for %s; `mmpeft plan` says what to "
            "change first",
            given.stage.name,
            longest,
            units.size(taken[least]),
            units.size(room),
        )
        return least, "the longest sample alone takes more than there is"
    more = min(most, 4 * least)
    if more > least:
        taken[more] = peak(more)
        slope = max(1.0, (taken[more] - taken[least]) / (more - least))
        found = min(most, int(least + (room - taken[least]) / slope) // _ROUND * _ROUND)
    else:
        found = least
    if found not in taken and found > more:
        taken[found] = peak(found)
        if taken[found] > room:
            found = int(more + (found - more) * (room - taken[more]) / (taken[found] - taken[more])) // _ROUND * _ROUND
    found = max(least, found)
    if found == most:
        return found, "all samples of a step that one process has fit"
    return found, "more would take more memory than there is"


def _rounded_up(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


def _without_init(train: Mapping[Part, PartTraining]) -> dict[Part, PartTraining]:
    # PiSSA and OLoRA decompose weights, and a model on the meta device has none.
    return {part: _plain(training) for part, training in train.items()}


def _plain(training: PartTraining) -> PartTraining:
    if isinstance(training, dict):
        return {key: value for key, value in training.items() if key != "init_lora_weights"}
    return training
