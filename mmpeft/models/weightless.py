"""A model that has all its modules and shapes and no numbers: what an adapter fits is seen without reading its base.

Each weight is one zero, repeated by strides of 0 (`torch.Tensor.expand`): on the CPU, where PEFT puts an adapter's own
weights, and a few bytes large. Buffers are left out of account.
"""

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mmpeft.models.checkpoints import check_name, reading
from mmpeft.models.load import skeleton


def read_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model.

    Raises:
        ModelError: not there, not reachable, or it brings code of its own and that was not allowed.
    """
    check_name(str(name))
    with reading(str(name), "model"):
        return cast(PreTrainedConfig, AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))


def weightless_model(config: PreTrainedConfig, name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration in float32, without its weights; those that are tied are one parameter.

    Args:
        config: of a multimodal model.
        name: of the model, for messages.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        ModelError: no known kind of model.
    """
    model = skeleton(config, name, trust_remote_code=trust_remote_code)
    model.tie_weights()
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None:
                if id(weight) not in made:
                    # PEFT would round an adapter to the precision of what it lies on.
                    dtype = torch.float32 if weight.dtype.is_floating_point else weight.dtype
                    zero = torch.zeros((), dtype=dtype).expand(weight.shape)
                    made[id(weight)] = nn.Parameter(zero, requires_grad=False)
                module._parameters[key] = made[id(weight)]
    return model.eval()
