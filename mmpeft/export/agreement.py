"""Whether two models say the same: what they think of each token of held-out answers."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mmpeft.core.errors import OutputError
from mmpeft.core.files import writing
from mmpeft.core.types import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near one model's next-token probabilities are to another's, over the tokens of held-out answers.

    Attributes:
        tokens: that were compared.
        top1: share of them for which both find the same token the most likely.
        kl: mean of KL(source || export), in nats.
    """

    tokens: int
    top1: float
    kl: float


class Said:
    """What a model thinks of the answers of batches, kept on disk, for another to be compared with.

    Args:
        folder: an existing directory, of which nothing else is expected.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def keep(self, model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the first model read the batches.

        Raises:
            OutputError: there is no room for what it says.
        """
        for batch in batches:
            logits = answer_logits(model, batch)
            try:
                with writing(self.folder):
                    save_file({"logits": logits.cpu()}, self.folder / f"{self.count:06d}.safetensors")
            except OutputError as error:
                raise OutputError(
                    f"{error}; what the source says of held-out samples is kept there: compare fewer (--samples), or "
                    "set TMPDIR to a folder with room"
                ) from error
            self.count += 1

    def against(self, model: Any, batches: Iterable[Mapping[str, Any]]) -> Agreement:
        """Let another read the same ones."""
        return self.compared(answer_logits(model, batch) for batch in batches)

    def compared(self, logits: Iterable[torch.Tensor]) -> Agreement:
        """What another thinks of the same ones: [tokens, vocabulary] of each batch in order."""
        same = tokens = 0
        divergence = 0.0
        for number, found_here in enumerate(logits):
            theirs = load_file(self.folder / f"{number:06d}.safetensors")["logits"].float()
            ours = found_here.float().cpu()
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            tokens += len(ours)
            expected, found = theirs.log_softmax(-1), ours.log_softmax(-1)
            # What the source holds for impossible counts nothing.
            divergence += float(torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - found)).sum())
        if not tokens:
            return Agreement(tokens=0, top1=math.nan, kl=math.nan)
        # It is never negative but by rounding.
        return Agreement(tokens=tokens, top1=same / tokens, kl=_positive(divergence / tokens))


def _positive(value: float) -> float:
    return 0.0 if value < 0 else value


def answer_logits(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of the positions that predict a token of an answer.

    Args:
        batch: of the collator, with `labels` [rows, columns] and no `logits_to_keep`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), evaluating(model):
        logits: torch.Tensor = model(**inputs).logits
    return logits[:, :-1][batch["labels"][:, 1:].to(logits.device) != IGNORE_INDEX]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """While it lasts, a model is in evaluation mode."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
