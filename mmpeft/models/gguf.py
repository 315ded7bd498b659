"""A causal language model and its tokenizer out of one GGUF file, as ordinary transformers objects."""

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmpeft.core.errors import ModelError
from mmpeft.core.optional import require

logger = logging.getLogger(__name__)

_MAGIC = b"GGUF"


def load_gguf(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read weights (dequantised) and tokenizer from a GGUF file.

    transformers marks a model read from GGUF as quantised, which `save_pretrained` refuses; so the weights are
    put into a fresh model of the same configuration, without the mark.

    Args:
        path: the file; its name may end in anything.
        dtype: precision of the weights in memory.

    Raises:
        ModelError: no such file, not a GGUF file, or an architecture that transformers cannot read from GGUF.
        MissingDependencyError: the gguf package is not installed.
    """
    path = Path(path)
    _check(path)
    require("gguf", extra="quickstart")
    folder, name = str(path.parent), path.name
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # a broken file ends in struct.error, a broken vocabulary in tokenizers' bare Exception
        raise ModelError(
            f"{path}: transformers cannot read this GGUF file ({error}); use the model's ordinary directory or hub id"
        ) from error
    model = _without_quantisation(loaded, dtype)
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    tokenizer.init_kwargs.pop("gguf_file", None)
    logger.info("read %s and its tokenizer from %s, dequantised to %s", type(model).__name__, name, dtype)
    return model, tokenizer


def _check(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a GGUF language model")
    with path.open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        raise ModelError(f"{path}: not a GGUF file (it starts with {start!r}, not {_MAGIC!r})")


def _without_quantisation(loaded: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "gguf_file", "dtype"):
        values.pop(key, None)
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generation = loaded.generation_config
    # Weights are assigned, not copied; buffers that no file holds (rotary frequencies) come from the loaded model.
    for name, module in loaded.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(model.get_submodule(name), key, buffer)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    if generation is not None:
        model.generation_config = generation
    return model.eval()
