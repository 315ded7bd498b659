"""A vision encoder: found in a checkpoint, measured by running it, with the image processor that feeds it."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from mmpeft.core.errors import ModelError
from mmpeft.models.checkpoints import check_complete, check_name, load_weights, reading

logger = logging.getLogger(__name__)

_PROBE_SIZES = ((96, 64), (64, 96))
"""(width, height) of the blank pictures by which an image processor is measured: one wide, one tall."""


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision encoder and the facts of it, measured at the size its pictures come in.

    Attributes:
        model: the encoder, without any text half.
        name: where it comes from, for messages.
        width: channels of its features.
        patch: side of a patch in pixels.
        grid: patches (down, across).
        prefix: leading tokens that are no patches: CLS, registers.
        mean, std: normalisation of its pixels, a value a channel.
    """

    model: PreTrainedModel
    name: str
    width: int
    patch: int
    grid: tuple[int, int]
    prefix: int
    mean: list[float]
    std: list[float]

    @property
    def patches(self) -> int:
        """Number of patches of a picture."""
        return self.grid[0] * self.grid[1]


def load_encoder(
    vision: str | PreTrainedModel, *, dtype: torch.dtype | str, trust_remote_code: bool
) -> tuple[PreTrainedModel, list[str]]:
    """The vision encoder of a checkpoint (the vision half of CLIP and SigLIP), or of a model in memory.

    Returns:
        The encoder, and the names of its weights that the checkpoint lacks.

    Raises:
        ModelError: it cannot be read, or has no vision encoder.
    """
    if isinstance(vision, PreTrainedModel):
        half = getattr(vision, "vision_model", None)
        return (half if isinstance(half, PreTrainedModel) else vision).eval(), []
    check_name(vision)
    with reading(vision, "vision encoder"):
        config = AutoConfig.from_pretrained(vision, trust_remote_code=trust_remote_code)
    options = {"config": config.vision_config} if getattr(config, "vision_config", None) is not None else {}
    return load_weights(
        AutoModel, vision, kind="vision encoder", dtype=dtype, trust_remote_code=trust_remote_code, **options
    )


def load_image_processor(vision: str | PreTrainedModel, *, trust_remote_code: bool) -> Any:
    """The image processor that lies beside an encoder.

    Raises:
        ModelError: there is none.
    """
    name = vision if isinstance(vision, str) else vision.name_or_path or ""
    if not name:
        raise ModelError("the vision encoder is a model in memory: give its image_processor= too")
    with reading(name, "image processor"):
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)


def pixels_of(image_processor: Any) -> torch.Tensor:
    """Pixels [2, 3, height, width] of two blank pictures.

    Raises:
        ModelError: wide and tall pictures come out in different sizes, or not as plain pixels.
    """
    outputs = [
        image_processor(images=Image.new("RGB", size, (90, 140, 60)), return_tensors="pt") for size in _PROBE_SIZES
    ]
    shapes = [tuple(output["pixel_values"].shape) for output in outputs]
    if shapes[0] != shapes[1] or len(shapes[0]) != 4:
        raise ModelError(
            f"{type(image_processor).__name__} turns pictures of {_PROBE_SIZES[0]} and {_PROBE_SIZES[1]} pixels into "
            f"{shapes[0]} and {shapes[1]}; a composed model needs one size [1, 3, height, width]: give an "
            "image_processor= that crops or resizes to a fixed size"
        )
    return torch.cat([output["pixel_values"] for output in outputs])


def normalisation(image_processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel, in units of 0..1 pixels; (0, 1) where it does not normalise.

    Raises:
        ModelError: pixels are scaled otherwise than by 1/255.
    """
    if getattr(image_processor, "do_rescale", True):
        factor = getattr(image_processor, "rescale_factor", None) or 1 / 255
        if abs(factor * 255 - 1) > 1e-6:
            raise ModelError(
                f"{type(image_processor).__name__} scales pixels by {factor}; encoders can be composed only at 1/255"
            )
    if not getattr(image_processor, "do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    return [float(value) for value in image_processor.image_mean], [float(value) for value in image_processor.image_std]


def measure_tower(
    model: PreTrainedModel, image_processor: Any, pixels: torch.Tensor, *, name: str, layer: int, missing: list[str]
) -> Tower:
    """Run an encoder once and read off what has to be known of it.

    That the last token is the last patch, and not a register, is seen by changing that patch of the picture.

    Raises:
        ModelError: the encoder does not take these pixels, has no such layer, gives no patch features in order, or
            lacks weights that its features depend on.
    """
    pixels = pixels.to(device=model.device, dtype=model.dtype)
    states = _hidden_states(model, pixels, name)
    if not -len(states) <= layer < len(states):
        raise ModelError(
            f"{name}: vision_feature_layer={layer}, but the encoder has {len(states)} hidden states "
            f"(0 to {len(states) - 1}, or -1 to -{len(states)})"
        )
    patch = model.config.patch_size
    patch = patch if isinstance(patch, int) else patch[0]
    grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
    tokens, width = states[layer].shape[1:]
    prefix = tokens - grid[0] * grid[1]
    changed = pixels.clone()
    changed[:, :, (grid[0] - 1) * patch : grid[0] * patch, (grid[1] - 1) * patch : grid[1] * patch] += 1
    moved = (_hidden_states(model, changed, name)[0] - states[0]).abs().amax((0, 2)) > 0
    if (
        width != model.config.hidden_size
        or prefix < 0
        or len(moved) != tokens
        or moved.nonzero().flatten().tolist() != [tokens - 1]
    ):
        raise ModelError(
            f"{name}: {type(model).__name__} gives {tokens} features for {grid[0]} x {grid[1]} patches, and they are "
            "not leading tokens followed by one feature a patch; such an encoder cannot be composed"
        )
    _check_missing(model, pixels, states[layer], layer=layer, name=name, missing=missing)
    mean, std = normalisation(image_processor)
    return Tower(model=model, name=name, width=width, patch=patch, grid=grid, prefix=prefix, mean=mean, std=std)


def _hidden_states(model: PreTrainedModel, pixels: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        try:
            states = model(pixels, output_hidden_states=True, return_dict=True).hidden_states
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{name}: {type(model).__name__} does not take pictures of {pixels.shape[2]} x {pixels.shape[3]} "
                f"pixels ({' '.join(str(error).split())[:200]}); give an image_processor= of the size that the "
                "encoder was made for"
            ) from error
    if not states or states[-1].ndim != 3 or not hasattr(model.config, "patch_size"):
        raise ModelError(
            f"{name}: {type(model).__name__} gives no features by patch; such an encoder cannot be composed"
        )
    return states


def _check_missing(
    model: PreTrainedModel, pixels: torch.Tensor, features: torch.Tensor, *, layer: int, name: str, missing: list[str]
) -> None:
    """Weights that the checkpoint lacks (a pooler, mostly) may be random only if the features do not depend on them."""
    if not missing:
        return
    state = model.state_dict()
    for key in missing:
        state[key].add_(1)
    if not torch.equal(_hidden_states(model, pixels, name)[layer], features):
        check_complete(name, missing)
    for key in missing:
        state[key].zero_()
    logger.info("%s: %s are not in the checkpoint; no feature depends on them", name, ", ".join(missing))
