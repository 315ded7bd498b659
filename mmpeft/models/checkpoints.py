"""Reading from a directory or the Hub: safetensors only, every weight accounted for, failures in plain words."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import list_repo_files
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from transformers import PreTrainedModel

from mmpeft.core.errors import MMPeftError, ModelError

logger = logging.getLogger(__name__)

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "tf_model.h5")


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: absolute, relative with dots, or of other than one or two parts."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name


def check_name(name: str) -> None:
    """Refuse a path that does not exist, before a hub is asked for it.

    Raises:
        ModelError: it looks like a path and there is nothing, or a file.
    """
    path = Path(name).expanduser()
    if looks_like_path(name) and not path.exists():
        raise ModelError(f"{name}: no such directory; expected a model's directory or a hub id such as owner/name")
    if path.is_file():
        raise ModelError(f"{name} is a file; expected a model's directory or a hub id such as owner/name")
    if path.is_dir() and not any(path.iterdir()):
        raise ModelError(f"{name} is an empty directory; expected a model's directory")


@contextlib.contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turn what transformers and the Hub raise into a `ModelError` about `name`, which should be a `kind`."""
    try:
        yield
    except MMPeftError:
        raise
    except SafetensorError as error:
        raise ModelError(f"{name}: a safetensors file is not whole ({error}); fetch it again") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_plain(name, kind, error)) from error


def _plain(name: str, kind: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    refusal = "" if Path(name).is_dir() else _refusal(name, error)
    if refusal:
        return refusal
    pickles = _pickles(name) if isinstance(error, OSError) else []
    if pickles or ("safetensors" in text and "file named" in text.lower()):
        found = ", ".join(pickles) or "none"
        return (
            f"{name}: no safetensors weights (found: {found}); pickled weights can run code when they are read and are "
            "refused: convert them with `save_pretrained`, or use a revision that has safetensors"
        )
    if "trust_remote_code" in text:
        return f"{name} brings code of its own; read it, then allow it: --trust-remote-code, or trust_remote_code=True"
    return f"{name}: cannot be read as a {kind}: {text[:400]}"


def _refusal(name: str, error: BaseException) -> str:
    """Why the Hub did not give a repository, "" if it did: transformers says it in the errors behind its own."""
    behind = []
    cause: BaseException | None = error
    while cause is not None:
        behind.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = tuple(type(cause) for cause in behind)
    if any(issubclass(kind, GatedRepoError) for kind in kinds):
        return (
            f"{name}: a gated repository that this machine has no access to; accept its terms on its page on the Hub, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if any(issubclass(kind, RepositoryNotFoundError | HFValidationError) for kind in kinds):
        return f"{name}: neither a local directory nor a repository on the Hub (a private one needs `hf auth login`)"
    if any(issubclass(kind, LocalEntryNotFoundError | ConnectionError) for kind in kinds):
        return (
            f"{name}: no such directory here, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set); "
            "give a local directory, or fetch it once with `hf download`"
        )
    return ""


def _pickles(name: str) -> list[str]:
    """Pickled weights of a directory or repository that holds no safetensors."""
    try:
        files = [file.name for file in Path(name).iterdir()] if Path(name).is_dir() else list_repo_files(name)
    except (httpx.HTTPError, OSError) as error:
        logger.info("%s: its files cannot be listed: %s", name, error)
        return []
    return [] if any(file.endswith(".safetensors") for file in files) else [f for f in _PICKLES if f in files]


def load_weights(
    auto_class: Any, name: str, *, kind: str, dtype: torch.dtype | str, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    """`auto_class.from_pretrained`, safetensors only, in eval mode.

    Returns:
        The model, and the names of its weights that the checkpoint does not hold (they are random).

    Raises:
        ModelError: not there, not reachable, not safetensors, or tensors of other shapes.
    """
    check_name(name)
    with reading(name, kind):
        model, report = auto_class.from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    return model.eval(), sorted(report["missing_keys"])


def check_complete(name: str, missing: list[str]) -> None:
    """Refuse a model of which some weights are random.

    Raises:
        ModelError: names the first of them.
    """
    if missing:
        raise ModelError(
            f"{name}: {len(missing)} weights are not in the checkpoint and would be random, first {missing[0]}; "
            "it belongs to another architecture, or a file of it is lacking"
        )
