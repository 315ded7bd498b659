"""Samples of unequal length as one batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mmpeft.core.errors import DataError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.encode import Encoded
from mmpeft.data.expand import AUDIO_IN_VIDEO
from mmpeft.data.join_features import HEAVY, KEYS, has_features, has_tensor, join_features
from mmpeft.families.catalogue import takes_supervised_logits

TEXT_ALIGNED = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Keys of a sample beside `input_ids` and `labels` that hold one number a token."""


class MultimodalCollator:
    """A `data_collator` for `transformers.Trainer` and `mmpeft.MultimodalTrainer`.

    Rows are padded on the right; media of all samples stand in one tensor a key, in order:

        input_ids       [rows, columns]     a b p p c d - -     labels  . . . . c d . .
                                            e f g h i - - -             . . . h i . . .
        attention_mask  [rows, columns]     1 1 1 1 1 1 0 0
        pixel_values    [pictures, 3, height, width]; absent if no sample has a picture

    With `supervised_only`, the language-model head is spared every column that no row predicts a label from:

        logits_to_keep  [kept]              2 3 4            columns whose next token is labelled in any row
        shift_labels    [rows, kept]        . c d            the next token where it is labelled
                                            h i .

    Loss and gradients are those of all columns. It needs a model whose forward takes `logits_to_keep` and whose
    loss takes `shift_labels` (LLaVA's does), and a batch that is not split by `nn.DataParallel`.

    Args:
        processor: a transformers processor; its tokenizer's padding token is used.
        pad_to_multiple_of: round the number of columns up to a multiple of this.
        supervised_only: add `logits_to_keep` and `shift_labels`; default: where every model type of the
            processor is known to take them.
    """

    def __init__(
        self, processor: Any, *, pad_to_multiple_of: int | None = None, supervised_only: bool | None = None
    ) -> None:
        tokenizer = processor.tokenizer
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id = next(identifier for identifier in candidates if identifier is not None)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.supervised_only = takes_supervised_logits(processor) if supervised_only is None else supervised_only

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The samples of `encode_sample` as one batch."""
        rows = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        lengths = torch.tensor([len(row) for row in rows])
        labels = self._pad([torch.as_tensor(sample["labels"]) for sample in samples], IGNORE_INDEX)
        batch: dict[str, Any] = {
            "input_ids": self._pad(rows, self.pad_token_id),
            "attention_mask": (torch.arange(labels.shape[1]) < lengths[:, None]).long(),
            "labels": labels,
        }
        for key in sorted({key for sample in samples for key in sample} & TEXT_ALIGNED):
            batch[key] = self._pad([torch.as_tensor(sample[key]) for sample in samples], 0)
        batch |= join_media(samples)
        if self.supervised_only:
            batch |= keep_supervised(labels)
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(list(rows), batch_first=True, padding_value=value)
        short = -padded.shape[1] % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(padded, (0, short), value=value)


def join_media(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The media tensors of all samples, one behind the other in the first dimension.

    Where they differ in another (tiles a picture, frames of sound) the smaller ones are filled up with zeros,
    which the models that make such tensors tell by a mask, by picture sizes, or by being all zero:

        [1, 5, 3, 16, 16] and [2, 3, 3, 16, 16]   ->   [3, 5, 3, 16, 16]

    `use_audio_in_video` is one truth for the batch. Of samples from a data set with a feature cache, pixels and sounds
    stay apart (see `mmpeft.data.join_features`).
    """
    joined: dict[str, Any] = {}
    names = {key for sample in samples for key in sample} - TEXT_ALIGNED - {"input_ids", "labels"} - KEYS
    if has_features(samples):
        joined |= join_features(samples, frozenset(names))
        names -= HEAVY
    if AUDIO_IN_VIDEO in names:
        if any(has_tensor(sample, "pixel_values_videos") and AUDIO_IN_VIDEO not in sample for sample in samples):
            raise DataError(
                "films with sound and films without stand in one batch, which the model takes apart only; load them "
                "with use_audio_in_video, which gives those without a silent track"
            )
        names.remove(AUDIO_IN_VIDEO)
        joined[AUDIO_IN_VIDEO] = True
    for key in sorted(names):
        tensors = [torch.as_tensor(sample[key]) for sample in samples if key in sample]
        largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        joined[key] = torch.cat([_filled(tensor, largest) for tensor in tensors])
    return joined


def _filled(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    if list(tensor.shape[1:]) == list(sizes):
        return tensor
    short = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    return torch.nn.functional.pad(tensor, [amount for end in reversed(short) for amount in (0, end)])


def keep_supervised(labels: torch.Tensor) -> Encoded:
    """`logits_to_keep` [kept] and `shift_labels` [rows, kept] of labels [rows, columns].

    If nothing is labelled one column is kept, unlabelled, so that the loss has a shape.
    """
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    kept = (following != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.long)
    return {"logits_to_keep": kept, "shift_labels": following[:, kept]}
