"""The generic road: the parts of a model whose family has no file of facts, found by inspection.

get_decoder()              the language model; where it is the whole base model, towers inside it are taken out
get_encoder("image")       the image tower, or what holds the image tower and more
names of modules           towers beside those, and what carries their features to the language model
get_output_embeddings()    the language model's head
"""

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mmpeft.core.errors import ModelError
from mmpeft.core.types import Modality, Part
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


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What inspection found.

    Attributes:
        spec: the parts, as the families state theirs.
        found: for each part, how: by `get_encoder`, `get_decoder`, or the names of modules.
    """

    spec: FamilySpec
    found: dict[Part, str]


def inspect_model(model: PreTrainedModel) -> FamilySpec:
    """The parts of a model, by its own `get_encoder` and `get_decoder` and by the names of its modules.

    A part that the model lacks (a projector, a tower apart from the language model) is left out of the spec.

    Raises:
        ModelError: no language model can be told.
    """
    return inspect_parts(model).spec


def inspect_parts(model: PreTrainedModel) -> Inspection:
    """`inspect_model`, with how each part was found.

    Raises:
        ModelError: no language model can be told.
    """
    language = _decoder(model)
    fused = language == _path(model, model.base_model)
    encoder = _encoder(model, language)
    towers = {
        part: _outermost(model, names, None if fused else language)
        for part, names in (("vision", TOWERS), ("audio", AUDIO_TOWERS))
    }
    parts: dict[Part, tuple[str, ...]] = {}
    found: dict[Part, str] = {}
    if towers["vision"] or encoder:
        # An encoder that holds a tower among other layers reads text as well: it belongs to the language model.
        parts["vision"] = towers["vision"] or (encoder,)
        found["vision"] = (
            "names" if _path(model, model.get_encoder(modality="image")) not in parts["vision"] else "get_encoder"
        )
    return Inspection(spec=FamilySpec(name="", model_types=(), parts=parts), found=found)
