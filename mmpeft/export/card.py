"""The card of an adapter: README.md with the Hub's metadata, every figure from the run's own record."""

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml

from mmpeft.core import units
from mmpeft.core.assets import asset_directory

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_METRIC_TYPES = {"token_f1": "f1"}
"""Names of metrics on the Hub, where they are other than ours."""


def render_card(facts: Mapping[str, Any]) -> str:
    """The text of README.md, from the content of mmpeft.json; what is absent there is `not recorded` here.

    Raises:
        jinja2.TemplateError: the template itself is broken.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(asset_directory("hub_cards")),
        # A card is Markdown: texts are made safe by `cell` and `code`, not by HTML escapes.
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": _cell,
        "code": _code,
        "count": units.count,
        "metric_title": units.metric_title,
        "name": _file_name,
        "percent": units.percent,
    }
    text = environment.get_template("adapter.md.j2").render(_content(facts))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _content(facts: Mapping[str, Any]) -> dict[str, Any]:
    recipe = facts.get("recipe") or {}
    before, after = _evaluation(facts, "before"), _evaluation(facts, "after")
    recipe_text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
    kinds = list(dict.fromkeys([*before["by_kind"], *after["by_kind"]]))

    def count_of(kind: str) -> int | None:
        return (after["by_kind"].get(kind) or before["by_kind"].get(kind) or {}).get("count")

    counts = [count_of(kind) for kind in kinds]
    return {
        "facts": facts,
        "front_matter": yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True),
        "title": _title(recipe),
        "stages": facts.get("stages") or [],
        "base": _base(facts),
        "local_base": bool(_model(facts)) and not _is_hub_id(str(_model(facts))),
        "parts": facts.get("parts") or {},
        "loading": _loading(facts),
        "before": before,
        "after": after,
        "metrics": list(after["metrics"]),
        "kinds": [] if kinds == [""] else kinds,
        "count_of": count_of,
        "asked": sum(number for number in counts if number) if all(counts) and counts else None,
        "train": (facts.get("data") or {}).get("train") or {},
        "held_out": (facts.get("data") or {}).get("eval") or {},
        "uses": _uses(facts.get("data") or {}),
        "recipe": recipe,
        "recipe_text": recipe_text,
        "fence": _fence(recipe_text),
        "versions": facts.get("versions") or {},
        "not_recorded": units.NOT_RECORDED,
    }


def _uses(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What each file was for; of a mixture each source with its weight."""
    train = data.get("train") or {}
    sources = [(f"training, weight {source['weight']:g}", source) for source in train.get("sources") or []]
    return [*(sources or [("training", train)]), ("held out", data.get("eval") or {})]


def _evaluation(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: (facts.get(key) or {}).get(name) or {} for key in ("metrics", "by_kind")}


def _title(recipe: Mapping[str, Any]) -> str:
    return PurePath(str(recipe.get("output") or "")).name or "adapter"


def _metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The Hub's metadata (huggingface.co/docs/hub/model-cards); a key whose value is not known is left out."""
    hub = _hub_bases(facts)
    states = {row.get("state") for row in (facts.get("parts") or {}).values()}
    tags = ["mmpeft", "peft", "multimodal", "vision-language", *(["lora"] if "lora" in states else [])]
    metadata: dict[str, Any] = {}
    if hub:
        metadata |= {"base_model": hub if len(hub) > 1 else hub[0], "base_model_relation": "adapter"}
    metadata |= {"library_name": "peft", "pipeline_tag": "image-text-to-text"}
    if language := facts.get("language"):
        metadata["language"] = language
    metadata["tags"] = [*tags, *([facts["family"]] if facts.get("family") else [])]
    return metadata | _results(facts)


def _results(facts: Mapping[str, Any]) -> dict[str, Any]:
    scores = _evaluation(facts, "after")["metrics"]
    if not scores:
        return {}
    held_out = (facts.get("data") or {}).get("eval") or {}
    rows = [
        {"type": _METRIC_TYPES.get(name, name), "name": units.metric_title(name), "value": round(value, 4)}
        for name, value in scores.items()
    ]
    result = {
        "task": {"type": "visual-question-answering", "name": "Visual Question Answering"},
        "dataset": {"type": "custom", "name": _file_name(held_out.get("file"))},
        "metrics": rows,
    }
    return {
        "metrics": [row["type"] for row in rows],
        "model-index": [{"name": _title(facts.get("recipe") or {}), "results": [result]}],
    }


def _model(facts: Mapping[str, Any]) -> Any:
    """The recipe's description of a composed model; else the name or directory that the run started from."""
    composed = (facts.get("recipe") or {}).get("model")
    return composed if isinstance(composed, Mapping) else facts.get("base_model") or composed


def _hub_bases(facts: Mapping[str, Any]) -> list[str]:
    """The Hub ids that the adapter stands on; a composed model's encoders and language model."""
    model = _model(facts)
    if isinstance(model, Mapping):
        vision = model.get("vision") or []
        names = [model.get("language"), *([vision] if isinstance(vision, str) else vision)]
    else:
        names = [model]
    return [str(name) for name in names if name and _is_hub_id(str(name))]


def _is_hub_id(name: str) -> bool:
    """Whether a name can be a Hub id: two parts, and no file or folder of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(".gguf") and not Path(name).exists()


def _base(facts: Mapping[str, Any]) -> str:
    model = _model(facts)
    if not model:
        return units.NOT_RECORDED
    if not isinstance(model, Mapping):
        return _linked(str(model))
    vision = model.get("vision") or []
    towers = [vision] if isinstance(vision, str) else vision
    projector = model.get("projector", units.NOT_RECORDED)
    kind = projector.get("kind", projector) if isinstance(projector, Mapping) else projector
    named = " and ".join(_linked(str(name)) for name in towers)
    return f"composed of {named}, a new projector ({_cell(kind)}) and {_linked(str(model.get('language')))}"


def _linked(name: str) -> str:
    """A Hub id as a link; of a local path only the last part, for it means nothing on another machine."""
    if _is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"{_code(PurePath(name).name)} (local)"


def _loading(facts: Mapping[str, Any]) -> str:
    path = '"path/to/this/adapter"'
    trust = ", trust_remote_code=True" if facts.get("family") == "composed" else ""
    return (
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({path}{trust})\n"
        f"processor = AutoProcessor.from_pretrained({path}{trust})"
    )


def _fence(text: str) -> str:
    """Backticks enough to close in a text that holds backticks itself."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _file_name(path: Any) -> str | None:
    return PurePath(str(path)).name if path else None


def _cell(text: Any) -> str:
    """A text that stays one cell of a Markdown table and cannot become markup."""
    if text is None or text == "":
        return units.NOT_RECORDED
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(escaped.split()))


def _code(text: Any) -> str:
    if text is None or text == "":
        return units.NOT_RECORDED
    plain = re.sub(r"[`|<>]", "", " ".join(str(text).split()))
    return f"`{plain}`"
