"""What an export starts from: an adapter with the base that it was trained on, or a model; each a directory here."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.core.files import write_json
from mmpeft.core.hashing import hash_file
from mmpeft.export.merge import BASE_LAYOUT
from mmpeft.export.shards import Checkpoint
from mmpeft.families.qwen2_5_omni import SPEAKERS
from mmpeft.models.checkpoints import check_name, reading
from mmpeft.models.load import (
    BASE_REVISION,
    BASE_WEIGHTS,
    FACTS_NAME,
    NOT_FETCHED,
    PROCESSOR_FILES,
    adapter_base,
    is_adapter,
    load_processor,
    read_adapter_config,
    read_facts,
    resolve_adapter,
    trained_revision,
)

OF_FILES = ("artefact", "files", "sizes")
"""Keys of mmpeft.json that say of which files a directory is."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter on its base, or a model.

    Attributes:
        name: as it was given.
        base: directory of the base, or of the model.
        base_name: what the base is called: a hub id, or a directory.
        adapter: directory of the adapter; None for a model.
        facts: content of mmpeft.json, of the adapter or the model; empty where there is none.
    """

    name: str
    base: Path
    base_name: str
    adapter: Path | None
    facts: Mapping[str, Any]

    @property
    def own_facts(self) -> dict[str, Any]:
        """`facts` without what only says of which files its directory is."""
        return {key: value for key, value in self.facts.items() if key not in OF_FILES}

    @property
    def folders(self) -> list[Path]:
        """What is read, and so may not be written over."""
        return [self.base, *([] if self.adapter is None else [self.adapter])]


def find_source(name: str | Path, *, base: str | Path | None = None) -> Source:
    """The adapter or model of a name, fetched if it is on the Hub.

    Args:
        name: directory or hub id; of the directory of a run, or of a composed model, the adapter in it is meant.
        base: directory or hub id of the base of an adapter; default: the one that it names, at the commit that its
            mmpeft.json records.

    Raises:
        ModelError: a model that is not there, cannot be reached, or has no processor.
        AdapterError: no whole adapter there, or several, or its base is not to be found, or not what it was.
    """
    name = result_of(str(name))
    check_single(name)
    if base is None and not is_adapter(name):
        folder = fetch_model(name)
        _check_processor(folder, None)
        return Source(name=name, base=folder, base_name=name, adapter=None, facts=read_facts(folder))
    adapter = resolve_adapter(name)
    read_adapter_config(adapter)
    facts = read_facts(adapter)
    if base is not None:
        folder = fetch_model(str(base))
        _check_processor(folder, adapter)
        return Source(name=name, base=folder, base_name=str(base), adapter=adapter, facts=facts)
    found = adapter_base(adapter)
    revision = trained_revision(adapter, found)
    try:
        folder = fetch_model(found, revision=revision)
    except ModelError as error:
        which = f" at revision {revision}, on which it was trained," if revision else ""
        raise AdapterError(
            f"{name}: its base model{which} cannot be read ({error}); say where it is: --base DIRECTORY"
        ) from error
    _check_unchanged(adapter, facts, folder)
    _check_processor(folder, adapter)
    return Source(name=name, base=folder, base_name=found, adapter=adapter, facts=facts)


def result_of(name: str) -> str:
    """The adapter in the directory of a run or of a composed model; any other name as it is."""
    within = (Path(name) / "adapter" / CONFIG_NAME).is_file() and not (Path(name) / "config.json").is_file()
    return str(Path(name) / "adapter") if within else name


def check_single(name: str) -> None:
    """Refuse a directory that holds several adapters and none itself, as PEFT saves those with names.

    Raises:
        AdapterError: names them.
    """
    folder = Path(name)
    if not folder.is_dir() or any((folder / file).is_file() for file in (CONFIG_NAME, "config.json")):
        return
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_NAME}"))
    if inside:
        raise AdapterError(
            f"{name}: no adapter itself, but it holds {', '.join(inside)}; give the directory of one, such as "
            f"{folder / inside[0]}"
        )


def _check_unchanged(adapter: Path, facts: Mapping[str, Any], base: Path) -> None:
    """Refuse a base whose files of weights are others now than those that mmpeft.json records of training.

    Raises:
        AdapterError: names the first, and what to do.
    """
    origin: Mapping[str, Any] = next((each for each in facts.get("base") or () if each.get("role") == "model"), {})
    records = [(origin.get("name"), origin.get("files")), (facts.get("base_model"), facts.get(BASE_WEIGHTS))]
    named = os.path.realpath(str(read_adapter_config(adapter).get("base_model_name_or_path")))
    recorded: Mapping[str, str] = next(
        (files for path, files in records if files and _real(path) == named),
        {},
    )
    then = {name: value for name, value in recorded.items() if name.endswith(".safetensors")}
    now = {file.name for file in base.glob("*.safetensors")}
    advice = f"put the base back as it was, or say that it is meant as it is now: --base {base}"
    if then and set(then) != now:
        raise AdapterError(
            f"{adapter}: {base} has {', '.join(sorted(now)) or 'no weights'}, where the adapter was trained on "
            f"{', '.join(sorted(then))[:200]}; {advice}"
        )
    for name, value in then.items():
        if hash_file(base / name) != value:
            raise AdapterError(
                f"{adapter}: {base / name} has changed since the adapter was trained on it ({FACTS_NAME} records its "
                f"hash); {advice}"
            )


def _real(path: Any) -> str | None:
    try:
        return os.path.realpath(str(path))
    except ValueError:
        return None


def _check_processor(base: Path, adapter: Path | None) -> None:
    if not any((folder / file).is_file() for folder in (base, adapter) if folder for file in PROCESSOR_FILES):
        beside = "" if adapter is None else f" and none beside the adapter in {adapter}"
        raise ModelError(
            f"{base}: no processor there ({' or '.join(PROCESSOR_FILES)}){beside}; copy it from where the model comes "
            "from, or save it: processor.save_pretrained(...)"
        )


def fetch_model(name: str, *, revision: str | None = None) -> Path:
    """The directory of a model, fetched without pickles if it is on the Hub.

    Raises:
        ModelError: not there or not to be reached.
    """
    check_name(name)
    if Path(name).is_dir():
        return Path(name)
    with reading(name, "model"):
        return Path(snapshot_download(name, revision=revision, ignore_patterns=list(NOT_FETCHED)))


def weights_hashes(base: Path) -> dict[str, str]:
    """SHA-256 of a model's files of weights, by name."""
    return {file.name: hash_file(file) for file in sorted(base.glob("*.safetensors"))}


def base_facts(base: str) -> dict[str, Any]:
    """What mmpeft.json records of the base that was trained on: the commit on the Hub, and names and shapes.

    Args:
        base: directory or hub id of a model that has been loaded.
    """
    file = cached_file(base, "config.json", _raise_exceptions_for_missing_entries=False)
    folder = Path(base) if file is None else Path(file).parent
    revision = None if Path(base).is_dir() else folder.name
    return {BASE_REVISION: revision, BASE_LAYOUT: Checkpoint(folder).layout_hash()}


def write_companions(
    source: Source, folder: Path, *, config: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> None:
    """Write all of a model's directory but the weights: configuration, processor, chat template, code, licence.

    The processor is the adapter's where it has one: pixel limits and chat template travel with it.

    Args:
        source: what is exported.
        folder: where to.
        config: content of config.json; default: the base's.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        ModelError: there is no processor, neither beside the adapter nor beside the base.
    """
    processor = load_processor(source.base, adapter=source.adapter, trust_remote_code=trust_remote_code)
    for file in sorted(source.base.iterdir()):
        if file.name == GENERATION_CONFIG_NAME or file.suffix == ".py" or file.name.upper().startswith(_LEGAL):
            shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", dict(config or base_config(source.base)))
    processor.save_pretrained(folder)
    speakers = cached_file(source.base_name, SPEAKERS, _raise_exceptions_for_missing_entries=False)
    if speakers is not None:
        shutil.copyfile(speakers, folder / SPEAKERS)


_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


def base_config(base: Path) -> dict[str, Any]:
    """Content of a model's config.json.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    try:
        return dict(json.loads((base / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{base / 'config.json'}: cannot be read ({error}); fetch it again") from error
