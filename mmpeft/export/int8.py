"""int8 (W8A8) in the compressed-tensors layout: what transformers, vLLM and vllm-ascend read.

    base + adapter -> merged, tensor by tensor -> smoothed, where asked -> int8 and scales -> shards

Memory holds about one shard, whatever the model's size; only what is measured with samples has the model in memory.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mmpeft.export.artefact import INT8, artefact, check_output
from mmpeft.export.linears import Linears, choose_linears
from mmpeft.export.merge import MergedModel
from mmpeft.export.merged_model import untied
from mmpeft.export.names import StoredNames
from mmpeft.export.shards import SHARD_BYTES, write_shards
from mmpeft.export.smooth import Smoothing
from mmpeft.export.sources import Source, base_config, write_companions
from mmpeft.export.w8a8 import Activations, quantization_config, quantize_rows, scale_of
from mmpeft.models.weightless import weightless_model


@dataclass(frozen=True, kw_only=True)
class Int8Settings:
    """What is quantized and how.

    Attributes:
        include: parts to quantize beside the language model.
        skip: names of linear layers that stay in their precision, or `re:` and a pattern.
        activations: scaled by token while the model runs, or by one number measured beforehand.
        smooth: how much of activations' outliers the weights take (0: none; SmoothQuant's 0.5).
    """

    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    activations: Activations = "dynamic"
    smooth: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What samples have told.

    Attributes:
        largest: of static activations: by linear layer the largest |x| that went into it.
        smoothing: what was moved from norms into linear layers.
    """

    largest: Mapping[str, float] = field(default_factory=dict)
    smoothing: Sequence[Smoothing] = ()


@dataclass(frozen=True, kw_only=True)
class Int8Result:
    """What was written.

    Attributes:
        output: the model's directory.
        quantized: names of the linear layers in int8, as the loaded model has them.
        left: the others, each with the reason.
        bytes: of all tensors.
        before: of the merged model's.
        language: the same two of the language model alone, embeddings and head with it.
    """

    output: Path
    quantized: Sequence[str]
    left: Mapping[str, str]
    bytes: int
    before: int
    language: tuple[int, int]


class Int8Export:
    """An export of one source.

    Args:
        source: an adapter on its base, or a model.
        settings: what is quantized and how.
        trust_remote_code: whether code that comes with the base may run.

    Attributes:
        linears: which layers are quantized.
        names: of the checkpoint.

    Raises:
        AdapterError: the adapter does not fit the base.
        ModelError: the base is not whole, or quantized already.
        RecipeError: `settings` name what is not there.
    """

    def __init__(self, source: Source, settings: Int8Settings, *, trust_remote_code: bool = False) -> None:
        self.source, self.settings, self.trust = source, settings, trust_remote_code
        self.merged = MergedModel(source.base, source.adapter, trust_remote_code=trust_remote_code)
        self.merged.check_unquantized()
        self._model = weightless_model(self.merged.config, str(source.base), trust_remote_code=trust_remote_code)
        self.names = StoredNames(self._model, self.merged.checkpoint.tensors)
        self.linears = choose_linears(self._model, self.names, include=settings.include, skip=settings.skip)

    def with_skipped(self, layers: Sequence[str]) -> "Int8Export":
        """The same with more layers left as they are."""
        made = copy.copy(self)
        made.settings = replace(self.settings, skip=(*self.settings.skip, *layers))
        made.linears = choose_linears(self._model, self.names, include=made.settings.include, skip=made.settings.skip)
        return made

    def check_output(self, output: str | Path, *, times: int = 1) -> None:
        """Refuse a place that `write` would refuse in the end, before long work.

        Args:
            times: how many copies of the model's weights have to find room there.

        Raises:
            OutputError: the output holds something else, is read, or has no room.
        """
        check_output(output, needs=times * self.merged.checkpoint.bytes, sources=self.source.folders)

    def write(self, output: str | Path, measured: Measured | None = None) -> Int8Result:
        """Write the directory.

        Args:
            measured: of all `linears`, where `settings` need it.

        Raises:
            OutputError: the output holds something else, has no room, or cannot be written; it is then as it was.
        """
        stream = _Stream(self.names, self.linears, self.settings, measured or Measured())
        facts = self.source.own_facts
        facts |= {
            "base_model": self.source.base_name,
            "merged_adapter": None if self.source.adapter is None else self.source.name,
            "int8": {**vars(self.settings), "quantized": len(self.linears.chosen), "left": dict(self.linears.left)},
        }
        needs = self.merged.checkpoint.bytes
        with artefact(output, kind=INT8, needs=needs, sources=self.source.folders, facts=facts) as out:
            config = base_config(self.source.base)
            config = untied(config) if self.merged.untied else config
            block = quantization_config(self.linears.ignore, activations=self.settings.activations)
            config |= {"quantization_config": block}
            write_companions(self.source, out.folder, config=config, trust_remote_code=self.trust)
            write_shards(stream(self.merged), out.folder, max_bytes=SHARD_BYTES)
        return Int8Result(
            output=Path(output),
            quantized=tuple(self.linears.chosen),
            left=dict(self.linears.left),
            bytes=stream.bytes,
            before=stream.before,
            language=(stream.language, stream.language_before),
        )


class _Stream:
    """Merged tensors in, what is on disk out; counts bytes on the way."""

    def __init__(self, names: StoredNames, linears: Linears, settings: Int8Settings, measured: Measured) -> None:
        self.bytes = self.before = self.language = self.language_before = 0
        self._layers = {stored: layer for layer, stored in linears.chosen.items()}
        self._language, self._static, self._measured = linears.language, settings.activations == "static", measured
        self._parameters = names.parameters
        self._norms = {f"{step.norm}.weight": step for step in measured.smoothing}
        self._biases = {f"{step.norm}.bias": step for step in measured.smoothing}
        self._readers = {f"{name}.weight": step for step in measured.smoothing for name in step.readers}

    def __call__(self, merged: Iterator[tuple[str, torch.Tensor]] | MergedModel) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in merged:
            made = list(self._made(name, self._smoothed(name, tensor)))
            before, now = tensor.nbytes, sum(each.nbytes for _, each in made)
            self.before += before
            self.bytes += now
            if name in self._language:
                self.language_before += before
                self.language += now
            yield from made

    def _smoothed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        parameter = self._parameters.get(name, "")
        if step := self._norms.get(parameter):
            return step.on_norm(tensor)
        if step := self._biases.get(parameter):
            return (tensor.float() / step.scale).to(tensor.dtype)
        if step := self._readers.get(parameter):
            return step.on_reader(tensor)
        return tensor

    def _made(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        layer = self._layers.get(name)
        if layer is None:
            yield name, tensor
            return
        whole, scale = quantize_rows(tensor)
        yield name, whole
        yield f"{name}_scale", scale
        if self._static:
            largest = torch.tensor([self._measured.largest[layer]])
            yield f"{name.removesuffix('weight')}input_scale", scale_of(largest, tensor.dtype)
