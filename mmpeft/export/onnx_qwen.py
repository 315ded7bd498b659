"""The tower of Qwen2.5-VL with attention by mask, so that pictures of any sizes go through one graph.

transformers' own splits patches picture by picture and window by window, which no trace follows; its exporter reshapes
instead, which asks for windows of one size, and a window at the edge of a picture is smaller.

    patches in the order of windows   a a a a b b c c c c
    windows                           0 0 0 0 1 1 2 2 2 2      attend where the number is the same
    pictures                          0 0 0 0 0 0 1 1 1 1      the same, in layers of full attention
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_attention_seqlens, get_vision_position_ids, get_vision_window_index


class QwenVision(nn.Module):
    """The tower's own modules in its own order.

    Args:
        tower: `Qwen2_5_VisionTransformerPretrainedModel`.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self,
        pixel_values: torch.Tensor,
        positions: torch.Tensor,
        window_index: torch.Tensor,
        reverse_index: torch.Tensor,
        pictures: torch.Tensor,
        windows: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Features of all pictures.

        Args:
            pixel_values: [patches, channels].
            positions: [patches, 2], row and column.
            window_index: [patches / 4], the order of windows.
            reverse_index: [patches / 4], back from it.
            pictures, windows: [patches], numbers, in the order of windows.

        Returns:
            `features` [patches / 4, text width].
        """
        tower = self.tower
        hidden = self._by_window(tower.patch_embed(pixel_values), window_index)
        cosine, sine = (self._by_window(each, window_index) for each in tower.rotary_pos_emb(hidden, positions))
        same = {id(numbers): (numbers[:, None] == numbers[None])[None, None] for numbers in (pictures, windows)}
        for number, block in enumerate(tower.blocks):
            mask = same[id(pictures if number in tower.fullatt_block_indexes else windows)]
            hidden = hidden + _attention(block.attn, block.norm1(hidden), cosine, sine, mask)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return {"features": tower.merger(hidden)[reverse_index]}

    def _by_window(self, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        unit = self.tower.spatial_merge_unit
        return tensor.unflatten(0, (-1, unit))[index].flatten(0, 1)


def _attention(
    module: Any, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    query, key, value = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).permute(1, 0, 2, 3).unbind(0)
    query, key = apply_rotary_pos_emb_vision(query, key, cosine, sine)
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=module.scaling)
    projected: torch.Tensor = module.proj(found[0].transpose(0, 1).flatten(1))
    return projected


def qwen_inputs(config: Any, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the graph wants to know of pictures beside their pixels.

    Args:
        config: of the tower.
        grid: [pictures, 3], patches in time, height and width.
    """
    lengths, _ = get_vision_attention_seqlens(grid, config, kwargs={})
    index, windows = get_vision_window_index(
        grid,
        spatial_merge_size=config.spatial_merge_size,
        window_size=config.window_size,
        patch_size=config.patch_size,
        kwargs={},
    )
    return {
        "positions": get_vision_position_ids(grid, config.spatial_merge_size, kwargs={}),
        "window_index": index,
        "reverse_index": torch.argsort(index),
        "pictures": _numbers(lengths),
        "windows": _numbers(windows),
    }


def _numbers(ends: torch.Tensor) -> torch.Tensor:
    """[0, 4, 6] -> [0, 0, 0, 0, 1, 1]."""
    lengths = ends[1:] - ends[:-1]
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


class QwenTower(nn.Module):
    """Stands where the tower was.

    Args:
        graph: of `QwenVision`.
        config: of the tower.
    """

    dtype = torch.float32

    def __init__(self, graph: Callable[..., Mapping[str, torch.Tensor]], config: Any) -> None:
        super().__init__()
        self.graph, self.config = graph, config
        self.spatial_merge_size = config.spatial_merge_size

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Features of pictures, as the tower gives them: `pooler_output` [patches / 4, text width]."""
        found: Any = self.graph(pixel_values=pixel_values, **qwen_inputs(self.config, grid_thw))["features"]
        return BaseModelOutputWithPooling(pooler_output=found)
