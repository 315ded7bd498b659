"""Ask a model and its GGUF export the same questions, and time both; writes benchmarks/results/gguf_export.json.

pip install --no-deps cyllama
python benchmarks/gguf_export.py runs/quickstart/adapter --data runs/quickstart/data/eval.json

Speed is measured only where nothing else runs on the machine (load below 2).
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cyllama
import cyllama.llama.llama_cpp as native
import torch
from PIL import Image

from mmpeft.export.gguf import MMPROJ, export_gguf
from mmpeft.models.load import load_model

RESULT = Path(__file__).parent / "results" / "gguf_export.json"
DECODED, MOST_LOAD = 128, 2.0


class Model(native.LlamaModel):  # type: ignore[misc]
    """A model that tells its number of tokens, which contexts of cyllama 0.2.18 ask for and it does not."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


class LlamaCpp:
    """An export in llama.cpp."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        native.disable_logging()
        self.model = Model(str(next(folder.glob("model-*.gguf"))))
        self.words = self.model.get_vocab()
        params = native.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = 2048
        params.n_threads = params.n_threads_batch = threads
        self.context = native.LlamaContext(self.model, params)
        seeing = native.MtmdContextParams(use_gpu=False, n_threads=threads, warmup=False)
        self.eyes = native.MtmdContext(str(folder / MMPROJ), self.model, seeing)

    def answer(self, prompt: str, picture: Image.Image, most: int, *, stop: bool = True) -> tuple[list[int], float]:
        """The most likely tokens after a prompt with its picture's mark, and the seconds a token takes."""
        self.context.kv_cache_clear()
        bitmap = native.MtmdBitmap.create_image(*picture.size, picture.convert("RGB").tobytes())
        chunks = self.eyes.tokenize(prompt, [bitmap], False, True)
        place = self.eyes.eval_chunks(self.context, chunks, 0, 0, 2048, True)
        sampler = native.LlamaSampler(native.LlamaSamplerChainParams())
        sampler.add_greedy()
        said: list[int] = []
        start = time.perf_counter()
        while len(said) < most:
            token = sampler.sample(self.context, -1)
            if stop and self.words.is_eog(token):
                break
            said.append(token)
            self.context.decode(native.llama_batch_get_one([token], place))
            place += 1
        return said, (time.perf_counter() - start) / max(len(said), 1)


def generate(model: Any, batch: Any, most: int, *, stop: bool = True) -> list[int]:
    """The most likely tokens after a prompt, by transformers."""
    least = 0 if stop else most
    with torch.no_grad():
        said = model.generate(**batch, max_new_tokens=most, min_new_tokens=least, do_sample=False)
    return [int(token) for token in said[0, batch["input_ids"].shape[1] :]]


def questions(data: Path) -> list[tuple[str, Path]]:
    """The first question about each picture of a LLaVA file, and the picture."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    return [
        (row["conversations"][0]["value"].replace("<image>", "").strip(), data.parent / "images" / row["image"])
        for row in rows
    ]


def compare(model: Any, processor: Any, cpp: LlamaCpp, asked: list[tuple[str, Path]], most: int) -> dict[str, Any]:
    """How many answers are the same, token by token."""
    same, differing = 0, []
    ends = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
    for text, path in asked:
        picture = Image.open(path).convert("RGB")
        prompt = prompt_of(processor, text)
        batch = processor(text=[prompt], images=[picture], return_tensors="pt")
        want = [token for token in generate(model, batch, most) if token not in ends]
        found, _ = cpp.answer(prompt.replace(processor.image_token, native.get_default_media_marker()), picture, most)
        same += found == want
        if found != want:
            differing.append({"question": text, "source": want, "export": found})
    return {"questions": len(asked), "same": same, "share": round(same / len(asked), 4), "differing": differing[:5]}


def prompt_of(processor: Any, text: str) -> str:
    """A question about a picture, as the model is asked it."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def speed(model: Any, processor: Any, cpp: LlamaCpp, asked: tuple[str, Path]) -> dict[str, Any]:
    """Tokens a second of both, one after the other, the best of three."""
    picture, prompt = Image.open(asked[1]).convert("RGB"), prompt_of(processor, asked[0])
    batch = processor(text=[prompt], images=[picture], return_tensors="pt")
    model = model.to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    text = prompt.replace(processor.image_token, native.get_default_media_marker())
    eager, native_speed = 0.0, 0.0
    for _ in range(3):
        start = time.perf_counter()
        generate(model, batch, 1, stop=False)
        first = time.perf_counter() - start
        start = time.perf_counter()
        generate(model, batch, DECODED + 1, stop=False)
        eager = max(eager, DECODED / (time.perf_counter() - start - first))
        native_speed = max(native_speed, 1 / cpp.answer(text, picture, DECODED, stop=False)[1])
    return {
        "transformers_bf16_eager": round(eager, 1),
        "llama_cpp": round(native_speed, 1),
        "ratio": round(native_speed / eager, 2),
        "load_after": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--data", type=Path, required=True, help="held-out questions in LLaVA's layout, images/ beside")
    parser.add_argument("--most", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--outtype", default="q8_0")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        done = export_gguf(options.source, Path(folder) / "out", outtype=options.outtype)
        model, processor = load_model(options.source, device="cpu", dtype="float32")
        model = model.merge_and_unload() if hasattr(model, "peft_config") else model
        cpp = LlamaCpp(Path(folder) / "out", threads=threads)
        asked = questions(options.data)[: options.limit]
        result: dict[str, Any] = {
            "command": "python benchmarks/gguf_export.py SOURCE --data EVAL",
            "outtype": options.outtype,
            "notes": list(done.notes),
            "bytes": {"source": done.before, **done.files},
            "answers": compare(model, processor, cpp, asked, options.most),
            "tokens_per_second": "not measured: the machine was not idle",
            "threads": threads,
            "llama_cpp": f"cyllama {cyllama.__version__}",
            "python": platform.python_version(),
        }
        if os.getloadavg()[0] < MOST_LOAD:
            result["tokens_per_second"] = speed(model, processor, cpp, asked[0])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
