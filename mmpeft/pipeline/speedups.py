"""What a stage's rows without padding spared it."""

from mmpeft.config.recipe import BatchConfig
from mmpeft.core.speed import Speedup


def packing_speedups(
    batch: BatchConfig, obstacle: str | None, *, tokens: int, computed: int, padded: int
) -> list[Speedup]:
    """Of packed rows, and of the beginnings that samples on the same media share.

        padded    p p p p a a a -     12 of 16 tokens are samples'; a row computes 9,
                  p p p p b b - -     for two samples share p p p p

    Args:
        batch: says whether they were asked for.
        obstacle: why samples cannot share a row; None if they can.
        tokens: of all samples, those that are shared counted for each.
        computed: tokens that went through the language model.
        padded: tokens that padded batches of the same samples would have held.
    """
    on = obstacle is None and batch.packing is not False
    why = obstacle or ("the family can be packed exactly" if on else "batch.packing is false")
    shares = on and batch.share_media
    return [
        Speedup(name="batch.packing", on=on, why=why, saved={"tokens": padded - tokens} if on else {}),
        Speedup(
            name="batch.share_media",
            on=shares,
            why="samples on the same picture run what they begin with once"
            if shares
            else "batch.share_media is false"
            if on
            else "it needs batch.packing",
            saved={"tokens": tokens - computed} if shares else {},
        ),
    ]
