"""`mmpeft adapters diff`: how far two adapters are from each other.

Of LoRA the products are compared, not the matrices: two adapters may do the same by other matrices. With small ranks
neither product has to be made:

    <B1 A1, B2 A2>  =  sum of (B1^T B2) * (A1 A2^T)          both [rank 1, rank 2]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpeft.export.adapters.files import AdapterFiles, LoraModule, read_adapter

_BESIDE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping")
"""Fields of adapter_config.json that say nothing of what an adapter does."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """Two tensors, or two products of LoRA, beside each other.

    Attributes:
        name: of the module with LoRA, or of the tensor that is saved whole.
        first: norm (root of the sum of squares) of the first.
        second: of the second.
        difference: of their difference.
        cosine: of the angle between them; None where one of them is zero.
    """

    name: str
    first: float
    second: float
    difference: float
    cosine: float | None


@dataclass(frozen=True, kw_only=True)
class AdapterDiff:
    """What two adapters differ in.

    Attributes:
        config: by field of adapter_config.json, the two values, where they differ.
        bases: the base that each names.
        only_first: modules and tensors that the second lacks.
        only_second: those that the first lacks.
        shapes: by name, the two shapes, where they differ.
        lora: of each module that both have LoRA on, the largest difference first.
        whole: of each tensor that both save whole.
    """

    config: dict[str, tuple[Any, Any]]
    bases: tuple[Any, Any]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    lora: tuple[Distance, ...]
    whole: tuple[Distance, ...]

    @property
    def same(self) -> bool:
        """Whether both do the same, to the last bit of what was computed here."""
        apart = self.only_first or self.only_second or self.shapes
        return not apart and all(row.difference == 0 for row in (*self.lora, *self.whole))


def diff_adapters(first: str | Path, second: str | Path) -> AdapterDiff:
    """Compare two adapters: configuration, names, shapes, and how far their weights are apart.

    Raises:
        AdapterError: one of them is not a whole adapter.
    """
    one, two = read_adapter(first), read_adapter(second)
    names_one, names_two = {*one.lora, *one.whole}, {*two.lora, *two.whole}
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    lora, whole = [], []
    for name in sorted(one.lora.keys() & two.lora.keys()):
        sizes = _sizes(one.lora[name]), _sizes(two.lora[name])
        if sizes[0] != sizes[1]:
            shapes[name] = sizes
        else:
            lora.append(_lora_distance(name, one.lora[name], two.lora[name]))
    for name in sorted(one.whole.keys() & two.whole.keys()):
        if one.whole[name].shape != two.whole[name].shape:
            shapes[name] = (tuple(one.whole[name].shape), tuple(two.whole[name].shape))
        else:
            whole.append(_distance(name, one.whole[name], two.whole[name]))
    return AdapterDiff(
        config=_fields(one.config, two.config),
        bases=(one.config.get("base_model_name_or_path"), two.config.get("base_model_name_or_path")),
        only_first=tuple(sorted(names_one - names_two)),
        only_second=tuple(sorted(names_two - names_one)),
        shapes=shapes,
        lora=tuple(sorted(lora, key=lambda row: -row.difference)),
        whole=tuple(sorted([*whole, *_more(one, two)], key=lambda row: -row.difference)),
    )


def _fields(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = sorted({*one, *two} - {*_BESIDE})
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


def _sizes(module: LoraModule) -> tuple[int, ...]:
    """Shape of what a LoRA adds; its rank may differ."""
    return (module.b.shape[0], *module.a.shape[1:])


def _lora_distance(name: str, one: LoraModule, two: LoraModule) -> Distance:
    def product(first: LoraModule, second: LoraModule) -> float:
        a = first.a.double().flatten(1) @ second.a.double().flatten(1).T
        b = first.b.double().flatten(1).T @ second.b.double().flatten(1)
        return float((a * b).sum()) * first.scale * second.scale

    same = all(torch.equal(x, y) for x, y in ((one.a, two.a), (one.b, two.b))) if one.scale == two.scale else False
    squares, inner = (product(one, one), product(two, two)), product(one, two)
    difference = 0.0 if same else max(squares[0] + squares[1] - 2 * inner, 0.0) ** 0.5
    norms = squares[0] ** 0.5, squares[1] ** 0.5
    cosine = inner / (norms[0] * norms[1]) if all(norms) else None
    return Distance(name=name, first=norms[0], second=norms[1], difference=difference, cosine=cosine)


def _distance(name: str, one: torch.Tensor, two: torch.Tensor) -> Distance:
    first, second = one.double().flatten(), two.double().flatten()
    norms = float(first.norm()), float(second.norm())
    cosine = float(first @ second) / (norms[0] * norms[1]) if all(norms) else None
    difference = float((first - second).norm())
    return Distance(name=name, first=norms[0], second=norms[1], difference=difference, cosine=cosine)


def _more(one: AdapterFiles, two: AdapterFiles) -> list[Distance]:
    """DoRA's magnitudes and biases of LoRA, where both have them."""
    return [
        _distance(f"{name}.{end}", tensor, two.lora[name].more[end])
        for name in sorted(one.lora.keys() & two.lora.keys())
        for end, tensor in one.lora[name].more.items()
        if end in two.lora[name].more and tensor.shape == two.lora[name].more[end].shape
    ]
