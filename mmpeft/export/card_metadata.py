"""The Hub's metadata at the top of a card (huggingface.co/docs/hub/model-cards); what is not known is left out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from mmpeft.core import units
from mmpeft.export.publishable import QUANTISED, Kind

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_METRIC_TYPES = {"token_f1": "f1"}
"""Names of metrics on the Hub, where they are other than ours."""

_TASKS = {"qwen2_audio": "audio-text-to-text", "qwen2_5_omni": "any-to-any"}
"""Pipeline tags by family, where they are other than image-text-to-text."""

_RELATIONS: Mapping[Kind, str] = {"adapter": "adapter", "model": "finetune", "merged": "finetune"}
_LIBRARIES: Mapping[Kind, str] = {"adapter": "peft", "onnx": "onnx", "gguf": "gguf"}
_LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a card says of the artefact that it lies in, beyond the facts of the run.

    Attributes:
        repo: where it is published; None in a run's own directory.
        export, parity: content of mmpeft.json of an export, and of parity.json.
        license: `license`, and `license_name` and `license_link` where it is `other`.
        pictures: pairs (what it shows, name of its file).
        modules_in_full: of an adapter, whether it has more than LoRA matrices; None where that is not known.
        files: names of what is published.
    """

    kind: Kind = "adapter"
    repo: str | None = None
    export: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    pictures: Sequence[tuple[str, str]] = ()
    modules_in_full: bool | None = None
    files: Sequence[str] = ()


def metadata(facts: Mapping[str, Any], card: Published, *, title: str) -> str:
    """YAML."""
    bases = hub_bases(facts, card)
    states = {row.get("state") for row in (facts.get("parts") or {}).values()}
    family = facts.get("family")
    tags = ["mmpeft", *(["peft"] if card.kind == "adapter" else []), "multimodal", "vision-language"]
    tags += [*(["lora"] if "lora" in states else []), *([str(family)] if family else [])]
    tags += [card.kind] if card.kind not in ("adapter", "model") else []
    results = _results(facts, card)
    more: dict[str, Any] = {key: card.license[key] for key in _LICENSE_KEYS if key in card.license}
    if bases and (relation := relation_of(facts, card)):
        more["base_model_relation"] = relation
    data = ModelCardData(
        base_model=None if not bases else bases[0] if len(bases) == 1 else bases,
        datasets=_datasets(facts) or None,
        eval_results=results or None,
        language=facts.get("language") or None,
        library_name=_LIBRARIES.get(card.kind, "transformers"),
        metrics=list(dict.fromkeys(row.metric_type for row in results)) or None,
        model_name=title if results else None,
        pipeline_tag=_TASKS.get(str(family), "image-text-to-text"),
        tags=tags,
        **more,
    )
    return str(data.to_yaml()).strip() + "\n"


def relation_of(facts: Mapping[str, Any], card: Published) -> str | None:
    """How it relates to its base model; None of a model that was composed of several."""
    if card.kind in QUANTISED:
        return "quantized"
    if card.kind == "model" and isinstance(facts.get("composed"), Mapping):
        return None
    return _RELATIONS[card.kind]


def _results(facts: Mapping[str, Any], card: Published) -> list[EvalResult]:
    held_out = (facts.get("data") or {}).get("eval") or {}
    name = PurePath(str(held_out.get("file") or "")).name or "held-out data"
    if card.kind in QUANTISED:
        compared = ((card.parity or {}).get("metrics") or {}).get("export") or {}
        scores = {key: value for key, value in compared.items() if _is_number(value)}
    else:
        scores = (facts.get("metrics") or {}).get("after") or {}
    return [
        EvalResult(
            task_type="visual-question-answering",
            task_name="Visual Question Answering",
            dataset_type="custom",
            dataset_name=name,
            metric_type=_METRIC_TYPES.get(metric, metric),
            metric_name=units.metric_title(metric),
            metric_value=round(value, 4),
        )
        for metric, value in scores.items()
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _datasets(facts: Mapping[str, Any]) -> list[str]:
    """Data sets of the Hub that it was trained on."""
    train = (facts.get("data") or {}).get("train") or {}
    files = [entry.get("file") for entry in (train, *(train.get("sources") or []))]
    names = [str(file).removeprefix("hf:").lstrip("/") for file in files if str(file).startswith("hf:/")]
    return list(dict.fromkeys("/".join(name.split("/")[:2]) for name in names if "," not in name))


def base_of(facts: Mapping[str, Any]) -> Any:
    """A name of the Hub that the base has; else the recipe's description of a composed model, or its name there."""
    named = facts.get("base_model")
    if named and is_hub_id(str(named)):
        return named
    composed = (facts.get("recipe") or {}).get("model")
    composed = facts.get("composed") or composed
    return composed if isinstance(composed, Mapping) else named or composed


def hub_bases(facts: Mapping[str, Any], card: Published | None = None) -> list[str]:
    """The Hub ids that it stands on; a composed model's encoders and language model."""
    model = base_of(facts) or source_base(card.export if card else {})
    if isinstance(model, Mapping):
        vision = model.get("vision") or []
        names = [model.get("language"), *([vision] if isinstance(vision, str) else vision)]
    else:
        names = [model]
    return [str(name) for name in names if name and is_hub_id(str(name))]


def source_base(export: Mapping[str, Any]) -> str | None:
    """The base model that mmpeft.json of an export names."""
    found = export.get("base_model")
    return str(found) if found else None


def is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id: two parts, and no file or folder of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()


def inherited_license(bases: Sequence[str]) -> dict[str, str]:
    """What the cards of these models (Hub ids, directories) agree on; empty where they don't, or say nothing."""
    found = []
    for base in bases:
        try:
            card = ModelCard.load(str(Path(base) / "README.md") if Path(base).is_dir() else base)
        except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError):
            return {}
        licence = {key: getattr(card.data, key) for key in _LICENSE_KEYS if isinstance(getattr(card.data, key), str)}
        if not licence.get("license"):
            return {}
        found.append(licence)
    return found[0] if found and all(licence == found[0] for licence in found) else {}
