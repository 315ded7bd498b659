"""A model with its processor, from a directory or the Hub, with an adapter or without."""

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.auto_factory import _get_model_class

from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.core.files import read_json
from mmpeft.families.registry import FAMILIES, trained_model
from mmpeft.models.base import quantized_as
from mmpeft.models.checkpoints import check_complete, check_name, load_weights, looks_like_path, reading
from mmpeft.models.devices import pick_device, pick_dtype
from mmpeft.models.modeling_composed import ComposedConfig
from mmpeft.models.pixels import limit_pixels
from mmpeft.models.quantized import Quantization, made_trainable, quantization_config
from mmpeft.models.sharded import SharedOut, Sharing, is_sharded, place_whole

logger = logging.getLogger(__name__)

FACTS_NAME = "mmpeft.json"
"""File of an adapter that mmpeft wrote; its `base_model_relative` says where the base lies from there."""

BASE_REVISION = "base_revision"
"""Its key with the commit of a base on the Hub that the adapter was trained on."""

BASE_WEIGHTS = "base_weights"
"""Its key with hashes of the files of a base that the run itself made; of others `base` has them."""

_COMMIT = re.compile("[0-9a-f]{40}")

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""One of them lies where a processor does."""

NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.gguf", "*.onnx", "checkpoint-*"]
"""What is not fetched of a repository on the Hub: pickles, weights in other formats, checkpoints of training."""
_SHOWN = 3
"""Names listed in a message before it says how many more there are."""


def load_model(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
    sharing: Sharing | None = None,
    quantization: Quantization | None = None,
) -> tuple[Any, Any]:
    """A model and its processor.

        load_model("llava-hf/llava-1.5-7b-hf")                          a base
        load_model("llava-hf/llava-1.5-7b-hf", adapter="me/receipts")   a base with an adapter on it
        load_model("runs/receipts/adapter")                             an adapter, on the base that it names

    A base on the Hub that an adapter names is read at the commit that the adapter's mmpeft.json records, if it does.

    Args:
        name_or_path: hub id or directory of a model of a known family, or of an adapter.
        adapter: hub id or directory of an adapter for that model.
        device: "auto" (the accelerator, else the CPU), or a torch device.
        dtype: "auto" (float32 on a CPU, else the checkpoint's own; of bitsandbytes' weights that always), or a
            precision.
        max_pixels: most pixels of a picture that the processor keeps, saved with it; default: its own limit.
        trust_remote_code: whether code that comes with the checkpoint may run. Composed models need none here.
        sharing: share its layers out over processes; default: this one has the whole model.
        quantization: read the language model's matrices in 8 or 4 bits: `int8`, `nf4` (`mmpeft[quant]`).

    Returns:
        The model in eval mode, a `PeftModel` if there is an adapter; and the processor, the adapter's own if it
        has one, else the base's.

    Raises:
        ModelError: not there, not reachable, no safetensors, or not a multimodal model of a known family.
        AdapterError: the adapter does not fit the base to the last key, or its base is not to be found.
    """
    target = pick_device(device)
    precision = pick_dtype(dtype, target)
    base, folder, revision = str(name_or_path), None, None
    if adapter is not None:
        folder = resolve_adapter(str(adapter))
    elif is_adapter(base):
        folder = resolve_adapter(base)
        base = adapter_base(folder)
        revision = trained_revision(folder, base)
    try:
        how = _How(
            trust_remote_code=trust_remote_code,
            sharing=sharing,
            quantization=quantization,
            device=target,
            own_precision=dtype == "auto",
            revision=revision,
        )
        model = _load_base(base, dtype=precision, how=how)
    except ModelError as error:
        if folder is None or adapter is not None:
            raise
        which = f" at revision {revision}, on which it was trained," if revision else ""
        raise AdapterError(
            f"{name_or_path}: its base model{which} cannot be read ({error}); say where the base is: "
            f"load_model(BASE, adapter={str(name_or_path)!r})"
        ) from error
    if is_sharded(model):
        place_whole(model, target)
    elif quantization is None and not is_deepspeed_zero3_enabled():
        cast(nn.Module, model).to(target)
    processor = load_processor(
        base, adapter=folder, max_pixels=max_pixels, trust_remote_code=trust_remote_code, revision=revision
    )
    return (model if folder is None else attach_adapter(model, folder)), processor


def load_processor(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """The processor that lies in the adapter's directory, else the base's, `max_pixels` set on it.

    Args:
        name_or_path: directory or hub id of the base.
        adapter: directory of the adapter.
        max_pixels: most pixels of a picture; default: the processor's own limit.
        trust_remote_code: whether code that comes with it may run.
        revision: commit of the base on the Hub; default: the newest.

    Raises:
        ModelError: there is none, or it does not take media and text, or its pictures have a fixed size.
    """
    beside = adapter is not None and any((Path(adapter) / file).is_file() for file in PROCESSOR_FILES)
    name = str(adapter if beside else name_or_path)
    check_name(name)
    with reading(name, "processor"):
        processor = AutoProcessor.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=None if beside else revision
        )
    takes_media = any(hasattr(processor, name) for name in ("image_processor", "feature_extractor"))
    if not takes_media or not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"{name}: {type(processor).__name__} is no processor of pictures and text; expected processor_config.json, "
            "an image processor (or a feature extractor of sound) and a tokenizer there"
        )
    if max_pixels is not None:
        limit_pixels(processor, max_pixels)
    return processor


def adapter_base(folder: str | Path) -> str:
    """Directory or hub id of the model that an adapter was made for.

    Raises:
        AdapterError: the adapter names none, or a directory that is not there any more.
    """
    folder = Path(folder)
    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise AdapterError(
            f"{folder}: the adapter names no base model; load it as load_model(BASE, adapter={str(folder)!r})"
        )
    if Path(named).is_dir():
        return str(named)
    relative = read_facts(folder).get("base_model_relative")
    if relative and (folder / relative).is_dir():
        moved = str((folder / relative).resolve())
        logger.info("the base model is not at %s any more; taking it from %s", named, moved)
        return moved
    if not looks_like_path(named):
        return str(named)
    raise AdapterError(
        f"{folder}: its base model {named} does not exist any more; put it back, or say where it is: "
        f"load_model(BASE, adapter={str(folder)!r})"
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """Content of mmpeft.json; empty where there is none.

    Raises:
        AdapterError: it is damaged.
    """
    file = folder / FACTS_NAME
    try:
        found = read_json(file) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: cannot be read ({error}); train or copy it again") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{file}: holds a {type(found).__name__}, not facts by name; train or copy it again")
    for key, sound in _SOUND.items():
        if found.get(key) is not None and not sound(found[key]):
            raise AdapterError(f"{file}: {key} is {str(found[key])[:80]!r}, which it cannot be; train or copy it again")
    return found


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _are_origins(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict) and _are_hashes(each.get("files") or {}) for each in value
    )


_SOUND: Mapping[str, Callable[[Any], bool]] = {
    "base_model_relative": lambda value: isinstance(value, str),
    "base": _are_origins,
    BASE_WEIGHTS: _are_hashes,
}
"""Keys that decide what is read, and what their values have to be."""


def trained_revision(folder: Path, base: str) -> str | None:
    """The commit of a base on the Hub that an adapter was trained on; None of directories, and where none is recorded.

    Args:
        folder: of the adapter.
        base: what `adapter_base` says of it.

    Raises:
        AdapterError: mmpeft.json is damaged.
    """
    found = None if Path(base).is_dir() else read_facts(folder).get(BASE_REVISION)
    if found is not None and not (isinstance(found, str) and _COMMIT.fullmatch(found)):
        raise AdapterError(
            f"{folder / FACTS_NAME}: {BASE_REVISION} is {str(found)[:80]!r}, no commit on the Hub; train or copy it "
            "again, or take it out to use the newest"
        )
    return found


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Content of adapter_config.json.

    Raises:
        AdapterError: there is none, or it is damaged.
    """
    file = folder / CONFIG_NAME
    try:
        found = read_json(file)
    except FileNotFoundError as error:
        raise AdapterError(f"{folder}: no {CONFIG_NAME} there; expected a directory that holds an adapter") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file}: cannot be read ({error}); train or copy it again") from error
    if not isinstance(found, dict):
        raise AdapterError(f"{file}: holds a {type(found).__name__}, not settings by name; train or copy it again")
    named = found.get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise AdapterError(
            f"{file}: base_model_name_or_path is {str(named)[:80]!r}, not a name; train or copy it again"
        )
    return found


def is_adapter(name: str) -> bool:
    """Whether a directory or hub repository holds an adapter and no model of its own."""
    if Path(name).is_dir():
        return (Path(name) / CONFIG_NAME).is_file() and not (Path(name) / "config.json").is_file()
    check_name(name)
    with reading(name, "model"):
        try:
            hf_hub_download(name, CONFIG_NAME)
        except LocalEntryNotFoundError:
            if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                raise
            return False
        except EntryNotFoundError:
            return False
    return True


def resolve_adapter(name: str) -> Path:
    """The adapter's directory, fetched without pickles if it is on the Hub; checked to hold a whole adapter."""
    folder = Path(name)
    try:
        if not folder.is_dir():
            check_name(name)
            with reading(name, "adapter"):
                folder = Path(snapshot_download(name, ignore_patterns=NOT_FETCHED))
    except ModelError as error:
        raise AdapterError(str(error)) from error
    lacking = [file for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / file).is_file()]
    if lacking:
        pickled = (
            " (a pickled .bin can run code when it is read and is refused)"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise AdapterError(
            f"{name}: no {' and no '.join(lacking)} there{pickled}; expected the directory of a whole PEFT adapter"
        )
    return folder


@dataclass(frozen=True, kw_only=True)
class _How:
    """How a base is read, beside its precision."""

    trust_remote_code: bool
    sharing: Sharing | None
    quantization: Quantization | None
    device: torch.device
    own_precision: bool
    revision: str | None


def _load_base(name: str, *, dtype: torch.dtype | str, how: _How) -> PreTrainedModel:
    check_name(name)
    with reading(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=how.trust_remote_code, revision=how.revision)
    if how.own_precision and quantized_as(config) == "bitsandbytes":
        # transformers 5.24 brings but a part of such a checkpoint to another precision, and its layers then refuse each
        # other. That has gone when one in bfloat16 answers after `from_pretrained(dtype=torch.float32)`.
        dtype = config.dtype or dtype
    loader = _loader(config, name)
    options: dict[str, Any] = {}
    if how.sharing is not None:
        mapping = getattr(loader, "_model_mapping", None)
        loader = SharedOut(loader if mapping is None else _get_model_class(config, mapping), how.sharing)
    if how.quantization is not None:
        if quantized_as(config) is not None:
            raise ModelError(f"{name}: is quantized already; leave `quantization` out")
        meta = skeleton(config, name, trust_remote_code=how.trust_remote_code)
        products = dtype if isinstance(dtype, torch.dtype) else None
        settings = quantization_config(meta, how.quantization, dtype=products)
        options = {"quantization_config": settings, "device_map": {"": how.device}}
    model, missing = load_weights(
        loader,
        name,
        kind="vision-language model",
        dtype=dtype,
        trust_remote_code=how.trust_remote_code,
        config=config,
        revision=how.revision,
        **options,
    )
    check_complete(name, missing)
    if how.quantization is not None:
        made_trainable(model)
    return model


def skeleton(config: Any, name: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a configuration on the meta device: modules, names and shapes without weights.

    Raises:
        ModelError: no known kind of model.
    """
    with reading(name, "model"), torch.device("meta"):
        made: PreTrainedModel = auto_class(config, name).from_config(config, trust_remote_code=trust_remote_code)
    return made


def auto_class(config: Any, name: str) -> Any:
    """The Auto class that builds a model of this configuration.

    Raises:
        ModelError: neither of those for multimodal language models does.
    """
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    known = ", ".join(model_type for spec in FAMILIES for model_type in spec.model_types)
    raise ModelError(
        f"{name}: model type {config.model_type!r} is not supported; supported: {known}; a language model and a vision "
        f"encoder become a {ComposedConfig.model_type} or llava model by mmpeft.compose_model"
    )


def _loader(config: Any, name: str) -> Any:
    """What reads a model of this configuration: the family's own loader, else an Auto class."""
    own = (spec.loaders[config.model_type] for spec in FAMILIES if config.model_type in spec.loaders)
    return next(own, None) or auto_class(config, name)


def attach_adapter(base: PreTrainedModel, folder: Path, *, weightless: bool = False) -> PeftModel:
    """The adapter on its base (of an omni model: on its thinker), every tensor of it in its place.

    Args:
        base: the model.
        folder: a whole adapter's directory.
        weightless: whether the base has shapes alone (`mmpeft.models.weightless`).

    Raises:
        AdapterError: modules, shapes or names differ from the base's, names examples; or a weight is no number.
    """
    model = trained_model(base)
    read_adapter_config(folder)
    try:
        with warnings.catch_warnings():
            # `_check_keys` says it as an error; peft 0.21 only warns.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            # Merging such an adapter is what `mmpeft.export.merge` sees to.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            peft_model = PeftModel.from_pretrained(
                model, str(folder), torch_device=str(model.device), low_cpu_mem_usage=weightless
            )
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            names = list(file.keys())
            stored = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:400]
        raise AdapterError(
            f"{folder}: the adapter does not fit {type(model).__name__} ({said}); "
            "load it on the base model that it was trained on"
        ) from error
    loaded = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    _check_keys(peft_model, loaded, stored, folder)
    for name, weight in loaded.items():
        if not bool(torch.isfinite(weight).all()):
            raise AdapterError(f"{folder}: {name} has weights that are NaN or infinite; train or copy it again")
    return peft_model.eval()


def _check_keys(
    model: PeftModel, loaded: dict[str, torch.Tensor], stored: dict[str, torch.Tensor], folder: Path
) -> None:
    expected = {_plain(name) for name in loaded}
    base = {f"base_model.model.{name.replace('.base_layer.', '.')}" for name in model.get_base_model().state_dict()}
    names = {_plain(name) for name in stored}
    if not expected <= names:
        # PEFT has found them under other names than these, by transformers' rules for checkpoints of the base.
        found = convert_peft_adapter_state_dict_for_transformers(model, model.peft_config["default"], stored)
        names = {_plain(name) for name in found}
    missing, unexpected = sorted(expected - names), sorted(names - expected - base)
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:_SHOWN])}{', ...' if len(keys) > _SHOWN else ''}"
        for what, keys in (("are lacking", missing), ("have no place in the model", unexpected))
        if keys
    ]
    if problems:
        raise AdapterError(
            f"{folder}: the adapter would do nothing or less than it should on "
            f"{type(model.get_base_model()).__name__}; of its weights {'; '.join(problems)}; load it on the base model "
            "that it was trained on"
        )


def _plain(name: str) -> str:
    """A tensor's name as `get_peft_model_state_dict` gives it; DoRA's magnitudes are stored by two names."""
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
