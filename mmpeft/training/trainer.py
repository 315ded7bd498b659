"""`MultimodalTrainer`: transformers' Trainer with learning rates by part and batches that no process count changes."""

import functools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmpeft.core.errors import DataError, OutputError, RecipeError
from mmpeft.core.files import writing
from mmpeft.core.memory import peak_memory_bytes
from mmpeft.core.tree import Tree
from mmpeft.core.types import IGNORE_INDEX, Part
from mmpeft.data.balancing import Cut, CutFigures
from mmpeft.data.stream_mixture import Stream
from mmpeft.methods.checkpoint import remove_directory, write_peft_files
from mmpeft.models.positions import with_positions
from mmpeft.models.tree_attention import check_attention
from mmpeft.training.ahead import ReadAhead, taken_ahead
from mmpeft.training.computing import Compute, Computing
from mmpeft.training.features import FeatureCache, fed
from mmpeft.training.loaders import (
    end_workers,
    from_worker,
    global_loader,
    naming_lost_workers,
    stream_loader,
    stream_sampler,
)
from mmpeft.training.main_process import on_main
from mmpeft.training.parts import parameter_groups, rates_now
from mmpeft.training.reach import reach_what_trains
from mmpeft.training.resume import SEAL, checkpoint_damage, seal_checkpoint
from mmpeft.training.skips import SkipWatch
from mmpeft.training.waiting import DataWaits
from mmpeft.training.weighing import weigh_tokens

logger = logging.getLogger(__name__)


class MultimodalTrainer(Trainer):
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
        self._resumed_from: Any = None
        self.proved_whole: Path | None = None
        _one_device(kwargs.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **kwargs)
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
        if not weigh_tokens(self) and cut is not None:
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
        self.add_callback(_EpochOfData(self.train_dataset))
        self.add_callback(_EndOfEpoch(self))

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

        Elsewhere is: on several processes, of a stream, where samples on the same media come together, and where steps
        are cut by cost.
        """
        dataset: Any = self.train_dataset
        streamed = isinstance(dataset, Stream)
        plain = self.args.world_size == 1 and not self.share_media and self.cut is None
        if not streamed and (not hasattr(dataset, "__len__") or plain):
            return super().get_train_dataloader()
        collator = self._get_collator_with_removed_columns(self.data_collator, description="training")
        if not streamed:
            loader = global_loader(dataset, self.args, collator, share_media=self.share_media, cut=self.cut)
            self.cut_figures = getattr(loader.batch_sampler, "figures", None)
            return loader
        sampler = stream_sampler(dataset, self.args)
        self.skips = SkipWatch(sampler, self.accelerator)
        if isinstance(self._resumed_from, str | Path):
            self.skips.load(Path(self._resumed_from))
        return stream_loader(sampler, self.args, collator)

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
        return found

    def end_reading(self) -> None:
        """Read no further ahead: at the end of an epoch, and of training."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _step_size(self) -> int:
        """Samples of a step, of all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch forward and backward; counts its samples and tokens without a synchronisation."""
        tree: Tree | None = inputs.get("tree")
        self._samples = self._samples + (tree.samples if tree else _labelled(inputs))
        self._tokens = self._tokens + (tree.tokens if tree else inputs["attention_mask"].sum())
        self._computed += inputs["input_ids"].numel()
        self._padded += tree.padded if tree else inputs["input_ids"].numel()
        step = functools.partial(super().training_step, model, inputs, *args, **kwargs)
        return self.computing.recompute.run(step)

    def _prepare_input(self, data: Any) -> Any:
        """The Trainer's own; from pinned memory without waiting for the device."""
        if isinstance(data, torch.Tensor) and self.args.device.type != "cpu" and data.is_pinned():
            data = data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own, on a packed row with the positions that the family gives it, and on kept features."""
        check_attention(self.model, inputs)
        with fed(self.features, self.model, with_positions(self.model, inputs), self.accelerator.autocast) as batch:
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
        with naming_lost_workers(), self.computing.on(training=True):
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
        samples, tokens, computed, padded = self.of_all_processes(
            self._samples, self._tokens, self._computed, self._padded
        )
        return samples, tokens, computed, padded

    def of_all_processes(self, *counts: torch.Tensor | int) -> list[int]:
        """The sums of these counts over all processes, each of which has to ask."""
        own = torch.tensor([float(count) for count in counts], device=self.args.device)
        return [int(count) for count in self.accelerator.reduce(own, reduction="sum").tolist()]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint and seal it; where that fails, remove what there is of it and say why.

        Raises:
            OutputError: the place cannot be written, for instance because the disk is full.
        """
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with writing(folder):
                if self.args.should_save:
                    # Of an earlier checkpoint of the same step, whose files are about to change.
                    (folder / SEAL).unlink(missing_ok=True)
                if self.skips is not None and self.args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
                    self.skips.save(folder)
                super()._save_checkpoint(model, trial)
                # All processes have files in it.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    seal_checkpoint(folder)
        except Exception:
            remove_directory(folder)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_peft_files(self.model, folder, state_dict)
            processor: Any = self.processing_class
            if processor is not None:
                processor.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights.

        Raises:
            OutputError: it is damaged.
        """
        folder = Path(resume_from_checkpoint)
        if folder != self.proved_whole and (damage := on_main(lambda: checkpoint_damage(folder))):
            raise OutputError(f"cannot resume from {resume_from_checkpoint}: {damage}; take an older checkpoint")
        own: Any = self.model
        if not isinstance(own, PeftModel):
            self._load_whole_model(resume_from_checkpoint)
            return
        # PEFT switches gradients on for all that an adapter holds; what was frozen has to stay so.
        trained = {name: parameter.requires_grad for name, parameter in own.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(trained[name])

    def _load_best_model(self) -> None:
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or isinstance(self.model, PeftModel):
            super()._load_best_model()
        else:
            self._load_whole_model(str(self.state.best_model_checkpoint))

    def _load_whole_model(self, checkpoint: str) -> None:
        """Weights of a model that trains in place.

        The Trainer of transformers 5.24 reads the file by the names of the module tree, but LLaVA's are converted
        when they are saved: it finds not one of them, warns, and keeps the weights that it has.
        tests/training/test_trainer.py [full] passes without this once transformers has mended it.
        """
        own: Any = self.model
        own.load_state_dict(type(own).from_pretrained(checkpoint).state_dict())


def _labelled(inputs: Mapping[str, Any]) -> torch.Tensor | int:
    """Samples of a padded batch; a blank, which stands where a process has no sample, has no label."""
    labels = inputs.get("labels")
    return len(inputs["input_ids"]) if labels is None else (labels != IGNORE_INDEX).any(dim=1).sum()


class _EndOfEpoch(TrainerCallback):
    """Ends reading ahead before the next epoch asks the same workers."""

    def __init__(self, trainer: MultimodalTrainer) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.end_reading()


def _one_device(args: TrainingArguments | None) -> None:
    """Train on one device a process: `DataParallel`, which the Trainer takes on several, cuts packed rows apart."""
    if args is not None and args.n_gpu > 1:
        logger.warning(
            "%d devices are here, and this process trains on one; `accelerate launch -m mmpeft run RECIPE` uses all",
            args.n_gpu,
        )
        args._n_gpu = 1


class _EpochOfData(TrainerCallback):
    """Tells a data set that changes with the epoch which one begins.

    Loaders do it only on some ways: accelerate 1.15 leaves it out where a run goes on in the middle of an epoch.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))
