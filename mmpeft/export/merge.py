"""An adapter merged into its base, tensor by tensor: exact, and with no more in memory than is being worked on.

PEFT attaches the adapter to a model of shapes alone, so that it is PEFT that says which module an adapter's tensor
belongs to, how it is scaled and what it does. Then each tensor of the base passes by:

    base on disk -> float32 -> PEFT's own merge of that module -> rounded once to the precision on disk -> out

What the adapter does not change goes through untouched, bit by bit.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.core.files import read_json
from mmpeft.export.names import Group, StoredNames
from mmpeft.export.shards import Checkpoint, read_header
from mmpeft.families.registry import trained_model
from mmpeft.models.base import quantized_as
from mmpeft.models.load import FACTS_NAME, attach_adapter
from mmpeft.models.weightless import read_config, weightless_model

Change = Callable[[torch.Tensor], torch.Tensor]
"""What an adapter makes of a weight, perhaps in place; both in float32."""

BASE_LAYOUT = "base_layout"
"""Key of mmpeft.json: `Checkpoint.layout_hash` of the base that an adapter was trained on."""

ADAPTER = "default"


class MergedModel:
    """What becomes of each tensor of a base.

    Args:
        base: a model's directory.
        adapter: a directory of a PEFT adapter for it; None: the base as it is.
        trust_remote_code: whether code that comes with the base may run.

    Attributes:
        checkpoint: the base's weights.
        config: the base's configuration.
        untied: whether weights that the base ties are two in the merged model, because the adapter treats them
            differently; its configuration then has to say so (`untie`).
        saved: names, in the checkpoint, of the tensors that something else in the adapter changes than LoRA.
        changed: names, in the checkpoint, of all that it changes.

    Raises:
        ModelError: the base is not whole, or quantized.
        AdapterError: the adapter does not fit it, or has numbers that are none.
    """

    def __init__(self, base: str | Path, adapter: str | Path | None, *, trust_remote_code: bool = False) -> None:
        self.checkpoint = Checkpoint(base)
        self.config = read_config(base, trust_remote_code=trust_remote_code)
        self.untied = False
        self.saved: set[str] = set()
        self.changed: set[str] = set()
        self._changes: dict[str, Change] = {}
        self._outcomes: dict[str, list[tuple[str, Change | None]]] = {}
        self._pending: dict[str, torch.Tensor] = {}
        if adapter is None:
            return
        _check_whole(Path(adapter))
        check_layout(self.checkpoint, Path(adapter))
        _check_quantized(self.config, self.checkpoint)
        model = weightless_model(self.config, str(base), trust_remote_code=trust_remote_code)
        tied = tied_names(model)
        # Of a model of its own: an adapter puts modules between those whose names rules of transformers ask for.
        bare = weightless_model(self.config, str(base), trust_remote_code=trust_remote_code)
        self._names = StoredNames(bare, self.checkpoint.tensors)
        self._check_shapes(bare)
        changes, identities, saved = _attached(model, Path(adapter))
        self._changes = changes
        self._plan(tied, identities, saved, Path(adapter))

    def check_unquantized(self) -> None:
        """Refuse a source whose weights are quantized, where they are to be written in another way.

        Raises:
            ModelError: they are.
        """
        if quantized_as(self.config):
            raise ModelError(
                f"{self.checkpoint.folder}: its weights are quantized already; export the model that it was made from"
            )

    def _check_shapes(self, model: PreTrainedModel) -> None:
        """The configuration is of this checkpoint: else the adapter would be fitted to another model than it is."""
        expected = model.state_dict()
        for stored, name in self._names.parameters.items():
            found, wanted = self.checkpoint.tensors[stored].shape, tuple(expected[name].shape)
            if found != wanted:
                raise ModelError(
                    f"{self.checkpoint.folder}: {stored} has shape {found}, its config.json says {wanted}; "
                    "the two are of different models"
                )

    def _plan(self, tied: dict[str, list[str]], identities: dict[str, Any], saved: set[str], adapter: Path) -> None:
        """For each stored tensor: under which names it comes out, and what is done to it."""
        reached: set[str] = set()
        stored_as = {parameter: stored for stored, parameter in self._names.parameters.items()}
        for stored, parameter in self._names.parameters.items():
            together = tied.get(parameter, [parameter])
            reached.update(together)
            outcomes = [(stored, self._changes.get(parameter))]
            apart = {identities.get(name) for name in together}
            if len(apart) > 1:
                self.untied = True
                outcomes += [
                    (self._names.stored_name(name), self._changes.get(name))
                    for name in together
                    if name not in stored_as
                ]
                # Each of them is written once, beside the first that the checkpoint has.
                stored_as.update(dict.fromkeys(together, stored))
            elif parameter not in self._changes and (other := next((n for n in together if n in self._changes), None)):
                outcomes = [(stored, self._changes[other])]
            if len(outcomes) > 1 or outcomes[0][1] is not None:
                self._outcomes[stored] = outcomes
                self.changed.add(stored)
            if any(name in saved for name in together):
                self.saved.add(stored)
        for stored, group in self._names.groups.items():
            made = self._made_by(group)
            reached.update(made)
            if any(name in self._changes for name in made):
                self.changed.add(stored)
            if any(name in saved for name in made):
                self.saved.add(stored)
        lost = sorted(set(self._changes) - reached)
        if lost:
            raise AdapterError(
                f"{adapter}: it changes {lost[0]}, which {self.checkpoint.folder} does not store; merge it into the "
                "base that it was trained on"
            )

    def _made_by(self, group: Group) -> list[str]:
        """The parameters of a group, without its numbers: one of several keeps all but the end of the first's name."""
        targets = group.converter.target_patterns
        return [group.parameter.replace(targets[0], target, 1) for target in targets]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name and tensor of the merged model, in the order of the base.

        Raises:
            ModelError: a weight of the base is NaN or infinite.
            AdapterError: a merged weight is.
        """
        for name, tensor in self.checkpoint:
            yield from self.merged(name, tensor)

    def merged(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """What becomes of one tensor of the checkpoint: itself, another, or two where the base tied what now differs.

        Raises:
            ModelError: a number of it is NaN or infinite.
            AdapterError: one of the merged tensor is.
        """
        if not all_finite(tensor):
            raise ModelError(f"{self.checkpoint.folder}: {name} has weights that are NaN or infinite; fetch it again")
        if name not in self.changed:
            yield name, tensor
        elif name in self._outcomes:
            outcomes = self._outcomes[name]
            for out, change in outcomes:
                # A change may be made in place.
                own = tensor if len(outcomes) == 1 else tensor.clone()
                yield out, (own if change is None else self._changed(out, own, change))
        else:
            if name not in self._pending:
                self._pending.update(self._regrouped(self._names.groups[name], name, tensor))
            yield name, self._pending.pop(name)

    def _regrouped(self, group: Group, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """All tensors of a group, merged; its others are read beside the one that came by."""
        read = {stored: tensor if stored == name else self.checkpoint.read(stored) for stored in group.stored.values()}
        joined = self._names.join(group, read)
        merged = {
            key: self._changed(key, value, self._changes[key]) if key in self._changes else value
            for key, value in joined.items()
        }
        return self._names.part(group, merged)

    def _changed(self, name: str, tensor: torch.Tensor, change: Change) -> torch.Tensor:
        with torch.no_grad():
            merged = change(tensor.float() if tensor.dtype != torch.float64 else tensor)
        if tuple(merged.shape) != tuple(tensor.shape):
            raise AdapterError(f"{name}: the adapter has shape {tuple(merged.shape)}, the base {tuple(tensor.shape)}")
        merged = merged.to(tensor.dtype)
        if not all_finite(merged):
            raise AdapterError(
                f"{name}: weights are NaN or infinite (in {str(tensor.dtype).removeprefix('torch.')}) once the adapter "
                "is merged; it is damaged, or too large for that precision"
            )
        return merged.contiguous()


def merged_tensors(
    base: str | Path, adapter: str | Path | None, *, trust_remote_code: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name and tensor of a base with an adapter merged into it, by the names of the base's checkpoint.

    Where `MergedModel.untied` matters (adapters on tied embeddings), use that class.

    Args:
        base: a model's directory.
        adapter: an adapter's directory; None: the base as it is.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        ModelError: the base is not whole, quantized, or has weights that are NaN or infinite.
        AdapterError: the adapter does not fit the base.
    """
    return iter(MergedModel(base, adapter, trust_remote_code=trust_remote_code))


def check_layout(checkpoint: Checkpoint, adapter: Path) -> None:
    """Refuse a base of other names and shapes than the one that mmpeft.json says the adapter was trained on.

    Raises:
        AdapterError: it is another model.
    """
    facts = adapter / FACTS_NAME
    recorded = read_json(facts).get(BASE_LAYOUT) if facts.is_file() else None
    if recorded and recorded != checkpoint.layout_hash():
        raise AdapterError(
            f"{adapter}: it was trained on another base: the names and shapes of the weights in {checkpoint.folder} "
            f"are not those that {FACTS_NAME} records; give the base that it was trained on"
        )


def _check_whole(adapter: Path) -> None:
    """Refuse an adapter's file that is cut short, which would seem not to fit the base."""
    try:
        read_header(adapter / SAFETENSORS_WEIGHTS_NAME)
    except ModelError as error:
        raise AdapterError(f"{adapter}: it is not whole ({error})") from error


def _check_quantized(config: Any, checkpoint: Checkpoint) -> None:
    if method := quantized_as(config):
        raise ModelError(
            f"{checkpoint.folder}: its weights are quantized ({method}), and an adapter cannot be merged into "
            "them exactly; merge it into the model that was quantized"
        )


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are; of a single one, such as a limit that Gemma 4 clamps by, only that it is not NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.numel() == 1:
        return not bool(torch.isnan(tensor).any())
    # Both are NaN where one number is; `torch.isfinite` would take as much memory again.
    ends = torch.stack(torch.aminmax(tensor if tensor.dtype.itemsize > 1 else tensor.float()))
    return bool(torch.isfinite(ends).all())


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """By name, all names of the parameter that it names, for those that have several."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return {name: together for together in names.values() if len(together) > 1 for name in together}


def _attached(model: PreTrainedModel, adapter: Path) -> tuple[dict[str, Change], dict[str, Any], set[str]]:
    """What an adapter does to a model without weights.

    Returns:
        By the name of each parameter that it changes, what it does; what tells changes apart (two parameters with the
        same one are still one tensor); and the names of parameters that something else changes than LoRA.

    Raises:
        AdapterError: it does not fit the model, or has weights that are NaN or infinite.
    """
    inner = trained_model(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is inner)
    before = dict(inner.named_parameters(remove_duplicate=False))
    peft_model = attach_adapter(model, adapter, weightless=True)
    changes: dict[str, Change] = {}
    identities: dict[str, Any] = {}
    saved: set[str] = set()
    for path, module in peft_model.get_base_model().named_modules():
        owner = prefix + ".".join(part for part in path.split(".") if part not in _WRAPPING)
        for leaf, (change, identity) in _changes_of(module).items():
            name = f"{owner}.{leaf}"
            if name in changes and not isinstance(module, ParamWrapper):
                raise AdapterError(f"{adapter}: it changes {name} in two ways at once, which cannot be merged")
            changes[name], identities[name] = change, identity
            if isinstance(module, ModulesToSaveWrapper | TrainableTokensLayer):
                saved.add(name)
    for path, weight in peft_model.get_base_model().named_parameters(remove_duplicate=False):
        name = ".".join(part for part in path.split(".") if part not in _WRAPPING)
        # Biases that `bias` lets train are stored by the base's own names, and have taken the place of those.
        # Where PEFT saves the module whole, its copy counts and not the original.
        if (
            prefix + name not in saved
            and name in before
            and weight.shape == before[name].shape
            and _replaced(path, weight, before[name])
        ):
            changes[prefix + name] = _replacement(weight)
            identities[prefix + name] = id(weight)
            saved.add(prefix + name)
    return changes, identities, saved


_WRAPPING = ("base_layer", "original_module", "token_adapter")
"""Attributes under which PEFT keeps what it wraps."""


def _replaced(path: str, weight: torch.Tensor, before: torch.Tensor) -> bool:
    aside = ".modules_to_save." in path or ".lora_" in path
    return not aside and weight.data_ptr() != before.data_ptr()


def _replacement(weight: torch.Tensor) -> Change:
    return lambda _: weight.detach().float()


def _changes_of(module: nn.Module) -> dict[str, tuple[Change, Any]]:
    """By the name of each parameter of what `module` wraps: what becomes of it, and what tells that apart."""
    if isinstance(module, ModulesToSaveWrapper):
        state = module.modules_to_save[ADAPTER].state_dict()
        return {leaf: (_replacement(tensor), tensor.data_ptr()) for leaf, tensor in state.items()}
    if isinstance(module, TrainableTokensLayer):
        rows = (module.tied_adapter or module).trainable_tokens_delta
        return {"weight": (_by_peft(module), id(rows))}
    if isinstance(module, TrainableTokensWrapper) or not isinstance(module, LoraLayer):
        return {}
    if isinstance(module, ParamWrapper):
        return {module.parameter_name: (_by_parameter(module), id(module))}
    if ADAPTER not in module.lora_A and ADAPTER not in module.lora_embedding_A:
        return {}
    changes: dict[str, tuple[Change, Any]] = {"weight": (_by_peft(module), id(module))}
    if module.lora_bias.get(ADAPTER):
        if getattr(module.get_base_layer(), "bias", None) is None:
            raise AdapterError("lora_bias: a layer without a bias has no place for it, so it cannot be merged")
        changes["bias"] = (_bias(module), id(module))
    return changes


def _by_peft(module: Any) -> Change:
    """PEFT's merge of one layer, its base's weight put in for the while."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        layer = module.get_base_layer()
        empty, bias = layer.weight, getattr(module, "lora_bias", {}).get(ADAPTER)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            if bias:
                module.lora_bias[ADAPTER] = False
            module.merge(adapter_names=[ADAPTER])
            return cast(torch.Tensor, layer.weight.data)
        finally:
            layer.weight = empty
            module.merged_adapters.clear()
            # DoRA keeps there what it would need to take the adapter out again.
            getattr(module, "_caches", {}).clear()
            if bias:
                module.lora_bias[ADAPTER] = True

    return change


def _bias(module: Any) -> Change:
    return lambda bias: bias + module.lora_B[ADAPTER].bias.detach().float() * module.scaling[ADAPTER]


def _by_parameter(wrapper: Any) -> Change:
    """PEFT's change of a parameter of experts, added to it."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        holder = wrapper.get_base_layer()
        empty = getattr(holder, wrapper.parameter_name)
        setattr(holder, wrapper.parameter_name, nn.Parameter(weight, requires_grad=False))
        try:
            return weight.add_(wrapper.get_delta_weight(ADAPTER).detach())
        finally:
            setattr(holder, wrapper.parameter_name, empty)

    return change
