"""Tower and projector of each family as one graph, and how its features come back into the model's own forward.

Two ways. Where a family's `get_image_features` is plain arithmetic, the graph is all of it, and features enter by
`mm_encoder_outputs`. Where it sorts out padding and sizes first, that stays outside, and the graph stands in for the
tower within the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmpeft.core.errors import ModelError
from mmpeft.export.onnx_parts import VISION, Part
from mmpeft.export.onnx_qwen import QwenTower, QwenVision, qwen_inputs

Graph = Callable[..., Mapping[str, torch.Tensor]]
"""A loaded graph: tensors by the names of its inputs, to those by the names of its outputs."""


@dataclass(frozen=True, kw_only=True)
class Vision:
    """How a family looks.

    Attributes:
        part: what is traced, of a model.
        attach: puts a graph in the place of the tower of a model without weights; None where features enter from
            outside.
        listed: whether features from outside come picture by picture, not as one tensor.
    """

    part: Callable[[Any], Part]
    attach: Callable[[Any, Graph], None] | None = None
    listed: bool = True


class _Llava(nn.Module):
    """`LlavaModel.get_image_features` without its list of pictures, over which a trace would count them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        layer = model.config.vision_feature_layer
        self.layers = [layer] if isinstance(layer, int) else list(layer)
        self.first = 1 if model.config.vision_feature_select_strategy == "default" else 0

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return {"features": self.projector(torch.cat([states[each][:, self.first :] for each in self.layers], dim=-1))}


class _Composed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.model.project_images(pixel_values)[1]}


class _InternVL(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": self.model.get_image_features(pixel_values, return_dict=True).pooler_output}


class _Idefics3(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_model, model.model.connector

    def forward(self, pixel_values: torch.Tensor, patch_attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.tower(pixel_values=pixel_values, patch_attention_mask=patch_attention_mask, return_dict=True)
        return {"features": self.projector(output.last_hidden_state)}


class _Idefics3Tower(nn.Module):
    """Stands where the tower was; the connector behind it is in the graph too."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(
        self, pixel_values: torch.Tensor, patch_attention_mask: torch.Tensor, **_: Any
    ) -> BaseModelOutputWithPooling:
        found: Any = self.graph(pixel_values=pixel_values, patch_attention_mask=patch_attention_mask)["features"]
        return BaseModelOutputWithPooling(last_hidden_state=found)


def _side(config: Any) -> tuple[int, int]:
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _pixels(config: Any) -> torch.Tensor:
    return torch.zeros(2, getattr(config, "num_channels", 3), *_side(config))


def _llava(model: Any) -> Part:
    config = model.config.vision_config
    if config.model_type == "pixtral":
        raise ModelError("ONNX export does not know towers that lay pictures of all sizes side by side (pixtral)")
    return _plain(_Llava(model), _pixels(config))


def _composed(model: Any) -> Part:
    return _plain(_Composed(model), _pixels(model.config.vision_configs[0]))


def _internvl(model: Any) -> Part:
    return _plain(_InternVL(model), _pixels(model.config.vision_config))


def _plain(module: nn.Module, pixels: torch.Tensor) -> Part:
    return Part(name=VISION, module=module, inputs={"pixel_values": pixels}, varying={"pixel_values": (0,)})


def _idefics3(model: Any) -> Part:
    config = model.config.vision_config
    pixels = _pixels(config)
    height, width = (side // config.patch_size for side in pixels.shape[2:])
    return Part(
        name=VISION,
        module=_Idefics3(model),
        inputs={"pixel_values": pixels, "patch_attention_mask": torch.ones(2, height, width, dtype=torch.bool)},
        varying={"pixel_values": (0,), "patch_attention_mask": (0,)},
    )


def _attach_idefics3(model: Any, graph: Graph) -> None:
    model.model.vision_model, model.model.connector = _Idefics3Tower(graph), nn.Identity()


def _qwen(model: Any) -> Part:
    tower = model.model.visual
    config = tower.config
    grid = torch.tensor([[1, 2 * config.spatial_merge_size, 3 * config.spatial_merge_size]] * 2)
    channels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.zeros(int(grid.prod(-1).sum()), channels)
    inputs = {"pixel_values": pixels, **qwen_inputs(config, grid)}
    return Part(name=VISION, module=QwenVision(tower), inputs=inputs, varying=dict.fromkeys(inputs, (0,)))


def _attach_qwen(model: Any, graph: Graph) -> None:
    model.model.visual = QwenTower(graph, model.config.vision_config)


FAMILIES: Mapping[str, Vision] = {
    "llava": Vision(part=_llava),
    "composed": Vision(part=_composed),
    "internvl": Vision(part=_internvl, listed=False),
    "smolvlm": Vision(part=_idefics3, attach=_attach_idefics3),
    "qwen2_5_vl": Vision(part=_qwen, attach=_attach_qwen),
}


def vision_of(family: str) -> Vision:
    """How a family looks.

    Raises:
        ModelError: ONNX export does not know it.
    """
    if family not in FAMILIES:
        raise ModelError(
            f"ONNX export does not know the family {family}, but {', '.join(sorted(FAMILIES))}; "
            "use `mmpeft export int8`"
        )
    return FAMILIES[family]
