"""Qwen3-VL (`Qwen3VLForConditionalGeneration`): features of several depths of the tower reach the language model.

Beside the merger of the last layer, `deepstack_merger_list` has one merger for each earlier layer whose features
are added to the first layers of the language model; all of them are the projector. A video is written into the text
frame by frame, each behind its time (`<0.3 seconds>`), so the processor needs the frames' places in the file.
Positions need `mm_token_type_ids`, as in Qwen2-VL.
"""

from mmpeft.families.projecting import qwen_merger
from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="qwen3_vl",
    model_types=("qwen3_vl",),
    processors=("Qwen3VLProcessor",),
    packable=True,
    project=qwen_merger,
    parts={
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
        "language": ("model.language_model", "lm_head"),
    },
    positions="media",
    modalities=("image", "video"),
    boxes="thousandths",
    note="Videos need the place of each frame in the file and its frame rate: their times are written into the text.",
)
