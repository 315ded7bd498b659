"""How a Trainer's forwards are computed: what is put on its model while it trains or evaluates, and taken off again."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.packing import PackedCollator
from mmpeft.models.base import base_of
from mmpeft.models.compiled import layers_compiled
from mmpeft.models.context_parallel import context_parallel_on
from mmpeft.models.fused_lora import lora_fused
from mmpeft.models.head_loss import HeadFigures, head_loss_on, unchunkable
from mmpeft.models.last_layer import LastLayerFigures, last_layer_obstacle, last_layer_spared
from mmpeft.models.linear_patches import patches_linear
from mmpeft.models.mask_free import needs_mask, without_mask
from mmpeft.models.npu_kernels import FusedModules, npu_kernels_on
from mmpeft.models.recomputed import RecomputedLayers
from mmpeft.models.sharded import is_sharded
from mmpeft.models.spared_casts import casts_spared
from mmpeft.models.tree_attention import at_once, tree_attention_on
from mmpeft.training.copies import KINDS
from mmpeft.training.recompute import Recompute


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What does not change a result.

    Attributes:
        chunked_loss: whether logits and loss are computed a chunk of positions at a time; None: where they are many.
        liger: compute such chunks by Liger's kernels, on CUDA where liger-kernel is installed.
        compile: run the language model's layers compiled.
        spare_casts: give LoRA its inputs as they are where autocast is on.
        fuse_lora: add LoRA's products in place where layers are not compiled and weights are whole.
        block_attention: compute attention of a packed row at once, in large matrix products or one call of a kernel,
            where the device has it.
        spare_cache: keep no keys and values, which generation alone would read, of models known to take `use_cache`.
        linear_patches: project the patches of a picture by a matrix product where the tower has a convolution for it.
        recompute: where memory does not suffice for a micro-batch, cut it, or keep less of some layers for the
            backward, where no other process waits within a micro-batch.
        spare_mask: run batches of a `MultimodalCollator`, which pads on the right, without their mask.
        npu_kernels: compute norms, gated activations and rotary positions by fused operators on an NPU.
        copy_ahead: copy the next micro-batch to an accelerator while it computes this one.
    """

    chunked_loss: bool | None = None
    liger: bool = True
    compile: bool = False
    spare_casts: bool = True
    fuse_lora: bool = True
    block_attention: bool = True
    spare_cache: bool = True
    spare_mask: bool = True
    linear_patches: bool = True
    npu_kernels: bool = True
    copy_ahead: bool = True
    recompute: bool = True


_IN_BACKWARD = frozenset(
    {
        OptimizerNames.LOMO,
        OptimizerNames.ADALOMO,
        *(name for name in OptimizerNames if name.value.endswith("_layerwise")),
    }
)
"""Optimizers that change weights while the backward runs: half of one cannot be taken back."""


def weights_spread(model: Any, args: TrainingArguments) -> bool:
    """Whether no process has a model's weights whole outside a forward: ZeRO-3 and FSDP, not ZeRO-1 and ZeRO-2."""
    plugin = args.deepspeed_plugin
    return bool(args.fsdp or is_sharded(model) or (plugin is not None and plugin.zero_stage == 3))


class Computing:
    """Puts it on the model of a Trainer, once however deep evaluation lies in training.

    Attributes:
        head: what the language-model head was spared while training; None before.
        last: what its last layer was spared; None where nothing.
        uncast: layers whose inputs were not cast to and fro.
        fused: layers whose LoRA was added in place.
        patches: convolutions that ran as matrix products.
        npu: modules that computed by an NPU's fused operators.
        recompute: what micro-batches run by.
        compiled: layers that ran compiled.
        segments: pieces of packed rows whose attention was computed with the row's.
        most_tokens: of a forward that kept no keys and values.
        mask_entries: those of masks that batches went without, one head's.
    """

    def __init__(self, trainer: Any, compute: Compute) -> None:
        self.trainer, self.compute = trainer, compute
        self.head: HeadFigures | None = None
        self.last: LastLayerFigures | None = None
        self.uncast = self.fused = self.patches = self.compiled = 0
        self.segments = self.most_tokens = self.mask_entries = 0
        self.npu = FusedModules()
        self.recompute = Recompute()
        self._on = False

    @contextlib.contextmanager
    def on(self, *, training: bool = False) -> Iterator[None]:
        """While it lasts, the model takes the batches of the Trainer's collator.

        Args:
            training: whether it is training that begins; figures are those of training, also behind evaluation.
        """
        if self._on:
            yield
            return
        with contextlib.ExitStack() as stack:
            model = self.trainer.model
            if self.spares_cache():
                # Before the hook that takes the labels, by which it tells training from generation.
                stack.callback(model.register_forward_pre_hook(self._without_cache, with_kwargs=True).remove)
            if self.why_masked() is None:
                stack.callback(model.register_forward_pre_hook(self._without_mask, with_kwargs=True).remove)
            if isinstance(self.trainer.data_collator, PackedCollator):
                stack.enter_context(tree_attention_on(model, blocks=self.compute.block_attention))
            stack.enter_context(context_parallel_on(model))
            if self.why_last_whole() is None:
                # Before the hooks of the loss, which take from some forwards what it goes by.
                last = stack.enter_context(last_layer_spared(model))
                self.last = last if training or self.last is None else self.last
            if self._known():
                head = stack.enter_context(head_loss_on(model, chunked=self._chunked(), liger=self.compute.liger))
                self.head = head if training or self.head is None else self.head
            self._put_on_layers(stack)
            if training and self.why_not_recomputed() is None:
                stack.enter_context(self.recompute.watching(model))
            self._on = True
            try:
                yield
            finally:
                self._on = False

    def _put_on_layers(self, stack: contextlib.ExitStack) -> None:
        """What changes how single layers and modules compute."""
        model = self.trainer.model
        if self.compute.compile:
            self.compiled = stack.enter_context(layers_compiled(model))
        if self.compute.spare_casts and self.trainer.autocast_precision is not None:
            self.uncast = stack.enter_context(casts_spared(model))
        if self.why_unfused() is None:
            self.fused = stack.enter_context(lora_fused(model))
        if self.compute.linear_patches:
            self.patches = stack.enter_context(patches_linear(model))
        if self.why_no_npu_kernels() is None:
            self.npu = stack.enter_context(npu_kernels_on(model))

    @property
    def spread(self) -> bool:
        """Whether weights are spread over processes."""
        return weights_spread(self.trainer.model, self.trainer.args)

    @property
    def in_one_go(self) -> bool:
        """Whether a micro-batch cannot run again: others wait for it, or DeepSpeed has gradients of it already."""
        trainer = self.trainer
        alone = trainer.args.world_size == 1 or (trainer.averages and trainer.together == 1)
        return bool(self.spread or trainer.is_deepspeed_enabled or not alone)

    def spares_cache(self) -> bool:
        """Whether keys and values are let go."""
        return self.compute.spare_cache and self._known() and unchunkable(self.trainer.model) is None

    def why_unfused(self) -> str | None:
        """Why LoRA is not added in place; None if it is, where a layer is plain."""
        if not self.compute.fuse_lora:
            return "compute.fuse_lora is false"
        if self.spread:
            return "weights are spread over processes"
        return "compiled layers fuse it themselves" if self.compute.compile else None

    def why_no_npu_kernels(self) -> str | None:
        """Why no module computes by an NPU's fused operators; None if those do that can."""
        if not self.compute.npu_kernels:
            return "compute.npu_kernels is false"
        if self.trainer.args.device.type != "npu":
            return "the device is no NPU"
        return "layers run compiled" if self.compute.compile else None

    def why_not_copied_ahead(self) -> str | None:
        """Why micro-batches go to the device on the stream that computes; None if they go ahead of it."""
        if not self.compute.copy_ahead:
            return "compute.copy_ahead is false"
        if self.trainer.args.device.type not in KINDS:
            return "the device has no streams"
        return None if self.trainer.args.dataloader_pin_memory else "batches are not in pinned memory"

    def why_not_recomputed(self) -> str | None:
        """Why a micro-batch that lacks memory does not run again; None if it does."""
        args = self.trainer.args
        if args.activation_checkpointing:
            return "all layers are recomputed already"
        if not self.compute.recompute:
            return "compute.checkpointing is false"
        if self.in_one_go:
            return "DeepSpeed, or other processes, would not know of a micro-batch that runs again"
        if args.optim in _IN_BACKWARD:
            return f"the optimizer {OptimizerNames(args.optim).value} updates weights in the backward"
        if not self._known():
            return "the model is none of transformers"
        return None if RecomputedLayers(self.trainer.model).layers else "the model's layers cannot be recomputed"

    def why_unblocked(self) -> str | None:
        """Why attention runs a sample at a time; None if a row is computed at once."""
        if not self.compute.block_attention:
            return "compute.block_attention is false"
        if not isinstance(self.trainer.data_collator, PackedCollator):
            return "batches are not packed"
        args, own = self.trainer.args, base_of(self.trainer.model).dtype
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else own
        return None if at_once(self.trainer.model, dtype, args.device) else "there is no kernel for it here"

    def why_last_whole(self) -> str | None:
        """Why the last layer's feed-forward part is computed at every position; None if it is not."""
        if not getattr(self.trainer.data_collator, "supervised_only", False):
            return "logits are computed everywhere"
        if self.compute.compile:
            return "layers run compiled"
        return last_layer_obstacle(self.trainer.model) if self._known() else "the model is none of transformers"

    def why_masked(self) -> str | None:
        """Why batches go through the model with a mask; None if they go without."""
        if not self.compute.spare_mask:
            return "compute.spare_mask is false"
        if isinstance(self.trainer.data_collator, PackedCollator):
            return "packed rows have none"
        if not isinstance(self.trainer.data_collator, MultimodalCollator):
            return "the collator may pad on the left"
        return needs_mask(self.trainer.model) if self._known() else "the model is none of transformers"

    def _known(self) -> bool:
        """Whether the model is one of transformers, by itself or in a `PeftModel`."""
        return isinstance(base_of(self.trainer.model), PreTrainedModel)

    def _chunked(self) -> bool | None:
        # Metrics read logits; weights that are spread over processes are whole inside the model's forward only.
        return False if self.trainer.compute_metrics is not None or self.spread else self.compute.chunked_loss

    def _without_cache(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A forward without labels may be one of generation.
        if kwargs.get("labels") is None:
            return None
        self.most_tokens = max(self.most_tokens, kwargs["labels"].numel())
        return args, {"use_cache": False, **kwargs}

    def _without_mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = without_mask(module, args, kwargs)
        if changed is not None:
            rows, length = kwargs["labels"].shape
            self.mask_entries += rows * length**2
        return changed
