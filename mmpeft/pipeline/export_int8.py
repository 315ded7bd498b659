"""`mmpeft export int8`: what samples have to tell is measured, the model is written, and the gate looks at it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpeft.core.errors import RecipeError
from mmpeft.export.agreement import evaluating
from mmpeft.export.coarse import w8a8
from mmpeft.export.int8 import Int8Export, Int8Result, Int8Settings, Measured
from mmpeft.export.observe import observe, simulated
from mmpeft.export.smooth import smooth
from mmpeft.export.sources import find_source
from mmpeft.models.load import load_model, load_processor
from mmpeft.pipeline.export_gate import (
    UNCOMPARED,
    Gate,
    Outcome,
    Threshold,
    concluded,
    fewest_left,
    find_held_out,
    source_model,
)


def export_int8(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    settings: Int8Settings | None = None,
    auto_skip: bool = False,
    data: Path | None = None,
    media_root: Path | None = None,
    samples: int = 64,
    threshold: Threshold | None = None,
    compare: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Outcome[Int8Result]:
    """Write an adapter on its base, or a model, as an int8 model directory, and compare it with what it was made from.

        mmpeft.export_int8("runs/receipts/adapter", "receipts-int8")
        AutoModelForImageTextToText.from_pretrained("receipts-int8")      # with compressed-tensors installed

    Args:
        source: directory or hub id.
        output: a new or empty directory, or an earlier export, which is replaced.
        base: directory or hub id of an adapter's base; default: the one that it names.
        settings: what is quantized and how.
        auto_skip: leave as few layers as will do in their precision, those first that int8 changes most.
        data, media_root: held-out samples; default: those of the run that trained the adapter.
        samples: of how many the tokens are compared, and activations measured.
        threshold: what the export has to reach.
        compare: whether to look at it at all; what was not looked at does not pass.
        device: where source and export are compared.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError, ModelError: source and base do not fit, or are not whole.
        DataError: there is nothing to compare on.
        OutputError: the output holds something else, has no room, or cannot be written.
        RecipeError: settings that need samples without any, or that name what is not there.
    """
    settings, threshold = settings or Int8Settings(), threshold or Threshold()
    found = find_source(source, base=base)
    export = Int8Export(found, settings, trust_remote_code=trust_remote_code)
    export.check_output(output)
    if not compare:
        if auto_skip or settings.smooth or settings.activations == "static":
            raise RecipeError(
                "static activations, smoothing and auto_skip need held-out samples; leave out --no-parity"
            )
        result = export.write(output)
        return concluded(result, UNCOMPARED)
    processor = load_processor(found.base, adapter=found.adapter, trust_remote_code=trust_remote_code)
    held_out = find_held_out(found, processor, data=data, media_root=media_root, samples=samples)
    with Gate(held_out, processor) as gate:
        model = source_model(found, device=device, trust_remote_code=trust_remote_code)
        gate.ask_source(model)
        measured, errors = _measure(gate, model, export)
        left: tuple[str, ...] = ()
        if auto_skip:
            left = tuple(_left_by_itself(gate, model, measured, errors, threshold))
            if len(left) == len(errors):
                raise RecipeError(
                    f"auto_skip: no choice of layers in int8 passes (top1 {threshold.top1:g}, KL {threshold.kl:g}, "
                    f"drop {threshold.drop:g}); ask for less (--min-agreement, --max-drop), or try --smooth 0.5"
                )
            export = export.with_skipped(left) if left else export
        del model
        result = export.write(output, measured)
        model, _ = load_model(result.output, device=device, trust_remote_code=trust_remote_code)
        parity = gate.judge(model, threshold, sizes=(result.before, result.bytes), layers=errors)
    return concluded(result, parity, left=left)


def _measure(gate: Gate, model: Any, export: Int8Export) -> tuple[Measured, dict[str, float]]:
    """What the export needs of samples, and how much int8 changes each layer's outputs; smooths the model in place."""
    settings, chosen = export.settings, export.linears.chosen
    with evaluating(model):
        steps = []
        if settings.smooth:
            seen = observe(model, chosen, gate.inputs(model))
            stored = set(export.names.parameters.values())
            first = next(gate.inputs(model))
            steps = smooth(model, chosen, seen, first, strength=settings.smooth, stored=stored)
        largest: dict[str, float] = {}
        if settings.activations == "static":
            seen = observe(model, chosen, gate.inputs(model))
            largest = {name: float(each.largest.max()) for name, each in seen.items()}
    return Measured(largest=largest, smoothing=steps), gate.errors(model, chosen, w8a8(largest or None))


def _left_by_itself(
    gate: Gate, model: Any, measured: Measured, errors: Mapping[str, float], threshold: Threshold
) -> list[str]:
    worst = sorted(errors, key=lambda name: -errors[name])

    def passes(left: list[str]) -> bool:
        # As the loaded export will compute it: with the scales that were measured, where activations have static ones.
        with simulated(model, [name for name in worst if name not in left], largest=measured.largest or None):
            return gate.passes(model, threshold)

    return fewest_left(worst, passes)
