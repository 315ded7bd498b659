"""InternVL 2.5 and 3 in the Hugging Face form (`InternVLForConditionalGeneration`).

A picture is cut into tiles of the tower's size, up to the processor's `max_patches`, with a thumbnail behind them; a
film is one tile a frame, each behind `Frame1: `. The processor puts the frames into `pixel_values`, too.
"""

from mmpeft.families.projecting import one_projector
from mmpeft.families.spec import BoxNotation, FamilySpec

SPEC = FamilySpec(
    name="internvl",
    model_types=("internvl",),
    processors=("InternVLProcessor",),
    packable=True,
    project=one_projector,
    parts={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    modalities=("image", "video"),
    boxes="thousandths",
    box_notation=BoxNotation(
        box="<box>[[{x1}, {y1}, {x2}, {y2}]]</box>", marks=("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
    ),
)
