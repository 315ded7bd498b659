"""The table of families, and how a model finds its own."""

from typing import Any

from mmpeft.core.errors import ModelError
from mmpeft.families import composed, llava
from mmpeft.families.spec import FamilySpec

FAMILIES: tuple[FamilySpec, ...] = (llava.SPEC, composed.SPEC)


def family_of(model: Any) -> FamilySpec:
    """The family of a transformers model (or of a `PeftModel` around one), by `config.model_type`.

    Raises:
        ModelError: no family has this model type.
    """
    model_type = model.config.model_type
    for spec in FAMILIES:
        if model_type in spec.model_types:
            return spec
    known = ", ".join(name for spec in FAMILIES for name in spec.model_types)
    raise ModelError(f"model type {model_type!r} is not supported; supported model types: {known}")


def family_of_processor(processor: Any) -> FamilySpec | None:
    """The family that a processor's class belongs to; None where none names it."""
    name = type(processor).__name__
    return next((spec for spec in FAMILIES if name in spec.processors), None)
