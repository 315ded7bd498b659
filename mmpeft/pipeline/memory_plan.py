"""What a stage takes of a device's memory, before it runs: by kind, at its peak, and what would make it less.

step      weights + gradients + optimizer + batch + activations + logits        micro-batch, the longest there is
update    weights + gradients + optimizer                                       optimizer
load      weights, and the file that they are read from in another precision    on a CPU
          ------------------------------------------------------------------
peak      the largest of these + fragmentation + overhead
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mmpeft.config.distributed import SHARED_OUT, ZERO, DistributedConfig

How = Literal["rehearsed", "estimated by formula"]

LOST_ON_CPU = 0.28
"""Of activations and logits, what the C library's allocator holds beside them: glibc keeps freed blocks below 32 MiB
(mallopt(3), M_MMAP_THRESHOLD), and not all can be used again. By docs/memory.md's measurements, 0.21 to 0.35."""

LOST_ON_ACCELERATOR = 0.05
"""The same of torch's caching allocator: assumed."""

UTILISATION = 0.4
"""Of a device's dense matrix products, the share that training reaches: assumed."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one process at the peak of a stage.

    Attributes:
        how: whether a step was run on tensors without storage, or its activations come from a formula.
        why: why not rehearsed; "" if it was.
        weights, gradients, optimizer, batch, activations, logits: of the largest micro-batch at its peak; `batch` are
            pixels, tokens and kept features, `logits` the loss among them.
        fragmentation: what the allocator loses.
        overhead: of Python, libraries and driver.
        update, load: the most while weights change, and while they are read; `load` is 0 on accelerators.
        samples, tokens: of that micro-batch.
        flop: of that micro-batch, forward and backward.
    """

    how: How
    why: str = ""
    weights: int
    gradients: int
    optimizer: int
    batch: int
    activations: int
    logits: int
    fragmentation: int
    overhead: int
    update: int
    load: int
    samples: int
    tokens: int
    flop: int

    @property
    def growth(self) -> int:
        """What comes on top of `overhead` at the peak."""
        step = self.weights + self.gradients + self.optimizer + self.batch + self.activations + self.logits
        return max(step + self.fragmentation, self.update, self.load)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.growth + self.overhead

    def to_dict(self) -> dict[str, Any]:
        """As plan.json holds it."""
        return {**asdict(self), "growth": self.growth, "peak": self.peak}


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something that would take less memory.

    Attributes:
        what: in words, with the recipe's key.
        saves: bytes of the peak.
        slower: by how much a step takes longer, as a factor; below 1 it is quicker.
        first: whether it is among those that make the stage fit, taken in this order.
    """

    what: str
    saves: int
    slower: float
    first: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a formula goes by.

    Attributes:
        weights, trained: bytes of the model and of what trains, whose gradients and two optimizer states are float32.
        layers, hidden, vocabulary: of the language model.
        item: bytes of an activation.
        samples, tokens: of the largest micro-batch.
    """

    weights: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int
    item: int
    samples: int
    tokens: int


def formula(sizes: Sizes, *, why: str, accelerated: bool, overhead: int) -> MemoryPlan:
    """A plan without a rehearsal: 34 s b h bytes a layer in 16 bits, without the scores of attention.

    Korthikanti et al. 2022 (arXiv:2205.05198), equation 1; that of the towers is not in it.
    """
    activations = 17 * sizes.item * sizes.tokens * sizes.hidden * sizes.layers
    logits = 3 * 4 * sizes.tokens * sizes.vocabulary
    lost = LOST_ON_ACCELERATOR if accelerated else LOST_ON_CPU
    states = sizes.weights + 3 * sizes.trained
    return MemoryPlan(
        how="estimated by formula",
        why=why,
        weights=sizes.weights,
        gradients=sizes.trained,
        optimizer=2 * sizes.trained,
        batch=8 * sizes.tokens,
        activations=activations,
        logits=logits,
        fragmentation=round(lost * (activations + logits)),
        overhead=overhead,
        update=states,
        load=0 if accelerated else sizes.weights,
        samples=sizes.samples,
        tokens=sizes.tokens,
        flop=6 * sizes.tokens * sizes.weights // sizes.item,
    )


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of a stage's model, by what several processes can do with them.

    Attributes:
        trained: weights that train, which `zero3` and `fsdp2` leave whole.
        layers: of the language model, without what trains in them.
        layer: the largest of those.
        live: what DeepSpeed may leave whole of those that run again soon, as it does by default.
        adapter: whether what trains is an adapter, whose gradients are averaged a bucket at a time.
        quantized: whether they are in 8 or 4 bits.
        halved: what trains in float32 beside a base in half precision: DeepSpeed's ZeRO-1 and ZeRO-2 compute with half
            of it, and keep it whole beside the optimizer's states.
    """

    trained: int
    layers: int
    layer: int
    live: int
    adapter: bool = True
    quantized: bool = False
    halved: int = 0


_BUCKET = 1 << 26
"""Bytes of gradients that are averaged at once."""


def shared(plan: MemoryPlan, strategy: DistributedConfig, processes: int, held: Held) -> MemoryPlan:
    """The plan of each of several processes that share a model as `distributed` says.

    Args:
        plan: of one process; where matrices or tokens are shared out (`tensor_parallel`, `context_parallel`), of one
            with its share of them.
    """
    if processes == 1 and strategy.offload == "none":
        return plan
    name = "ddp" if strategy.strategy == "auto" else strategy.strategy
    weights, gradients, optimizer, activations = plan.weights, plan.gradients, plan.optimizer, plan.activations
    if ZERO.get(name, 3) < 3:
        half = held.halved // 2
        # Nor does autocast keep a copy of them in half precision.
        weights, gradients, activations = weights - half, gradients - half, max(0, activations - half)
        optimizer += held.halved
    if name in ZERO:
        optimizer = -(-optimizer // processes)
    if ZERO.get(name, 0) >= 2:
        gradients = -(-gradients // processes)
    if name in ("ddp", "fsdp2"):
        gradients += min(held.trained, _BUCKET) if held.adapter else held.trained
    if name in SHARED_OUT:
        # A layer is whole while it runs, and the next is being gathered.
        share = 0 if strategy.offload == "all" else -(-held.layers // processes)
        whole = max(2 * held.layer, held.live if name == "zero3" else 0)
        weights += min(held.layers, share + whole) - held.layers
    if strategy.offload != "none":
        optimizer = 0
        # DeepSpeed lets them wait beside the states, too.
        gradients = 0 if name in ZERO else gradients
    saved = plan.weights + plan.gradients + plan.optimizer - weights - gradients - optimizer
    return replace(
        plan,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        update=max(0, plan.update - saved),
    )


def changes(plan: MemoryPlan, room: int, *, checkpointed: MemoryPlan | None, towers: int, held: Held) -> list[Change]:
    """What would take less memory, what costs least time first; those marked `first` make it fit, if any do.

    Args:
        room: bytes of the device.
        checkpointed: the plan with activation checkpointing; None where it is on.
        towers: bytes of frozen towers that a feature cache lets rest on the host; 0 where it is on, or cannot be.
        held: bytes of the model.
    """
    moving = plan.activations + plan.logits + plan.fragmentation
    one = moving - moving // max(1, plan.samples)
    found = [
        Change(what="data.cache.features: true (towers rest on the host)", saves=towers, slower=0.9),
        Change(what="batch.micro: 1, or batch.tokens smaller", saves=one, slower=1.0),
        Change(what="trainer: {optim: adamw_bnb_8bit}", saves=plan.optimizer * 3 // 4, slower=1.02),
    ]
    if checkpointed is not None:
        found.append(
            Change(what="compute.checkpointing: true", saves=max(0, plan.peak - checkpointed.peak), slower=1.33)
        )
    found += [
        Change(what="distributed: {strategy: zero2, offload: optimizer}", saves=plan.optimizer, slower=1.4),
        # Of 16 bits; of 32 it is more.
        Change(what="quantization: nf4", saves=0 if held.quantized else held.layers * 7 // 10, slower=1.5),
        Change(
            what="distributed: zero3 or fsdp2 on 8 devices",
            saves=max(0, held.layers * 7 // 8 - 2 * held.layer),
            slower=1.6,
        ),
        Change(what="distributed: {tensor_parallel: 8} on 8 devices", saves=held.layers * 7 // 8, slower=1.8),
    ]
    return _marked([change for change in found if change.saves > 0], plan.peak - room)


def _marked(found: Sequence[Change], lacking: int) -> list[Change]:
    marked = []
    for change in found:
        marked.append(replace(change, first=lacking > 0))
        lacking -= change.saves
    return marked


def error(planned: int, measured: int) -> float:
    """By how much a plan lies above (below, if negative) what was measured, as a share of that."""
    return (planned - measured) / measured


def compared(plan: Mapping[str, Any], *, peak: int, before: int, exact: bool) -> dict[str, Any]:
    """What stage.json says of a plan when its stage has run.

    Args:
        plan: of `MemoryPlan.to_dict`.
        peak: bytes that the process had at most while the stage ran.
        before: bytes that it had before the run's first model.
        exact: whether the peak is that of the stage alone, not of the process since it began.
    """
    grown = max(1, peak - before)
    return {
        "planned_bytes": plan["growth"],
        "measured_bytes": grown,
        "before_bytes": before,
        "error": error(plan["growth"], grown),
        "of_stage_alone": exact,
        "how": plan["how"],
    }
