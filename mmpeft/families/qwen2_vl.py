"""Qwen2-VL (`Qwen2VLForConditionalGeneration`): pictures of any size, and video.

The merger that carries pictures into the language model lies inside the vision tower. `pixel_values` are the
patches of all pictures, one behind the other; `image_grid_thw` says how many belong to each. Positions have three
rows (time, height, width): the forward computes them from the grids and the processor's `mm_token_type_ids`
(0 text, 1 picture, 2 video), and refuses pictures without these.
"""

from mmpeft.families.projecting import qwen_merger
from mmpeft.families.spec import BoxNotation, FamilySpec

SPEC = FamilySpec(
    name="qwen2_vl",
    model_types=("qwen2_vl",),
    processors=("Qwen2VLProcessor",),
    packable=True,
    project=qwen_merger,
    parts={
        "vision": ("model.visual",),
        "projector": ("model.visual.merger",),
        "language": ("model.language_model", "lm_head"),
    },
    positions="media",
    modalities=("image", "video"),
    boxes="thousandths",
    box_notation=BoxNotation(
        box="<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        point="<|box_start|>({x},{y})<|box_end|>",
        marks=("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    ),
    note="A picture thinner than a token is widened to one, and may then take more tokens than `max_pixels` allows.",
)
