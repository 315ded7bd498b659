"""Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): as Qwen2-VL, with windowed attention in the vision tower.

Without `mm_token_type_ids` its forward gives pictures the positions of plain text and says nothing (transformers
5.24; Qwen2-VL's refuses). A video also brings `second_per_grid_ts`, one number a video: its positions in time go by
seconds. Boxes are pixels of the picture as the processor has resized it, so they change with `max_pixels`.
"""

from mmpeft.families.projecting import qwen_merger
from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="qwen2_5_vl",
    model_types=("qwen2_5_vl",),
    processors=("Qwen2_5_VLProcessor",),
    packable=True,
    project=qwen_merger,
    parts={
        "vision": ("model.visual",),
        "projector": ("model.visual.merger",),
        "language": ("model.language_model", "lm_head"),
    },
    positions="media",
    modalities=("image", "video"),
    boxes="resized_pixels",
    note="`mm_token_type_ids` have to reach the model, or pictures get the positions of plain text.",
)
