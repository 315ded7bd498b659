"""A LoRA as a GGUF adapter, which llama.cpp puts on its base when it starts (`--lora`).

llama.cpp adds `alpha / r * B A` to a matrix, one alpha for all: what else PEFT scales by goes into B.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from mmpeft.core.errors import AdapterError
from mmpeft.export.gguf_file import Piece
from mmpeft.export.gguf_language import LanguageNames
from mmpeft.export.merge import ADAPTER
from mmpeft.models.load import attach_adapter

_WRAPPED = ("base_layer",)


class GgufAdapter:
    """The language model's LoRA of an adapter.

    Args:
        model: the base, without weights; the adapter is attached to it.
        adapter: the adapter's directory.
        names: of the language model in GGUF.
        saved: names of parameters that something else in the adapter changes than LoRA.

    Attributes:
        alpha: of the whole adapter.
        pieces: tensors of the file.

    Raises:
        AdapterError: it holds something that a GGUF adapter cannot express.
    """

    def __init__(self, model: Any, adapter: Path, names: LanguageNames, saved: set[str]) -> None:
        self.alpha = 0.0
        self.pieces: list[Piece] = []
        self._tensors: dict[str, torch.Tensor] = {}
        for parameter in sorted(saved):
            if names.name(parameter) is not None:
                raise _refused(adapter, parameter, "is changed by something else than LoRA")
        for path, module in attach_adapter(model, adapter, weightless=True).get_base_model().named_modules():
            parameter = ".".join(part for part in path.split(".") if part not in _WRAPPED) + ".weight"
            if isinstance(module, LoraLayer) and names.name(parameter) is not None:
                self._add(module, parameter, adapter, names)
        if not self.pieces:
            raise AdapterError(
                f"{adapter}: it has no LoRA on the language model, so there is no adapter to write; leave out --lora"
            )

    def _add(self, module: Any, parameter: str, adapter: Path, names: LanguageNames) -> None:
        if ADAPTER not in module.lora_A:
            raise _refused(adapter, parameter, "is changed by a LoRA on embeddings or on bare parameters")
        if module.use_dora.get(ADAPTER) or getattr(module, "lora_variant", {}).get(ADAPTER) is not None:
            raise _refused(adapter, parameter, "is changed by DoRA or another variant of LoRA")
        if module.lora_bias.get(ADAPTER):
            raise _refused(adapter, parameter, "gets a bias from its LoRA")
        if parameter == "lm_head.weight":
            raise _refused(adapter, parameter, "is changed, and where embeddings are tied llama.cpp has no head apart")
        first, second = module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach()
        rank = first.shape[0]
        scale = float(module.scaling[ADAPTER]) * rank
        self.alpha = self.alpha or scale
        # llama.cpp looks at the base's rows in its own order.
        second = names.take(parameter)(second.float()) * (scale / self.alpha)
        for letter, tensor in (("a", first.float()), ("b", second)):
            name = f"{names.name(parameter)}.lora_{letter}"
            self.pieces.append(Piece(source=name, name=name, shape=tuple(tensor.shape), exact=True))
            self._tensors[name] = tensor

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name and tensor."""
        yield from self._tensors.items()


def _refused(adapter: Path, parameter: str, why: str) -> AdapterError:
    return AdapterError(f"{adapter}: {parameter} {why}, which no GGUF adapter can say; leave out --lora to merge it")
