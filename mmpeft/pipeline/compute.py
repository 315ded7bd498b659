"""A recipe's `compute` block on a stage's model: what is switched on, and what it spared."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainingArguments

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.core.speed import Speedup
from mmpeft.models.base import base_of
from mmpeft.models.compiled import layer_count, layer_parameters, uncompilable
from mmpeft.models.dimensions import cache_bytes
from mmpeft.models.groups import group_of
from mmpeft.models.head_loss import AUTO_ENTRIES, HeadFigures, unchunkable
from mmpeft.training.computing import Compute, weights_spread
from mmpeft.training.trainer import MultimodalTrainer

FLOAT32 = 4
"""Bytes of a logit where its loss is computed."""


WORTH_COMPILING = {"cpu": 1e14, "cuda": 1e17}
"""Floating-point operations of a stage from which compiling its layers pays: five minutes at 0.3 TFLOP/s, where it was
measured to take half a minute and to spare a fifth to a third of what comes after; on CUDA, where it was not,
seventeen at 100."""

SAMPLE_TOKENS = 256
"""Tokens of a sample, where nobody has counted."""


def plan_compute(recipe: Recipe, model: Any, args: TrainingArguments, *, samples: int) -> Compute:
    """What the Trainer is asked for.

    Args:
        samples: how many the stage trains on.

    Raises:
        RecipeError: the recipe asks for what the model cannot do; says why.
    """
    switch = recipe.compute.chunked_loss
    obstacle = unchunkable(model)
    if switch is True and not obstacle and weights_spread(model, args):
        obstacle = "the head's weights are spread over processes"
    if switch is True and obstacle:
        raise RecipeError(f"compute.chunked_loss: {obstacle}; leave it out")
    return Compute(
        chunked_loss=None if switch == "auto" else switch,
        liger=recipe.compute.liger,
        compile=why_uncompiled(recipe, model, args, samples=samples) is None,
        spare_casts=recipe.compute.spare_casts,
        fuse_lora=recipe.compute.fuse_lora,
        block_attention=recipe.compute.block_attention,
        spare_cache=recipe.compute.spare_cache,
        spare_mask=recipe.compute.spare_mask,
        linear_patches=recipe.compute.linear_patches,
        npu_kernels=recipe.compute.npu_kernels,
        copy_ahead=recipe.compute.copy_ahead,
        recompute=recipe.compute.checkpointing == "auto",
    )


def why_uncompiled(recipe: Recipe, model: Any, args: TrainingArguments, *, samples: int) -> str | None:
    """Why the language model's layers run as they are; None where they are compiled.

    Raises:
        RecipeError: the recipe asks for compiled layers where they cannot be; says why.
    """
    switch, device = recipe.compute.compile, args.device.type
    if switch is False:
        return "compute.compile is false"
    obstacle = (
        "layers run twice with activation checkpointing"
        if args.activation_checkpointing
        else "processes that run samples together were not tested with it"
        if group_of(model) is not None
        else f"weights are in {recipe.quantization}"
        if recipe.quantization != "none"
        else "weights are spread over processes"
        if weights_spread(model, args)
        else uncompilable(model, device)
    )
    if switch is True:
        if obstacle:
            raise RecipeError(f"compute.compile: {obstacle}; leave it out")
        return None
    if obstacle or not args.bf16 or args.world_size > 1:
        return obstacle or ("it pays in bfloat16 only" if not args.bf16 else "it was tested on one process")
    work = 6.0 * layer_parameters(model) * SAMPLE_TOKENS * samples
    if work < WORTH_COMPILING.get(device, float("inf")):
        return f"{samples:,} samples are too few for what compiling takes"
    return None


def supervised_only(recipe: Recipe, model: Any, args: TrainingArguments) -> bool | None:
    """Whether batches keep the logits of supervised positions only; None: where the model's forward offers it."""
    # Label smoothing reads the logits of every position.
    if args.label_smoothing_factor or not recipe.compute.supervised_only:
        return False
    return True if unchunkable(model) is None else None


def compute_speedups(
    recipe: Recipe, trainer: MultimodalTrainer, *, samples: int, relief: Sequence[str] = ()
) -> list[Speedup]:
    """What the block spared a stage that has trained on so many samples.

    Args:
        relief: what was changed from its beginning, for memory did not suffice before.
    """
    compiled = trainer.computing.compute.compile
    why = "" if compiled else why_uncompiled(recipe, trainer.model, trainer.args, samples=samples)
    head = trainer.computing.head or HeadFigures()
    return [
        _supervised(recipe, trainer, head),
        _chunked(recipe, trainer, head),
        _casts(recipe, trainer),
        _fused(trainer),
        _blocked(trainer),
        _cache(recipe, trainer),
        _mask(trainer),
        _patches(recipe, trainer),
        _npu_kernels(trainer),
        _copies(trainer),
        _liger(recipe, head),
        Speedup(
            name="compute.compile",
            on=compiled,
            why=why or "layers run compiled",
            saved={"layers run one operation at a time": float(trainer.computing.compiled)} if compiled else {},
        ),
        _checkpointing(trainer, relief),
    ]


def _supervised(recipe: Recipe, trainer: MultimodalTrainer, head: HeadFigures) -> Speedup:
    name = "compute.supervised_only"
    if getattr(trainer.data_collator, "supervised_only", False):
        saved, why = {"logits": float(head.positions - head.kept)}, "logits are computed where a label is predicted"
        if last := trainer.computing.last:
            saved["tokens of the last feed-forward"] = float(last.tokens - last.kept)
            why = "logits and the last layer's feed-forward part are computed where a label is predicted"
        return Speedup(name=name, on=True, why=why, saved=saved)
    if not recipe.compute.supervised_only:
        return Speedup(name=name, on=False, why="compute.supervised_only is false")
    smoothed = trainer.args.label_smoothing_factor
    why = "label smoothing reads every logit" if smoothed else "the model's forward was not tested with it"
    return Speedup(name=name, on=False, why=why)


def _chunked(recipe: Recipe, trainer: MultimodalTrainer, head: HeadFigures) -> Speedup:
    name, switch = "compute.chunked_loss", recipe.compute.chunked_loss
    if head.chunked:
        why = "it was asked for" if switch is True else f"{head.entries:,} logits of a forward exceed {AUTO_ENTRIES:,}"
        saved = {"bytes": float(FLOAT32 * (head.entries - head.largest))}
        return Speedup(name=name, on=True, why=why, saved=saved)
    if switch is False:
        return Speedup(name=name, on=False, why="compute.chunked_loss is false")
    why = (
        unchunkable(trainer.model)
        or ("the head's weights are spread over processes" if trainer.computing.spread else None)
        or f"the most logits of a forward are {head.entries:,}, and {AUTO_ENTRIES:,} fit"
    )
    return Speedup(name=name, on=False, why=why)


def _liger(recipe: Recipe, head: HeadFigures) -> Speedup:
    name = "compute.liger"
    if head.liger:
        return Speedup(name=name, on=True, why="Liger's kernels computed the chunks of logits")
    asked = recipe.compute.liger
    why = "no chunk of logits was computed on CUDA with liger-kernel installed" if asked else f"{name} is false"
    return Speedup(name=name, on=False, why=why)


def _casts(recipe: Recipe, trainer: MultimodalTrainer) -> Speedup:
    name, layers = "compute.spare_casts", trainer.computing.uncast
    if layers:
        saved = {"casts a forward": float(2 * layers)}
        return Speedup(name=name, on=True, why="LoRA takes its inputs in half precision as they are", saved=saved)
    asked = recipe.compute.spare_casts
    why = "no LoRA runs in half precision by autocast" if asked else "compute.spare_casts is false"
    return Speedup(name=name, on=False, why=why)


def _fused(trainer: MultimodalTrainer) -> Speedup:
    name, layers = "compute.fuse_lora", trainer.computing.fused
    if layers:
        saved = {"tensors a forward": float(3 * layers)}
        return Speedup(name=name, on=True, why="LoRA's products are added in place", saved=saved)
    return Speedup(name=name, on=False, why=trainer.computing.why_unfused() or "no layer has plain LoRA")


def _blocked(trainer: MultimodalTrainer) -> Speedup:
    why = trainer.computing.why_unblocked()
    name, segments = "compute.block_attention", float(trainer.computing.segments * layer_count(trainer.model))
    if why is not None:
        return Speedup(name=name, on=False, why=why)
    saved = {"attentions of a sample by itself": segments}
    return Speedup(name=name, on=True, why="a row's attention is computed at once", saved=saved)


def _cache(recipe: Recipe, trainer: MultimodalTrainer) -> Speedup:
    name = "compute.spare_cache"
    if trainer.computing.spares_cache():
        saved = {"bytes": float(cache_bytes(trainer.model, trainer.computing.most_tokens, _activations(trainer)))}
        return Speedup(name=name, on=True, why="training reads no keys and values of earlier forwards", saved=saved)
    asked = recipe.compute.spare_cache
    why = "models of this type were not tested with it" if asked else "compute.spare_cache is false"
    return Speedup(name=name, on=False, why=why)


def _mask(trainer: MultimodalTrainer) -> Speedup:
    why = trainer.computing.why_masked()
    name = "compute.spare_mask"
    if why is not None:
        return Speedup(name=name, on=False, why=why)
    saved = {"entries of masks": float(trainer.computing.mask_entries)}
    return Speedup(name=name, on=True, why="no token sees the padding behind it", saved=saved)


def _patches(recipe: Recipe, trainer: MultimodalTrainer) -> Speedup:
    name = "compute.linear_patches"
    if trainer.computing.patches:
        saved = {"convolutions a forward": float(trainer.computing.patches)}
        return Speedup(name=name, on=True, why="the tower's patches are projected by a matrix product", saved=saved)
    asked = recipe.compute.linear_patches
    why = "no tower has a convolution that takes patches one by one" if asked else "compute.linear_patches is false"
    return Speedup(name=name, on=False, why=why)


def _npu_kernels(trainer: MultimodalTrainer) -> Speedup:
    name, fused = "compute.npu_kernels", trainer.computing.npu
    if not fused.total:
        why = trainer.computing.why_no_npu_kernels() or "no module computes what the fused operators do"
        return Speedup(name=name, on=False, why=why)
    saved = {"norms": fused.norms, "gated activations": fused.activations, "rotary positions": fused.rotations}
    return Speedup(
        name=name,
        on=True,
        why="Ascend's fused operators compute norms, gated activations and rotary positions",
        saved={f"{kind} of several operations": float(count) for kind, count in saved.items() if count},
    )


def _copies(trainer: MultimodalTrainer) -> Speedup:
    name, count = "compute.copy_ahead", trainer.copied_ahead
    if not count:
        why = trainer.computing.why_not_copied_ahead() or "batches came to the device by other ways"
        return Speedup(name=name, on=False, why=why)
    why = "micro-batches go to the device on a stream of their own"
    return Speedup(name=name, on=True, why=why, saved={"copies that computing waited for": float(count)})


def _activations(trainer: MultimodalTrainer) -> int:
    """Bytes of a number in a forward."""
    halved = trainer.args.bf16 or trainer.args.fp16
    return 2 if halved else base_of(trainer.model).dtype.itemsize


def _checkpointing(trainer: MultimodalTrainer, relief: Sequence[str]) -> Speedup:
    name, recompute = "compute.checkpointing", trainer.computing.recompute
    if relief:
        return Speedup(name=name, on=True, why=f"memory did not suffice before: {', '.join(relief)}")
    if trainer.args.activation_checkpointing:
        return Speedup(name=name, on=True, why="it was asked for")
    done = [
        *([f"micro-batches were cut into {recompute.parts}"] if recompute.parts > 1 else []),
        *([f"{recompute.count} of {recompute.total} layers were computed again"] if recompute.count else []),
        *(["activations waited in host memory"] if recompute.offloads else []),
    ]
    if done:
        saved = {"layers' activations": float(recompute.count)} if recompute.count else {}
        why = f"memory did not suffice until {' and '.join(done)}"
        return Speedup(name=name, on=True, why=why, saved=saved)
    return Speedup(name=name, on=False, why=trainer.computing.why_not_recomputed() or "memory sufficed without it")
