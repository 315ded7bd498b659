"""The table of families, and how a model finds its own."""

from typing import Any

from mmpeft.families import (
    composed,
    gemma3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    paligemma,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_audio,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    smolvlm,
)
from mmpeft.families.generic import inspect_model
from mmpeft.families.spec import FamilySpec

FAMILIES: tuple[FamilySpec, ...] = (
    llava.SPEC,
    llava_next.SPEC,
    llava_onevision.SPEC,
    composed.SPEC,
    qwen2_vl.SPEC,
    qwen2_5_vl.SPEC,
    qwen3_vl.SPEC,
    qwen3_5.SPEC,
    qwen2_5_omni.SPEC,
    qwen2_audio.SPEC,
    internvl.SPEC,
    smolvlm.SPEC,
    gemma3.SPEC,
    paligemma.SPEC,
)


def family_of(model: Any) -> FamilySpec:
    """The family of a transformers model (or of a `PeftModel` around one): by `config.model_type`, else by inspection.

    Raises:
        ModelError: no family has this model type, and its parts cannot be told by inspection.
    """
    model_type = model.config.model_type
    for spec in FAMILIES:
        if model_type in spec.model_types:
            return spec
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect_model(base)


def family_of_processor(processor: Any) -> FamilySpec | None:
    """The family that a processor's class belongs to; None where none names it."""
    name = type(processor).__name__
    return next((spec for spec in FAMILIES if name in spec.processors), None)


def trained_model(model: Any) -> Any:
    """The model inside `model` that is trained and whose forward gives a loss: `model` itself for most families.

    Of a `Qwen2_5OmniForConditionalGeneration` it is the thinker. Adapters are put on in place, so the model around it
    has them too.

    Raises:
        ModelError: no family has this model type.
    """
    path = family_of(model).trained_submodule.get(model.config.model_type, "")
    if not path:
        return model
    inner = model.get_submodule(path)
    # An adapter's `base_model_name_or_path` comes from here; the whole checkpoint is where the inner model lies.
    inner.config.name_or_path = inner.config.name_or_path or model.config.name_or_path
    inner.name_or_path = inner.name_or_path or model.name_or_path
    return inner
