"""What frozen towers make of a sample's media: computed once, and given to the model in every step after.

    pixels -> tower -> projector -> packing, scattering -> language model
                   |            |
             cut "input"   cut "output"

Where the projector trains, what its modules take is kept (cut "input"); where it is frozen too, what the model's own
`get_image_features` gives (cut "output"). Features of one sample are tensors by name:

    image/model.multi_modal_projector        cut "input": [pictures, patches, channels], what that module takes
    image/model.visual.merger                of the Qwen line: [patches, channels], all pictures in one row
    image/pooler_output                      cut "output": one tensor, pictures or tiles in the first dimension
    image/pooler_output[]                    a list in the model's output; its tensors stand in one row
    image/deepstack_features/0[]             the same of one layer of several

The first dimension is that of pictures, tiles, frames or patches, so features of several samples are joined there.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from mmpeft.core.errors import ModelError
from mmpeft.core.types import MODALITIES, Modality, Part
from mmpeft.families.registry import family_of
from mmpeft.families.spec import FamilySpec
from mmpeft.models.base import base_of
from mmpeft.models.feature_weights import first_random, weights_digest
from mmpeft.models.feeding import Joined, feeding, inner_of, join, projector_modules

Cut = Literal["input", "output"]

PIXELS: Mapping[Modality, str] = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_features",
}
"""By modality: the tensor of a sample that its tower takes."""

_KEPT = ("pooler_output", "deepstack_features")


@dataclass(frozen=True)
class Unplanned:
    """Nothing can be cached.

    Attributes:
        reason: why, as a clause: "the vision tower trains".
    """

    reason: str


@dataclass(frozen=True)
class FeaturePlan:
    """Which outputs of a model's frozen parts are kept, how they are computed, and how the model takes them.

    Attributes:
        spec: the model's family.
        cut: where the model is cut.
    """

    spec: FamilySpec
    cut: Cut
    _identities: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of the model whose weights decide what the features are."""
        towers: tuple[Part, ...] = ("vision", "audio")
        return (*towers, "projector") if self.cut == "output" else towers

    @torch.no_grad()
    def compute(self, model: Any, media: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The features of one sample.

        Runs in the mode, and under the autocast, that the caller has set: those of a training step.

        Args:
            model: a transformers model, or a `PeftModel` around one.
            media: the media tensors that `encode_sample` gives for the sample.

        Returns:
            Features by name, on the model's device; {} for a sample without media.

        Raises:
            ModelError: the model does not give what the plan expects.
        """
        base = base_of(model)
        given = {key: torch.as_tensor(value).to(_device(base)) for key, value in media.items()}
        features: dict[str, torch.Tensor] = {}
        for modality in MODALITIES:
            if PIXELS[modality] in given:
                found = self._output(base, modality, given) if self.cut == "output" else _inputs(base, modality, given)
                features |= {f"{modality}/{name}": tensor.clone() for name, tensor in found.items()}
        return features

    def _output(self, base: Any, modality: Modality, media: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = _run_tower(base, modality, media)
        found: dict[str, torch.Tensor] = {}
        for name in _KEPT:
            value = getattr(output, name, None)
            layers: dict[str, Any] = {name: value}
            if name == "deepstack_features":
                layers = {f"{name}/{number}": layer for number, layer in enumerate(value or ())}
            for key, tensor in layers.items():
                listed = not isinstance(tensor, torch.Tensor)
                found[f"{key}[]" if listed else key] = torch.cat(list(tensor)) if listed else tensor
        return found

    @contextlib.contextmanager
    def feed(self, model: Any, features: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[None]:
        """Let forwards within run on these features instead of the towers.

        The batch still says by its tensors which media it has; `placeholders` makes tensors for that which take no
        memory.

        Args:
            model: as for `compute`.
            features: of each sample with media, in the order of the batch.
        """
        joined: Joined = {}
        base = base_of(model)
        for modality in MODALITIES:
            own = [{name: t for name, t in each.items() if name.startswith(f"{modality}/")} for each in features]
            names = {name for each in own for name in each}
            if names:
                joined[modality] = {
                    name.partition("/")[2]: join([each[name].to(_device(base)) for each in own if each])
                    for name in sorted(names)
                }
        with feeding(base, self.spec, joined, whole=self.cut == "output"):
            yield

    def identity(self, model: Any, autocast: torch.dtype | None = None) -> str:
        """A hash of all in the model that the features depend on: weights, their numbers' format, place of the cut.

        Args:
            model: as for `compute`.
            autocast: the format in which autocast computes; None without it.

        Returns:
            Hex; the same for the same weights in another run, adapter or stage.
        """
        key = str(autocast)
        if key not in self._identities:
            digest = hashlib.blake2b(repr((self.cut, self.spec.name, key)).encode(), digest_size=16)
            digest.update(weights_digest(base_of(model), self.spec, self.parts))
            self._identities[key] = digest.hexdigest()
        return self._identities[key]


def plan_features(model: Any, train: Mapping[Part, Any]) -> FeaturePlan | Unplanned:
    """What of a model's frozen parts can be kept, exactly.

    Args:
        model: what is trained: a transformers model, or a `PeftModel` around one.
        train: how each part trains ("full", "frozen", or how LoRA is put on); left out is frozen. A projector that
            trains in another stage may be named too: then both stages share what is kept.
    """
    spec, base = family_of(model), base_of(model)
    if not spec.cacheable:
        return Unplanned(f"the model type {base.config.model_type} is not among those whose features are known")
    trained = {part for part, how in train.items() if how not in (None, "frozen")}
    for part in ("vision", "audio"):
        if part in trained:
            return Unplanned(f"the {part} tower trains, so its outputs change from step to step")
    for tower in spec.uncacheable.keys() & {getattr(config, "model_type", "") for config in _sub_configs(base)}:
        return Unplanned(f"{tower} towers {spec.uncacheable[tower]}")
    whole = "projector" not in trained and all(
        hasattr(inner_of(base), f"get_{m}_features") for m in spec.modalities[:1]
    )
    plan = FeaturePlan(spec, "output" if whole else "input")
    random = first_random(base, spec, plan.parts)
    if random:
        return Unplanned(f"{random}, so a frozen part gives other outputs in each step of training")
    return plan


def placeholders(
    shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Stand-ins for pixels and sounds that no tower reads: one number each, seen as the shape that they had.

    Rows and columns of pixels are cut to one, so that a family that lays tiles side by side copies next to nothing.

    Args:
        shapes: by key, what the batch would hold.
    """
    made = {}
    for key, (shape, dtype) in shapes.items():
        seen = (*shape[:-3], 1, 1, 1) if len(shape) > 3 else tuple(shape)
        made[key] = torch.zeros((), dtype=dtype, device=device).expand(seen)
    return made


def _device(base: Any) -> torch.device:
    """The model's; not by its first weight, which may be one of a tower that rests on the host."""
    weight: torch.Tensor = base.get_input_embeddings().weight
    if isinstance(weight.data, DTensor):
        # A share of it may wait on the host as well.
        return torch.empty(0, device=weight.data.device_mesh.device_type).device
    return weight.device


def _sub_configs(base: Any) -> list[Any]:
    return [getattr(base.config, name, None) for name in base.config.sub_configs]


def _run_tower(base: Any, modality: Modality, media: Mapping[str, torch.Tensor]) -> Any:
    """What the model's own `get_..._features` gives for a sample's media."""
    method = getattr(inner_of(base), f"get_{modality}_features")
    known = inspect.signature(method).parameters
    pixels = PIXELS[modality]
    beside = {key: value for key, value in media.items() if key in known and key != pixels}
    return method(media[pixels], **beside, return_dict=True)


class _Taken(Exception):
    """All that was asked of a forward has been seen."""


def _inputs(base: Any, modality: Modality, media: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each module of the projector takes, by its path; the last of them does not run any more."""
    found: dict[str, torch.Tensor] = {}
    modules = projector_modules(base, family_of(base))

    def keep(path: str, arguments: tuple[Any, ...]) -> None:
        if path in found or len(arguments) != 1:
            raise ModelError(
                f"{path} of {type(base).__name__} is called twice, or with {len(arguments)} arguments; expected one "
                "call with one; set data.cache.features: false"
            )
        found[path] = arguments[0].detach()
        if len(found) == len(modules):
            raise _Taken

    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            # Before the hook by which ZeRO-3 gathers its weights.
            handle = module.register_forward_pre_hook(lambda _, given, path=path: keep(path, given), prepend=True)
            stack.callback(handle.remove)
        stack.enter_context(contextlib.suppress(_Taken))
        if hasattr(inner_of(base), f"get_{modality}_features"):
            _run_tower(base, modality, media)
        else:
            # Qwen2-Audio calls its tower in the middle of its forward; two tokens are enough to get there.
            tokens = torch.zeros(1, 2, dtype=torch.long, device=_device(base))
            inner_of(base)(input_ids=tokens, attention_mask=torch.ones_like(tokens), **media)
    return found


__all__ = ["PIXELS", "FeaturePlan", "Unplanned", "placeholders", "plan_features"]
