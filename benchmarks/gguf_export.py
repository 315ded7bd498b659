"""A GGUF export in llama.cpp beside its source: the same questions, and the speed of both in turn, in one run.

    pip install --no-deps cyllama
    python benchmarks/gguf_export.py [--run runs/gguf-benchmark] [--rounds 3]

The source is a quickstart with a SigLIP tower (llama.cpp computes CLIP otherwise: its issue 25814); a run that is
there already is taken as it is. It is exported as `mmpeft export gguf` does, with its gate: all held-out questions are
asked of both. Speed is that of a picture with a long prompt: prefill until the first token, decoding that of all
others, llama.cpp against transformers in bfloat16. Writes benchmarks/results/gguf_export.json; speeds are only to be
trusted where `others_cores` is near 0, which is how many cores other programs had meanwhile.
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
from PIL import Image
from rich.console import Console

import mmpeft
from mmpeft.export.gguf_vision import vision_shape
from mmpeft.export.llama_cpp import LlamaCpp, version
from mmpeft.pipeline.facts import hardware, versions
from mmpeft.pipeline.quickstart import quickstart

RESULTS = Path(__file__).parent / "results" / "gguf_export.json"
CALM = 0.1


def busy() -> float:
    """Seconds that all cores together have worked since the machine started; Linux alone says."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    ticks = dict(zip(names, map(int, line), strict=False))
    return (sum(ticks.values()) - ticks["idle"] - ticks["iowait"]) / os.sysconf("SC_CLK_TCK")


def source_in(run: Path) -> Path:
    """The adapter of a quickstart with a SigLIP tower, which is trained unless it is there."""
    if not (run / "adapter").is_dir():
        quickstart(run, tower="siglip", console=Console(stderr=True))
    return run / "adapter"


def long_prompt(processor: Any, tokens: int) -> str:
    """A picture's token and so many tokens of text."""
    words = processor.tokenizer(" and then some more of it" * tokens)["input_ids"][:tokens]
    return str(processor.image_token + processor.tokenizer.decode(words))


@torch.no_grad()
def transformers_seconds(model: Any, batch: Any, tokens: int) -> float:
    """To `tokens` tokens behind a prompt."""
    start = time.perf_counter()
    found = model.generate(
        **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    seconds = time.perf_counter() - start
    assert found.shape[1] == batch["input_ids"].shape[1] + tokens
    return seconds


def llama_cpp_seconds(cpp: LlamaCpp, prompt: str, picture: Image.Image, tokens: int) -> float:
    """As `transformers_seconds`."""
    start = time.perf_counter()
    cpp.read(prompt, [picture], more=tokens)
    assert len(cpp.go_on(tokens, stop=False)) == tokens
    return time.perf_counter() - start


def speed(source: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both, and those of every round."""
    model, processor = mmpeft.load_model(source, device="cpu", dtype="bfloat16")
    model = (model.merge_and_unload() if hasattr(model, "peft_config") else model).eval()
    cpp = LlamaCpp.of_export(out, threads=torch.get_num_threads())
    side = model.config.vision_config.image_size
    picture = Image.linear_gradient("L").resize((side, side)).convert("RGB")
    prompt = long_prompt(processor, options.prompt)
    batch = processor(text=[prompt], images=[picture], return_tensors="pt")
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    marked = vision_shape(model.config, str(source)).marked(prompt, processor.image_token, cpp.mark)
    ask = {
        "transformers_bf16": lambda tokens: transformers_seconds(model, batch, tokens),
        "llama_cpp": lambda tokens: llama_cpp_seconds(cpp, marked, picture, tokens),
    }
    length = batch["input_ids"].shape[1]
    rounds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in ask}
    for seconds in ask.values():
        seconds(2)
    start, worked, own = time.perf_counter(), busy(), time.process_time()
    for _ in range(options.rounds):
        for name, seconds in ask.items():
            first, whole = seconds(1), seconds(options.new_tokens)
            rounds[name]["prefill"].append(length / first)
            rounds[name]["decode"].append((options.new_tokens - 1) / (whole - first))
    others = (busy() - worked - (time.process_time() - own)) / (time.perf_counter() - start)
    median = {name: {kind: statistics.median(rates) for kind, rates in found.items()} for name, found in rounds.items()}
    return {
        "prompt_tokens": length,
        "new_tokens": options.new_tokens,
        "tokens_per_second": {name: {**median[name], "rounds": rounds[name]} for name in ask},
        "ratio": {
            kind: median["llama_cpp"][kind] / median["transformers_bf16"][kind] for kind in ("prefill", "decode")
        },
        "others_cores": round(others, 2),
        "calm": others < CALM,
    }


def main() -> None:
    """Train, export, compare, measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/gguf-benchmark"), help="where the quickstart lies")
    parser.add_argument("--source", type=Path, help="another adapter or model in its place")
    parser.add_argument("--data", type=Path, help="held-out questions; default: those of the run")
    parser.add_argument("--media-root", type=Path)
    parser.add_argument("--outtype", default="q8_0")
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    source = options.source or source_in(options.run)
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "out", time.perf_counter()
        done = mmpeft.export_gguf(
            source, out, outtype=options.outtype, data=options.data, media_root=options.media_root, device="cpu"
        )
        seconds = time.perf_counter() - start
        found = {
            "command": "python benchmarks/gguf_export.py",
            "hardware": hardware(torch.device("cpu")),
            "versions": {**versions(), "llama_cpp": version()},
            "threads": torch.get_num_threads(),
            "load_before": round(load, 2),
            "source": "quickstart with a SigLIP tower" if options.source is None else str(options.source.name),
            "outtype": options.outtype,
            "notes": list(done.result.notes),
            "files": dict(done.result.files),
            "export_and_gate_seconds": seconds,
            "parity": dict(done.parity),
            "speed": speed(source, out, options),
        }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
