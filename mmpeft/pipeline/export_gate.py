"""The gate of exports: each is compared with its source on held-out data before anybody is given it.

parity.json, beside the export
  passed, why            whether `mmpeft push` takes it, and why not
  threshold              what was asked for
  agreement              tokens of held-out answers, share with the same most likely token, mean KL divergence; share
                         of held-out questions that both answer with the same words
  metrics                {"source": {...}, "export": {...}} of the answers that both give
  seconds, bytes         to answer, and of all weights, of both
  memory                 most that the process had while it answered, of both: tensors of an accelerator, on a CPU
                         resident memory with all that the process holds beside the model; not where one was asked on
                         an accelerator and the other on a CPU, as llama.cpp is
  layers                 what the export changes in the outputs of layers, relative to them, most first; of int8 always,
                         of others where they do not pass
  runtime                of GGUF, the llama.cpp that answered
"""

import gc
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from mmpeft.config.recipe import EvaluateConfig, Recipe
from mmpeft.core.errors import DataError
from mmpeft.core.files import write_json
from mmpeft.core.memory import forget_peak, latest_peak_bytes
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.dataset import MultimodalDataset, load_dataset
from mmpeft.evaluation.decode import placed
from mmpeft.export.agreement import Agreement, Said, evaluating
from mmpeft.export.artefact import is_running
from mmpeft.export.coarse import Coarse
from mmpeft.export.observe import observe
from mmpeft.export.sources import Source
from mmpeft.models.load import load_model
from mmpeft.pipeline.data import load_held_out
from mmpeft.pipeline.evaluate import evaluate_with

PARITY = "parity.json"


class Written(Protocol):
    """What an exporter says of what it wrote."""

    @property
    def output(self) -> Path:
        """Its directory."""


Result = TypeVar("Result", bound=Written)

UNCOMPARED: Mapping[str, Any] = {"passed": False, "why": "it was not compared with its source"}
"""Content of parity.json where nobody asked for a comparison."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What an export has to reach.

    Attributes:
        top1: least share of held-out tokens for which source and export find the same one the most likely.
        kl: most KL divergence, the mean over held-out tokens.
        drop: most that a metric of held-out answers may fall.
        answers: least share of held-out questions that both answer with the same words; None where it is not asked
            for.
    """

    top1: float = 0.95
    kl: float = 0.05
    drop: float = 0.01
    answers: float | None = None

    @property
    def asked(self) -> dict[str, float]:
        """What is asked for, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What source and export are asked.

    Attributes:
        dataset: held-out samples.
        evaluate: how their questions are answered and scored.
        samples: of how many the tokens of answers are compared, from the first.
        origin: where the samples come from.
    """

    dataset: MultimodalDataset
    evaluate: EvaluateConfig
    samples: int
    origin: str

    def batches(self, processor: Any, model: Any) -> Iterator[Mapping[str, Any]]:
        """One sample at a time, as a model's forward takes it, with labels; nothing is padded."""
        collate = MultimodalCollator(processor, supervised_only=False)
        for index in range(min(self.samples, len(self.dataset))):
            yield placed(collate([self.dataset[index]]), model)


@dataclass(frozen=True, kw_only=True)
class Outcome(Generic[Result]):
    """An export and what the gate found.

    Attributes:
        result: what was written.
        parity: content of parity.json.
        left_by_itself: layers that `auto_skip` of int8 has left in their precision.
    """

    result: Result
    parity: Mapping[str, Any]
    left_by_itself: tuple[str, ...] = ()


def find_held_out(
    source: Source, processor: Any, *, data: Path | None = None, media_root: Path | None = None, samples: int = 64
) -> HeldOut:
    """The data that is given, else that of the run that trained the source.

    Raises:
        DataError: there is none.
    """
    written = source.facts.get("recipe")
    recipe = Recipe.from_dict(written) if isinstance(written, Mapping) else None
    evaluate = recipe.evaluate if recipe else EvaluateConfig()
    if data is not None:
        dataset: Any = load_dataset(data, media_root=media_root, processor=processor)
        return HeldOut(dataset=dataset, evaluate=evaluate, samples=samples, origin=str(data))
    dataset = load_held_out(recipe, processor) if recipe else None
    if dataset is None:
        why = "the run that trained it held nothing out" if recipe else "it has no mmpeft.json that names its run"
        raise DataError(f"{source.name}: nothing to compare the export on, for {why}; give --data FILE, or --no-parity")
    return HeldOut(dataset=dataset, evaluate=evaluate, samples=samples, origin="data.eval of its run")


def source_model(source: Source, *, device: str, trust_remote_code: bool) -> Any:
    """What an export is made from, merged as it is, with its weights."""
    model: Any = load_model(source.base, adapter=source.adapter, device=device, trust_remote_code=trust_remote_code)[0]
    return model.merge_and_unload() if hasattr(model, "peft_config") else model


Layers = Mapping[str, float] | Callable[[], Mapping[str, float]]
"""By name what an export changes in a layer's outputs, relative to them; or what measures it if it does not pass."""


class Gate:
    """Source and export, asked the same things one after the other; a context, for what the source said is kept.

    Args:
        held_out: what they are asked.
        processor: of both.
    """

    def __init__(self, held_out: HeldOut, processor: Any) -> None:
        self.held_out, self.processor = held_out, processor
        _sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_KEPT}{os.getpid()}-")
        self._said = Said(Path(self._folder.name))
        self._source: dict[str, Any] = {}

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *_: Any) -> None:
        self._folder.cleanup()

    def batches(self, model: Any) -> Iterator[Mapping[str, Any]]:
        """What is compared, for a model."""
        return self.held_out.batches(self.processor, model)

    def ask_source(self, model: Any) -> None:
        """Keep what the source says."""
        self._said.keep(model, self.batches(model))
        self._source = self._scores(model)

    def errors(self, model: Any, layers: Iterable[str], coarse: Coarse) -> dict[str, float]:
        """What an export changes in the outputs of layers while the source reads what is compared, relative to them.

        Args:
            model: the source.
            layers: names of linear layers in it.
            coarse: how the export computes them.
        """
        with evaluating(model):
            seen = observe(model, layers, self.inputs(model), coarse)
        return {name: each.error for name, each in seen.items()}

    def inputs(self, model: Any) -> Iterator[Mapping[str, Any]]:
        """What is compared, for a model's forward without a loss."""
        for batch in self.batches(model):
            yield {name: value for name, value in batch.items() if name != "labels"}

    def agreement(self, model: Any) -> Agreement:
        """How near another model is to the source."""
        return self._said.against(model, self.batches(model))

    def judge(
        self,
        model: Any,
        threshold: Threshold,
        *,
        sizes: tuple[int, int],
        layers: Layers,
    ) -> dict[str, Any]:
        """Content of parity.json.

        Args:
            model: the export.
            threshold: what it has to reach.
            sizes: bytes of the weights of source and export.
            layers: by name what the export changes in a layer's outputs, or what measures that.
        """
        return self.verdict(self.agreement(model), self._scores(model), threshold, sizes=sizes, layers=layers)

    def passes(self, model: Any, threshold: Threshold) -> bool:
        """Whether another model would do; its answers are asked for where its tokens are near enough."""
        found = self.agreement(model)
        if shortfalls(found, {}, {}, threshold):
            return False
        held_out = self.held_out
        scores = evaluate_with(held_out.evaluate, model, self.processor, held_out.dataset)
        if _same_answers(self._source["predictions"], scores["predictions"]) < (threshold.answers or 0.0):
            return False
        return not shortfalls(found, self._source["metrics"], scores["metrics"], threshold)

    def agreement_of(self, logits: Iterable[torch.Tensor]) -> Agreement:
        """How near logits are to the source's: [tokens, vocabulary] of the answers of each compared sample in order."""
        return self._said.compared(logits)

    def verdict(
        self,
        found: Agreement,
        scores: Mapping[str, Any],
        threshold: Threshold,
        *,
        sizes: tuple[int, int],
        layers: Layers,
    ) -> dict[str, Any]:
        """Content of parity.json of an export that was asked elsewhere.

        Args:
            found: how near it is to the source.
            scores: of its answers, as `evaluate_model` has them, with their `memory` where it was measured.
            threshold, sizes, layers: as `judge`.
        """
        why = shortfalls(found, self._source["metrics"], scores["metrics"], threshold)
        same = _same_answers(self._source["predictions"], scores["predictions"])
        if threshold.answers is not None and same < threshold.answers:
            why.append(f"the same answer is given to {same:.1%}, and {threshold.answers:.1%} are asked for")
        measured = layers if isinstance(layers, Mapping) else layers() if why else {}
        # What overflows comes first.
        worst = sorted(measured.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)
        memory = {"source": self._source["memory"], "export": scores.get("memory")}
        if why and worst:
            why.append("most is changed by " + ", ".join(f"{name} ({error:.1%})" for name, error in worst[:3]))
        return {
            "passed": not why,
            "why": "; ".join(why),
            "threshold": threshold.asked,
            "data": self.held_out.origin,
            "agreement": {**asdict(found), "answers": same},
            "metrics": {"source": self._source["metrics"], "export": scores["metrics"]},
            "questions": len(scores["predictions"]),
            "seconds": {"source": self._source["seconds"], "export": scores["seconds"]},
            "bytes": dict(zip(("source", "export"), sizes, strict=True)),
            **({"memory": memory} if None not in memory.values() else {}),
            "layers": [{"name": name, "error": error} for name, error in worst],
        }

    def _scores(self, model: Any) -> dict[str, Any]:
        """Scores of its answers, and the peak of memory that they took; None where the system does not tell."""
        place = model.device.type
        # Tensors that only references in a circle keep, such as the source's.
        gc.collect()
        told = forget_peak(place)
        scores = evaluate_with(self.held_out.evaluate, model, self.processor, self.held_out.dataset)
        return {**scores, "memory": latest_peak_bytes(place) if told else None}


_KEPT = "mmpeft-parity-"


def _sweep() -> None:
    """Remove what gates of processes have left that were killed: logits, which may be gigabytes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_KEPT}*-*"):
        number = folder.name.removeprefix(_KEPT).partition("-")[0]
        if number.isdigit() and not is_running(int(number)):
            shutil.rmtree(folder, ignore_errors=True)


def _same_answers(source: Sequence[Mapping[str, Any]], export: Sequence[Mapping[str, Any]]) -> float:
    """The share of predictions with the same answer, to the same questions in order."""
    same = sum(ours["answer"] == theirs["answer"] for theirs, ours in zip(source, export, strict=True))
    return same / len(source)


def shortfalls(
    found: Agreement, source: Mapping[str, float], export: Mapping[str, float], threshold: Threshold
) -> list[str]:
    """In what an export misses its threshold; none if it reaches it."""
    why = []
    if not found.tokens:
        why.append("no token of an answer was compared")
    if found.top1 < threshold.top1:
        why.append(f"the same token is the most likely for {found.top1:.1%}, and {threshold.top1:.1%} are asked for")
    if found.kl > threshold.kl or not math.isfinite(found.kl):
        why.append(f"KL divergence is {found.kl:.3g}, and at most {threshold.kl:g} is asked for")
    why += [
        f"{name} falls from {value:.3f} to {export[name]:.3f}"
        for name, value in source.items()
        if export[name] < value - threshold.drop - 1e-9
    ]
    return why


def fewest_left(layers: Sequence[str], passes: Callable[[list[str]], bool]) -> list[str]:
    """Layers that have to stay as they are, none of which could be quantized as well; all if nothing else helps.

    The shortest beginning of `layers` is found by halves, then what of it can go, in smaller and smaller pieces.

    Args:
        layers: by what quantization does to them, the worst first.
        passes: whether an export that leaves these would do.
    """
    low, high = 0, len(layers)
    while low < high:
        middle = (low + high) // 2
        if passes(list(layers[:middle])):
            high = middle
        else:
            low = middle + 1
    left = list(layers[:low])
    if len(left) == len(layers) and not passes(left):
        return left
    size = len(left) // 2
    while size:
        before = len(left)
        # From the end: what is changed least goes first.
        for start in reversed(range(0, len(left), size)):
            without = left[:start] + left[start + size :]
            if passes(without):
                left = without
        # Behind one that went another may go: leaving more does not always help.
        size = size // 2 if size > 1 else int(len(left) < before)
    return left


def concluded(result: Result, parity: Mapping[str, Any], *, left: tuple[str, ...] = ()) -> Outcome[Result]:
    """The outcome of an export, beside which parity.json is put."""
    parity = _finite(parity)
    write_json(result.output / PARITY, parity)
    return Outcome(result=result, parity=parity, left_by_itself=left)


def _finite(value: Any) -> Any:
    """The same with None in the place of numbers that JSON does not have: NaN, and without limit."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
