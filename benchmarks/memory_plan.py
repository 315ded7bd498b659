"""The memory that `mmpeft plan` foretells against what a stage then takes, on a CPU.

Each case is a run of its own in a fresh process: a LLaVA of random weights (a language model as wide as
SmolLM2-135M with its vocabulary, six layers of it; a CLIP tower of four), one update of the longest samples, or two
where the optimizer's states are large.
Measured is the growth of the process' resident memory, from before the model is loaded to the peak of the stage, as
stage.json has it. Writes benchmarks/results/memory_plan.json and .md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import mmpeft  # isort: skip; before transformers, for torchvision's sake
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

RESULTS = Path(__file__).parent / "results"
LIMIT = 0.15
"""Most that a plan may be off."""

TEMPLATE = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
)
LORA = {"language": {"r": 8}}
PROJECTOR = {"projector": "full"}
TOWER = {"vision": "full"}
LANGUAGE = {"language": "full"}

CASES: dict[str, dict[str, Any]] = {
    "vision tower full, float32, micro 4, packed": {"train": TOWER, "micro": 4, "steps": 2},
    "LoRA, float32, micro 4, padded": {"train": LORA, "micro": 4, "packing": False},
    "LoRA, bfloat16, micro 4, padded": {"train": LORA, "micro": 4, "packing": False, "dtype": "bfloat16"},
    "language model full, float32, micro 1": {"train": LANGUAGE, "micro": 1, "steps": 2},
    "LoRA, float32, micro 1": {"train": LORA, "micro": 1},
    "LoRA and projector, float32, micro 4, feature cache": {
        "train": {**PROJECTOR, **LORA},
        "micro": 4,
        "features": True,
    },
    "projector, bfloat16, micro 4, packed": {"train": PROJECTOR, "micro": 4, "dtype": "bfloat16"},
    "LoRA, float32, micro 8, packed, checkpointing": {"train": LORA, "micro": 8, "checkpointing": True},
    "LoRA, float32, micro 4, packed": {"train": LORA, "micro": 4},
    "projector, float32, micro 4, packed, feature cache": {"train": PROJECTOR, "micro": 4, "features": True},
    "projector, float32, micro 4, packed": {"train": PROJECTOR, "micro": 4},
    "LoRA, float32, micro 8, packed": {"train": LORA, "micro": 8},
    "LoRA, bfloat16, base in nf4, micro 4, packed": {
        "train": LORA,
        "micro": 4,
        "dtype": "bfloat16",
        "quantization": "nf4",
    },
}


def write_model(folder: Path) -> None:
    """The model and its processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}
    fast.add_special_tokens({**special, "additional_special_tokens": ["<|im_start|>", "<image>"]})
    side = {"height": 224, "width": 224}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=fast,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=224,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=196,
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def write_data(folder: Path, samples: int = 16) -> None:
    """Questions on pictures of noise, with answers of 100 to 170 tokens."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    rows = []
    for index in range(samples):
        pixels = generator.integers(0, 255, (224, 224, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        answer = "It is " + "word " * (20 + 2 * (index % 8))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def recipe_of(case: dict[str, Any], work: Path, output: Path) -> dict[str, Any]:
    """The recipe of a case."""
    batch = {"size": case["micro"], "micro": case["micro"]}
    if "packing" in case:
        batch["packing"] = case["packing"]
    return {
        "model": str(work / "model"),
        "data": {
            "train": str(work / "data" / "train.json"),
            "media_root": str(work / "data" / "images"),
            "workers": 0,
            "cache": {"features": case.get("features", False), "directory": str(work / "cache")},
        },
        "stages": [
            {
                "name": "stage",
                "train": case["train"],
                "max_steps": case.get("steps", 1),
                "trainer": {"save_strategy": "no"},
            }
        ],
        "batch": batch,
        "compute": {"checkpointing": case.get("checkpointing", "auto")},
        "dtype": case.get("dtype", "float32"),
        "quantization": case.get("quantization", "none"),
        "device": "cpu",
        "output": str(output),
    }


PLANNED_RUN = (
    "import sys, mmpeft, mmpeft.pipeline.run as run; run.WORTH_REHEARSING = 0.0; "
    "mmpeft.run(mmpeft.Recipe.from_yaml(sys.argv[1]))"
)


def measure(name: str, case: dict[str, Any], work: Path) -> dict[str, Any]:
    """Planned and measured of one case, in a process of its own."""
    output = work / "runs" / name.replace(",", "").replace(" ", "-")
    recipe = output.with_suffix(".yaml")
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(recipe_of(case, work, output)), encoding="utf-8")
    begin = time.perf_counter()
    environment = {**os.environ, "HF_DATASETS_CACHE": str(work / "datasets"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        # As `mmpeft run` does, which plans no stage as short as these.
        [sys.executable, "-c", PLANNED_RUN, str(recipe)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    stage = json.loads((output / "stages" / "01-stage" / "stage.json").read_text(encoding="utf-8"))
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))["stages"][0]["memory"]
    kinds = ("weights", "gradients", "optimizer", "batch", "activations", "logits", "fragmentation", "update", "load")
    found = stage["figures"]["memory"]
    return {
        "case": name,
        **{key: found[key] for key in ("planned_bytes", "measured_bytes", "error", "how", "of_stage_alone")},
        "samples": plan["samples"],
        "tokens": plan["tokens"],
        "by_kind": {kind: plan[kind] for kind in kinds},
        "seconds": time.perf_counter() - begin,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| stage | tokens | planned, MiB | measured, MiB | error |", "| :-- | --: | --: | --: | --: |"]
    lines += [
        f"| {row['case']} | {row['tokens']:,} | {row['planned_bytes'] / 2**20:,.0f} | "
        f"{row['measured_bytes'] / 2**20:,.0f} | {row['error']:+.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], target: Path) -> None:
    """The results so far."""
    result = {
        "mmpeft": mmpeft.__version__,
        "torch": torch.__version__,
        "system": platform.platform(),
        "worst_error": max(abs(row["error"]) for row in rows),
        "cases": rows,
    }
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def main() -> None:
    """Measure the cases; ends with status 1 if a plan is off by more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--results", type=Path, default=RESULTS / "memory_plan.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_model(work / "model")
        write_data(work / "data")
        rows = []
        for name, case in CASES.items():
            if arguments.only in name:
                rows.append(measure(name, case, work))
                print(table(rows[-1:]).splitlines()[-1], f"{rows[-1]['seconds']:.0f} s", flush=True)
                write(rows, arguments.results)
    raise SystemExit(max(abs(row["error"]) for row in rows) > LIMIT)


if __name__ == "__main__":
    main()
