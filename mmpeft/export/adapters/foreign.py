"""What other programs write beside, or instead of, a plain PEFT adapter; read without running any code.

    LLaVA            mm_projector.bin · non_lora_trainables.bin      model.mm_projector.0.weight
                     adapter_model.bin or .safetensors               base_model.model.model.layers.0....lora_A.weight
    ms-swift         vit.safetensors                                 base_model.model.model.visual....
    MindSpeed-MM     lora_adapter_iteration_10.safetensors           model.layers.0....lora_A.default.weight

LLaVA: haotian-liu/LLaVA, llava/train/train.py. ms-swift: swift/tuner_plugin/lora_llm.py (tower and projector in full
beside LoRA). MindSpeed-MM: mindspeed_mm/fsdp/utils/lora_weight_manager.py (FSDP2).
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmpeft.core.errors import AdapterError
from mmpeft.export.adapters.files import read_config

FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
    "mm_projector.bin",
    "vit.safetensors",
)
"""Names of files that are read of a directory, beside those of MindSpeed-MM."""

_MINDSPEED = re.compile(r"lora_adapter(?:_iteration_(\d+))?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Tensors as another program wrote them.

    Attributes:
        files: what was read.
        tensors: by name, without what wrappers put before and into names.
        config: content of adapter_config.json; None where there is none.
    """

    files: tuple[Path, ...]
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] | None


def read_foreign(source: str | Path) -> Foreign:
    """The tensors of a file, or of all known files of a directory.

    Raises:
        AdapterError: no known file there, one holds more than tensors, two hold one tensor differently, or there are
            several states of one training.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    files = _files(source)
    tensors: dict[str, torch.Tensor] = {}
    owner: dict[str, Path] = {}
    for file in files:
        for key, tensor in read_tensors(file).items():
            name = plain_name(key)
            if name is None:
                continue
            if name in tensors and not torch.equal(tensors[name], tensor):
                raise AdapterError(f"{file}: {name} differs from that of {owner[name].name}; give one file of the two")
            tensors[name], owner[name] = tensor, file
    config = read_config(folder) if (folder / CONFIG_NAME).is_file() else None
    return Foreign(files=tuple(files), tensors=tensors, config=config)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise AdapterError(f"{source}: no such file or directory")
    found = [source / name for name in FILES if (source / name).is_file()]
    # Where both are there they hold the same, and one of them is no pickle.
    if source / FILES[0] in found and source / FILES[1] in found:
        found.remove(source / FILES[1])
    states = sorted(file for file in source.iterdir() if _MINDSPEED.fullmatch(file.name))
    if len(states) > 1:
        raise AdapterError(
            f"{source}: {len(states)} states of one LoRA, {', '.join(f.name for f in states)}; give one file"
        )
    if not found and not states:
        raise AdapterError(
            f"{source}: no file there that can be converted; expected {', '.join(FILES)} or lora_adapter*.safetensors"
        )
    return [*found, *states]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a pickle that holds nothing else.

    Raises:
        AdapterError: the file is not whole, or a pickle that could run code.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings():
            # Of a pickle by another protocol than torch's; what cannot be read is an error below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{file}: holds more than tensors, and reading it could run code of whoever wrote it, so it was not read "
            f"({' '.join(str(error).split())[:160]}); ask for a safetensors file"
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise AdapterError(f"{file}: not a whole file of tensors ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in found.items()
    ):
        raise AdapterError(f"{file}: holds something else than tensors by name; expected those alone")
    return {str(key): value.contiguous() for key, value in found.items()}


def plain_name(key: str) -> str | None:
    """A tensor's name without what wrappers put before it and into it; None for a copy that does not count.

    base_model.model.model.layers.0.q_proj.lora_A.default.weight  ->  model.layers.0.q_proj.lora_A.weight
    """
    if ".original_module." in key:
        return None
    name = key
    for prefix in ("_orig_mod.", "module.", "base_model.model.", "_orig_mod."):
        name = name.removeprefix(prefix)
    name = re.sub(r"\.modules_to_save\.(default\.)?", ".", name)
    return re.sub(r"\.base_layer\.", ".", re.sub(r"(\.lora_\w+)\.default\b", r"\1", name))


_LLAVA = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.image_newline$", "image_newline"),
    (r"^model\.(layers|embed_tokens|norm)\.", r"language_model.model.\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)
"""From names of haotian-liu/LLaVA to those of LLaVA's checkpoints on the Hub, after
transformers/models/llava/convert_llava_weights_to_hf.py."""

_PROJECTOR = re.compile(r"^(?:model\.)?mm_projector\.(?:(\d+)\.)?(weight|bias)$")


def candidates(name: str, leaves: Mapping[int, str]) -> Iterator[str]:
    """Names that a foreign parameter may have in the base's checkpoint, the likeliest first.

    Args:
        name: as `plain_name` gives it.
        leaves: by their numbers in LLaVA's `nn.Sequential`, the projector's modules in the base.
    """
    match = _PROJECTOR.match(name)
    if match:
        module = leaves.get(int(match.group(1) or 0))
        if module is not None:
            yield f"{module}.{match.group(2)}"
        return
    yield name
    for pattern, replacement in _LLAVA:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            yield renamed
