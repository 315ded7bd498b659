"""Every model type that `AutoModelForImageTextToText` knows, with its parts and how far mmpeft supports it.

First-class families state their facts in code, which is read when the catalogue is made. What is known of all other
types stands in walked.json: tests/families/test_walk.py trains a tiny model of each and fails where the file says
something else.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmpeft.core.types import PARTS, Part
from mmpeft.families.registry import FAMILIES, family_of_processor
from mmpeft.families.spec import FamilySpec

WALKED = Path(__file__).with_name("walked.json")
"""`transformers`, the version that was walked, and `types`, one record a model type:
    step             "picture" or "text": what it was trained on
    parts, found     what inspection finds, and how (types without a file of facts)
    modalities       the same
    processor        the class that transformers maps to it; null: none
    supervised       whether its forward takes `logits_to_keep` as indices, and its loss `shift_labels`
    data             whether its processor lets `encode_sample` write pictures into a row of tokens; null: it has none
    exclude_modules  modules that LoRA has to leave out
    needs            a library that the type needs, which mmpeft does not install
    auto_class       false where the auto class does not give back the base model that was saved
    note             what else a user should know
    reason           why it is not supported; then there is no step
"""

Status = Literal["first class", "generic", "not supported"]
Step = Literal["picture", "text"]
How = Literal["stated", "get_encoder", "get_decoder", "name"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of one model type.

    Attributes:
        model_type: value of `config.model_type`.
        family: name of the first-class family; None for all others.
        status: `first class`: a file of facts and the contract test; `generic`: parts found by inspection, one
            training step and the reloaded adapter tested; `not supported`: see `note`.
        step: what the tiny model was trained on in the test; None if it was not.
        parts: module paths by part.
        found: for each part, how: stated by the family, by `get_encoder` or `get_decoder`, or by a module's name.
        modalities: what it takes beside text.
        data: whether mmpeft reads data for it, else batches have to be made by the user; None: that depends on the
            processor that its checkpoint brings.
        note: what a user should know, or why it is not supported; "" if nothing.
    """

    model_type: str
    family: str | None
    status: Status
    step: Step | None
    parts: Mapping[Part, tuple[str, ...]]
    found: Mapping[Part, How]
    modalities: tuple[str, ...]
    data: bool | None
    note: str = ""


def walked() -> dict[str, dict[str, Any]]:
    """The checked-in records, by model type."""
    types: dict[str, dict[str, Any]] = json.loads(WALKED.read_text(encoding="utf-8"))["types"]
    return types


def walked_version() -> str:
    """The version of transformers whose model types these are."""
    return str(json.loads(WALKED.read_text(encoding="utf-8"))["transformers"])


def catalogue() -> tuple[Entry, ...]:
    """All model types in the order of their names, with those that mmpeft has beside transformers' mapping."""
    own = {model_type: spec for spec in FAMILIES for model_type in spec.model_types}
    table = walked()
    names = sorted({*table, *own})
    return tuple(
        _first_class(name, own[name], table.get(name, {})) if name in own else _other(name, table[name])
        for name in names
    )


def takes_supervised_logits(processor: Any) -> bool:
    """Whether every model type of this processor was tested to train on the logits of supervised positions alone."""
    spec = family_of_processor(processor)
    if spec is not None:
        return spec.supervised_logits
    name = type(processor).__name__
    records = [record for record in walked().values() if record.get("processor") == name]
    return bool(records) and all(record["supervised"] for record in records)


def _first_class(model_type: str, spec: FamilySpec, record: Mapping[str, Any]) -> Entry:
    return Entry(
        model_type=model_type,
        family=spec.name,
        status="first class",
        step=record.get("step"),
        parts={part: spec.parts[part] for part in PARTS if part in spec.parts},
        found=dict.fromkeys(spec.parts, "stated"),
        modalities=spec.modalities,
        data=True,
        note=spec.note,
    )


def _other(model_type: str, record: Mapping[str, Any]) -> Entry:
    parts: dict[Part, tuple[str, ...]] = {
        part: tuple(record["parts"][part]) for part in PARTS if part in record.get("parts", {})
    }
    return Entry(
        model_type=model_type,
        family=None,
        status="not supported" if "reason" in record else "generic",
        step=record.get("step"),
        parts=parts,
        found=record.get("found", {}),
        modalities=tuple(record.get("modalities", ())),
        data=record.get("data"),
        note=record.get("reason") or " ".join(_notes(record, parts)),
    )


def _notes(record: Mapping[str, Any], parts: Mapping[Part, Any]) -> Iterable[str]:
    if "projector" not in parts:
        yield "No projector: train LoRA on the language model."
    if "needs" in record:
        yield f"Needs {record['needs']}: pip install {record['needs']}."
    if record["data"] is False:
        yield "Give the trainer batches of your own: mmpeft cannot write its pictures and answers into one row."
    elif record["data"] is None and record["modalities"]:
        yield "Whether mmpeft reads data for it depends on the processor that its checkpoint brings."
    if "exclude_modules" in record:
        yield f"Give language.exclude_modules: [{', '.join(record['exclude_modules'])}]: peft does not load them again."
    if "note" in record:
        yield record["note"]
