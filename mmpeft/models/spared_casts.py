"""LoRA under autocast without the detour of its inputs through float32.

PEFT keeps LoRA matrices in float32 and casts each input to it; autocast then casts that back to the half precision it
came in, forward and backward. Left as they are the inputs are the same, number for number.

    PEFT's own     x bf16 -> float32 -> bf16 -> lora_A       autocast casts the two small matrices, once a step
    here           x bf16 -------------------> lora_A
"""

import contextlib
from collections.abc import Iterator

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer


@contextlib.contextmanager
def casts_spared(model: torch.nn.Module) -> Iterator[int]:
    """Let LoRA take its inputs as they come; for a model that runs under autocast.

    DoRA and other variants keep their casts: they compute norms in the precision of the input.

    Yields:
        How many layers are spared them.
    """
    with contextlib.ExitStack() as stack:
        plain = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.lora_variant]
        for layer in plain:
            stack.enter_context(disable_input_dtype_casting(layer))
        yield len(plain)
