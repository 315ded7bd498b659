"""A recipe's `distributed` on the processes at hand: what the Trainer is told, and how the base model is loaded."""

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import str_to_bool
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from mmpeft.config.distributed import ZERO, DistributedConfig, distributed_problems
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import changes_base
from mmpeft.core.errors import RecipeError
from mmpeft.core.memory import available_memory, returning_memory
from mmpeft.core.optional import require
from mmpeft.methods.attach import trains_tower
from mmpeft.models.sharded import Sharing
from mmpeft.pipeline.base import base_precision, skeleton
from mmpeft.pipeline.deepspeed_build import drop_dead_locks


def pick_strategy(stage: StageConfig) -> DistributedConfig:
    """How a stage's processes share the work; never `auto`.

    One process has nobody to share with, and is `ddp` unless it offloads.

    Raises:
        RecipeError: offloading by a process that no launcher has started, or a whole model to be written of shares.
        MissingDependencyError: DeepSpeed is not installed.
    """
    chosen = told(stage)
    if chosen.shares_weights and trains_tower(stage.train):
        name = chosen.strategy if chosen.tensor_parallel == 1 else "tensor_parallel"
        raise RecipeError(
            f"stages.{stage.name}.distributed: {name} is for adapters, and this stage trains a tower or the "
            "language model `full`, which is written as a whole model; use zero1 or zero2"
        )
    language = stage.train.get("language")
    if chosen.tensor_parallel > 1 and isinstance(language, dict) and (field := _reads_matrices(language)):
        raise RecipeError(
            f"stages.{stage.name}.train.language.{field}: {language[field]!r} reads whole matrices, and "
            "distributed.tensor_parallel shares them out; leave one of the two out"
        )
    if chosen.context_parallel > 1 and trains_tower(stage.train):
        raise RecipeError(
            f"stages.{stage.name}.distributed.context_parallel: is for adapters, and this stage trains a tower or the "
            "language model `full`; use zero1 or zero2"
        )
    launched = torch.distributed.is_available() and torch.distributed.is_initialized()
    if chosen.offload != "none" and not launched:
        raise RecipeError(
            f"stages.{stage.name}.distributed.offload: {chosen.offload} needs a launcher, on one process as well; use "
            "`mmpeft run` or `accelerate launch --num_processes 1 -m mmpeft run`"
        )
    if PartialState().num_processes == 1:
        alone = DistributedConfig(strategy="ddp")
        chosen = alone if chosen.offload == "none" else chosen.model_copy(update={"context_parallel": 1})
    if chosen.strategy in ZERO:
        require("deepspeed", extra="deepspeed")
    return chosen


def told(stage: StageConfig) -> DistributedConfig:
    """What a stage and the launcher's settings say together; never `auto`.

    Raises:
        RecipeError: they exclude each other.
    """
    chosen = stage.distributed
    if chosen.strategy != "auto":
        return chosen
    launcher = launcher_strategy()
    if launcher is None:
        return chosen.model_copy(update={"strategy": "ddp"})
    if chosen.together == 1:
        return launcher
    if launcher.strategy != "ddp" and chosen.tensor_parallel > 1:
        raise RecipeError(
            f"stages.{stage.name}.distributed.tensor_parallel: is for ddp, and the launcher's settings say "
            f"{launcher.strategy}; give the stage `strategy: ddp`, or the launcher other settings"
        )
    if launcher.strategy in ZERO:
        raise RecipeError(
            f"stages.{stage.name}.distributed.context_parallel: is for ddp and fsdp2, and the launcher's settings say "
            f"{launcher.strategy}; give the stage one of them as `strategy`, or the launcher other settings"
        )
    return chosen.model_copy(update={"strategy": launcher.strategy, "offload": launcher.offload})


def _reads_matrices(lora: Mapping[str, Any]) -> str | None:
    """The field by which a LoRA needs more than the share of a matrix that a process has."""
    if changes_base(lora):
        return "init_lora_weights"
    return next((field for field in ("use_dora", "lora_bias") if lora.get(field)), None)


@functools.cache
def launcher_strategy() -> DistributedConfig | None:
    """What `accelerate launch` was told; None if nothing.

    It is taken out of the environment, where accelerate would find it for each stage, whatever the recipe says of it.
    """
    found: dict[str, Any] | None = None
    parallel = _taken_parallel()
    if _taken("ACCELERATE_USE_DEEPSPEED"):
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        name = next((name for name, number in ZERO.items() if number == stage), "ddp")
        found = {"strategy": name, "offload": _deepspeed_offload(stage)}
    elif _taken("ACCELERATE_USE_FSDP"):
        offload = str_to_bool(os.environ.get("FSDP_OFFLOAD_PARAMS", "false"))
        found = {"strategy": "fsdp2", "offload": "all" if offload else "none"}
    if parallel:
        found = {"strategy": "ddp", **(found or {}), **parallel}
    for name in [each for each in os.environ if each.startswith(_SETTINGS)]:
        del os.environ[name]
    if found and (problems := distributed_problems(found["strategy"], found)):
        why = "; ".join(f"{key}: {each}" for key, each in problems)
        raise RecipeError(f"the launcher's settings, which as a stage's `distributed` are {found}: {why}")
    return DistributedConfig(**found) if found else None


def _taken_parallel() -> dict[str, Any]:
    """What accelerate's `ParallelismConfig` says; its context and its sequence parallel are one thing here."""
    if not _taken("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return {}
    sizes = {name: int(os.environ.get(f"{_PARALLEL}{name}_SIZE", "1")) for name in ("TP", "CP", "SP", "DP_SHARD")}
    found: dict[str, Any] = {"strategy": "fsdp2"} if sizes["DP_SHARD"] > 1 else {}
    if sizes["TP"] > 1:
        found["tensor_parallel"] = sizes["TP"]
    if (tokens := max(sizes["CP"], sizes["SP"])) > 1:
        found["context_parallel"] = tokens
    return found


_PARALLEL = "PARALLELISM_CONFIG_"
_SETTINGS = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_", "FSDP_", _PARALLEL)


def _taken(name: str) -> bool:
    return bool(str_to_bool(os.environ.pop(name, "false")))


def _deepspeed_offload(stage: int) -> str:
    if stage == 3 and os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none") != "none":
        return "all"
    optimizer = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
    return "optimizer" if stage and optimizer != "none" else "none"


def strategy_arguments(strategy: DistributedConfig) -> dict[str, Any]:
    """Fields of `TrainingArguments`."""
    if strategy.strategy not in ZERO:
        return {}
    settings = {
        **_zero(strategy),
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        # The optimizer is the recipe's, with a learning rate by part.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return {"deepspeed": settings}


def _zero(strategy: DistributedConfig) -> dict[str, Any]:
    number, accelerated = ZERO[strategy.strategy], PartialState().device.type != "cpu"
    block: dict[str, Any] = {
        "stage": number,
        # Gradients are reduced in buckets while backward goes on.
        "overlap_comm": accelerated,
        "contiguous_gradients": True,
        # Buffers by the model's width: what trains in an adapter would not fill DeepSpeed's own.
        "reduce_bucket_size": "auto",
    }
    if number == 3:
        block |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    host = {"device": "cpu", "pin_memory": accelerated}
    if strategy.offload != "none":
        block["offload_optimizer"] = host
    if strategy.offload == "all":
        block["offload_param"] = host
    return {"zero_optimization": block}


@contextlib.contextmanager
def loading(strategy: DistributedConfig, recipe: Recipe, base: str) -> Iterator[Sharing | None]:
    """While it lasts, `load_model` with the `sharing` that it yields gives each process what is its own of a base.

    Raises:
        RecipeError: a launcher's settings share out weights that have to be whole.
    """
    if recipe.quantization != "none" and (strategy.strategy != "ddp" or strategy.tensor_parallel > 1):
        raise RecipeError(
            f"quantization: {recipe.quantization} is for ddp and context_parallel, and the launcher's settings say "
            f"{strategy.describe()}; give its stages `distributed: ddp`, or the launcher other settings"
        )
    if strategy.tensor_parallel > 1:
        yield Sharing(
            processes=PartialState().num_processes,
            tensor_parallel=strategy.tensor_parallel,
            tokens=strategy.sequence_parallel,
        )
    elif strategy.strategy == "fsdp2" or strategy.context_parallel > 1:
        yield Sharing(
            processes=PartialState().num_processes,
            offload=strategy.offload == "all",
            layers=strategy.strategy == "fsdp2",
            context_parallel=strategy.context_parallel,
        )
    elif strategy.strategy == "zero3":
        deepspeed = require("deepspeed", extra="deepspeed")
        drop_dead_locks()
        deepspeed.init_distributed(dist_backend=PartialState().backend, auto_mpi_discovery=False)
        precision = base_precision(recipe, base)
        half = {"bf16": {"enabled": precision == torch.bfloat16}, "fp16": {"enabled": precision == torch.float16}}
        # transformers looks for it for as long as somebody holds it.
        holder = HfDeepSpeedConfig({**_zero(strategy), **half, "train_micro_batch_size_per_gpu": 1})
        try:
            with returning_memory():
                yield None
        finally:
            del holder
            unset_hf_deepspeed_config()
    else:
        yield None


def evaluation_sharing(recipe: Recipe, base: str) -> Sharing | None:
    """How a base model is shared out where its answers are asked for; None where each process has the whole."""
    state, switch = PartialState(), recipe.evaluate.share_weights
    if state.num_processes == 1 or switch is False or recipe.quantization != "none":
        return None
    sharing = Sharing(processes=state.num_processes)
    if switch is True:
        return sharing
    if all(not pick_strategy(stage).shares_weights for stage in recipe.stages):
        return None
    weights = sum(weight.numel() for weight in skeleton(base, trust_remote_code=recipe.trust_remote_code).parameters())
    return sharing if weights * base_precision(recipe, base).itemsize > FITS * _own_memory(state.device) else None


def _own_memory(device: torch.device) -> int:
    """Bytes that this process may still take; of main memory its part, where several run on a machine."""
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return available_memory(device.type) // several


FITS = 0.8
"""Of a device's free memory, what weights may take beside what answering needs."""


def forget_strategy() -> None:
    """Let what a stage has told accelerate and transformers not hold for what comes behind it."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
