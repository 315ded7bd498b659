"""`mmpeft export gguf`: the model is written, and llama.cpp, where it is installed, is asked what the source was asked.

llama.cpp is given pictures and texts as its users give them: it scales the one and splits the other by itself, so what
it does otherwise than the processor is part of the comparison.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from mmpeft.core.errors import DataError, MissingDependencyError
from mmpeft.core.memory import forget_peak, latest_peak_bytes
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.box_text import spelt_out
from mmpeft.data.labels import conversation_of, prompt_of, starts_with_bos
from mmpeft.data.load_media import load_media
from mmpeft.evaluation.scores import score_answers
from mmpeft.export.artefact import check_replaceable
from mmpeft.export.coarse import in_blocks
from mmpeft.export.gguf import GgufResult, write_gguf
from mmpeft.export.gguf_file import Q8_BLOCK, OutType
from mmpeft.export.gguf_vision import VisionShape, vision_shape
from mmpeft.export.llama_cpp import LlamaCpp, binding, version
from mmpeft.export.sources import Source, find_source
from mmpeft.models.devices import pick_device
from mmpeft.models.load import load_processor
from mmpeft.models.weightless import read_config
from mmpeft.pipeline.export_gate import (
    UNCOMPARED,
    Gate,
    HeldOut,
    Outcome,
    Threshold,
    concluded,
    find_held_out,
    source_model,
)

SAME = 0.95
"""Least share of held-out questions that llama.cpp and the source answer alike."""


def export_gguf(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    outtype: str = OutType.Q8_0,
    lora: bool = False,
    skip: Sequence[str] = (),
    data: Path | None = None,
    media_root: Path | None = None,
    samples: int = 64,
    threshold: Threshold | None = None,
    compare: bool = True,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Outcome[GgufResult]:
    """Write an adapter on its base, or a model, as GGUF files, and compare them with what they were made from.

        mmpeft.export_gguf("runs/receipts/adapter", "receipts-gguf")
        llama-mtmd-cli -m receipts-gguf/model-q8_0.gguf --mmproj receipts-gguf/mmproj-f16.gguf --image receipt.png

    Where llama.cpp is not installed (`pip install --no-deps cyllama`) nothing is compared, and parity.json says so.

    Args:
        source: directory or hub id.
        output: a new or empty directory, or an earlier export, which is replaced.
        base: directory or hub id of an adapter's base; default: the one that it names.
        outtype: how the language model's matrices are written: `q8_0`, `f16` or `bf16`.
        lora: write the adapter's LoRA apart, to be put on a GGUF file of its base, and no language model; there is
            nothing to compare then.
        skip: names of linear layers that stay in 16 bits, or `re:` and a pattern.
        data, media_root: held-out samples; default: those of the run that trained the adapter.
        samples: of how many the tokens are compared.
        threshold: what the export has to reach.
        compare: whether to look at it at all; what was not looked at does not pass.
        device: where the source is asked; llama.cpp computes on the CPU.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError, ModelError: source and base do not fit, are not whole, or llama.cpp does not compute them.
        DataError: there is nothing to compare on, or it has more than pictures.
        OutputError: the output holds something else, has no room, or cannot be written.
        RecipeError: `lora` for a model, an outtype that there is not, or `skip` names no layer or nothing in int8.
    """
    check_replaceable(Path(output).expanduser())
    found = find_source(source, base=base)
    options: dict[str, Any] = {"outtype": outtype, "lora": lora, "skip": skip, "trust_remote_code": trust_remote_code}
    why = _obstacle(lora=lora) if compare else ""
    if not compare or why:
        parity = {**UNCOMPARED, "why": f"{UNCOMPARED['why']}: {why}"} if why else UNCOMPARED
        return concluded(write_gguf(found, output, **options), parity)
    config = read_config(found.base, trust_remote_code=trust_remote_code)
    shape = vision_shape(config, found.name)
    processor = load_processor(found.base, adapter=found.adapter, trust_remote_code=trust_remote_code)
    held_out = find_held_out(found, processor, data=data, media_root=media_root, samples=samples)
    _check_pictures_alone(held_out)
    result = write_gguf(found, output, **options)
    with Gate(held_out, processor) as gate:

        def asked_first() -> Any:
            return _source(found, device=device, trust_remote_code=trust_remote_code)

        gate.ask_source(asked_first())
        asked = Asked(LlamaCpp.of_export(result.output, threads=torch.get_num_threads()), held_out, processor, shape)
        near, scores = gate.agreement_of(asked.logits()), asked.scores()
        if pick_device(device).type != "cpu":
            # An accelerator's tensors are not to be compared with resident memory.
            scores["memory"] = None
        parity = gate.verdict(
            near,
            scores,
            threshold or Threshold(answers=SAME),
            sizes=(result.before, result.bytes),
            layers=lambda: gate.errors(asked_first(), result.quantized, in_blocks(lambda _: Q8_BLOCK)),
        )
    return concluded(result, {**parity, "runtime": version()})


def _obstacle(*, lora: bool) -> str:
    """Why an export cannot be compared; empty if it can."""
    if lora:
        return "a LoRA alone has no language model; compare an export without --lora"
    try:
        binding()
    except MissingDependencyError as error:
        return str(error)
    return ""


def _check_pictures_alone(held_out: HeldOut) -> None:
    dataset = held_out.dataset
    other = next((index for index in range(len(dataset)) if dataset.media_kinds(index) & ~_PICTURES), None)
    if other is not None:
        raise DataError(
            f"{held_out.origin}: sample {dataset.sample(other).id!r} has films or recordings, and llama.cpp is asked "
            "about pictures alone; give --data FILE without them"
        )


_PICTURES = 1
"""The bit of pictures in `MultimodalDataset.media_kinds`."""


def _source(found: Source, *, device: str, trust_remote_code: bool) -> Any:
    model = source_model(found, device=device, trust_remote_code=trust_remote_code)
    # llama.cpp says the most likely token whatever penalties the source's settings name: so does the source here.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model


class Asked:
    """A GGUF export in llama.cpp, asked what its source was asked.

    Args:
        cpp: the export.
        held_out: what it is asked.
        processor: of the source; only texts are made and read by it.
        shape: how its pictures are written.
    """

    def __init__(self, cpp: LlamaCpp, held_out: HeldOut, processor: Any, shape: VisionShape) -> None:
        self.cpp, self.held_out, self.processor, self.shape = cpp, held_out, processor, shape

    def logits(self) -> Iterator[torch.Tensor]:
        """Of each compared sample what it thinks of the tokens of answers: [tokens, vocabulary]."""
        dataset = self.held_out.dataset
        for index in range(min(self.held_out.samples, len(dataset))):
            whole = spelt_out(self.processor, dataset.sample(index), root=dataset.media_root, limits=dataset.limits)
            conversation = conversation_of(self.processor, whole.turns)
            pictures = load_media(whole, root=dataset.media_root, limits=dataset.limits).images
            answers = _answers(dataset[index])
            rows = []
            # A cut to max_length may have left answers out.
            for (start, _), answer in zip(conversation.spans, answers, strict=False):
                self.cpp.read(**self._prompt(conversation.text[:start], pictures), more=len(answer))
                rows.append(torch.from_numpy(self.cpp.follow(answer)))
            yield torch.cat(rows)

    def scores(self) -> dict[str, Any]:
        """Of its greedy answers, as `evaluate_model` has them of the source's, and the peak of memory they took."""
        gc.collect()
        told = forget_peak("cpu")
        start = time.perf_counter()
        dataset, evaluate = self.held_out.dataset, self.held_out.evaluate
        questions, answers = dataset.questions()[: evaluate.limit], []
        for question in questions:
            text = prompt_of(self.processor, question.prompt, thinking="</think>" in question.reference).text
            pictures = load_media(question, root=dataset.media_root, limits=dataset.limits).images
            said = self.cpp.answer(**self._prompt(text, pictures), most=evaluate.max_new_tokens)
            answers.append(self.processor.tokenizer.decode(said, skip_special_tokens=True).strip())
        seconds = time.perf_counter() - start
        memory = latest_peak_bytes("cpu") if told else None
        return {**score_answers(questions, answers, evaluate.metrics), "seconds": seconds, "memory": memory}

    def _prompt(self, text: str, pictures: Sequence[Any]) -> dict[str, Any]:
        """A text with llama.cpp's marks, and the pictures that it has."""
        marked = self.shape.marked(text, self.processor.image_token, self.cpp.mark)
        begin = not starts_with_bos(self.processor, text)
        return {"prompt": marked, "pictures": pictures[: marked.count(self.cpp.mark)], "begin": begin}


def _answers(encoded: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens of each answer: runs of tokens with labels."""
    pairs = zip(encoded["input_ids"].tolist(), encoded["labels"].tolist(), strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX)
    return [[token for token, _ in run] for labelled, run in runs if labelled]
