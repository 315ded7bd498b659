"""How a Trainer writes and reads what it goes on from: sealed checkpoints, and adapters as they lie on disk."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmpeft.core.errors import OutputError
from mmpeft.core.files import writing
from mmpeft.methods.checkpoint import remove_directory, write_peft_files
from mmpeft.training.main_process import on_main
from mmpeft.training.resume import SEAL, checkpoint_damage, seal_checkpoint
from mmpeft.training.shares import adapter_parameters, gathered
from mmpeft.training.skips import SkipWatch


class CheckpointingTrainer(Trainer):
    """Checkpoints that are whole or not there, and adapters without what they do not hold.

    Attributes:
        skips: what was left out of a stream, which checkpoints hold as well; None where nothing is streamed.
        proved_whole: a checkpoint that needs no proof any more.
    """

    skips: SkipWatch | None
    proved_whole: Path | None

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's own; of an adapter nothing but what it holds is gathered from other processes."""
        if self.is_deepspeed_enabled and isinstance(self.model, PeftModel):
            with gathered(adapter_parameters(self.model)):
                self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            self._save_arguments(folder)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            write_peft_files(self.model, folder, state_dict)
            processor: Any = self.processing_class
            if processor is not None:
                processor.save_pretrained(folder)
            self._save_arguments(folder)

    def _save_arguments(self, folder: Path) -> None:
        """The arguments without the token, for they are pushed with the rest."""
        if not self.args.should_save:
            return
        arguments: Any = copy.copy(self.args)
        arguments.hub_token = None
        torch.save(arguments, folder / TRAINING_ARGS_NAME)

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
