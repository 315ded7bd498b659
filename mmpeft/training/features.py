"""What training does with a feature cache: gives the model what is kept, and computes and keeps the rest."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mmpeft.core.errors import RecipeError
from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
from mmpeft.models.features import PIXELS, FeaturePlan, placeholders
from mmpeft.models.resting import RestingTowers

_WAITING_BYTES = 1 << 28
"""Features that wait to be written, at most; beyond it a step waits for the disk."""


_REST_AFTER = 64
"""Samples whose features were kept, one after another, behind which towers are no longer waited for."""


class FeatureCache:
    """Feeds a model in training from a store, and fills the store.

        batch["features"]     kept          -> to the model
                              not kept      -> computed -> to the model
                                                        '-> written by a thread, so that no step waits for the disk

    A sample that comes again before its features are on disk (many questions on a picture, workers that read ahead)
    takes those in memory.

    Attributes:
        hits: samples whose towers did not run.
        misses: samples whose towers ran.
        rested: whether the towers' weights have left the accelerator at any time.

    Args:
        plan: what of this model is kept.
        store: where; that of the data set.
        towers: those of the model, to rest on the host while they are not needed; None leaves them where they are.
    """

    def __init__(self, plan: FeaturePlan, store: FeatureStore, *, towers: RestingTowers | None = None) -> None:
        self.plan, self.store, self.towers = plan, store, towers
        self.hits = self.misses = 0
        self.rested = False
        self._in_a_row = 0
        self._waiting: dict[str, Mapping[str, torch.Tensor]] = {}
        self._lock = threading.Lock()
        self._writer: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def feeding(self, model: Any, inputs: dict[str, Any], autocast: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        """The batch as the model's forward takes it, while the model takes these features.

        Args:
            model: what is trained, without what processes are joined by.
            inputs: the batch, on the model's device.
            autocast: a context for what a training step computes in.
        """
        carriers = inputs["features"]
        rest = {key: value for key, value in inputs.items() if key not in ("features", "features_shapes")}
        features = [self._features(model, each, autocast) for each in carriers]
        with self.plan.feed(model, features):
            yield rest | placeholders(inputs["features_shapes"], rest["input_ids"].device)

    def _features(
        self, model: Any, carrier: Mapping[str, Any], autocast: Callable[[], Any]
    ) -> Mapping[str, torch.Tensor]:
        key = carrier["key"]
        kept = carrier["tensors"]
        if kept is None and key:
            with self._lock:
                kept = self._waiting.get(key)
            if kept is None and self.store.has(key) and (entry := self.store.read(key)) is not None:
                kept = entry.tensors
        if kept is not None:
            self.hits += 1
            self._in_a_row += 1
            if self.towers is not None and self._in_a_row == _REST_AFTER:
                self.towers.rest()
                self.rested = True
            return kept
        self.misses += 1
        self.wake()
        with autocast():
            computed = self.plan.compute(model, carrier["media"])
        if key and carrier["rest"] is not None:
            self._write(key, {name: tensor.cpu() for name, tensor in computed.items()}, carrier["rest"])
        return computed

    def _write(self, key: str, features: Mapping[str, torch.Tensor], rest: KeptExpansion) -> None:
        with self._lock:
            self._waiting[key] = features
            waiting = sum(tensor.nbytes for each in self._waiting.values() for tensor in each.values())
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="features")
        written = self._writer.submit(self._written, key, features, rest)
        if waiting > _WAITING_BYTES:
            written.result()

    def _written(self, key: str, features: Mapping[str, torch.Tensor], rest: KeptExpansion) -> None:
        try:
            self.store.write(key, Entry(tensors=features, expansion=rest))
        finally:
            with self._lock:
                self._waiting.pop(key, None)

    def expect_kept(self) -> None:
        """Let the towers rest as soon as one sample is found kept, before the forward that it is in."""
        self._in_a_row = _REST_AFTER - 1

    def wake(self) -> None:
        """Have the towers where the model is."""
        self._in_a_row = 0
        if self.towers is not None:
            self.towers.wake()

    def close(self) -> None:
        """Wait until all is written, and leave the model whole on its device."""
        self.wake()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None


@contextlib.contextmanager
def fed(
    cache: FeatureCache | None, model: Any, inputs: dict[str, Any], autocast: Callable[[], Any]
) -> Iterator[dict[str, Any]]:
    """The batch as the model's forward takes it; one without kept features as it is.

    Raises:
        RecipeError: the batch has kept features, but training has no cache.
    """
    if "features" not in inputs:
        if cache is not None and any(key in inputs for key in PIXELS.values()):
            cache.wake()
        yield inputs
    elif cache is None:
        raise RecipeError(
            "the data set gives features from a cache; give MultimodalTrainer its features=FeatureCache(plan, store)"
        )
    else:
        with cache.feeding(model, inputs, autocast) as batch:
            yield batch
