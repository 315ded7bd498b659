"""A stage's largest micro-batch and one update, run on tensors that have no storage, to see what they would take.

What runs is the stage's own trainer, on a model of the same shape and with samples of the recipe's data, so whatever a
recipe switches (packing, attention, chunked loss, checkpointing, the feature cache) is in the figures by being run.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.data.feature_store import FeatureStore, default_directory
from mmpeft.data.join_features import HEAVY
from mmpeft.data.stream_mixture import Stream
from mmpeft.methods.plan import describe_training
from mmpeft.models.base import base_of
from mmpeft.models.features import Unplanned
from mmpeft.models.hollow import Hollow, Kind, hollow_model, hollow_tensor
from mmpeft.pipeline.arguments import Batch, learning_rates
from mmpeft.pipeline.data import TrainData
from mmpeft.pipeline.directory import StageDirectory
from mmpeft.pipeline.features import stage_plan
from mmpeft.pipeline.stage import PreparedStage, make_trainer
from mmpeft.training.features import FeatureCache
from mmpeft.training.reach import reach_what_trains
from mmpeft.training.trainer import MultimodalTrainer

_STEPS = 64
"""Steps of the first epoch among whose micro-batches the largest is looked for; with `batch.balance` it comes first."""

_KEPT_ARGUMENTS = frozenset(
    {
        "optim",
        "optim_args",
        "optim_target_modules",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "label_smoothing_factor",
        "bf16",
        "fp16",
        "train_sampling_strategy",
        "weight_decay",
    }
)
"""Fields of a stage's `trainer` block that change what a step takes."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a micro-batch and an update of a stage take, on one process that has the whole model; bytes.

    Attributes:
        samples, tokens: of the micro-batch; `tokens` are those computed, padding among them.
        weights: of the base model and the adapter.
        trained: of those among them that train.
        step: the most while the micro-batch runs forward and backward, by kind.
        update: the most while the optimizer changes the weights, by kind.
        gradients, optimizer: of all that trains.
        features: what a feature cache gives for the micro-batch; 0 without one.
        largest: the most bytes of one tensor of the micro-batch.
        flop: floating-point operations of the micro-batch, forward and backward, recomputed layers among them.
    """

    samples: int
    tokens: int
    weights: int
    trained: int
    step: Mapping[Kind, int]
    update: Mapping[Kind, int]
    gradients: int
    optimizer: int
    features: int
    largest: int
    flop: int


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What is rehearsed.

    Attributes:
        model: of `get_peft_model`, on the meta device, in the precision that it is loaded in.
        dtype: of the base model's weights.
        batch: as `plan_batch` has it, of one process.
        steps: optimizer steps of the stage.
        features: whether towers are spared by a feature cache.
    """

    model: Any
    processor: Any
    dtype: torch.dtype
    batch: Batch
    steps: int
    features: bool


def rehearse(
    recipe: Recipe, stage: StageConfig, given: Rehearsed, dataset: TrainData, *, tokens: int | None = None
) -> Rehearsal:
    """Run the largest micro-batch of a stage by shape alone.

    The model becomes hollow in place and is of no use afterwards.

    Args:
        tokens: take so many tokens of the longest samples as a micro-batch instead, as near as they come.

    Raises:
        Exception: whatever the model's forward raises on tensors without storage.
    """
    vocabulary = int(getattr(base_of(given.model).config.get_text_config(), "vocab_size", 0))
    hollow = Hollow(PartialState().device, vocabulary=vocabulary)
    hollow_model(given.model, hollow)
    with tempfile.TemporaryDirectory(prefix="mmpeft-plan-") as folder:
        trainer = _trainer(recipe, stage, given, dataset, folder=Path(folder))
        cached = given.features and _cached(recipe, stage, trainer)
        samples = _largest(trainer, dataset, tokens)
        return _run(trainer, hollow, [_with_features(sample) for sample in samples] if cached else samples)


def _trainer(
    recipe: Recipe, stage: StageConfig, given: Rehearsed, dataset: TrainData, *, folder: Path
) -> MultimodalTrainer:
    alone = stage.model_copy(
        update={
            "distributed": DistributedConfig(strategy="ddp"),
            "trainer": {key: value for key, value in stage.trainer.items() if key in _KEPT_ARGUMENTS},
        }
    )
    plain = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"workers": 0}),
            # Compiled layers keep less; what they are compiled with is not rehearsed.
            "compute": recipe.compute.model_copy(update={"compile": False}),
        }
    )
    prepared = PreparedStage(
        model=given.model,
        processor=given.processor,
        plan=describe_training(given.model, stage.train, learning_rates(stage)),
        dtype=given.dtype,
        initial=None,
    )
    return make_trainer(
        plain,
        alone,
        prepared,
        (dataset, None),
        folder=StageDirectory(folder),
        batch=given.batch,
        steps=given.steps,
    )


def _largest(trainer: MultimodalTrainer, dataset: Any, tokens: int | None) -> list[Mapping[str, Any]]:
    """The samples of the largest micro-batch, encoded."""
    micro = trainer.args.per_device_train_batch_size
    if isinstance(dataset, Stream):
        return list(islice(iter(dataset), micro))
    lengths = dataset.lengths(0)["tokens"]
    if tokens is not None:
        order = (-lengths).argsort(kind="stable").tolist()
        return [dataset[index] for index in _filling(order, lengths, tokens)]
    packed = trainer.cut is not None and trainer.cut.bounds.packed
    batches: Any = trainer.get_train_dataloader().batch_sampler
    seen = islice(batches, _STEPS * trainer.args.gradient_accumulation_steps)

    def size(indices: Sequence[int]) -> int:
        each = [int(lengths[index if index >= 0 else -1 - index]) for index in indices]
        return sum(each) if packed else len(each) * max(each)

    largest = max(seen, key=size)
    return [dataset[index if index >= 0 else -1 - index] for index in largest]


def _filling(order: Sequence[int], lengths: Any, tokens: int) -> list[int]:
    """The longest samples, some more than once if there are few, that make up so many tokens; one at least."""
    taken: list[int] = []
    total = 0
    while True:
        for index in order:
            if taken and total + int(lengths[index]) > tokens:
                return taken
            taken.append(index)
            total += int(lengths[index])


def _run(trainer: MultimodalTrainer, hollow: Hollow, samples: Sequence[Mapping[str, Any]]) -> Rehearsal:
    model: Any = trainer.model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    collate: Any = trainer.data_collator
    batch = collate(samples)
    inputs = _hollow_batch(batch, hollow)
    tokens = int(inputs["input_ids"].numel())
    weights = hollow.live["weights"]
    with _ready(trainer, hollow) as step:
        update = _update(trainer, hollow, trained)
        hollow.forget_peak()
        before = hollow.flop
        step(inputs)
        peak = hollow.peak
        gradients = sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
        optimizer = hollow.live["optimizer"]
    return Rehearsal(
        samples=len(samples),
        tokens=tokens,
        weights=weights,
        trained=sum(weight.nbytes for weight in trained),
        step=peak.kinds,
        update=update,
        gradients=gradients,
        optimizer=optimizer,
        features=0,
        largest=peak.largest,
        flop=hollow.flop - before,
    )


@contextlib.contextmanager
def _ready(trainer: MultimodalTrainer, hollow: Hollow) -> Iterator[Any]:
    """A trainer as it is within `train()`: what it runs a micro-batch by."""
    model: Any = trainer.model
    if trainer.args.activation_checkpointing:
        # As `transformers.Trainer` does it when training begins.
        options: dict[str, Any] = dict(trainer.args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
        every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs=options or None, every_n_layers=every, offload=offload
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(trainer.computing.on(training=True))
        stack.callback(model.register_forward_hook(reach_what_trains).remove)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: hollow.name(weight.grad, "gradients"))
        # Autocast, as a step has it.
        wrapped = trainer.accelerator.prepare_model(model, evaluation_mode=True)
        wrapped.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        stack.enter_context(hollow)
        yield lambda inputs: trainer.training_step(wrapped, inputs)


def _update(trainer: MultimodalTrainer, hollow: Hollow, trained: Sequence[Any]) -> Mapping[Kind, int]:
    """Bytes by kind at the peak of an update, behind which the optimizer has its states."""
    for weight in trained:
        weight.grad = torch.empty_like(weight)
        hollow.name(weight.grad, "gradients")
    optimizer = trainer.create_optimizer()
    hollow.forget_peak()
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                hollow.name(value, "optimizer")
    hollow.forget_peak()
    optimizer.step()
    update = dict(hollow.peak.kinds)
    if trainer.args.gradient_accumulation_steps == 1:
        optimizer.zero_grad(set_to_none=True)
    return update


def _cached(recipe: Recipe, stage: StageConfig, trainer: MultimodalTrainer) -> bool:
    """Give a trainer a feature cache that holds nothing and keeps nothing."""
    plan = stage_plan(recipe, stage, trainer.model)
    if isinstance(plan, Unplanned):
        return False
    trainer.take_features(FeatureCache(plan, FeatureStore(default_directory(), 0)))
    return True


def _with_features(sample: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**sample, "features_key": ""} if HEAVY & set(sample) else sample


def _hollow_batch(batch: Any, hollow: Hollow) -> Any:
    if isinstance(batch, torch.Tensor):
        made = hollow_tensor(batch, hollow)
        hollow.hold(made, "batch")
        return made
    if isinstance(batch, Mapping):
        return {key: _hollow_batch(value, hollow) for key, value in batch.items()}
    if isinstance(batch, list):
        return [_hollow_batch(value, hollow) for value in batch]
    return batch
