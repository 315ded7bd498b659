"""`mmpeft export onnx`: the model is written as graphs, and the gate looks at what ONNX Runtime makes of them."""

from dataclasses import replace
from pathlib import Path

from mmpeft.export.artefact import check_replaceable
from mmpeft.export.coarse import in_blocks
from mmpeft.export.onnx import OnnxResult, OnnxSettings, int8_layers, merged_in_memory, write_onnx
from mmpeft.export.onnx_graph import check_installed
from mmpeft.export.onnx_model import OnnxModel
from mmpeft.export.onnx_weights import block_of
from mmpeft.export.sources import find_source
from mmpeft.models.load import load_processor
from mmpeft.pipeline.export_gate import UNCOMPARED, Gate, Outcome, Threshold, concluded, find_held_out


def export_onnx(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    settings: OnnxSettings | None = None,
    data: Path | None = None,
    media_root: Path | None = None,
    samples: int = 64,
    threshold: Threshold | None = None,
    compare: bool = True,
) -> Outcome[OnnxResult]:
    """Write an adapter on its base, or a model, as ONNX graphs, and compare these with what they were made from.

        mmpeft.export_onnx("runs/receipts/adapter", "receipts-onnx")
        mmpeft.OnnxModel.from_pretrained("receipts-onnx")

    Both run on the CPU, the source in float32.

    Args:
        source: directory or hub id.
        output: a new or empty directory, or an earlier export, which is replaced.
        base: directory or hub id of an adapter's base; default: the one that it names.
        settings: what is written how.
        data, media_root: held-out samples; default: those of the run that trained the adapter.
        samples: of how many the tokens are compared.
        threshold: what the export has to reach.
        compare: whether to look at it at all; what was not looked at does not pass.

    Raises:
        AdapterError, ModelError: source and base do not fit, are not whole, or are of a kind without ONNX export.
        DataError: there is nothing to compare on.
        MissingDependencyError: a library of the extra `onnx` is not installed.
        OutputError: the output holds something else, has no room, or cannot be written.
        RecipeError: `settings` name what is not there.
    """
    check_installed()
    settings = settings or OnnxSettings()
    settings.check()
    check_replaceable(Path(output).expanduser())
    found = find_source(source, base=base)
    if not compare:
        return concluded(write_onnx(found, merged_in_memory(found), output, settings), UNCOMPARED)
    processor = load_processor(found.base, adapter=found.adapter)
    held_out = find_held_out(found, processor, data=data, media_root=media_root, samples=samples)
    # Prompts that share a row want attention by segments, which a graph does not have.
    held_out = replace(held_out, evaluate=held_out.evaluate.model_copy(update={"share_media": False}))
    with Gate(held_out, processor) as gate:
        model = merged_in_memory(found)
        if settings.precision == "int8":
            # Names that are not there are told before the source answers.
            int8_layers(model, settings)
        gate.ask_source(model)
        result = write_onnx(found, model, output, settings)
        del model
        parity = gate.judge(
            OnnxModel.from_pretrained(result.output),
            threshold or Threshold(),
            sizes=(result.before, result.bytes),
            layers=lambda: gate.errors(merged_in_memory(found), result.quantized, in_blocks(block_of)),
        )
    return concluded(result, parity)
