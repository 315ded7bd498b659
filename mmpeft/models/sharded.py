"""A language model whose weights are shared out over processes, each read from disk by whom it belongs to: by layer.

    layer 0   [process 0 | process 1]      together for as long as the layer runs, forward and backward
    layer 1   [process 0 | process 1]
    tower, projector, adapter              whole in every process

This is FSDP2; how matrices are shared out, which never are whole, says `mmpeft.models.tensor_parallel`.

Towers run by themselves where their outputs are kept, and a batch of text alone does not run them at all: nothing in
them may wait for another process. What trains in an adapter is small, and stays whole as well.

transformers 5.24 shards a model between making it on the meta device and reading its weights; only what it shards is
its own choice. Accelerate's FSDP2 shards when the whole model has been read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from mmpeft.core.errors import ModelError
from mmpeft.families.registry import trained_model
from mmpeft.models.base import base_of
from mmpeft.models.context_parallel import ContextParallel, share_tokens
from mmpeft.models.tensor_parallel import TensorParallel, mark_shares, share_layers


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a model is shared out while it is read.

    Attributes:
        processes: all that torch.distributed has, which was set up before.
        offload: whether each process keeps its share in host memory.
        tensor_parallel: processes that have a share of each matrix together; 1: each layer is shared by all processes,
            and whole while it runs.
        tokens: whether those have a part of the tokens each between blocks.
        layers: whether layers are shared where matrices are not; else each process has them whole.
        context_parallel: processes that have a part of the tokens together.
    """

    processes: int
    offload: bool = False
    tensor_parallel: int = 1
    tokens: bool = True
    layers: bool = True
    context_parallel: int = 1


class SharedOut:
    """Reads a model of a class with its layers shared out.

        SharedOut(LlavaForConditionalGeneration, Sharing(processes=8)).from_pretrained(...)

    Args:
        model_class: a class of transformers' models.
    """

    def __init__(self, model_class: type[PreTrainedModel], sharing: Sharing) -> None:
        self.model_class, self.sharing = model_class, sharing

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """That of the class, with its arguments and results; the model is one of this very class."""
        result = self._read_shared(name, options)
        degree = self.sharing.context_parallel
        if degree > 1:
            mesh = _groups(self.sharing.processes, degree)
            share_tokens(_model_of(result), ContextParallel(degree, mesh.get_local_rank(), mesh.get_group()))
        return result

    def _read_shared(self, name: str, options: dict[str, Any]) -> Any:
        degree = self.sharing.tensor_parallel
        if degree == 1 and not self.sharing.layers:
            return self.model_class.from_pretrained(name, **options)
        by_layer = DistributedConfig(fsdp_size=self.sharing.processes)
        if self.sharing.processes == 1:
            # Of one process all waits in host memory, where it is read; its layers come to the device one by one.
            result = self.model_class.from_pretrained(name, **options)
            meshes = _meshes(by_layer)[1]
            _mark(_model_of(result), by_layer, meshes)
            self._by_layer(_model_of(result), meshes)
            return result
        if degree == 1:
            result = self._read(name, by_layer, self._by_layer, options)
            if self.sharing.offload:
                # transformers reads shares to their device.
                torch.nn.Module.to(_model_of(result), "cpu")
            return result
        spread = DistributedConfig(tp_size=degree, fsdp_size=self.sharing.processes // degree)
        result = self._read(name, spread, self._by_matrix, options)
        model = _model_of(result)
        mesh = model._device_mesh["tp"]
        # What is left are plain tensors, about which neither transformers nor PEFT need know anything.
        model.config.distributed_config = model._device_mesh = model._mesh_manager = None
        share_layers(model, TensorParallel(degree, mesh.get_local_rank(), mesh.get_group(), self.sharing.tokens))
        return result

    def _read(self, name: str, spread: DistributedConfig, share_out: Callable[..., None], options: Any) -> Any:
        def distribute(cls: type, model: Any, config: DistributedConfig, meshes: Any) -> Any:
            model.__class__ = self.model_class
            _mark(model, config, meshes)
            share_out(model, meshes)
            return model

        def prepare(cls: type, config: DistributedConfig, device_map: Any = None) -> tuple[Any, Any, Any]:
            return config, *_meshes(config)

        own = {
            "prepare_distribute_model": classmethod(prepare),
            "maybe_distribute_model": classmethod(distribute),
            "__module__": self.model_class.__module__,
        }
        reader: Any = type(self.model_class.__name__, (self.model_class,), own)
        return reader.from_pretrained(name, distributed_config=spread, **options)

    def _by_matrix(self, model: Any, meshes: Any) -> None:
        mark_shares(model, meshes.get_mesh("tp"))

    def _by_layer(self, model: Any, meshes: Any) -> None:
        pinned = torch.accelerator.is_available()
        policy = CPUOffloadPolicy(pin_memory=pinned) if self.sharing.offload else OffloadPolicy()
        _share_out(model, meshes.get_mesh("fsdp"), policy)


def _model_of(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _mark(model: Any, config: DistributedConfig, meshes: TransformersDeviceMesh) -> None:
    """Let a model tell transformers, PEFT and the Trainer what they ask of one that is shared out."""
    model.config.distributed_config = config
    # No `_tp_size`, by which PEFT would gather the whole model to write an adapter that is whole already.
    model._mesh_manager, model._fsdp_size = meshes, config.fsdp_size
    model._device_mesh = meshes.get_mesh(("pp", "fsdp", "tp"))
    model._is_distributed_loading_by_transformers = True


def _meshes(config: DistributedConfig) -> tuple[torch.device, TransformersDeviceMesh]:
    """Where weights are read to, and the processes in their order.

    transformers' own are of any accelerator that is there, whatever a recipe says of it.
    """
    device = PartialState().device
    shape = (1, 1, config.fsdp_size or 1, config.tp_size or 1)
    dense = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
    experts = init_device_mesh(device.type, shape, mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
    return device, TransformersDeviceMesh(dense, experts)


def _groups(processes: int, degree: int) -> Any:
    """Of neighbouring processes that run the same samples; this one's."""
    mesh = init_device_mesh(PartialState().device.type, (processes // degree, degree), mesh_dim_names=("dp", "cp"))
    return mesh["cp"]


def _share_out(model: Any, mesh: Any, policy: OffloadPolicy) -> None:
    language = trained_model(model)
    layers = getattr(language.get_decoder(), "layers", None)
    if not layers:
        raise ModelError(
            f"distributed: fsdp2: no list of layers was found in {type(model).__name__}'s language model; use zero3"
        )
    embeddings, head = language.get_input_embeddings(), language.get_output_embeddings()
    # Tied, they are one tensor that two modules would gather at two times.
    apart = [] if head is None or embeddings is None or head.weight is embeddings.weight else [embeddings, head]
    units: list[Any] = [*apart[:1], *layers, *apart[1:]]
    for unit in units:
        fully_shard(unit, mesh=mesh, offload_policy=policy)
    for before, behind in pairwise(units):
        # While one computes, the next is gathered. An accelerator's streams see to that; a CPU has none, and its
        # collectives have to be asked not to wait.
        before.set_modules_to_forward_prefetch([behind])
        behind.set_modules_to_backward_prefetch([before])
    if mesh.device_type == "cpu":
        for unit in units:
            unit._set_unshard_async_op(True)
    inside = {parameter for unit in units for parameter in unit.parameters()}
    # The root has no weights; it lets one unit gather its weights while the one before computes.
    whole = {parameter for parameter in model.parameters() if parameter not in inside}
    fully_shard(model, mesh=mesh, offload_policy=policy, ignored_params=whole)
    model._is_fsdp_managed_module = True


def place_whole(model: Any, device: torch.device) -> None:
    """Move what each process has whole to its device: beside shares that wait in host memory it was read there too."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and not isinstance(parameter.data, DTensor):
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def is_sharded(model: Any) -> bool:
    """Whether a model's layers are shared out, and whole only while they run."""
    return isinstance(base_of(model), FSDPModule)
