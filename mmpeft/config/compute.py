"""The `compute` block: how a step is computed. None of it changes what comes out, beyond rounding."""

from typing import Literal

from mmpeft.config.block import Block

Switch = Literal["auto", True, False]
"""On, off, or on where it pays; the run's report says which and why."""


class ComputeConfig(Block):
    """How a step is computed."""

    supervised_only: bool = True
    """Compute logits, and the last layer's feed-forward part, where a label is predicted, not at every token."""
    chunked_loss: Switch = "auto"
    """Compute logits and their loss a chunk of positions at a time, so that they never stand in memory at once; `auto`:
    where they would hold more than 2^26 numbers."""
    liger: bool = True
    """Compute these chunks by Liger's kernels: on CUDA, where liger-kernel is installed (not run there yet)."""
    compile: Switch = "auto"
    """Run the language model's layers through torch.compile; the first step takes tens of seconds more. `auto`: in
    bfloat16, on one process, for language models tested with it, where training would take about five minutes
    (twenty on CUDA)."""
    checkpointing: Switch = "auto"
    """Keep a layer's input alone and compute the rest again in backward: less memory, a third more work. `auto`: as
    memory asks for it: a micro-batch that lacks memory runs again cut in two, then for as many layers as it takes, then
    with activations on the host; for all layers where the stage's `trainer` block has `activation_checkpointing`."""
    spare_casts: bool = True
    """In half precision, give LoRA its inputs as they are, not by way of float32; the same numbers."""
    fuse_lora: bool = True
    """Add LoRA's products to the layer's own in place, where layers run uncompiled on one whole set of weights."""
    block_attention: bool = True
    """In half precision, compute attention of a packed row at once: in large matrix products on a CPU that has
    instructions for bfloat16, in one call of a kernel for rows of several lengths on CUDA and Ascend (not run there
    yet)."""
    spare_cache: bool = True
    """Keep no keys and values for generation while training."""
    linear_patches: bool = True
    """Project the patches of a picture by one matrix product, where a tower has a convolution over each for it."""
    spare_mask: bool = True
    """Run batches that are padded on the right as plainly causal, without an attention mask."""
    npu_kernels: bool = True
    """Compute norms, gated activations and rotary positions by Ascend's fused operators on an NPU, where layers run
    uncompiled (not run on hardware yet)."""
    copy_ahead: bool = True
    """Copy the next micro-batch to an accelerator while it computes this one; it takes a micro-batch's memory more."""
