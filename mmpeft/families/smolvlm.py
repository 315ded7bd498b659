"""SmolVLM and Idefics3 (`SmolVLMForConditionalGeneration`, `Idefics3ForConditionalGeneration`).

A picture is cut into tiles, each behind `<row_1_col_1>`, with the whole one behind them. `pixel_values` are
[samples, tiles, 3, height, width]; a tile that is all zero fills up and is left out by the forward.
"""

from mmpeft.families.projecting import one_row
from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="smolvlm",
    model_types=("smolvlm", "idefics3"),
    processors=("SmolVLMProcessor", "Idefics3Processor"),
    packable=True,
    project=one_row,
    parts={
        "vision": ("model.vision_model",),
        "projector": ("model.connector",),
        "language": ("model.text_model", "lm_head"),
    },
    modalities=("image", "video"),
    # Its processor writes the tensors of films over those of pictures.
    mixes_media=False,
    note="Idefics3 takes pictures only; SmolVLM takes pictures or films in a sample, not both.",
)
