"""Training speed at equal maths: mmpeft against TRL and ms-swift, in turn, on the same model, data and adapter.

    python benchmarks/train_speed.py --trl VENV/bin/python --swift VENV/bin/python [--case eight] [--dtype bfloat16]

A LLaVA of the shape of SmolLM2-135M with a CLIP ViT-B/16 tower (random weights, 196 picture tokens, about 240 tokens
a sample) trains its projector and LoRA on its language model. Cases: `distinct`, each sample its own picture;
`eight`, eight questions a picture. Each program runs in a process of its own, with its own best exact settings, samples
in the order of the file. The losses of all are compared step for step: beyond 1 % apart, nothing is written. Peers are
installed by hand, each into an environment of its own; one that is not given is left out. Writes
benchmarks/results/train_speed.json; the figure to trust is the ratio, for all run in turn on the same machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mmpeft
from mmpeft.methods.attach import get_peft_model
from mmpeft.pipeline.facts import hardware

# After mmpeft, which makes a CUDA build of torchvision importable beside a CPU build of torch.
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # isort: skip
from transformers import (  # isort: skip
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "train_speed.json"
WARM_UP = 2
CASES = {"distinct": 1, "eight": 8}
"""Questions a picture."""
TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}{%- endif -%}"
    "{{ '\nASSISTANT:' }}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{{ message['content'][0]['text'] }}"
    "{%- endif -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
"""ms-swift's for LLaVA 1.5, so that all see the same tokens."""


def make_model(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": 224, "width": 224}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )
    text = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=196,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_adapter(model_folder: Path, folder: Path) -> None:
    """Projector and LoRA, with weights, so that all programs start from the same ones."""
    model, _ = mmpeft.load_model(str(model_folder), device="cpu", dtype="float32")
    torch.manual_seed(1)
    adapted = get_peft_model(model, {"projector": "full", "language": {"r": 16, "lora_alpha": 32}})
    mmpeft.save_adapter(adapted, folder)


def make_data(folder: Path, samples: int, per_picture: int) -> tuple[Path, Path]:
    """LLaVA JSON, and the same in ms-swift's own layout."""
    noise = np.random.default_rng(0)
    rows, swift = [], []
    for index in range(samples):
        picture = f"{index // per_picture}.png"
        if not (folder / picture).exists():
            Image.fromarray(noise.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(folder / picture)
        question, answer = f"What is in picture {index}, said in words?", f"thing {index % 7}"
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": picture, "conversations": turns})
        messages = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
        swift.append({"messages": messages, "images": [str(folder / picture)]})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "swift.json").write_text(json.dumps(swift), encoding="utf-8")
    return folder / "data.json", folder / "swift.json"


def run(name: str, python: str, work: dict[str, Any], folder: Path) -> dict[str, Any]:
    worker = HERE / "peers" / f"{name.partition(' ')[0]}_worker.py"
    work = {**work, "result": str(folder / "result.json"), "output": str(folder / "output")}
    (folder / "work.json").write_text(json.dumps(work), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python, str(worker), str(folder / "work.json")], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def apart(losses: list[float], others: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="Python of an environment with TRL")
    parser.add_argument("--swift", help="Python of an environment with ms-swift")
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    programs = {"mmpeft": sys.executable, "mmpeft without packing": sys.executable}
    programs |= {"trl": options.trl} if options.trl else {}
    programs |= {"swift": options.swift} if options.swift else {}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_model(root / "model")
        make_adapter(root / "model", root / "adapter")
        for case in options.case or list(CASES):
            (root / case).mkdir()
            data, swift = make_data(root / case, options.steps * options.batch, CASES[case])
            work = {
                "model": str(root / "model"),
                "adapter": str(root / "adapter"),
                "data": str(data),
                "swift_data": str(swift),
                "dtype": options.dtype,
                "steps": options.steps,
                "batch": options.batch,
                "learning_rate": 1e-3,
            }
            found = {}
            for name, python in programs.items():
                folder = Path(tempfile.mkdtemp(dir=root))
                found[name] = run(name, python, {**work, "packing": name == "mmpeft"}, folder)
                print(case, name, json.dumps(found[name]), file=sys.stderr, flush=True)
            rows += table(case, options, found)
    RESULTS.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(json.dumps(row))


def table(case: str, options: argparse.Namespace, found: dict[str, Any]) -> list[dict[str, Any]]:
    ours = found["mmpeft"]
    rows = []
    for name, result in found.items():
        difference = apart(ours["losses"], result["losses"])
        if difference > 0.01:
            sys.exit(f"{case}: the losses of {name} are {difference:.1%} off: not the same maths, nothing is written")
        speed = options.batch / statistics.median(result["seconds"][WARM_UP:])
        rows.append(
            {
                "case": case,
                "dtype": options.dtype,
                "batch": options.batch,
                "program": name,
                "samples_a_second": round(speed, 3),
                "mmpeft_is_times_as_fast": round(
                    statistics.median(result["seconds"][WARM_UP:]) / statistics.median(ours["seconds"][WARM_UP:]), 2
                ),
                "largest_difference_of_loss": float(f"{difference:.2g}"),
                "peak_gib": result["peak_gib"],
            }
        )
    return rows


if __name__ == "__main__":
    main()
