"""Gemma 3 (`Gemma3ForConditionalGeneration`): every picture takes the same number of tokens, which see each other.

`token_type_ids` are 1 where a picture's tokens stand: there attention goes both ways. The projector's matrix is a bare
parameter, so the projector is saved whole.
"""

from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="gemma3",
    model_types=("gemma3",),
    processors=("Gemma3Processor",),
    packable=True,
    parts={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    token_types="media",
    note="Adapters that train the projector cannot be mixed in one batch: PEFT's `adapter_names` needs leaf modules.",
)
