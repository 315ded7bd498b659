"""The walk: each type in `AutoModelForImageTextToText` at tiny size, from its parts to a reloaded adapter.

`python -m tests.families.walk` walks all of them and writes what was found to mmpeft/families/walked.json, which
`mmpeft families` prints and tests/families/test_walk.py holds the library to. The reasons and notes in that file are
written by hand and kept.
"""

import copy
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mmpeft.core.errors import MMPeftError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.collate import keep_supervised
from mmpeft.families import catalogue
from mmpeft.families.generic import inspect_parts
from mmpeft.families.registry import FAMILIES, family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.plan import base_name
from tests.families.inputs import Batch, inputs_of
from tests.families.shrink import MODEL_TYPES, tiny_model

FIRST_CLASS = {model_type for spec in FAMILIES for model_type in spec.model_types}

HAND = ("note", "exclude_modules", "auto_class", "needs", "reason")
"""Fields of a record that are written by hand."""

MOST_PARAMETERS = 5_000_000

TOLERANCE = 1e-5
"""Largest difference of logits after reloading; most types give exactly the same."""


def walk(model_type: str, folder: Path, train: dict[str, Any] | None = None, *, auto: bool = True) -> dict[str, Any]:
    """Find parts, attach, take one step, save, reload in plain PEFT and by the auto class; every claim is asserted.

    With `auto` false, the auto class is asserted to give another model back.

    Returns:
        The step that was possible, and for a type without a file of facts what inspection found.
    """
    model = tiny_model(model_type)
    assert sum(weight.numel() for weight in model.parameters()) < MOST_PARAMETERS
    base, spec = copy.deepcopy(model), family_of(model)
    inputs = inputs_of(model)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    if train is None:
        train = {"language": {"r": 4}} | ({"projector": "full"} if spec.projector_leaves(model, spec) else {})
    with torch.no_grad():
        before = model(**inputs.batch)
    adapted = get_peft_model(model, train)
    fresh = adapted(**inputs.batch)
    torch.testing.assert_close(fresh.logits, before.logits, rtol=0, atol=0)
    fresh.loss.backward()
    reached = {
        spec.part_of(base_name(name))
        for name, weight in adapted.named_parameters()
        if weight.grad is not None and weight.grad.any()
    }
    # Text alone says nothing to a projector; and nothing but what trains may have a gradient.
    assert reached == set(train) - ({"projector"} if inputs.step == "text" else set()), reached
    torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0).step()
    with torch.no_grad():
        after = adapted(**inputs.batch)
        assert after.loss.isfinite()
        assert after.loss != before.loss
        save_adapter(adapted, folder / "adapter")
        again = PeftModel.from_pretrained(base, folder / "adapter").eval()
        torch.testing.assert_close(again(**inputs.batch).logits, after.logits, rtol=0, atol=TOLERANCE)
        loaded = AutoModelForImageTextToText.from_pretrained(folder / "adapter", dtype=torch.float32).eval()
        same = torch.allclose(loaded(**inputs.batch).logits, after.logits, rtol=0, atol=TOLERANCE)
        assert same == auto, "the auto class"
    return {"step": inputs.step, **({} if model_type in FIRST_CLASS else found(model_type, inputs.batch))}


def found(model_type: str, batch: Batch) -> dict[str, Any]:
    """What can be told of a type without a file of facts, as the catalogue holds it."""
    model = tiny_model(model_type)
    inspection = inspect_parts(model)
    return {
        "parts": {part: list(paths) for part, paths in inspection.spec.parts.items()},
        "found": dict(inspection.found),
        "modalities": list(inspection.spec.modalities),
        "processor": processor_of(model_type),
        "data": False if model.config.is_encoder_decoder else says_what_it_writes(processor_of(model_type)),
        "supervised": takes_supervised_logits(model, batch),
    }


def processor_of(model_type: str) -> str | None:
    """The class of processor that transformers maps to the type."""
    name = PROCESSOR_MAPPING_NAMES.get(model_type) or PROCESSOR_MAPPING_NAMES.get(model_type.removesuffix("_thinker"))
    return cast(str | None, name)


def says_what_it_writes(processor: str | None) -> bool | None:
    """Whether a processor tells `encode_sample` what it puts in the place of a picture; None: no processor."""
    if processor is None:
        return None
    return getattr(transformers, processor).replace_image_token is not ProcessorMixin.replace_image_token


def takes_supervised_logits(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the logits of supervised positions alone give the same loss and gradients as those of all."""
    # Two stretches of labels, so that what is kept is not one slice.
    labels = batch["labels"].clone()
    labels[:, -4:-2] = IGNORE_INDEX
    kept = keep_supervised(labels)

    def trained(**extra: Any) -> tuple[Any, list[torch.Tensor]]:
        model.zero_grad()
        out = model(**{**batch, "labels": labels, **extra})
        out.loss.backward()
        return out, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    every, gradients = trained()
    try:
        some, others = trained(**kept)
    except (ValueError, TypeError, RuntimeError, IndexError):
        return False
    return (
        some.logits.shape[1] == len(kept["logits_to_keep"]) < every.logits.shape[1]
        and len(gradients) == len(others)
        and torch.allclose(some.loss, every.loss, rtol=1e-5)
        and all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(gradients, others, strict=True))
    )


def recorded(record: dict[str, Any]) -> dict[str, Any]:
    """What the catalogue says of how the type is walked."""
    options: dict[str, Any] = {"auto": record.get("auto_class", True)}
    if "exclude_modules" in record:
        options["train"] = {"projector": "full", "language": {"r": 4, "exclude_modules": record["exclude_modules"]}}
    return options


def main() -> None:
    """Write the table; a type that fails and has no reason yet gets the error as its reason, for a person to judge."""
    table = catalogue.walked()
    for model_type in MODEL_TYPES:
        record = table.get(model_type, {})
        if "needs" in record and importlib.util.find_spec(record["needs"]) is None:
            continue
        kept = {key: value for key, value in record.items() if key in HAND}
        try:
            with tempfile.TemporaryDirectory() as folder:
                kept = {**walk(model_type, Path(folder), **recorded(record)), **kept}
            kept.pop("reason", None)
        except (MMPeftError, AssertionError, ImportError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            kept.setdefault("reason", " ".join(str(error).split()))
        sys.stderr.write(f"{model_type}: {kept.get('step') or kept['reason']}\n")
        table[model_type] = kept
    # One line a type, so that what changes can be read in a diff.
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(table[name], ensure_ascii=False)}" for name in MODEL_TYPES)
    text = f'{{"transformers": "{transformers.__version__}", "types": {{\n{rows}\n}}}}\n'
    catalogue.WALKED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
