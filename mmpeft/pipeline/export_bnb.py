"""`mmpeft export bnb`: the model is written as bitsandbytes holds it, and the gate looks at it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft.export.bnb import COPIES, BnbKind, BnbResult, without_uneven, write_bnb
from mmpeft.export.coarse import as_loaded
from mmpeft.export.int8 import Int8Export, Int8Settings
from mmpeft.export.sources import find_source
from mmpeft.models.devices import pick_device
from mmpeft.models.load import load_model, load_processor
from mmpeft.pipeline.export_gate import UNCOMPARED, Gate, Outcome, Threshold, concluded, find_held_out, source_model


def export_bnb(
    source: str | Path,
    output: str | Path,
    *,
    kind: BnbKind = "int8",
    base: str | Path | None = None,
    skip: Sequence[str] = (),
    data: Path | None = None,
    media_root: Path | None = None,
    samples: int = 64,
    threshold: Threshold | None = None,
    compare: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Outcome[BnbResult]:
    """Write an adapter on its base, or a model, with LLM.int8 or NF4 weights, and compare it with its source.

    Args:
        kind: `int8` or `nf4`.
        skip: names of linear layers that stay in 16 bits, or `re:` and a pattern.

    The others, and what is raised, are those of `export_int8`.
    """
    found = find_source(source, base=base)
    export = Int8Export(found, Int8Settings(skip=tuple(skip)), trust_remote_code=trust_remote_code)
    export = without_uneven(export, kind)
    export.check_output(output, times=COPIES)
    place = pick_device(device)
    if place.type == "cpu":
        # DeepSpeed, where it is installed, looks for an accelerator when it is imported, and says that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not compare:
        result = write_bnb(export, output, kind=kind, device=place)
        return concluded(result, UNCOMPARED)
    processor = load_processor(found.base, adapter=found.adapter, trust_remote_code=trust_remote_code)
    held_out = find_held_out(found, processor, data=data, media_root=media_root, samples=samples)
    with Gate(held_out, processor) as gate:

        def asked() -> Any:
            return source_model(found, device=device, trust_remote_code=trust_remote_code)

        gate.ask_source(asked())
        result = write_bnb(export, output, kind=kind, device=place)
        model, _ = load_model(result.output, device=device, trust_remote_code=trust_remote_code)
        parity = gate.judge(
            model,
            threshold or Threshold(),
            sizes=(result.before, result.bytes),
            layers=lambda: gate.errors(asked(), result.quantized, as_loaded(model)),
        )
    return concluded(result, parity)
