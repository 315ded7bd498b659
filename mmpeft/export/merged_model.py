"""`mmpeft.merge`: an adapter and its base as one ordinary model directory."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmpeft.core.errors import ModelError
from mmpeft.export.artefact import MERGED, artefact
from mmpeft.export.merge import MergedModel, tied_names
from mmpeft.export.shards import SHARD_BYTES, shard_bytes, write_shards
from mmpeft.export.sources import Source, base_config, find_source, write_companions
from mmpeft.models.weightless import read_config, weightless_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What was merged.

    Attributes:
        output: the model's directory.
        base: name of the base.
        adapter: name of the adapter; None where a whole model was copied.
        tensors: number of tensors of the model.
        changed: number of those of the base that the adapter changed.
        bytes: of all tensors.
        shards: number of files that they fill.
        untied: whether weights that the base ties are two now.
    """

    output: Path
    base: str
    adapter: str | None
    tensors: int
    changed: int
    bytes: int
    shards: int
    untied: bool


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    shard_size: str | int = SHARD_BYTES,
    trust_remote_code: bool = False,
) -> MergeResult:
    """Merge an adapter into its base and write an ordinary model directory with the processor.

        mmpeft.merge("runs/receipts/adapter", "receipts-merged")
        AutoModelForImageTextToText.from_pretrained("receipts-merged")

    Each weight is merged in float32 and rounded once to the precision of the base. Memory holds about one shard.

    Args:
        adapter: directory or hub id of an adapter; of a whole model that a stage wrote: it is copied.
        output: a new or empty directory, or an earlier export, which is replaced.
        base: directory or hub id of the base; default: the one that the adapter names.
        shard_size: most bytes of one file of weights, as `2GB` or a number.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError: the adapter does not fit the base, or has weights that are no numbers.
        ModelError: the base is not whole, quantized, or has no processor.
        OutputError: the output holds something else, has no room, or cannot be written; it is then as it was.
    """
    limit = shard_bytes(shard_size)
    source = find_source(adapter, base=base)
    merged = MergedModel(source.base, source.adapter, trust_remote_code=trust_remote_code)
    # A copy stays what it is: of a merged model nobody would ask whether it was compared with its source.
    kind = MERGED if source.adapter else str(source.facts.get("artefact") or MERGED)
    with artefact(
        output, kind=kind, needs=merged.checkpoint.bytes, sources=source.folders, facts=_facts(source)
    ) as out:
        config = base_config(source.base)
        if merged.untied:
            config = untied(config)
        write_companions(source, out.folder, config=config, trust_remote_code=trust_remote_code)
        if merged.untied:
            _check_untied(out.folder, trust_remote_code=trust_remote_code)
            logger.info("the adapter tells embeddings and head apart, which %s ties: they are two now", source.base)
        counted = _Counted(iter(merged))
        where = write_shards(counted, out.folder, max_bytes=limit)
    return MergeResult(
        output=Path(output),
        base=source.base_name,
        adapter=None if source.adapter is None else source.name,
        tensors=len(where),
        changed=len(merged.changed),
        bytes=counted.bytes,
        shards=len(set(where.values())),
        untied=merged.untied,
    )


class _Counted:
    """A stream of tensors, and the bytes that have passed."""

    def __init__(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.bytes, self._tensors = 0, tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._tensors:
            self.bytes += tensor.nbytes
            yield name, tensor


def _facts(source: Source) -> dict[str, Any]:
    """What the adapter's mmpeft.json says, and what it was merged from."""
    kept = source.own_facts
    if source.adapter is None:
        return kept
    return {**kept, "base_model": source.base_name, "merged_adapter": source.name}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says of itself, and of each part that says so, that embeddings and head are two."""
    inner = {key: untied(value) if isinstance(value, dict) else value for key, value in config.items()}
    text = inner.get("text_config")
    if isinstance(text, dict):
        text["tie_word_embeddings"] = False
    says = "tie_word_embeddings" in inner or "architectures" in inner
    return {**inner, "tie_word_embeddings": False} if says else inner


def _check_untied(folder: Path, *, trust_remote_code: bool) -> None:
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model = weightless_model(config, str(folder), trust_remote_code=trust_remote_code)
    tied = tied_names(model)
    if tied:
        raise ModelError(
            f"the adapter changes one of {' and '.join(tied[min(tied)])}, which this type of model ties whatever its "
            "configuration says; it cannot be merged: train both or neither"
        )
