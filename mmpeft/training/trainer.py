"""`MultimodalTrainer`: transformers' Trainer with learning rates by part and batches that no process count changes."""

import functools
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from mmpeft.core.errors import DataError, RecipeError
from mmpeft.core.host import OnHost
from mmpeft.core.memory import peak_memory_bytes
from mmpeft.core.tree import Tree
from mmpeft.core.types import IGNORE_INDEX, Part
from mmpeft.data.balancing import Cut, CutFigures
from mmpeft.data.batching import BlankedDataset
from mmpeft.data.stream_mixture import Stream
from mmpeft.families.registry import family_of
from mmpeft.methods.plan import base_name
from mmpeft.models.context_parallel import parts_of_layers
from mmpeft.models.groups import group_of
from mmpeft.models.positions import with_positions
from mmpeft.models.sharded import is_sharded
from mmpeft.models.tensor_parallel import partial_parameters
from mmpeft.models.tree_attention import check_attention
from mmpeft.training.ahead import ReadAhead, taken_ahead
from mmpeft.training.callbacks import EndOfReading, EpochOfData
from mmpeft.training.checkpointing import CheckpointingTrainer
from mmpeft.training.computing import Compute, Computing
from mmpeft.training.copies import CopiesAhead
from mmpeft.training.features import FeatureCache, fed
from mmpeft.training.guards import one_device, optimizer_whole
from mmpeft.training.loaders import (
    Share,
    end_workers,
    from_worker,
    global_loader,
    naming_lost_workers,
    seeds_of_workers,
    stream_loader,
    stream_sampler,
)
from mmpeft.training.parts import parameter_groups, rates_now
from mmpeft.training.reach import reach_what_trains
from mmpeft.training.recompute import Cuttable
from mmpeft.training.shares import (
    average_gradients,
    backward_through_layers,
    whole_hidden,
)
from mmpeft.training.skips import SkipWatch
from mmpeft.training.waiting import DataWaits
from mmpeft.training.weighing import weigh_tokens


class MultimodalTrainer(CheckpointingTrainer):
    """An HF Trainer for multimodal models.

    On one process its losses are those of `transformers.Trainer` with the same collator (where those of a step depend
    on how it is cut, see `weighing`, they are means over its labelled tokens instead). Beyond it: a learning rate by
    part, global batches that stay the same on any number of processes, checkpoints that
    are whole or absent, and logs with samples/s, tokens/s, memory and the rate of each part.

    Args:
        learning_rates: peak learning rate by part; default: `args.learning_rate` for all that trains.
        share_media: bring samples on the same media together, for a `PackedCollator` to share what they begin with;
            the data set needs `media_key(index)`, as `MultimodalDataset` has.
        cut: how steps are cut into micro-batches by cost; default: in their order. `args` accumulate as many.
        features: what a data set with a feature cache needs.
        compute: how forwards are computed; default: as does best.
        *args, **kwargs: those of `transformers.Trainer`.

    Attributes:
        averages: whether gradients are averaged over processes behind the last backward of a step; False for a single
            process, and where DDP (of a model that trains in place) or DeepSpeed does it.
        together: processes that run the same samples, each with its share of the language model's matrices or tokens.
        share: which samples of each step this process takes.
        proved_whole: a checkpoint whose files were read and found whole already, so that resuming does not read them
            again.

    Raises:
        RecipeError: label smoothing, with a collator that keeps the logits of supervised positions only; a budget of
            tokens, with a model whose loss depends on how a step is cut.
    """

    def __init__(
        self,
        *args: Any,
        learning_rates: Mapping[Part, float] | None = None,
        share_media: bool = False,
        cut: Cut | None = None,
        features: FeatureCache | None = None,
        compute: Compute | None = None,
        **kwargs: Any,
    ) -> None:
        self.learning_rates, self.share_media, self.cut = learning_rates, share_media, cut
        self.features: FeatureCache | None = None
        self.cut_figures: CutFigures | None = None
        self.computing = Computing(self, compute or Compute())
        self.skips: SkipWatch | None = None
        self.waits = DataWaits()
        self._ahead: ReadAhead | None = None
        self._copies: CopiesAhead | None = None
        self._averaged: list[torch.nn.Parameter] = []
        self._in_parts: list[torch.nn.Parameter] = []
        self._resumed_from: Any = None
        self.proved_whole: Path | None = None
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        one_device(given)
        with optimizer_whole(given):
            super().__init__(*args, **kwargs)
        self.averages = self.args.world_size > 1 and isinstance(self.model, PeftModel) and not self.is_deepspeed_enabled
        group = group_of(self.model)
        self.together = group.together if group else 1
        self.share = Share(world=self.args.world_size // self.together, rank=self.args.process_index // self.together)
        # So that the Trainer does not wrap it: what trains in an adapter is small, and its gradients are averaged here.
        self.is_distributed_loading_by_transformers = self.averages or is_sharded(self.model)
        if features is not None:
            self.take_features(features)
        smoothing = self.args.label_smoothing_factor
        reader = (
            f"label_smoothing_factor={smoothing}" if smoothing else "compute_metrics" if self.compute_metrics else None
        )
        if reader and getattr(self.data_collator, "supervised_only", False):
            raise RecipeError(
                f"{reader} reads the logits of every position; give "
                "data_collator=MultimodalCollator(processor, supervised_only=False)"
            )
        self._weighs_tokens = weigh_tokens(self)
        if not self._weighs_tokens and cut is not None:
            if cut.bounds.tokens is not None:
                raise RecipeError(
                    "batch.tokens: this model's loss is a mean of each micro-batch and would depend on how a step is "
                    "cut; use batch.micro"
                )
            self.cut = None
        if self.args.ddp_find_unused_parameters is None and self.accelerator.ddp_handler is not None:
            # A batch without a picture leaves the vision tower and the projector out. The Trainer of transformers
            # 5.24 expects that of adapters, but not of models that train in place with activation checkpointing.
            self.accelerator.ddp_handler.find_unused_parameters = True
        self._tokens: torch.Tensor | int = 0
        self._samples: torch.Tensor | int = 0
        self._window_start = time.perf_counter()
        self._window_tokens = self._window_samples = 0
        self._computed = self._padded = 0
        self.tokens_trained = self.samples_trained = self.tokens_computed = self.tokens_padded = 0
        self.add_callback(EpochOfData(self.train_dataset))
        self.add_callback(EndOfReading(self))

    def take_features(self, features: FeatureCache) -> None:
        """Train on what is kept from now on; the data set has to keep features in the same store."""
        self.features = features
        # They are no argument of the model's forward.
        self.args.remove_unused_columns = False

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer that `args.optim` names, over groups by part where rates by part were given."""
        target: Any = self.model if model is None else model
        if self.learning_rates is None or self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, target)
        groups = parameter_groups(
            target,
            self.learning_rates,
            decay=self.get_decay_parameter_names(target),
            weight_decay=self.args.weight_decay,
        )
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own on one process; elsewhere one whose global batches are those of one process.

        Elsewhere is: on several processes, of a stream, where samples on the same media come together, where steps are
        cut by cost, and under DeepSpeed.
        """
        dataset: Any = self.train_dataset
        streamed = isinstance(dataset, Stream)
        in_each = self._media_in_step()
        plain = self.args.world_size == 1 and not self.share_media and self.cut is None and not in_each
        if not streamed and (not hasattr(dataset, "__len__") or plain):
            return super().get_train_dataloader()
        collator = self._get_collator_with_removed_columns(self.data_collator, description="training")
        if not streamed:
            in_each = in_each and hasattr(dataset, "media_kinds")
            loader = global_loader(
                dataset,
                self.args,
                collator,
                self.share,
                share_media=self.share_media,
                cut=self.cut,
                media_in_each=in_each,
            )
            sampler: Any = loader.batch_sampler
            self.cut_figures = getattr(sampler.batches if in_each else sampler, "figures", None)
            return loader
        if in_each:
            raise RecipeError(
                "data.streaming with DeepSpeed: on text alone it would wait for ever for others with pictures, or "
                "lose the gradients of the micro-batches before; use ddp or fsdp2, or data.streaming: false"
            )
        sampler = stream_sampler(dataset, self.args, self.share)
        self.skips = SkipWatch(sampler, self.accelerator)
        if isinstance(self._resumed_from, str | Path):
            self.skips.load(Path(self._resumed_from))
        return stream_loader(sampler, self.args, collator)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The Trainer's own, whose workers' seeds are not drawn from what dropout draws from."""
        loader: Any = super()._get_dataloader(*args, **kwargs)
        getattr(loader, "base_dataloader", loader).generator = seeds_of_workers(self.args)
        return loader

    def _media_in_step(self) -> bool:
        """Whether all processes need media in each micro-batch: DeepSpeed's, where more than language trains.

        On one process too: of an update it keeps the gradients that the last micro-batch has.
        """
        if not self.is_deepspeed_enabled:
            return False
        own: Any = self.model
        spec = family_of(own)
        return any(
            parameter.requires_grad and spec.part_of(base_name(name)) not in (None, "language")
            for name, parameter in own.named_parameters()
        )

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """The Trainer's own; processes that run the same samples go through all of it together."""
        if self.together == 1:
            return super().get_eval_dataloader(*args, **kwargs)
        prepare, self.accelerator.prepare = self.accelerator.prepare, _as_it_is
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.accelerator.prepare = prepare

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of a step, and how many labelled tokens all processes have in them.

        Raises:
            DataError: a sample cannot be used, or too many of a stream were left out.
        """
        self._ahead = taken_ahead(epoch_iterator, self._ahead, num_batches)
        batches = self.waits.watch(self._ahead or epoch_iterator)
        if self.skips is not None:
            batches = self.skips.unpack(batches)
        try:
            found = super().get_batch_samples(batches, num_batches, device)
        except DataError as error:
            raise from_worker(error) from None
        if self._ahead is not None:
            self._ahead.refill()
        if self.skips is not None:
            self.skips.check((self.state.global_step + 1) * self._step_size())
        if self.computing.why_not_copied_ahead() is None:
            self._copies = self._copies or CopiesAhead(self.args.device, self._prepare_input)
            self._copies.expect(found[0])
        return found

    @property
    def copied_ahead(self) -> int:
        """Micro-batches that went to the device while it computed the one before."""
        return self._copies.count if self._copies is not None else 0

    def end_reading(self) -> None:
        """Read no further ahead: at the end of an epoch, and of training."""
        if self._copies is not None:
            self._copies.forget()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _step_size(self) -> int:
        """Samples of a step, of all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.share.world

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forward and backward; counts its samples and tokens without a synchronisation."""
        numbers: OnHost | None = inputs.pop("numbers", None)
        tree: Tree | None = inputs.get("tree")
        self._samples = self._samples + (tree.samples if tree else _labelled(inputs))
        self._tokens = self._tokens + (tree.tokens if tree else inputs["attention_mask"].sum())
        self.computing.segments += len(tree.segments) if tree else 0
        self._computed += inputs["input_ids"].numel()
        self._padded += tree.padded if tree else inputs["input_ids"].numel()
        step: Any = super().training_step
        moved = self._copies.take(inputs) if self._copies is not None else None
        again = functools.partial(step, model, inputs, *args, **kwargs)
        whole = again if moved is None else functools.partial(step, model, moved, *args, **kwargs)
        cuttable = None
        # The losses of pieces add up to the micro-batch's where each token is weighed by those of the step alone.
        if numbers is not None and self._weighs_tokens:
            indices = numbers.values["numbers"]

            def pieces(parts: int) -> list[Any]:
                # They are read and encoded anew, by this process: where memory did not suffice once, so is each later
                # micro-batch of the stage that has several samples.
                return [functools.partial(step, model, each, *args, **kwargs) for each in self._cut_up(indices, parts)]

            cuttable = Cuttable(most=len(indices), pieces=pieces)
        loss = self.computing.recompute.run(whole, cuttable, again=again)
        if self.averages and self.accelerator.sync_gradients:
            average_gradients(self._averaged, in_parts=self._in_parts, parts=self.together)
            self.computing.recompute.agree(self.args.device)
        return loss

    def _cut_up(self, indices: Sequence[int], parts: int) -> list[dict[str, Any]]:
        """The samples of a micro-batch as so many of about one size."""
        rows: Any = BlankedDataset(self.train_dataset)
        collate: Any = self.data_collator
        bounds = [len(indices) * part // parts for part in range(parts + 1)]
        return [collate([rows[index] for index in indices[start:end]]) for start, end in pairwise(bounds)]

    def _sync_replicated_trainable_parameters(self, model: Any) -> None:
        """Begin with the first process's adapter; `training_step` averages its gradients.

        transformers 5.24 sends each of them in the midst of backward, when it is there: never, on text alone.
        """
        # Walked once, not at each step: an adapter is a small part of the parameters.
        self._averaged = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._in_parts = [*partial_parameters(model), *parts_of_layers(model)]
        for parameter in self._averaged if self.averages else ():
            torch.distributed.broadcast(parameter.data, src=0)

    def _prepare_input(self, data: Any) -> Any:
        """The Trainer's own; from pinned memory without waiting for the device."""
        if isinstance(data, torch.Tensor) and self.args.device.type != "cpu" and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    @property
    def autocast_precision(self) -> torch.dtype | None:
        """What forwards are cast to; None if they are not."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """The Trainer's own; under DeepSpeed too, whose ZeRO-3 leaves what trains in float32 beside a base in half."""
        half = self.autocast_precision
        if not self.is_deepspeed_enabled or half is None:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, dtype=half, cache_enabled=bool(cache_enabled))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, on a packed row with the positions that the family gives it, and on kept features."""
        check_attention(self.model, inputs)
        autocast = self.autocast_smart_context_manager if self.is_deepspeed_enabled else self.accelerator.autocast
        with fed(self.features, self.model, with_positions(self.model, inputs), autocast) as batch:
            return super().compute_loss(model, batch, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, with what the collator's batches need."""
        with self.computing.on():
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with speed and memory since the last time and the learning rate of each part."""
        if "loss" in logs:
            now = time.perf_counter()
            samples, tokens, *_ = self._count()
            seconds = max(now - self._window_start, 1e-9)
            logs["samples_per_second"] = (samples - self._window_samples) / seconds
            logs["tokens_per_second"] = (tokens - self._window_tokens) / seconds
            logs["memory_bytes"] = peak_memory_bytes(self.args.device.type)
            logs |= self.waits.window(self.accelerator)
            self._window_start, self._window_samples, self._window_tokens = now, samples, tokens
            if self.learning_rates is not None and self.optimizer is not None:
                rates = rates_now(self.optimizer.param_groups, logs["learning_rate"])
                logs |= {f"learning_rate/{part}": rate for part, rate in rates.items()}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`transformers.Trainer.train`; speed is counted from here."""
        self._window_start = time.perf_counter()
        model: Any = self.model
        self._resumed_from = args[0] if args else kwargs.get("resume_from_checkpoint")
        with (
            naming_lost_workers(),
            self.computing.on(training=True),
            whole_hidden(self.accelerator, model),
            backward_through_layers(model),
        ):
            # Behind the hook that gives outputs their loss.
            hook = model.register_forward_hook(reach_what_trains)
            try:
                result = super().train(*args, **kwargs)
            finally:
                hook.remove()
                self.end_reading()
                end_workers(self.callback_handler.train_dataloader)
                if self.features is not None:
                    self.features.close()
        self.samples_trained, self.tokens_trained, self.tokens_computed, self.tokens_padded = self._count()
        return result

    def _count(self) -> tuple[int, int, int, int]:
        """So far and of all processes: samples, their tokens, tokens computed, and those of padded batches."""
        counted = self.of_all_processes(self._samples, self._tokens, self._computed, self._padded)
        samples, tokens, computed, padded = (count // self.together for count in counted)
        return samples, tokens, computed, padded

    def of_all_processes(self, *counts: torch.Tensor | int) -> list[int]:
        """The sums of these counts over all processes, each of which has to ask."""
        own = torch.tensor([float(count) for count in counts], device=self.args.device)
        return [int(count) for count in self.accelerator.reduce(own, reduction="sum").tolist()]


def _as_it_is(loader: DataLoader) -> DataLoader:
    return loader


def _labelled(inputs: Mapping[str, Any]) -> torch.Tensor | int:
    """Samples of a padded batch; a blank, which stands where a process has no sample, has no label."""
    labels = inputs.get("labels")
    return len(inputs["input_ids"]) if labels is None else (labels != IGNORE_INDEX).any(dim=1).sum()
