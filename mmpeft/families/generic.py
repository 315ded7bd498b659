"""The generic road: the parts of a model whose family has no file of facts, found by inspection.

get_decoder()              the language model; where it is the whole base model, towers inside it are taken out
get_encoder("image")       the image tower, or what holds the image tower and more
names of modules           towers beside those, and what carries their features to the language model
get_output_embeddings()    the language model's head
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import transformers
from torch import nn

from mmpeft.core.errors import ModelError
from mmpeft.core.types import MODALITIES, Modality, Part
from mmpeft.families.spec import FamilySpec

TOWERS = (
    "vision_tower",
    "visual",
    "vision_model",
    "vision_encoder",
    "image_tower",
    "image_encoder",
    "video_tower",
    "high_res_vision_model",
    "vision_tokenizer",
    "vqmodel",
)
"""Last names of modules that turn pictures into features or picture tokens (transformers 5.24)."""

AUDIO_TOWERS = ("audio_tower", "audio_encoder", "speech_encoder", "audio_tokenizer")
"""The same for sound."""

PROJECTORS = (
    "multi_modal_projector",
    "connector",
    "projector",
    "aligner",
    "mm_projector",
    "merger",
    "vision_projection",
    "visual_projection",
    "language_projection",
    "qformer",
    "perceiver_resampler",
    "patch_merger",
    "resampler_model",
    "image_to_text_projection",
    "embed_vision",
    "embed_audio",
    "vision_adapter",
    "vision_embed_tokens",
    "visual_embeddings_table",
    "high_res_vision_proj",
    "high_res_vision_neck",
    "layerwise_projectors",
    "spatial_projectors",
    "deepstack_merger_list",
)
"""Last names of modules that carry a tower's features to the language model (transformers 5.24)."""

PIXELS = ("pixel_values", "flattened_patches")
"""Main inputs of models whose encoder reads nothing but pictures."""


How = Literal["get_encoder", "get_decoder", "name"]
"""How a part was found."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What inspection found.

    Attributes:
        spec: the parts, as the families state theirs.
        found: for each of its parts, how.
    """

    spec: FamilySpec
    found: Mapping[Part, How]


def inspect_model(model: transformers.PreTrainedModel) -> FamilySpec:
    """The parts of a model, by its own `get_encoder` and `get_decoder` and by the names of its modules.

    A part that the model lacks (a projector, a tower apart from the language model) is left out.

    Raises:
        ModelError: no language model can be told.
    """
    return inspect_parts(model).spec


def inspect_parts(model: transformers.PreTrainedModel) -> Inspection:
    """`inspect_model`, with how each part was found.

    Raises:
        ModelError: no language model can be told.
    """
    language = _language(model)
    towers = {"vision": _vision(model, language), "audio": _named(model, AUDIO_TOWERS, language)}
    parts: dict[Part, tuple[str, ...]] = {}
    found: dict[Part, How] = {}
    for part, modality in (("vision", "image"), ("audio", "audio")):
        if towers[part]:
            parts[part] = towers[part]  # type: ignore[index]
            own = {_path(model, model.get_encoder(modality=modality)), _path(model, model.get_encoder())}
            found[part] = "get_encoder" if own & set(towers[part]) else "name"  # type: ignore[index]
    projector = _named(model, PROJECTORS, language)
    if projector:
        parts["projector"], found["projector"] = projector, "name"
    parts["language"], found["language"] = language, "get_decoder"
    model_type = model.config.model_type
    spec = FamilySpec(
        name=model_type,
        model_types=(model_type,),
        parts=parts,
        modalities=_modalities(model, parts),
        # Neither is checked for a type whose code nobody has read.
        supervised_logits=False,
        cacheable=(),
    )
    return Inspection(spec=spec, found=found)


def _language(model: transformers.PreTrainedModel) -> tuple[str, ...]:
    """The decoder, the head outside it, and an encoder that reads text."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is model.base_model and head is None:
        raise ModelError(
            f"the parts of {type(model).__name__} (model type {model.config.model_type!r}) cannot be told: "
            "get_decoder() finds no language model apart from the rest, and get_output_embeddings() no head that "
            "predicts tokens; expected a model that answers in text; this model type needs a family of its own in "
            "mmpeft/families"
        )
    paths = [_path(model, decoder)]
    encoder = model.get_encoder()
    if model.config.is_encoder_decoder and model.main_input_name not in PIXELS:
        paths.append(_path(model, encoder))
    if head is not None:
        paths.append(_path(model, head))
    return tuple(path for place, path in enumerate(paths) if not _inside(path, paths[:place]))


def _vision(model: transformers.PreTrainedModel, language: tuple[str, ...]) -> tuple[str, ...]:
    """The towers that read pictures: by name, else the encoder of a model whose encoder reads pictures alone."""
    towers = _named(model, TOWERS, language)
    if not towers and model.config.is_encoder_decoder and model.main_input_name in PIXELS:
        towers = (_path(model, model.get_encoder()),)
    return towers


def _named(model: transformers.PreTrainedModel, names: tuple[str, ...], language: tuple[str, ...]) -> tuple[str, ...]:
    """Outermost modules with parameters that have one of the names; the language model's own modules have none.

    A language model that is the whole base model, or an encoder that reads text and pictures, may hold some.
    """
    closed = () if model.get_decoder() is model.base_model else language[:1]
    paths: list[str] = []
    for path, module in model.named_modules():
        holds = any(True for _ in module.parameters())
        if holds and path.rpartition(".")[2] in names and not _inside(path, (*paths, *closed)):
            paths.append(path)
    return tuple(paths)


def _inside(path: str, others: Iterable[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") or not other for other in others)


def _path(model: transformers.PreTrainedModel, module: nn.Module) -> str:
    """The module's name in the model; "" for the model itself."""
    return next((name for name, other in model.named_modules() if other is module), "")


def _modalities(model: transformers.PreTrainedModel, parts: Mapping[Part, tuple[str, ...]]) -> tuple[Modality, ...]:
    """Pictures where something reads them, films where the forward takes them, sound where a tower reads it."""
    taken = inspect.signature(model.forward).parameters
    image = "vision" in parts or "projector" in parts
    video = image and any(name.startswith(("pixel_values_video", "video_grid")) for name in taken)
    has: dict[Modality, bool] = {"image": image, "video": video, "audio": "audio" in parts}
    return tuple(modality for modality in MODALITIES if has[modality])
