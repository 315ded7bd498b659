"""How an adapter lies on disk. The only room that knows: training writes through it, all others read through it.

adapter/
  adapter_config.json          a plain `peft.LoraConfig`
  adapter_model.safetensors    LoRA matrices and the projector's leaves
  processor files              tokenizer, image processor, chat template
  mmpeft.json                  where it comes from: recipe, data, versions, scores
"""

import contextlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mmpeft.config.train import PartTraining, changes_base
from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.core.files import read_json, whole_directory, write_json
from mmpeft.methods.readable import renamed, stored_modules
from mmpeft.models.base import quantized_as
from mmpeft.models.load import FACTS_NAME

logger = logging.getLogger(__name__)

MAGNITUDE = ".lora_magnitude_vector"

InitialLora = dict[str, torch.Tensor]
"""LoRA matrices as they were before training, for initialisations that change the base (PiSSA, OLoRA)."""


def initial_lora(model: PeftModel) -> InitialLora | None:
    """A copy of the LoRA matrices, to be taken before training; None where the base was left as it is."""
    if not changes_base({"init_lora_weights": _config(model).init_lora_weights}):
        return None
    state = get_peft_model_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in state.items() if ".lora_" in name}


def saved_as(training: PartTraining) -> PartTraining:
    """How a later stage finds what `training` made: PiSSA and OLoRA are written as a plain LoRA of twice the rank."""
    if not isinstance(training, dict) or not changes_base(training):
        return training
    factor = 2**0.5 if training.get("use_rslora") else 2
    kept = {key: value for key, value in training.items() if key != "init_lora_weights"}
    return {**kept, "r": 2 * training.get("r", 8), "lora_alpha": factor * training.get("lora_alpha", 8)}


def _config(model: PeftModel) -> LoraConfig:
    return cast(LoraConfig, model.peft_config["default"])


def save_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    processor: Any = None,
    facts: Mapping[str, Any] | None = None,
    initial: InitialLora | None = None,
    card: str | None = None,
) -> Path:
    """Write a plain PEFT adapter; the directory appears whole or not at all.

    Args:
        model: a `PeftModel` with the adapter "default".
        path: the directory to write.
        processor: saved beside the adapter, so that pixel limits and chat template travel with it.
        facts: content of mmpeft.json.
        initial: what `initial_lora` returned before training. PiSSA and OLoRA subtract their start from the
            base; the difference is written as a LoRA of twice the rank that fits the untouched base:
                W_res + B A  =  W + [B, -B0] [A; A0]
        card: text of README.md; default: PEFT's own.

    Raises:
        OutputError: the place cannot be written; an adapter that stood there is then still whole.
    """
    path = Path(path)
    with whole_directory(path) as folder:
        write_peft_files(model, folder)
        if initial is not None:
            _as_plain_lora(folder, renamed(initial, stored_modules(model)))
        _make_base_absolute(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        if facts is not None:
            write_json(folder / FACTS_NAME, facts)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return path


def write_peft_files(model: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """PEFT's own files as they stand in training: `save_adapter` and trainer checkpoints both start from them.

    `state_dict` replaces the model's own where its tensors are sharded over processes (ZeRO-3, FSDP).
    """
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state_dict)
    if _config(model).use_dora:
        _rename_magnitudes(folder)
    modules = stored_modules(model)
    if modules:
        weights = folder / SAFETENSORS_WEIGHTS_NAME
        save_file(renamed(load_file(weights), modules), weights, metadata={"format": "pt"})


def _rename_magnitudes(folder: Path) -> None:
    """Name DoRA's magnitudes as both loaders read them.

    peft 0.21 writes `....lora_magnitude_vector`, which its own loader takes, but which
    `from_pretrained(adapter)` of transformers 5.24 leaves out with a warning: other logits, no error. Both take
    `....lora_magnitude_vector.weight`. Without this the DoRA case of tests/methods/test_checkpoint.py fails; once
    it does not, transformers has mended it.
    """
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    state = load_file(weights)
    named = {f"{name}.weight" if name.endswith(MAGNITUDE) else name: tensor for name, tensor in state.items()}
    save_file(named, weights, metadata={"format": "pt"})


def _make_base_absolute(folder: Path) -> None:
    config = read_json(folder / CONFIG_NAME)
    base = config.get("base_model_name_or_path")
    if base and Path(base).is_dir():
        config["base_model_name_or_path"] = str(Path(base).resolve())
        write_json(folder / CONFIG_NAME, config)


def _as_plain_lora(folder: Path, initial: InitialLora) -> None:
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    trained = load_file(weights)
    merged = dict(trained)
    for name, start in initial.items():
        now, start = trained[name], start.to(trained[name])
        merged[name] = torch.cat([now, start], 0) if ".lora_A." in name else torch.cat([now, -start], 1)
    save_file(merged, weights, metadata={"format": "pt"})
    config = read_json(folder / CONFIG_NAME)
    config["init_lora_weights"] = True
    config["r"] *= 2
    # The scale is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA; it has to stay what it was.
    factor = 2**0.5 if config.get("use_rslora") else 2
    config["lora_alpha"] *= factor
    config["rank_pattern"] = {key: 2 * value for key, value in config.get("rank_pattern", {}).items()}
    config["alpha_pattern"] = {key: factor * value for key, value in config.get("alpha_pattern", {}).items()}
    write_json(folder / CONFIG_NAME, config)


def save_model(
    model: PreTrainedModel, path: str | Path, *, processor: Any = None, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write an ordinary Hugging Face model directory, with the processor; whole or not at all.

    Raises:
        ModelError: the model was read from int8 (compressed-tensors), which transformers turns into 16 bits as it runs.
        OutputError: the place cannot be written; a model that stood there is then still whole.
    """
    path = Path(path)
    if quantized_as(model.config) == "compressed-tensors":
        raise ModelError(
            f"{path}: {type(model).__name__} was read from int8 and is no longer that in memory; copy the directory "
            "that it was read from"
        )
    with whole_directory(path) as folder:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        if facts is not None:
            write_json(folder / FACTS_NAME, facts)
    return path


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter directory, on CPU, by the names `peft.get_peft_model_state_dict` gives them.

    Raises:
        AdapterError: no adapter there, or its file is cut short.
    """
    file = Path(path) / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise AdapterError(f"{path}: no {SAFETENSORS_WEIGHTS_NAME} there; expected a directory that holds an adapter")
    try:
        return {name.replace(f"{MAGNITUDE}.weight", MAGNITUDE): tensor for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file}: not a whole safetensors file ({error}); train or copy it again") from error


def carry_over(model: PeftModel, previous: str | Path) -> list[str]:
    """Load what an earlier stage trained into a model prepared for the next one.

    Every tensor of the earlier adapter has to find its place: nothing that was trained gets lost.

    Returns:
        The names that were loaded.

    Raises:
        AdapterError: a tensor of the earlier adapter has no place here, or another shape.
    """
    modules = stored_modules(model)
    weights = renamed(read_weights(previous), {stored: name for name, stored in modules.items()})
    current = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = sorted(set(weights) - set(current))
    if lost:
        raise AdapterError(
            f"{previous}: {len(lost)} of its {len(weights)} tensors have no place in the next stage, first {lost[0]}; "
            "let the next stage train the same parts and modules, or start it from a merged model"
        )
    for name, tensor in weights.items():
        if tensor.shape != current[name].shape:
            raise AdapterError(
                f"{previous}: {name} has shape {tuple(tensor.shape)}, the next stage expects "
                f"{tuple(current[name].shape)}; give both stages the same `r`"
            )
    set_peft_model_state_dict(model, renamed({**current, **weights}, modules))
    logger.info("carried %d tensors over from %s", len(weights), previous)
    return sorted(weights)


def copy_adapter(source: Path, destination: Path, *, facts: Mapping[str, Any], card: str) -> None:
    """The adapter in `source` under another name, with its final facts and card; whole or not at all."""
    with whole_directory(destination) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        write_json(folder / FACTS_NAME, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")


def remove_directory(path: Path) -> None:
    """Remove a directory that may not be there."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
