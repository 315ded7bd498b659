"""What GPTQ would change about W8A8: errors of linear layers' outputs, weights rounded to the nearest or by GPTQ.

    python benchmarks/gptq.py runs/quickstart [--calibration 32] [--asked 16] [--every 9]

Scales are those of `mmpeft export int8`: one a row of weights, one a token of activations. GPTQ (Frantar et al. 2022,
arXiv:2210.17323) is calibrated on some held-out samples and asked on others. Writes benchmarks/results/gptq.json.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mmpeft
from mmpeft.export.w8a8 import quantize, quantize_rows, through_int8, tokens_through_int8

RESULTS = Path(__file__).parent / "results" / "gptq.json"
DAMPING = 0.01


def by_gptq(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Weights in int8, each column's error made good by those that follow."""
    step = quantize_rows(weight)[1]
    left = weight.double()
    hessian = (inputs.T @ inputs).double()
    hessian += torch.eye(len(hessian), dtype=hessian.dtype) * DAMPING * hessian.diagonal().mean()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    done = torch.zeros_like(left)
    for column in range(left.shape[1]):
        own = left[:, column : column + 1]
        done[:, column : column + 1] = quantize(own, step).double() * step.double()
        error = (own - done[:, column : column + 1]) / factor[column, column]
        left[:, column + 1 :] -= error @ factor[column : column + 1, column + 1 :]
    return done.float()


@torch.no_grad()
def inputs_of(
    linears: dict[str, nn.Linear], model: Any, processor: Any, dataset: Any, asked: range
) -> dict[str, torch.Tensor]:
    """What each of these layers takes in, [tokens, channels], for some samples."""
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    hooks = [
        linear.register_forward_hook(lambda _, args, __, name=name: kept[name].append(args[0].flatten(0, -2)))
        for name, linear in linears.items()
    ]
    collate = mmpeft.MultimodalCollator(processor)
    for start in range(asked.start, asked.stop, 4):
        batch = collate([dataset[index] for index in range(start, min(start + 4, asked.stop))])
        model(**{name: value for name, value in batch.items() if name not in ("numbers", "labels")})
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in kept.items()}


def main() -> None:
    """Ask, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="of `mmpeft quickstart`")
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--asked", type=int, default=16)
    parser.add_argument("--every", type=int, default=9, help="of so many linear layers one is looked at")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    loaded, processor = mmpeft.load_model(options.run / "adapter", device="cpu", dtype="float32")
    model = loaded.merge_and_unload().eval()
    data = options.run / "data"
    dataset = mmpeft.load_dataset(data / "eval.json", media_root=data / "images", processor=processor)
    layers = model.get_decoder().layers
    found = [(name, module) for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    linears = dict(found[:: options.every])
    calibration = inputs_of(linears, model, processor, dataset, range(options.calibration))
    last = len(dataset)
    asked = inputs_of(linears, model, processor, dataset, range(last - options.asked, last))
    rows = {}
    for name, linear in linears.items():
        weight, inputs = linear.weight.detach(), asked[name]
        wanted = inputs @ weight.T

        def error(output: torch.Tensor, wanted: torch.Tensor = wanted) -> float:
            return float(((output - wanted) ** 2).mean() / (wanted**2).mean())

        coarse = tokens_through_int8(inputs)
        rows[name] = {
            "weights and activations in int8": error(coarse @ through_int8(weight).T),
            "the same, weights by GPTQ": error(coarse @ by_gptq(weight, calibration[name]).T),
            "activations alone": error(coarse @ weight.T),
        }
    means = {kind: statistics.fmean(row[kind] for row in rows.values()) for kind in next(iter(rows.values()))}
    whole, gptq, activations = means
    result = {
        "command": f"python benchmarks/gptq.py RUN --every {options.every}",
        "layers": len(rows),
        "of": len(found),
        "mean_relative_squared_error": means,
        "median_of_gptq_to_nearest": statistics.median(row[gptq] / row[whole] for row in rows.values()),
        "share_of_activations": means[activations] / means[whole],
        "by_layer": rows,
    }
    options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "by_layer"}, indent=2) + "\n")


if __name__ == "__main__":
    main()
