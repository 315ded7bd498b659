"""What mmpeft has to know of a model family: facts, and the few functions that need the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from mmpeft.core.types import Modality, Part

BoxConvention = Literal["fraction", "thousandths", "resized_pixels", "location_tokens"]
"""How a family writes a place in a picture into text.

    fraction          x1, y1, x2, y2 from 0 to 1, of the picture (LLaVA)
    thousandths       whole numbers from 0 to 1000, of the picture (Qwen2-VL, Qwen3-VL, InternVL)
    resized_pixels    whole pixels of the picture as the processor resizes it (Qwen2.5-VL)
    location_tokens   <locYYYY><locXXXX><locYYYY><locXXXX>, 0000 to 1023, of the picture (PaliGemma)
"""


@dataclass(frozen=True, kw_only=True)
class BoxNotation:
    """How a family writes the numbers of a place, as `str.format` takes it.

    Attributes:
        box: of x1, y1, x2, y2.
        point: of x, y.
        marks: control tokens of the family that a text may hold, for they stand around places or what is there.
    """

    box: str = "[{x1}, {y1}, {x2}, {y2}]"
    point: str = "[{x}, {y}]"
    marks: tuple[str, ...] = ()


TokenTypes = Literal["media", "suffix"]
"""What the family's `token_type_ids` say: 1 where a picture's tokens stand, or 1 where the answer stands."""


def leaves_with_parameters(module: nn.Module, prefix: str) -> list[str]:
    """Names of the outermost modules under `module` that hold parameters of their own.

        multi_modal_projector            no parameters of its own: look inside
        |- linear_1  (weight, bias)      -> "multi_modal_projector.linear_1"
        |- act                           no parameters at all
        '- linear_2  (weight, bias)      -> "multi_modal_projector.linear_2"

    Leaves, not the projector as a whole, are what PEFT's `modules_to_save` must name: with the whole
    projector, batches of mixed adapters (`adapter_names=[...]`) raise TypeError in peft 0.21.
    """
    if any(True for _ in module.parameters(recurse=False)):
        return [prefix]
    return [
        name
        for child, submodule in module.named_children()
        for name in leaves_with_parameters(submodule, f"{prefix}.{child}")
    ]


def all_projector_leaves(model: nn.Module, spec: "FamilySpec") -> list[str]:
    """Every parameter-holding leaf under the projector's paths.

    A path that names a bare parameter of a larger module (LLaVA-NeXT's `image_newline`) has no module that PEFT could
    save alone: it stays frozen.
    """
    modules = dict(model.named_modules())
    return [
        name
        for path in spec.parts.get("projector", ())
        if path in modules
        for name in leaves_with_parameters(modules[path], path)
    ]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """The facts of one family.

    Attributes:
        name: what `mmpeft families` and `adapters/<name>/` call it.
        model_types: values of `config.model_type` that belong to it.
        parts: for each part, the module paths that hold it, as `model.named_modules()` prints them; where one
            path lies inside another (`visual.merger` in `visual`), the longer one counts.
        projector_leaves: names the projector's trainable leaf modules in a given model.
        processors: names of the processor classes by which data knows the family, where that matters to it.
        modalities: what the model takes beside text.
        trained_submodule: for a model type whose class holds more than what is trained and has no forward of its
            own, the path of the model inside it that is trained; `parts` are that model's paths.
        loaders: for a model type that its auto class cannot load, what loads it; it has the same `from_pretrained`.
        chat_template: Jinja template for processors of the family that come without one.
        token_types: how `token_type_ids` are made, where the forward wants them.
        supervised_logits: whether the forward takes `logits_to_keep` as indices, and the loss `shift_labels`.
        mixes_media: whether one sample may hold pictures and films together.
        positions: whether a token's position is its place in the sequence, or follows from the media before it.
        packable: whether samples may stand in one row.
        boxes: what the numbers of a place in a picture count.
        box_notation: how they are written.
        cacheable: the outermost outputs that are the same in every epoch while their parts are frozen.
        project: what the model's `get_..._features` gives, from what the modules of its projector take: called with
            the model, the modality, these inputs by module path, and the call's arguments by name. None where the
            model's own method can be led through without its tower, for nothing but the projector reads its output.
        uncacheable: types of towers whose outputs cannot be kept a sample, each with the reason, as a clause.
        note: what a user of the family should know, in one sentence; "" if nothing.
    """

    name: str
    model_types: tuple[str, ...]
    parts: Mapping[Part, tuple[str, ...]]
    projector_leaves: Callable[[nn.Module, "FamilySpec"], list[str]] = all_projector_leaves
    processors: tuple[str, ...] = ()
    modalities: tuple[Modality, ...] = ("image",)
    trained_submodule: Mapping[str, str] = field(default_factory=dict)
    loaders: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    token_types: TokenTypes | None = None
    supervised_logits: bool = True
    mixes_media: bool = True
    positions: Literal["sequence", "media"] = "sequence"
    packable: bool = False
    boxes: BoxConvention = "fraction"
    box_notation: BoxNotation = BoxNotation()
    cacheable: tuple[Part, ...] = field(default=("vision",))
    project: Callable[[Any, Modality, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    uncacheable: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def part_of(self, name: str) -> Part | None:
        """The part that a module or parameter name belongs to; None if to no part."""
        longest, found = -1, None
        for part, paths in self.parts.items():
            for path in paths:
                if len(path) > longest and (name == path or name.startswith(f"{path}.") or not path):
                    longest, found = len(path), part
        return found
