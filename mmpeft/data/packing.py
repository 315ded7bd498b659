"""Samples as one row without padding, samples on the same pictures sharing what they have in common.

    padded    p p p p a a a -        packed    p p p p a a a b b c c c c
              p p p p b b - -
              c c c c - - - -

A row's tokens are picked out of the padded batch, so that whatever a family computes from that batch (its positions,
above all) is picked by the same indices.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mmpeft.core.host import OnHost
from mmpeft.core.tree import Segment, Tree
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.chat import control_tokens
from mmpeft.data.collate import join_media
from mmpeft.data.encode import Encoded
from mmpeft.data.join_features import KEYS
from mmpeft.families.registry import family_of_processor
from mmpeft.families.spec import TokenTypes

TEXT_KEYS = frozenset({"input_ids", "labels", "token_type_ids", "mm_token_type_ids"})
"""Keys of a sample that hold one number a token; the others hold media."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of a padded batch stand in its row.

    Attributes:
        order: the samples, by their place in the batch; those that share stand together.
        carriers: the samples whose media the row holds; the others see those of a sample before them.
        index: LongTensor [row], the place of each token in the flattened padded batch, rows in `order`.
        positions: LongTensor [row], the place of each token in its own sample.
        tree: the row's segments.
    """

    order: tuple[int, ...]
    carriers: tuple[int, ...]
    index: torch.Tensor
    positions: torch.Tensor
    tree: Tree


def plan_packing(
    samples: Sequence[Encoded], media_ids: frozenset[int], *, share: bool = True, two_way: TokenTypes | None = None
) -> Packing:
    """How samples are packed into one row.

    Args:
        samples: what `encode_sample` gives.
        media_ids: tokens that stand for features of pictures, videos and recordings.
        share: whether samples on the same media share their beginning.
        two_way: what `token_type_ids` say, in families whose pictures or prompts are seen both ways.
    """
    # Where a prompt is seen both ways, a picture sees the question behind it: nothing is the same for two questions.
    shares = share and two_way != "suffix"
    row = _Row(samples, two_way)
    for group in _groups(samples, media_ids) if shares else [[number] for number in range(len(samples))]:
        row.put(group, _shared(samples, group, media_ids) if len(group) > 1 else 0)
    tree = Tree(
        segments=tuple(row.segments),
        # A blank, which stands where a process has no sample, has no label.
        samples=sum(_first_label(sample) < len(sample["labels"]) for sample in samples),
        tokens=sum(len(sample["input_ids"]) for sample in samples),
        padded=row.columns * len(samples),
    )
    return Packing(
        order=tuple(row.order),
        carriers=tuple(row.carriers),
        index=torch.cat(row.index),
        positions=torch.cat(row.positions),
        tree=tree,
    )


class _Row:
    """A row as it grows."""

    def __init__(self, samples: Sequence[Encoded], two_way: TokenTypes | None) -> None:
        self.samples, self.two_way = samples, two_way
        self.columns = max(len(sample["input_ids"]) for sample in samples)
        self.order: list[int] = []
        self.carriers: list[int] = []
        self.index: list[torch.Tensor] = []
        self.positions: list[torch.Tensor] = []
        self.segments: list[Segment] = []
        self.length = 0

    def put(self, group: Sequence[int], shared: int) -> None:
        """Samples that share so many tokens."""
        first = len(self.order)
        self.order += group
        self.carriers += group[:1] if shared else group
        parent = self._segment(first, 0, shared, None) if shared else None
        for place, sample in enumerate(group, start=first):
            self._segment(place, shared, len(self.samples[sample]["input_ids"]), parent)

    def _segment(self, place: int, start: int, end: int, parent: tuple[int, int] | None) -> tuple[int, int]:
        places = torch.arange(start, end)
        self.index.append(place * self.columns + places)
        self.positions.append(places)
        bounds = self.length, self.length + end - start
        blocks = self._blocks(self.samples[self.order[place]], start, end)
        self.segments.append(Segment(start=bounds[0], end=bounds[1], parent=parent, blocks=blocks))
        self.length = bounds[1]
        return bounds

    def _blocks(self, sample: Encoded, start: int, end: int) -> tuple[tuple[int, int], ...]:
        if self.two_way is None or "token_type_ids" not in sample:
            return ()
        inside = sample["token_type_ids"][start:end] == (1 if self.two_way == "media" else 0)
        edges = torch.diff(
            inside.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int)
        )
        begins, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
        return tuple((self.length + begin, self.length + stop) for begin, stop in zip(begins, ends, strict=True))


def _groups(samples: Sequence[Encoded], media_ids: frozenset[int]) -> list[list[int]]:
    """Samples with the same media, and the same text up to the last of them; those without media stay alone.

    They stand in the order in which each group begins.
    """
    groups: dict[object, list[int]] = {}
    for number, sample in enumerate(samples):
        media = sorted(set(sample) - TEXT_KEYS - KEYS)
        # The key of kept features is a hash of the media already.
        key: object = sample.get("features_key") or tuple((name, _digest(sample[name])) for name in media)
        groups.setdefault((key, _begin(sample, media_ids)) if key else number, []).append(number)
    return list(groups.values())


def _begin(sample: Encoded, media_ids: frozenset[int]) -> tuple[int, ...]:
    """The tokens up to the last one of a medium: two samples share these or nothing."""
    ids = sample["input_ids"].tolist()
    return tuple(ids[: max((place for place, token in enumerate(ids) if token in media_ids), default=-1) + 1])


def _digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(repr((tensor.dtype, tuple(tensor.shape))).encode() + data.tobytes(), digest_size=16).digest()


def _shared(samples: Sequence[Encoded], group: Sequence[int], media_ids: frozenset[int]) -> int:
    """How many tokens all samples of a group begin with; 0 if their media do not all stand among these.

    The last shared token comes before the one that predicts the first label, so every sample has its own loss.
    """
    rows = [samples[number]["input_ids"] for number in group]
    shared = min(_first_label(samples[number]) - 1 for number in group)
    if shared <= 0:
        return 0
    same = torch.stack([row[:shared] == rows[0][:shared] for row in rows]).all(dim=0)
    if not same.all():
        shared = int((~same).nonzero()[0])
    media = torch.tensor(sorted(media_ids))
    return shared if not any(torch.isin(row[shared:], media).any() for row in rows) else 0


def _first_label(sample: Encoded) -> int:
    """The place of the first label; behind the last token if there is none."""
    labelled = (sample["labels"] != IGNORE_INDEX).nonzero()
    return int(labelled[0]) if len(labelled) else len(sample["labels"])


def pick(packing: Packing, padded: torch.Tensor) -> torch.Tensor:
    """[..., rows, columns] of a padded batch as [..., 1, row]."""
    return padded.flatten(-2)[..., packing.index].unsqueeze(-2)


class PackedCollator:
    """A `data_collator` that makes one row of a batch, for a model under `tree_attention_on`.

        input_ids       [1, row]         p p p p a a a b b c c c c
        position_ids    [1, row]         0 1 2 3 4 5 6 4 5 0 1 2 3
        labels          [1, row]; where the family takes them, logits_to_keep [kept] and shift_labels [1, kept]
        tree            the row's segments, for the attention
        media tensors   each medium once that samples share

    Where a family computes positions from pictures (`mm_token_type_ids`), `padded` holds what it does so from, on the
    host, and `mmpeft.models.positions.with_positions` puts `position_ids` in.

    Args:
        processor: a transformers processor.
        share: whether samples on the same media share their beginning.
        supervised_only: add `logits_to_keep` and `shift_labels`; default: where the family's forward takes them. With
            `mmpeft.models.head_loss.head_loss_on` every family does.
    """

    def __init__(self, processor: Any, *, share: bool = True, supervised_only: bool | None = None) -> None:
        self.share = share
        self.media_ids = frozenset(control_tokens(processor).media_ids.values())
        spec = family_of_processor(processor)
        taken = bool(spec and spec.supervised_logits)
        self.supervised_only = taken if supervised_only is None else supervised_only
        self.two_way = spec.token_types if spec else None
        self.placed = bool(spec and spec.positions == "media")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The samples of `encode_sample` as one row."""
        rows: list[Encoded] = [
            {key: value if key in KEYS else torch.as_tensor(value) for key, value in sample.items()}
            for sample in samples
        ]
        packing = plan_packing(rows, self.media_ids, share=self.share, two_way=self.two_way)
        ordered = [rows[number] for number in packing.order]
        padded = {key: _padded(ordered, key) for key in ("input_ids", "labels", "mm_token_type_ids") if key in rows[0]}
        batch: dict[str, Any] = {
            "input_ids": pick(packing, padded["input_ids"]),
            "tree": packing.tree,
            "labels": pick(packing, padded["labels"]),
            **join_media([rows[number] for number in packing.carriers]),
        }
        if self.supervised_only:
            batch |= _supervised(packing, padded["labels"])
        if self.placed:
            lengths = torch.tensor([len(row["input_ids"]) for row in ordered])
            batch["padded"] = OnHost(
                {
                    **{key: value for key, value in padded.items() if key != "labels"},
                    "attention_mask": (torch.arange(padded["input_ids"].shape[1]) < lengths[:, None]).long(),
                    "index": packing.index,
                    **join_media([{key: row[key] for key in PLACES & set(row)} for row in ordered]),
                }
            )
        else:
            batch["position_ids"] = packing.positions[None]
        return batch


PLACES = frozenset(
    {
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "video_second_per_grid",
        "feature_attention_mask",
        "use_audio_in_video",
    }
)
"""Keys of a sample from which a family computes positions."""


def _padded(rows: Sequence[Encoded], key: str) -> torch.Tensor:
    # What stands in the padding is never picked.
    return pad_sequence(
        [row[key] for row in rows], batch_first=True, padding_value=IGNORE_INDEX if key == "labels" else 0
    )


def _supervised(packing: Packing, labels: torch.Tensor) -> Encoded:
    """`logits_to_keep` [kept] and `shift_labels` [1, kept]; no token predicts the first one of the next sample."""
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    targets = pick(packing, following)
    kept = (targets[0] != IGNORE_INDEX).nonzero().squeeze(1)
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.long)
    return {"logits_to_keep": kept, "shift_labels": targets[:, kept]}
