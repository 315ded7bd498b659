"""Held-out questions answered and scored, shared out over the processes of a run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from mmpeft.config.recipe import EvaluateConfig
from mmpeft.core.errors import DataError
from mmpeft.data.dataset import MultimodalDataset
from mmpeft.data.mixture import MixedDataset
from mmpeft.data.stream_mixture import Stream
from mmpeft.evaluation.decode import Work
from mmpeft.evaluation.generate import answer_questions
from mmpeft.evaluation.metrics import load_metric
from mmpeft.evaluation.scores import score_answers
from mmpeft.models.sharded import is_sharded


def evaluate_model(
    model: Any,
    processor: Any,
    dataset: MultimodalDataset | MixedDataset | Stream,
    *,
    metrics: Sequence[str] = ("exact_match", "token_f1", "anls"),
    max_new_tokens: int = 64,
    batch_size: int = 32,
    limit: int | None = None,
    share_media: bool = True,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Answer every question of a data set (greedy) and score the answers.

    Args:
        limit: only the first so many questions.
        share_media: run what questions on the same media begin with once, where the answers are the same.
        on_batch: called with the number of questions answered since the last call.

    Returns:
        `{"metrics": {name: value}, "by_kind": {kind: {...}}, "predictions": [...], "seconds": float, "work": {...},
        "speedups": [{...}]}`, where work counts tokens as `mmpeft.evaluation.decode.Work` says; on several processes
        each answers its share and all get the whole.

    Raises:
        RecipeError: a metric that does not exist; before any question is asked.
        DataError: no question, a picture that cannot be read, or a prompt that holds a control token; or `dataset` is
            a mixture of several sources.
    """
    if not isinstance(dataset, MultimodalDataset):
        raise DataError(
            f"found a {type(dataset).__name__}; expected the data set of one source: load sources one by one, "
            "without streaming"
        )
    for name in metrics:
        load_metric(name)
    state = PartialState()
    start = time.perf_counter()
    questions = dataset.questions()[:limit]
    # Processes that have but shares of the model run in step: on the same questions.
    together = is_sharded(model)
    mine = range(0 if together else state.process_index, len(questions), 1 if together else state.num_processes)
    answers = answer_questions(
        model,
        processor,
        [questions[index] for index in mine],
        media_root=dataset.media_root,
        limits=dataset.limits,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        share_media=share_media,
        on_batch=on_batch,
    )
    pairs, shares = list(zip(mine, answers.texts, strict=True)), [answers.work]
    if state.num_processes > 1 and not together:
        pairs, shares = gather_object(pairs), gather_object(shares)
    work = Work.total(shares)
    ordered = [text for _, text in sorted(pairs)]
    return score_answers(questions, ordered, metrics) | {
        "seconds": time.perf_counter() - start,
        "work": asdict(work),
        "speedups": [asdict(replace(answers.sharing, saved=work.spared if answers.sharing.on else {}))],
    }


def evaluate_with(
    config: EvaluateConfig, model: Any, processor: Any, dataset: MultimodalDataset, **options: Any
) -> dict[str, Any]:
    """`evaluate_model` as a recipe's `evaluate` block says."""
    return evaluate_model(model, processor, dataset, **config.model_dump(exclude={"share_weights"}), **options)
