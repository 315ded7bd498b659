"""The head and its loss by Liger's kernels (https://github.com/linkedin/Liger-Kernel), on CUDA where it is installed.

Its loss reads and writes a chunk of logits once, where PyTorch's operators do so a few times. It waits for the GPU
twice a micro-batch: in the forward it counts the labelled tokens on the host, in the backward it looks whether the
gradient is one. The rest of the step does not wait. Not tested on hardware; the numbers were compared in Triton's
interpreter.
"""

import functools
import importlib
import importlib.util
import logging
from typing import Any

import torch

from mmpeft.core.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

PACKAGE = "liger_kernel"


def liger_takes(head: torch.nn.Module, hidden: torch.Tensor) -> bool:
    """Whether Liger's loss can compute this head's, for hidden states as they are.

    Not in float16, whose gradients come to it before they are scaled into its range.
    """
    return (
        hidden.device.type == "cuda"
        and type(head) is torch.nn.Linear
        and hidden.dtype == head.weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float32)
        and _loss() is not None
    )


def liger_loss(head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy of hidden states [positions, width] and targets [positions]."""
    make = _loss()
    assert make is not None, "liger_takes was not asked"
    total: torch.Tensor = make(ignore_index=IGNORE_INDEX, reduction="sum")(head.weight, hidden, targets, head.bias)
    return total


@functools.cache
def _loss() -> Any:
    """Liger's loss; None where it is not installed, or does not go with what is."""
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    try:
        module = importlib.import_module(f"{PACKAGE}.transformers.fused_linear_cross_entropy")
        return module.LigerFusedLinearCrossEntropyLoss
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.warning("liger-kernel cannot be used (%s); PyTorch computes the loss", error)
        return None
