"""`mmpeft compose`: what an adapter trains whole goes into the base, and its LoRA stays an adapter.

out/
  model/      the base with the trained projector in it: shards without a changed tensor are hard links to the base's
  adapter/    a pure LoRA on out/model, as servers that put adapters on at run time want it
  mmpeft.json

Weights keep their place in their files, so a shard that changes is a copy with some bytes written over.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.core.files import read_json, write_json, writing
from mmpeft.export.artefact import artefact
from mmpeft.export.merge import BASE_LAYOUT, MergedModel, all_finite
from mmpeft.export.shards import Checkpoint
from mmpeft.export.sources import OF_FILES, Source, find_source, write_companions
from mmpeft.models.load import BASE_REVISION, FACTS_NAME, load_processor

KIND = "composed model"


@dataclass(frozen=True, kw_only=True)
class ComposeResult:
    """What was written.

    Attributes:
        model: directory of the base with the projector in it.
        adapter: directory of the pure LoRA; None where the adapter has no LoRA.
        baked: number of tensors of the base that changed.
        rewritten: files of weights that were written.
        linked: files that are hard links to the base's.
        copied: files that were copied, since they could not be linked.
        notes: what of the LoRA servers may not take.
    """

    model: Path
    adapter: Path | None
    baked: int
    rewritten: tuple[str, ...]
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    notes: tuple[str, ...]


def compose(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    link: bool = True,
    trust_remote_code: bool = False,
) -> ComposeResult:
    """Put all that an adapter trains whole (projector, biases, token embeddings) into its base, and leave a pure LoRA.

        done = compose("runs/receipts/adapter", "receipts")
        PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(done.model), done.adapter)

    Args:
        adapter: directory or hub id of an adapter.
        output: a new or empty directory, or an earlier export, which is replaced.
        base: directory or hub id of the base; default: the one that the adapter names.
        link: whether files of the base that do not change may be hard links instead of copies.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError: it is no adapter, does not fit the base, or trains nothing whole.
        ModelError: the base is not whole, quantized, has no processor, or weights that are NaN or infinite.
        OutputError: the output holds something else, has no room, or cannot be written; it is then as it was.
    """
    source = find_source(adapter, base=base)
    if source.adapter is None:
        raise AdapterError(f"{adapter}: a whole model, not an adapter; there is nothing to put into a base")
    merged = MergedModel(source.base, source.adapter, trust_remote_code=trust_remote_code)
    if not merged.saved:
        raise AdapterError(
            f"{adapter}: a pure LoRA already, on {source.base_name}; there is nothing to put into a base"
        )
    if merged.untied:
        raise AdapterError(
            f"{adapter}: it tells embeddings and head apart, which the base ties; use `mmpeft merge` instead"
        )
    checkpoint = merged.checkpoint
    changing = sorted({checkpoint.tensors[name].file for name in merged.saved})
    with artefact(
        output,
        kind=KIND,
        needs=_needs(source, Path(output), changing, link=link),
        sources=source.folders,
        facts={"base_model": source.base_name, "composed_adapter": source.name},
    ) as out:
        model = out.folder / "model"
        model.mkdir()
        write_companions(source, model, trust_remote_code=trust_remote_code)
        _check_finite(checkpoint)
        with writing(model):
            linked, copied = _place(checkpoint, model, changing, link=link)
            _write_over(merged, model)
        final = Path(output).expanduser().resolve() / "model"
        has_lora = _write_lora(source, out.folder / "adapter", final, Checkpoint(model))
        if has_lora:
            processor = load_processor(model, trust_remote_code=trust_remote_code)
            processor.save_pretrained(out.folder / "adapter")
    return ComposeResult(
        model=Path(output) / "model",
        adapter=Path(output) / "adapter" if has_lora else None,
        baked=len(merged.saved),
        rewritten=tuple(changing),
        linked=tuple(linked),
        copied=tuple(copied),
        notes=_notes(read_json(source.adapter / CONFIG_NAME)) if has_lora else (),
    )


def _check_finite(checkpoint: Checkpoint) -> None:
    """Refuse a base with weights that are no numbers, in files that are only linked as well; each is read once."""
    for name, tensor in checkpoint:
        if not all_finite(tensor):
            raise ModelError(f"{checkpoint.folder}: {name} has weights that are NaN or infinite; fetch it again")


def _needs(source: Source, output: Path, changing: list[str], *, link: bool) -> int:
    """Bytes that are written, as far as links can be made."""
    place = output.expanduser().absolute()
    while not place.exists():
        place = place.parent
    files = Checkpoint(source.base).files
    written = changing if link and place.stat().st_dev == source.base.stat().st_dev else files
    lora = 0 if source.adapter is None else (source.adapter / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return sum((source.base / file).stat().st_size for file in written) + lora


def _place(checkpoint: Checkpoint, model: Path, changing: list[str], *, link: bool) -> tuple[list[str], list[str]]:
    """Bring all files of weights; those that do not change as links where that goes."""
    linked, copied = [], []
    for file in checkpoint.files:
        # A snapshot of the Hub's cache has links of its own, which lead nowhere from another folder.
        original = (checkpoint.folder / file).resolve()
        if file not in changing and link and _link(original, model / file):
            linked.append(file)
            continue
        shutil.copyfile(original, model / file)
        if file not in changing:
            copied.append(file)
    if len(checkpoint.files) > 1:
        shutil.copyfile(checkpoint.folder / SAFE_WEIGHTS_INDEX_NAME, model / SAFE_WEIGHTS_INDEX_NAME)
    return linked, copied


def _link(original: Path, link: Path) -> bool:
    try:
        os.link(original, link)
    except OSError:
        return False
    return True


def _write_over(merged: MergedModel, model: Path) -> None:
    """Write each changed tensor over the copy of its base's: name, shape and type stay, so its place does too."""
    for name in sorted(merged.saved):
        stored = merged.checkpoint.tensors[name]
        for out, tensor in merged.merged(name, merged.checkpoint.read(name)):
            if out != name or tensor.nbytes != stored.bytes:
                raise AdapterError(f"{name}: it does not keep its place in {stored.file}; use `mmpeft merge` instead")
            with (model / stored.file).open("r+b") as file:
                file.seek(stored.begin)
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _write_lora(source: Source, folder: Path, model: Path, checkpoint: Checkpoint) -> bool:
    """The adapter's LoRA as one of its own on `model`; False where it has none."""
    if source.adapter is None:
        return False
    weights = load_file(source.adapter / SAFETENSORS_WEIGHTS_NAME)
    lora = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    if not lora:
        return False
    folder.mkdir()
    with writing(folder):
        save_file(lora, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = read_json(source.adapter / CONFIG_NAME)
    bare = {"modules_to_save": None, "trainable_token_indices": None, "bias": "none", "revision": None}
    write_json(folder / CONFIG_NAME, {**config, **bare, "base_model_name_or_path": str(model)})
    facts = {
        **{key: value for key, value in source.facts.items() if key not in (*OF_FILES, BASE_REVISION)},
        "base_model": str(model),
        "base_model_relative": "../model",
        BASE_LAYOUT: checkpoint.layout_hash(),
    }
    write_json(folder / FACTS_NAME, facts)
    return True


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What servers that put LoRA on at run time may not take, vLLM by its documentation of LoRA among them."""
    wants = {
        "use_dora": "DoRA (use_dora)",
        "lora_bias": "biases of LoRA (lora_bias)",
        "target_parameters": "LoRA on the parameters of experts (target_parameters)",
    }
    return tuple(
        f"the adapter has {what}, which servers may not take" for key, what in wants.items() if config.get(key)
    )
