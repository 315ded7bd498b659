"""Whether keeping what frozen towers give is worth its place on the disk."""

from dataclasses import dataclass

from mmpeft.core import units


@dataclass(frozen=True, kw_only=True)
class CacheCase:
    """What is known before a stage begins.

    Attributes:
        media: samples with unlike media.
        shown: how often all stages that share the cache take a sample with media.
        found: whether entries of earlier runs are there.
        bytes_each: of the features of one sample's media, on average.
        limit_bytes: that all entries may take.
        free_bytes: of the disk, less what is left for other files.
    """

    media: int
    shown: float
    found: bool
    bytes_each: float
    limit_bytes: int
    free_bytes: int


def cache_pays(case: CacheCase) -> tuple[bool, str]:
    """Whether features are worth keeping, and why, in a clause with figures.

    It pays where a tower would run more often than there are media to run on: in a second epoch, a second stage, a
    second question on a picture, or where an earlier run has kept them. One pass over unlike media would only write.
    What does not all fit pays for the share that does, for an entry that a run uses stays; a share that nobody would
    notice, below a tenth, does not.
    """
    if not case.media:
        return False, "no sample has media"
    if case.shown <= case.media and not case.found:
        return False, (
            f"no medium is shown twice, {case.shown:,.0f} of {case.media:,} once, so nothing would be read again; "
            "data.cache.features: true keeps them for other runs"
        )
    needed = round(case.media * case.bytes_each)
    room = max(0, min(case.limit_bytes, case.free_bytes))
    share = min(1.0, room / needed) if needed else 1.0
    bound = "data.cache.limit_bytes" if case.limit_bytes <= case.free_bytes else "the disk"
    if share < 0.1:
        return False, (
            f"features of {case.media:,} media would take {units.size(needed)}, and {bound} has room for "
            f"{units.size(room)}; data.cache.features: true keeps as many as fit"
        )
    again = f"the stages show {case.media:,} different media {case.shown:,.0f} times"
    if case.shown <= case.media:
        again = f"features of earlier runs are there, and the stages show {case.media:,} media"
    fits = "" if share == 1 else f", of which {bound} holds {units.percent(share)}"
    return True, f"towers are frozen, and {again}; their features take {units.size(needed)}{fits}"
