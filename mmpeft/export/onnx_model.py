"""`mmpeft.OnnxModel`: an ONNX export that answers, with ONNX Runtime in the place of its weights.

Positions, padding, where pictures go and how answers are searched for stay transformers' own code: its model class
without weights, in which graphs stand for embedding, decoder, head and tower.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import GENERATION_CONFIG_NAME

from mmpeft.core.errors import ModelError
from mmpeft.export.onnx_graph import OnnxGraph
from mmpeft.export.onnx_parts import DECODER, EMBEDDING, HEAD, VISION, position_axes
from mmpeft.export.onnx_vision import vision_of
from mmpeft.models.checkpoints import check_name, reading
from mmpeft.models.dimensions import head_channels, key_heads
from mmpeft.models.load import NOT_FETCHED, load_processor
from mmpeft.models.weightless import read_config, weightless_model

MANIFEST = "onnx.json"
"""Beside the graphs: {"family", "precision", "graphs": {part: file}}."""


class OnnxModel(nn.Module):
    """A model of graphs; it answers as the one that it was made from.

        model = mmpeft.OnnxModel.from_pretrained("receipts-onnx")
        mmpeft.answer(model, model.processor, images=["receipt.png"], prompt="What is the total?")
        for text in model.stream(**inputs):                            # tensors of `model.processor(...)`
            print(text, end="")

    Args:
        folder: what `mmpeft export onnx` has written.

    Attributes:
        config: of the model.
        processor: of the model.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ModelError: no such directory, or it is not whole.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        manifest = _manifest(folder)
        graphs = {part: OnnxGraph(folder / file) for part, file in manifest["graphs"].items()}
        self.config = read_config(folder)
        self.processor = load_processor(folder)
        self.host: Any = weightless_model(self.config, str(folder))
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.host.generation_config = GenerationConfig.from_pretrained(folder)
        vision = vision_of(manifest["family"])
        embedding = _Embedding(graphs[EMBEDDING])
        decoder = self.host.get_decoder()
        path = next(name for name, module in self.host.named_modules() if module is decoder)
        self.host.set_submodule(path, _Decoder(graphs[DECODER], embedding, decoder.config))
        head = self.host.get_output_embeddings()
        path = next(name for name, module in self.host.named_modules() if module is head)
        self.host.set_submodule(path, _Head(graphs[HEAD]))
        self._vision = graphs[VISION]
        self._from_outside, self._listed = vision.attach is None, vision.listed
        if vision.attach is not None:
            vision.attach(self.host, self._vision)
        self.eval()

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "OnnxModel":
        """The model of a directory or hub id."""
        check_name(str(name))
        if Path(name).is_dir():
            return cls(Path(name))
        with reading(str(name), "model"):
            patterns = [pattern for pattern in NOT_FETCHED if pattern != "*.onnx"]
            return cls(Path(snapshot_download(str(name), ignore_patterns=[*patterns, "*.safetensors", "*.py"])))

    @property
    def generation_config(self) -> Any:
        """How it generates, where a call does not say."""
        return self.host.generation_config

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Any:
        """What the model's own forward gives, with `logits` and, with `use_cache`, the cache."""
        return self.host(**self._seen(inputs))

    @torch.no_grad()
    def generate(self, **inputs: Any) -> Any:
        """What transformers' `generate` gives."""
        return self.host.generate(**self._seen(inputs))

    def stream(self, **inputs: Any) -> Iterator[str]:
        """The answer to one prompt, piece by piece, as it comes.

        Args:
            **inputs: tensors of `processor`, and what `generate` takes.
        """
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self.generate(**inputs, streamer=streamer)
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield from cast(Iterator[str], streamer)
        thread.join()
        if failed:
            raise failed[0]

    def _seen(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs with features in the place of pixels, where these do not enter by the tower."""
        if not self._from_outside or inputs.get("pixel_values") is None:
            return inputs
        rest = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_sizes")}
        features = self._vision(pixel_values=inputs["pixel_values"].float())["features"]
        pooled: Any = list(features) if self._listed else features
        return {**rest, "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ModelError(f"{folder}: no {MANIFEST} there; it is no export of `mmpeft export onnx`")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        missing = {EMBEDDING, DECODER, HEAD, VISION} - set(found["graphs"])
        outside = [name for name in found["graphs"].values() if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read ({error!r}); export or copy the model again") from error
    if missing or outside:
        raise ModelError(f"{file}: it names no {min(missing) if missing else 'file beside it'}; export the model again")
    return cast(dict[str, Any], found)


class _Embedding(nn.Module):
    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        shape = input_ids.shape
        return self.graph(input_ids=input_ids.reshape(1, -1))["inputs_embeds"].reshape(*shape, -1)


class _Head(nn.Module):
    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.graph(hidden_states=hidden_states)["logits"]


class _Decoder(nn.Module):
    """Keeps keys and values in a `DynamicCache`, as tensors that are ONNX Runtime's own.

        present.3.0    keys of layer 3     [rows, heads, past + length, channels]
        present.3.1    values

    Args:
        graph: of the decoder.
        embedding: where transformers looks for it.
        config: of the language model.
    """

    def __init__(self, graph: OnnxGraph, embedding: nn.Module, config: Any) -> None:
        super().__init__()
        self.graph, self.embed_tokens, self.config = graph, embedding, config
        # transformers asks a parameter where a model is and how precise, and graphs have none.
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self._layers = [f"past.{layer}" for layer in range(config.num_hidden_layers)]
        self._empty = (key_heads(config), 0, head_channels(config))

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """The language model's forward."""
        hidden: Any = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = hidden.shape[:2]
        seen = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(rows, seen + length, dtype=torch.long)
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            raise ModelError("an ONNX model takes attention masks [rows, tokens] alone")
        tensors = {
            "inputs_embeds": hidden.float(),
            "attention_mask": attention_mask.long(),
            "position_ids": self._positions(position_ids, rows, seen, length),
        }
        if seen:
            past = [(layer.keys, layer.values) for layer in cache.layers]
        else:
            empty = torch.zeros(rows, *self._empty)
            past = [(empty, empty)] * len(self._layers)
        for name, (keys, values) in zip(self._layers, past, strict=True):
            tensors[f"{name}.0"], tensors[f"{name}.1"] = keys, values
        found = self.graph(**tensors)
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None:
            self._keep(cache, found)
        return BaseModelOutputWithPast(last_hidden_state=cast(Any, found["last_hidden_state"]), cache=cache)

    def _positions(self, given: torch.Tensor | None, rows: int, seen: int, length: int) -> torch.Tensor:
        axes = position_axes(self.config)
        if given is None:
            given = torch.arange(seen, seen + length)[None]
        if axes:
            # A fourth, in front, is that of plain text, from which transformers makes masks of packed rows.
            given = given[-axes:] if given.dim() == 3 else given[None].expand(axes, -1, -1)
            return given.expand(axes, rows, length)
        return given.expand(rows, length)

    def _keep(self, cache: Any, found: dict[str, torch.Tensor]) -> None:
        for number in range(len(self._layers)):
            keys, values = found[f"present.{number}.0"], found[f"present.{number}.1"]
            if number < len(cache.layers) and cache.layers[number].is_initialized:
                cache.layers[number].keys, cache.layers[number].values = keys, values
            else:
                cache.update(keys, values, number)
