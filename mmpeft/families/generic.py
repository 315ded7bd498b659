"""The generic road: the parts of a model whose family has no file of facts, found by inspection."""

from torch import nn
from transformers import PreTrainedModel

from mmpeft.core.errors import ModelError
from mmpeft.core.types import Part
from mmpeft.families.spec import FamilySpec

PROJECTORS = (
    "multi_modal_projector",
    "connector",
    "projector",
    "aligner",
    "mm_projector",
    "merger",
    "vision_projection",
    "language_projection",
    "qformer",
    "patch_merger",
    "resampler_model",
    "image_to_text_projection",
    "embed_vision",
    "deepstack_merger_list",
)
"""Last names of modules that carry a tower's features to the language model (transformers 5.24)."""


def inspect_model(model: PreTrainedModel) -> FamilySpec:
    """The parts of a model, by its own `get_encoder` and `get_decoder` and by its projector's name.

    A model without a projector gets a spec without that part.

    Raises:
        ModelError: no image tower, or no language model apart from it, can be told.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parts: dict[Part, tuple[str, ...]] = {}
    for part, module in (
        ("vision", model.get_encoder(modality="image")),
        ("audio", model.get_encoder(modality="audio")),
        ("language", model.get_decoder()),
    ):
        path = names.get(id(module), "")
        if path and module is not model.base_model:
            parts[part] = (path,)  # type: ignore[index]
    missing = [part for part in ("vision", "language") if part not in parts]
    if missing or parts["vision"] == parts["language"]:
        raise ModelError(
            f"the parts of {type(model).__name__} (model type {model.config.model_type!r}) cannot be told: "
            f"found {parts or 'none'}; expected an image tower and a language model apart from it; "
            "this model type needs a family of its own in mmpeft/families"
        )
    projector = _projector_paths(model, parts["language"][0])
    if projector:
        parts["projector"] = projector
    head = names.get(id(model.get_output_embeddings()), "")
    if head and not head.startswith(f"{parts['language'][0]}."):
        parts["language"] += (head,)
    return FamilySpec(name=model.config.model_type, model_types=(model.config.model_type,), parts=parts)


def _projector_paths(model: nn.Module, language: str) -> tuple[str, ...]:
    """Outermost modules of a projector's name that lie outside the language model."""
    paths: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{path}.") for path in (*paths, language))
        if not inside and name.rpartition(".")[2] in PROJECTORS:
            paths.append(name)
    return tuple(paths)
