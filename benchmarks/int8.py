"""Speed of ONNX int8 on a CPU: against transformers in bfloat16 and float32, in turn, in one run.

    python benchmarks/int8.py [--prompt 400] [--new-tokens 64] [--rounds 3] [--threads 2]

A LLaVA of the shape of SmolLM2-135M with a CLIP ViT-B/16 tower (random weights) is exported as `mmpeft export onnx`
does, and reads a prompt of text and goes on from it, greedily, as `generate` does. Prefill is the first token's time,
decoding that of all others. Random weights say nothing about accuracy: that is the parity gate's. Writes
benchmarks/results/int8.json; the figures to trust are the ratios.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from workload.shapes import make_model

import mmpeft
from mmpeft.export.onnx import OnnxSettings, merged_in_memory, write_onnx
from mmpeft.export.sources import find_source
from mmpeft.pipeline.facts import hardware, versions

RESULTS = Path(__file__).parent / "results" / "int8.json"
QUICK = {"size": "tiny", "prompt": 40, "new_tokens": 4, "rounds": 1}


@torch.no_grad()
def ask(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Seconds to `tokens` tokens behind a prompt."""
    begin = time.perf_counter()
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - begin
    assert found.shape[1] == ids.shape[1] + tokens
    return seconds


def measure(models: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Tokens a second of each, and those of every round."""
    ids = torch.randint(0, 200, (1, options.prompt))
    rounds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for model in models.values():
        ask(model, ids, 2)
    for _ in range(options.rounds):
        for name, model in models.items():
            first = ask(model, ids, 1)
            whole = ask(model, ids, options.new_tokens)
            rounds[name]["prefill"].append(options.prompt / first)
            rounds[name]["decode"].append((options.new_tokens - 1) / (whole - first))
    return {
        name: {**{kind: statistics.median(rates) for kind, rates in found.items()}, "rounds": found}
        for name, found in rounds.items()
    }


def main() -> None:
    """Export, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="135m")
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model("llava", options.size, folder / "model")
        source = find_source(folder / "model")
        begin = time.perf_counter()
        fp32 = merged_in_memory(source)
        written = write_onnx(source, fp32, folder / "onnx", OnnxSettings())
        seconds = time.perf_counter() - begin
        bf16, _ = mmpeft.load_model(folder / "model", device="cpu", dtype="bfloat16")
        models = {"onnx_int8": mmpeft.OnnxModel.from_pretrained(folder / "onnx"), "bf16": bf16.eval(), "fp32": fp32}
        rates = measure(models, options)
    ours = rates["onnx_int8"]
    found = {
        "command": "python benchmarks/int8.py",
        "hardware": hardware(torch.device("cpu")),
        "versions": versions(),
        "threads": options.threads,
        "load_before": load,
        "model": options.size,
        "prompt_tokens": options.prompt,
        "new_tokens": options.new_tokens,
        "tokens_per_second": rates,
        "ratio": {
            name: {kind: ours[kind] / rates[name][kind] for kind in ("prefill", "decode")} for name in ("bf16", "fp32")
        },
        "export_seconds": seconds,
        "bytes": dict(written.graphs),
    }
    text = json.dumps(found, indent=2)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
