"""LLaVA-NeXT, also called LLaVA 1.6 (`LlavaNextForConditionalGeneration`): tiles of the picture beside the whole.

A picture is tiled to the nearest of the checkpoint's resolutions; the processor says its tokens by its size
(`image_sizes`), each row of tiles closed by the vector `image_newline`.
"""

from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="llava_next",
    model_types=("llava_next",),
    processors=("LlavaNextProcessor",),
    packable=True,
    parts={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector", "model.image_newline"),
        "language": ("model.language_model", "lm_head"),
    },
    note="`image_newline`, the vector at the end of each row of a picture, stays frozen: PEFT cannot save it alone.",
)
