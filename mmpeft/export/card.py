"""The card of an adapter, model or export: README.md, every figure from a file that the run or the export wrote."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import jinja2
import yaml

from mmpeft.core import units
from mmpeft.core.assets import asset_directory
from mmpeft.export.card_metadata import Published, base_of, hub_bases, is_hub_id, metadata, source_base


def render_card(facts: Mapping[str, Any], card: Published | None = None) -> str:
    """The text of README.md, from the content of mmpeft.json; what is absent there is `not recorded` here.

    Args:
        card: what it lies in; default: an adapter that is not published yet.

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
    card = card or Published()
    text = environment.get_template(f"{card.kind}.md.j2").render(_content(facts, card))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _content(facts: Mapping[str, Any], card: Published) -> dict[str, Any]:
    recipe = facts.get("recipe") or {}
    before, after = _evaluation(facts, "before"), _evaluation(facts, "after")
    recipe_text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True) if recipe else ""
    kinds = list(dict.fromkeys([*before["by_kind"], *after["by_kind"]]))

    def count_of(kind: str) -> int | None:
        return (after["by_kind"].get(kind) or before["by_kind"].get(kind) or {}).get("count")

    counts = [count_of(kind) for kind in kinds]
    title = _title(facts, card)
    place = card.repo or f"path/to/this/{'adapter' if card.kind == 'adapter' else 'model'}"
    hub = hub_bases(facts, card)
    return {
        "facts": facts,
        "card": card,
        "front_matter": metadata(facts, card, title=title),
        "title": title,
        # Of a model that no run wrote there is nothing to say but what it is.
        "recorded": card.kind == "adapter" or bool(recipe),
        "place": place,
        "hub_base": hub[0] if len(hub) == 1 else None,
        "export_base": source_base(card.export),
        "figures": list(_figures({name: (card.parity or {}).get(name) or {} for name in _COMPARED})),
        "limits": list(_figures((card.parity or {}).get("threshold") or {})),
        "stages": facts.get("stages") or [],
        "base": _base(facts, card),
        "local_base": bool(base_of(facts)) and not is_hub_id(str(base_of(facts))),
        "parts": facts.get("parts") or {},
        "loading": _loading(facts, place),
        "gguf_files": _gguf_files(card),
        "own_class": facts.get("family") == "composed",
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
        "versions": facts.get("versions") or card.export.get("versions") or {},
        "not_recorded": units.NOT_RECORDED,
    }


_COMPARED = ("agreement", "metrics", "bytes", "memory", "seconds")
"""What parity.json says of an export and its source."""


def _uses(data: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What each file was for; of a mixture each source with its weight."""
    train = data.get("train") or {}
    sources = [(f"training, weight {source['weight']:g}", source) for source in train.get("sources") or []]
    return [*(sources or [("training", train)]), ("held out", data.get("eval") or {})]


def _evaluation(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: (facts.get(key) or {}).get(name) or {} for key in ("metrics", "by_kind")}


def _title(facts: Mapping[str, Any], card: Published) -> str:
    output = str((facts.get("recipe") or {}).get("output") or "")
    return card.repo.split("/")[-1] if card.repo else PurePath(output).name or card.kind


def _base(facts: Mapping[str, Any], card: Published) -> str:
    model = base_of(facts) or source_base(card.export)
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
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"{_code(PurePath(name).name)} (local)"


def _gguf_files(card: Published) -> tuple[str, str]:
    """Names of the language model and of the vision part; what stands for them where there is none."""
    names = [name for name in card.files if name.endswith(".gguf")]
    seen = next((name for name in names if "mmproj" in name), "MMPROJ.gguf")
    return next((name for name in names if "mmproj" not in name), "LANGUAGE.gguf"), seen


def _figures(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Numbers and words of a JSON object by their keys, those of inner objects behind the outer's; no lists."""
    for key, value in values.items():
        name = f"{before}{units.metric_title(str(key))}"
        if isinstance(value, Mapping):
            yield from _figures(value, f"{name}: ")
        elif isinstance(value, bool | str):
            yield name, str(value)
        elif isinstance(value, int):
            yield name, f"{value:,}"
        elif isinstance(value, float):
            yield name, f"{value:.4g}"


def _loading(facts: Mapping[str, Any], place: str) -> str:
    path = f'"{place}"'
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
