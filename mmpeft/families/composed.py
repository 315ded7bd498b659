"""Models of `mmpeft.compose_model` that the LLaVA class cannot express (see models/modeling_composed.py)."""

from mmpeft.families.projecting import one_row
from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="composed",
    model_types=("mmpeft_composed",),
    processors=("ComposedProcessor",),
    packable=True,
    project=one_row,
    parts={
        "vision": ("vision_towers",),
        "projector": ("multi_modal_projector",),
        "language": ("language_model",),
    },
)
