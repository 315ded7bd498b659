"""The recipe: one file that describes a run. Frozen pydantic models; unknown keys fail."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from transformers import TrainingArguments

from mmpeft.config.block import Block, no_bool, raise_all
from mmpeft.config.compute import ComputeConfig, Switch
from mmpeft.config.data import DataConfig
from mmpeft.config.distributed import Distributed, DistributedConfig
from mmpeft.config.load import Document, describe, load_yaml
from mmpeft.config.names import did_you_mean
from mmpeft.config.train import PartTraining, train_problems
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part

TRAINER_FIELDS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(TrainingArguments))

_OWNED_BY_RECIPE = {
    "output_dir": "output",
    "per_device_train_batch_size": "batch.micro",
    "gradient_accumulation_steps": "batch.size and batch.micro",
    "num_train_epochs": "stages[].epochs",
    "max_steps": "stages[].max_steps",
    "learning_rate": "stages[].learning_rate",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "device",
    "resume_from_checkpoint": "the option --resume",
    "dataloader_num_workers": "data.workers",
    "dataloader_drop_last": "nothing: the last update of an epoch has the samples that are left",
    "remove_unused_columns": "nothing: the data set returns only what the model takes",
    "deepspeed": "stages[].distributed: zero1, zero2 or zero3",
    "fsdp": "stages[].distributed: fsdp2",
    "fsdp_config": "stages[].distributed: fsdp2",
    "push_to_hub": "hub",
    "hub_model_id": "hub.repo",
    "hub_private_repo": "hub.private",
    "hub_token": "nothing: log in with `hf auth login`, or set HF_TOKEN",
}


class ComposeConfig(Block):
    """A model made from a vision encoder (or two), a language model and a new projector."""

    vision: str | tuple[str, ...]
    language: str
    projector: str | dict[str, Any] = "mlp"
    chat_template: str | None = None
    """A Jinja chat template that takes the place of the language model's own."""
    vision_feature_layer: int = -2


class BatchConfig(Block):
    """The batch, in samples. `size` is global: the same on one process and on eight."""

    size: int = Field(default=16, ge=1)
    micro: int | None = Field(default=None, ge=1)
    """Samples of one process that go through the model at once; default: as many as `size` allows, up to 16."""
    tokens: Annotated[int, BeforeValidator(no_bool), Field(ge=8)] | Literal["auto"] | None = None
    """Instead of `micro`: most tokens of what goes through the model at once on one process (of a row its tokens, of
    a padded batch rows x longest); a step's samples stay the same, they are only cut otherwise. `auto`: as
    many as fit the device's memory by the plan of the stage."""
    balance: bool = True
    """Spread the samples of a step over processes and micro-batches by their cost, and take the longest first."""
    packing: bool | None = None
    """Put these samples into one row without padding; default: where the model's family can be packed exactly."""
    share_media: bool = True
    """Bring samples on the same picture together, and run what they begin with once; needs packing."""

    @model_validator(mode="after")
    def _cut_in_one_way(self) -> "BatchConfig":
        if self.micro is not None and self.tokens is not None:
            raise_all([("micro", "`tokens` says how a step is cut, too; leave one of the two out")])
        return self


class EvaluateConfig(Block):
    """How the held-out questions are answered and scored."""

    metrics: tuple[Literal["exact_match", "token_f1", "anls"], ...] = ("exact_match", "token_f1", "anls")
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=32, ge=1)
    limit: int | None = Field(default=None, ge=1)
    """Answer only this many questions, the first of the file."""
    share_media: bool = True
    """Run what questions on the same picture begin with once, where the answers are the same."""
    share_weights: Switch = "auto"
    """Share the model's layers out over processes, which then answer every question together; `auto`: where a stage
    shares them out and the whole model would not fit the device."""


class HubConfig(Block):
    """Where the result is pushed when the run is done."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    private: bool = True
    """Of a repository that is new."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """The base's name on the Hub, where the recipe composes it or names a directory; pushed first where nothing is
    there yet."""
    license: str | None = None
    """As the Hub calls it; default: that of the base's card."""


def _per_part(value: Any) -> str:
    return "<per part>" if isinstance(value, Mapping) else "<one>"


LearningRate = Annotated[
    Annotated[float, Field(gt=0), Tag("<one>")]
    | Annotated[dict[Part, Annotated[float, Field(gt=0)]], Tag("<per part>")],
    Discriminator(_per_part),
]


class StageConfig(Block):
    """One stage: which parts train, how fast, how long."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    train: dict[Part, PartTraining]
    learning_rate: LearningRate = 2.0e-4
    epochs: Annotated[float, BeforeValidator(no_bool)] = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; when given, it takes the place of `epochs`."""
    distributed: Distributed = DistributedConfig()
    """What several processes share of the model: `ddp`, `zero1`, `zero2`, `zero3`, `fsdp2`, or `auto`."""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Anything else that `transformers.TrainingArguments` takes."""

    @field_validator("train", mode="before")
    @classmethod
    def _check_train(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "mmpeft", "found {value}; expected parts such as {{projector: full}}", {"value": repr(value)}
            )
        raise_all(train_problems(value))
        return value

    @field_validator("trainer", mode="before")
    @classmethod
    def _check_trainer(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        problems = []
        for key in value:
            if key in _OWNED_BY_RECIPE:
                problems.append((key, f"is set elsewhere in the recipe: {_OWNED_BY_RECIPE[key]}"))
            elif key == "warmup_ratio":
                problems.append((key, "is gone from transformers 5; `warmup_steps` below 1 is the same ratio"))
            elif key not in TRAINER_FIELDS:
                problems.append((key, f"unknown training argument{did_you_mean(key, TRAINER_FIELDS)}"))
        raise_all(problems)
        return value

    @model_validator(mode="after")
    def _rates_belong_to_trained_parts(self) -> "StageConfig":
        if isinstance(self.learning_rate, dict):
            trained = [part for part in PARTS if self.train.get(part, "frozen") != "frozen"]
            problems = [
                (
                    "learning_rate." + part,
                    f"{part} is not trained in this stage; trained: {', '.join(trained)}",
                )
                for part in self.learning_rate
                if part not in trained
            ]
            problems += [
                ("learning_rate", f"no learning rate for {part}, which this stage trains")
                for part in trained
                if part not in self.learning_rate
            ]
            raise_all(problems)
        return self


PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "two-stage": (
        {"name": "projector", "train": {"projector": "full"}, "learning_rate": 1.0e-3},
        {
            "name": "language",
            "train": {"projector": "full", "language": {"r": 16, "lora_alpha": 32}},
            "learning_rate": {"projector": 2.0e-5, "language": 2.0e-4},
        },
    ),
    "projector": ({"name": "projector", "train": {"projector": "full"}, "learning_rate": 1.0e-3},),
    "lora": ({"name": "language", "train": {"language": {"r": 16, "lora_alpha": 32}}, "learning_rate": 2.0e-4},),
}
"""Stages by name: LLaVA's two-stage rates for LoRA (github.com/haotian-liu/LLaVA, scripts/v1_5), and its halves."""


def _stages(value: Any) -> Any:
    if isinstance(value, str):
        if value not in PRESETS:
            raise PydanticCustomError(
                "mmpeft",
                "unknown preset {value}{hint}",
                {"value": repr(value), "hint": did_you_mean(value, PRESETS)},
            )
        return PRESETS[value]
    return value


def _model_kind(value: Any) -> str:
    return "<compose>" if isinstance(value, Mapping | ComposeConfig) else "<name>"


class Recipe(Block):
    """A whole run. `model`, `data.train` and `stages` suffice; everything else has a default."""

    model: Annotated[
        Annotated[str, Tag("<name>")] | Annotated[ComposeConfig, Tag("<compose>")], Discriminator(_model_kind)
    ]
    data: DataConfig
    stages: Annotated[tuple[StageConfig, ...], BeforeValidator(_stages), Field(min_length=1)]
    batch: BatchConfig = BatchConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    """Compute the same bits in each run on the same machine; slower. An operation that cannot is an error."""
    output: Path = Path("runs/mmpeft")
    processes: Annotated[int, BeforeValidator(no_bool), Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that `mmpeft run` starts on this machine; `auto`: one for each accelerator where a stage has
    `distributed`, else one. A launcher's own number goes before it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `npu`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the base model's weights; `auto` is the checkpoint's own on accelerators and float32 on CPU."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """What the language model's frozen matrices are held in, by bitsandbytes, while adapters train on them (QLoRA)."""
    trust_remote_code: bool = False
    hub: HubConfig | None = None
    """Where the result is pushed when the run is done; default: nowhere."""

    @model_validator(mode="after")
    def _stage_names_differ(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        repeated = {name for name in names if names.count(name) > 1} | {"before", "after"}.intersection(names)
        raise_all([("stages", f"the name {name!r} is taken; give each stage its own") for name in sorted(repeated)])
        return self

    @model_validator(mode="after")
    def _quantized_weights_are_frozen_and_whole(self) -> "Recipe":
        if self.quantization == "none":
            return self
        full = [
            (f"stages.{stage.name}.train.{part}", f"full writes a whole model, and quantization is {self.quantization}")
            for stage in self.stages
            for part in ("vision", "audio", "language")
            if stage.train.get(part) == "full"
        ]
        shared = [
            (
                f"stages.{stage.name}.distributed",
                f"{stage.distributed.describe()} shares out weights or states, and those of quantization: "
                f"{self.quantization} are whole in each process; use ddp or context_parallel",
            )
            for stage in self.stages
            if stage.distributed.strategy not in ("auto", "ddp") or stage.distributed.tensor_parallel > 1
        ]
        raise_all([*full, *shared])
        return self

    @model_validator(mode="after")
    def _streams_have_an_end(self) -> "Recipe":
        problems = [
            (
                f"stages.{stage.name}.max_steps",
                "missing; data.streaming does not count the samples of a source: say how many steps the stage takes",
            )
            for stage in self.stages
            if stage.max_steps is None and self.data.streaming and self.data.alone
        ]
        raise_all(problems)
        return self

    @model_validator(mode="after")
    def _streams_have_no_lengths(self) -> "Recipe":
        if self.data.streaming and self.batch.tokens is not None:
            reason = "a stream's samples have no length before they are read; use batch.micro, or data.streaming: false"
            raise_all([("batch.tokens", reason)])
        return self

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> "Recipe":
        """Read a recipe file; `overrides` are `key=value` strings as `--set` takes them.

        Raises:
            RecipeError: every problem at once, each with its line, key, what was found and the nearest valid name.
        """
        document = load_yaml(Path(path))
        preset = document.value.get("stages")
        if isinstance(preset, str) and preset in PRESETS and any(text.startswith("stages.") for text in overrides):
            document.value["stages"] = copy.deepcopy(list(PRESETS[preset]))
        for override in overrides:
            document.override(override)
        try:
            return cls.model_validate(document.value)
        except ValidationError as error:
            raise RecipeError(describe(error, cls, document)) from None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], overrides: tuple[str, ...] = ()) -> "Recipe":
        """A recipe from plain values, checked as a file is; `overrides` as of `from_yaml`.

        Raises:
            RecipeError: every problem at once, each with its key, what was found and the nearest valid name.
        """
        document = Document(value=copy.deepcopy(dict(value)), source="recipe")
        for override in overrides:
            document.override(override)
        try:
            return cls.model_validate(document.value)
        except ValidationError as error:
            raise RecipeError(describe(error, cls, document)) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values (paths as text), complete with defaults: what `recipe.yaml` of a run holds."""
        return self.model_dump(mode="json")
