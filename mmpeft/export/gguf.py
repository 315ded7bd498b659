"""A model as GGUF, which llama.cpp, Ollama and LM Studio run.

    model-q8_0.gguf     the language model with its tokenizer; with `lora` adapter-f32.gguf in its place
    mmproj-f16.gguf     the vision tower with its projector
    mmpeft.json         what it was made of

Weights pass by one at a time, merged with an adapter, so memory holds about one tensor whatever the model's size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.export.artefact import GGUF, artefact
from mmpeft.export.gguf_adapter import GgufAdapter
from mmpeft.export.gguf_file import Q8_BLOCK, GgufFile, OutType, Piece, gguf_package
from mmpeft.export.gguf_language import LanguageNames, add_language, extra_pieces, language_of
from mmpeft.export.gguf_vision import vision_shape
from mmpeft.export.gguf_words import add_words
from mmpeft.export.linears import matching
from mmpeft.export.merge import MergedModel, tied_names
from mmpeft.export.names import StoredNames
from mmpeft.export.sources import Source
from mmpeft.models.load import load_processor
from mmpeft.models.weightless import read_config, weightless_model

MMPROJ, ADAPTER_FILE = "mmproj-f16.gguf", "adapter-f32.gguf"
_HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class GgufResult:
    """What was written.

    Attributes:
        output: the directory.
        files: bytes of the tensors, by name of the file.
        before: bytes of the merged model's tensors.
        notes: how llama.cpp treats pictures otherwise than the processor.
        quantized: names of the linear layers that are in int8.
    """

    output: Path
    files: dict[str, int]
    before: int
    notes: tuple[str, ...]
    quantized: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all tensors that were written."""
        return sum(self.files.values())


def write_gguf(
    source: Source,
    output: str | Path,
    *,
    outtype: str = OutType.Q8_0,
    lora: bool = False,
    skip: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> GgufResult:
    """Write an adapter on its base, or a model, as GGUF files.

    Args:
        source: what is written.
        output: a new or empty directory, or an earlier export, which is replaced.
        outtype: how the language model's matrices are written: `q8_0`, `f16` or `bf16`.
        lora: write the adapter's LoRA apart, to be put on a GGUF file of its base, and no language model.
        skip: names of linear layers that stay in 16 bits, or `re:` and a pattern.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError, ModelError: source and base do not fit, are not whole, or llama.cpp does not compute them.
        OutputError: the output holds something else, has no room, or cannot be written.
        RecipeError: `lora` for a model, an outtype that there is not, or `skip` names no layer or nothing in int8.
    """
    if outtype not in list(OutType):
        raise RecipeError(f"outtype {outtype!r}: expected one of {', '.join(OutType)}")
    if lora and source.adapter is None:
        raise RecipeError(f"{source.name}: it is a model and no adapter; leave out --lora")
    if skip and (lora or outtype != OutType.Q8_0):
        raise RecipeError(f"skip: {'a LoRA alone' if lora else outtype} has no layer in int8; leave --skip out")
    export = GgufExport(source, skip=skip, trust_remote_code=trust_remote_code)
    return export.write(output, outtype=OutType(outtype), lora=lora)


class GgufExport:
    """An export of one source.

    Args:
        source: an adapter on its base, or a model.
        skip: names of linear layers that stay in 16 bits, or `re:` and a pattern.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError: the adapter does not fit the base.
        ModelError: the base is not whole or quantized, or mmpeft does not write it as GGUF.
        RecipeError: `skip` names no layer.
    """

    def __init__(self, source: Source, *, skip: Sequence[str] = (), trust_remote_code: bool = False) -> None:
        gguf_package()
        self.source, self.trust = source, trust_remote_code
        self.config: Any = read_config(source.base, trust_remote_code=trust_remote_code)
        self.shape = vision_shape(self.config, source.name)
        self.language = language_of(self.config.text_config, source.name)
        self.merged = MergedModel(source.base, source.adapter, trust_remote_code=trust_remote_code)
        self.merged.check_unquantized()
        self.processor = load_processor(source.base, adapter=source.adapter, trust_remote_code=trust_remote_code)
        self.model = weightless_model(self.config, str(source.base), trust_remote_code=trust_remote_code)
        self.names = StoredNames(self.model, self.merged.checkpoint.tensors)
        if self.names.groups:
            raise ModelError(
                f"{source.base}: {min(self.names.groups)} is rearranged on loading; load and save it with transformers"
            )
        self.words = LanguageNames(self.language, self.config.text_config, self.shape.language)
        self.linears = {
            name: module for name, module in self.model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        self.skipped = matching(skip, self.linears)

    def write(self, output: str | Path, *, outtype: OutType = OutType.Q8_0, lora: bool = False) -> GgufResult:
        """Write the directory.

        Raises:
            AdapterError: `lora`, and the adapter holds what no GGUF adapter can say.
            ModelError: a tensor has no place in GGUF, or a number none in its type.
            OutputError: the output holds something else, has no room, or cannot be written; it is then as it was.
        """
        adapter = self._adapter() if lora else None
        language, vision = self._pieces()
        notes = tuple(self.shape.notes(self.config, self.processor))
        facts = self.source.own_facts
        facts |= {
            "base_model": self.source.base_name,
            "merged_adapter": None if self.source.adapter is None or lora else self.source.name,
            "gguf": {"outtype": outtype.value, "lora": lora, "notes": list(notes), "skipped": sorted(self.skipped)},
        }
        needs = self.merged.checkpoint.bytes
        with artefact(output, kind=GGUF, needs=needs, sources=self.source.folders, facts=facts) as out:
            first = out.folder / (ADAPTER_FILE if lora else f"model-{outtype.value}.gguf")
            spoken = self._lora_file(first, adapter) if adapter else self._language_file(first, language, outtype)
            with spoken, self._vision_file(out.folder / MMPROJ, vision) as seen:
                for name, tensor in self._parameters():
                    spoken.take(name, tensor)
                    seen.take(name, tensor)
                for name, tensor in adapter or self._extras():
                    spoken.take(name, tensor)
                spoken.check_whole()
                seen.check_whole()
        files = {spoken.path.name: spoken.bytes, seen.path.name: seen.bytes}
        in_int8 = self._in_int8() if outtype is OutType.Q8_0 and not lora else ()
        return GgufResult(output=Path(output), files=files, before=needs, notes=notes, quantized=in_int8)

    def _in_int8(self) -> tuple[str, ...]:
        """Names of the linear layers that Q8_0 is of."""
        return tuple(
            name
            for name, layer in self.linears.items()
            if self.words.name(f"{name}.weight") and name not in self.skipped and layer.in_features % Q8_BLOCK == 0
        )

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Merged tensors by the names of parameters."""
        for name, tensor in self.merged:
            yield self.names.parameters.get(name, _HEAD if self.merged.untied else name), tensor

    def _extras(self) -> Iterator[tuple[str, torch.Tensor]]:
        for piece, tensor in extra_pieces(self.config.text_config):
            yield piece.source, tensor

    def _pieces(self) -> tuple[list[Piece], list[Piece]]:
        """The tensors of both files."""
        language = [piece for piece, _ in extra_pieces(self.config.text_config)]
        vision: list[Piece] = []
        head_apart = self.merged.untied or _HEAD not in tied_names(self.model)
        shapes = {name: self.merged.checkpoint.tensors[stored].shape for stored, name in self.names.parameters.items()}
        if self.merged.untied and _HEAD not in shapes:
            shapes[_HEAD] = shapes[f"{self.shape.language}.embed_tokens.weight"]
        for parameter, shape in shapes.items():
            name = self.words.name(parameter)
            if name is not None and (parameter != _HEAD or head_apart):
                take = self.words.take(parameter)
                # The head's, too, is the embedding's table where both have the same weights.
                shared = not head_apart and parameter.endswith("embed_tokens.weight")
                half = (_HEAD if shared else parameter).removesuffix(".weight") in self.skipped
                language.append(Piece(source=parameter, name=name, shape=shape, take=take, half=half))
            elif parameter.startswith((f"{self.shape.tower}.", f"{self.shape.projector}.")):
                vision += self.shape.pieces(self.config, parameter, shape)
            elif name is None and not parameter.endswith(".inv_freq"):
                raise ModelError(f"{self.source.base}: GGUF has no place for its tensor {parameter}")
        return language, vision

    @property
    def _rows(self) -> int:
        stored = next(key for key, name in self.names.parameters.items() if name.endswith("embed_tokens.weight"))
        return self.merged.checkpoint.tensors[stored].shape[0]

    def _language_file(self, path: Path, pieces: list[Piece], outtype: OutType) -> GgufFile:
        file = GgufFile(path, self.language.arch, pieces, outtype)
        self._general(file, "model", outtype)
        add_language(file.writer, self.language, self.config.text_config, rows=self._rows)
        add_words(
            file.writer,
            self.processor.tokenizer,
            rows=self._rows,
            template=getattr(self.processor, "chat_template", None) or self.processor.tokenizer.chat_template,
            ends=self._ends(),
        )
        file.begin()
        return file

    def _ends(self) -> list[int]:
        """Tokens that end an answer, the tokenizer's own first."""
        own, generation = self.processor.tokenizer.eos_token_id, self.model.generation_config
        given = getattr(generation, "eos_token_id", None)
        others = given if isinstance(given, list) else [given]
        return list(dict.fromkeys(number for number in (own, *others) if number is not None))

    def _vision_file(self, path: Path, pieces: list[Piece]) -> GgufFile:
        file = GgufFile(path, "clip", pieces, OutType.F16)
        self._general(file, "mmproj", OutType.F16)
        self.shape.keys(file.writer, self.config, self.processor)
        file.begin()
        return file

    def _lora_file(self, path: Path, adapter: GgufAdapter) -> GgufFile:
        file = GgufFile(path, self.language.arch, adapter.pieces, OutType.F16)
        self._general(file, "adapter", None)
        file.writer.add_string("adapter.type", "lora")
        file.writer.add_float32("adapter.lora.alpha", adapter.alpha)
        file.begin()
        return file

    def _adapter(self) -> GgufAdapter:
        assert self.source.adapter is not None
        saved = {self.names.parameters.get(name, name) for name in self.merged.saved}
        model = weightless_model(self.config, str(self.source.base), trust_remote_code=self.trust)
        return GgufAdapter(model, self.source.adapter, self.words, saved)

    def _general(self, file: GgufFile, kind: str, outtype: OutType | None) -> None:
        package, base = gguf_package(), Path(self.source.base_name)
        file.writer.add_type(kind)
        # A directory's path is nobody's business but this machine's.
        file.writer.add_name(base.resolve().name if base.is_dir() else self.source.base_name)
        if outtype is not None:
            file.writer.add_file_type(package.LlamaFileType[f"MOSTLY_{outtype.name}"])
        file.writer.add_quantization_version(package.GGML_QUANT_VERSION)
