"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): tiles for one picture, none for several, and films.

How many tokens a picture takes depends on its sample: alone it is tiled as in LLaVA-NeXT, beside others it is seen
whole only. So a sample of several pictures cannot be cut between them.
"""

from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="llava_onevision",
    model_types=("llava_onevision",),
    processors=("LlavaOnevisionProcessor",),
    packable=True,
    parts={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector", "model.image_newline"),
        "language": ("model.language_model", "lm_head"),
    },
    modalities=("image", "video"),
    note="`image_newline`, the vector at the end of each row of a picture, stays frozen: PEFT cannot save it alone.",
)
