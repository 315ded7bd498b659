"""A model whose forwards take features that were kept, in place of running its towers.

Methods of this one model object are put in front of its class's while a context lasts; no module is renamed, wrapped or
moved. What is not fed (evaluation, generation) runs as always.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from mmpeft.core.types import MODALITIES, Modality
from mmpeft.families.spec import FamilySpec

Joined = dict[Modality, dict[str, torch.Tensor]]
"""Features of all samples of a batch by modality and name, without the modality in the name."""


@dataclass
class TowerOutput(ModelOutput):
    """What a tower, or one of the model's `get_..._features`, gives."""

    last_hidden_state: Any = None
    pooler_output: Any = None
    hidden_states: Any = None
    deepstack_features: Any = None


class _EveryLayer:
    """Hidden states that nobody looks at: the projector is given its input."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.hidden


def inner_of(base: Any) -> Any:
    """The module that puts media into the text: `base.model`, or `base` itself where it has no such module."""
    return base.model if "model" in dict(base.named_children()) else base


def projector_modules(base: nn.Module, spec: FamilySpec) -> dict[str, nn.Module]:
    """The modules of the projector by path; of a list of modules each of its own."""
    modules = dict(base.named_modules())
    found: dict[str, nn.Module] = {}
    for path in spec.parts.get("projector", ()):
        module = modules.get(path)
        if isinstance(module, nn.ModuleList):
            found |= {f"{path}.{name}": child for name, child in module.named_children()}
        elif module is not None:
            found[path] = module
    return found


def join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Features of several samples in one tensor.

    Films of unlike lengths, [films, tokens, channels] each, are joined into [1, tokens of all, channels]: no family
    tells them apart any more.
    """
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        tensors = [tensor.flatten(0, 1)[None] for tensor in tensors]
        return torch.cat(list(tensors), dim=1)
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


@contextlib.contextmanager
def feeding(base: Any, spec: FamilySpec, joined: Joined, *, whole: bool) -> Iterator[None]:
    """Let forwards of `base` within run on these features.

    Args:
        whole: they are the outputs of `get_..._features`; else the inputs of the projector's modules.
    """
    inner = inner_of(base)
    with contextlib.ExitStack() as stack:
        for modality in joined if whole or spec.project is not None else ():
            original = getattr(inner, f"get_{modality}_features")
            if whole:
                given: Any = functools.partial(_as_output, joined[modality])
            else:
                given = functools.partial(_projected, base, spec, modality, joined[modality], original)
            stack.enter_context(_replaced(inner, f"get_{modality}_features", given))
        if not whole and spec.project is None and joined:
            stack.enter_context(_through_projector(base, spec, joined))
        yield


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, function: Any) -> Iterator[None]:
    had = module.__dict__.get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        if had is None:
            delattr(module, name)
        else:
            setattr(module, name, had)


def _as_output(features: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> TowerOutput:
    """The features as the model's own method gives them."""
    output = TowerOutput()
    layers: dict[int, Any] = {}
    for name, tensor in features.items():
        value = [tensor] if name.endswith("[]") else tensor
        key, _, layer = name.removesuffix("[]").partition("/")
        if layer:
            layers[int(layer)] = value
            output[key] = [layers[number] for number in sorted(layers)]
        else:
            output[key] = value
    if isinstance(output.pooler_output, torch.Tensor):
        # Audio of Qwen2.5-Omni is read from here; both are one tensor.
        output.last_hidden_state = output.pooler_output
    return output


def _projected(
    base: Any,
    spec: FamilySpec,
    modality: Modality,
    features: Mapping[str, torch.Tensor],
    original: Any,
    *args: Any,
    **kwargs: Any,
) -> TowerOutput:
    """What the family's projector makes of its inputs."""
    assert spec.project is not None
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    return TowerOutput(**spec.project(base, modality, features, given))


@contextlib.contextmanager
def _through_projector(base: Any, spec: FamilySpec, joined: Joined) -> Iterator[None]:
    """Let the model's own methods run on a tower that gives nothing, and its projector on what was kept."""
    inner = inner_of(base)
    now = {"modality": next(iter(joined))}

    def entering(modality: Modality, method: Any, *args: Any, **kwargs: Any) -> Any:
        now["modality"] = modality
        return method(*args, **kwargs)

    some = next(iter(next(iter(joined.values())).values()))
    nothing = torch.zeros(1, 2, 1, dtype=some.dtype, device=some.device)
    with contextlib.ExitStack() as stack:
        for modality in MODALITIES:
            method = getattr(inner, f"get_{modality}_features", None)
            if method is not None:
                name = f"get_{modality}_features"
                stack.enter_context(_replaced(inner, name, functools.partial(entering, modality, method)))
        for path in (path for part in ("vision", "audio") for path in spec.parts.get(part, ())):
            stack.enter_context(_replaced(base.get_submodule(path), "forward", functools.partial(_no_tower, nothing)))
        for path, module in projector_modules(base, spec).items():
            handle = module.register_forward_pre_hook(lambda _, args, path=path: (joined[now["modality"]][path],))
            stack.callback(handle.remove)
        yield


def _no_tower(nothing: torch.Tensor, *args: Any, **kwargs: Any) -> TowerOutput:
    return TowerOutput(last_hidden_state=nothing, hidden_states=_EveryLayer(nothing))
