"""LLaVA 1.5 (`LlavaForConditionalGeneration`), and what `mmpeft.compose_model` builds in its form."""

from torch import nn

from mmpeft.families.spec import FamilySpec, all_projector_leaves


def _projector_leaves(model: nn.Module, spec: FamilySpec) -> list[str]:
    # `compose_model(projector="linear")` keeps `linear_2` as a fixed identity, so that the class stays native.
    leaves = all_projector_leaves(model, spec)
    if getattr(model.config, "projector_kind", None) == "linear":
        return [name for name in leaves if not name.endswith(".linear_2")]
    return leaves


SPEC = FamilySpec(
    name="llava",
    model_types=("llava",),
    processors=("LlavaProcessor",),
    packable=True,
    uncacheable={"pixtral": "lay the pictures of a batch side by side in one row"},
    parts={
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    projector_leaves=_projector_leaves,
)
