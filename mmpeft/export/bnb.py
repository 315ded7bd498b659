"""bitsandbytes: LLM.int8 or NF4 weights, for transformers on one device.

transformers quantizes while it reads, so the merged model lies beside the output for that long.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from mmpeft.core.errors import RecipeError
from mmpeft.core.optional import require
from mmpeft.export.artefact import BNB, artefact
from mmpeft.export.int8 import Int8Export
from mmpeft.export.merged_model import untied
from mmpeft.export.shards import Checkpoint, write_shards
from mmpeft.export.sources import base_config, write_companions
from mmpeft.models.checkpoints import reading
from mmpeft.models.load import auto_class
from mmpeft.models.weightless import read_config

BnbKind = Literal["int8", "nf4"]

COPIES = 2
"""Of the model's weights that there is room for while it is written: the merged one lies beside what comes of it."""


@dataclass(frozen=True, kw_only=True)
class BnbResult:
    """What was written.

    Attributes:
        output: the model's directory.
        quantized: names of the linear layers that bitsandbytes holds.
        bytes: of all tensors.
        before: of the merged model's.
    """

    output: Path
    quantized: tuple[str, ...]
    bytes: int
    before: int


def write_bnb(export: Int8Export, output: str | Path, *, kind: BnbKind, device: torch.device) -> BnbResult:
    """Write a source with its linear layers as bitsandbytes holds them.

    Args:
        export: the source, and which layers are quantized; its other settings are not looked at.
        output: a new or empty directory, or an earlier export, which is replaced.
        kind: `int8` (LLM.int8, arXiv:2208.07339) or `nf4` (4 bits, arXiv:2305.14314).
        device: where they are quantized.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        OutputError: the output holds something else, has no room, or cannot be written.
    """
    require("bitsandbytes", extra="quant")
    source, merged = export.source, export.merged
    facts = source.own_facts
    facts |= {"base_model": source.base_name, "bitsandbytes": kind, "left": dict(export.linears.left)}
    needs = COPIES * merged.checkpoint.bytes
    with artefact(output, kind=BNB, needs=needs, sources=source.folders, facts=facts) as out:
        config = base_config(source.base)
        config = untied(config) if merged.untied else config
        write_companions(source, out.folder, config=config, trust_remote_code=export.trust)
        with tempfile.TemporaryDirectory(prefix=".merged-", dir=out.folder) as folder:
            write_companions(source, Path(folder), config=config, trust_remote_code=export.trust)
            write_shards(iter(merged), Path(folder))
            model = _read(folder, _settings(export, kind), device, trust_remote_code=export.trust)
        model.save_pretrained(out.folder)
        names = tuple(
            name for name, module in model.named_modules() if type(module).__module__.startswith("bitsandbytes")
        )
        written = Checkpoint(out.folder).bytes
    return BnbResult(output=Path(output), quantized=names, bytes=written, before=merged.checkpoint.bytes)


def without_uneven(export: Int8Export, kind: BnbKind) -> Int8Export:
    """The same without layers that bitsandbytes cannot hold: NF4 has a scale for each 64 numbers of a row on CPUs.

    Raises:
        RecipeError: none is left.
    """
    if kind == "int8":
        return export
    shapes = export.merged.checkpoint.tensors
    uneven = [name for name, stored in export.linears.chosen.items() if shapes[stored].shape[1] % _NF4_BLOCK]
    if len(uneven) == len(export.linears.chosen):
        raise RecipeError(
            f"kind: nf4 holds layers whose inputs are a multiple of {_NF4_BLOCK}, and none of those that are left is "
            "(--skip takes others out); take --kind int8"
        )
    return export.with_skipped(uneven) if uneven else export


_NF4_BLOCK = 64


def _settings(export: Int8Export, kind: BnbKind) -> BitsAndBytesConfig:
    left = list(export.linears.left)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=left,
    )


def _read(folder: str, settings: BitsAndBytesConfig, device: torch.device, *, trust_remote_code: bool) -> Any:
    config = read_config(folder, trust_remote_code=trust_remote_code)
    with reading(folder, "model"):
        return auto_class(config, folder).from_pretrained(
            folder,
            quantization_config=settings,
            device_map={"": device},
            dtype="auto",
            trust_remote_code=trust_remote_code,
        )
