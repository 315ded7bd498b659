"""Training with a feature cache follows the losses of training without one, and runs no tower twice."""

import hashlib

import pytest
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from mmpeft import MultimodalCollator, MultimodalTrainer, get_peft_model, load_dataset
from mmpeft.core.errors import RecipeError
from mmpeft.data.feature_store import FeatureStore, KeptExpansion
from mmpeft.data.join_features import HEAVY
from mmpeft.data.packing import PackedCollator
from mmpeft.models.features import plan_features
from mmpeft.models.resting import RestingTowers
from mmpeft.training import features as training_features
from mmpeft.training.features import FeatureCache
from tests.families.models import FIRST_CLASS
from tests.project import write_data
from tests.tiny import tiny_llava
from tests.training.test_trainer import arguments

TRAINS = {
    "projector": {"projector": "full"},
    "lora": {"language": {"r": 4}},
    "both": {"projector": "full", "language": {"r": 4}},
}


class KeptDataset(Dataset):
    """A data set whose samples come with what a store has of them."""

    def __init__(self, dataset, store):
        self.dataset, self.store = dataset, store

    def __len__(self):
        return len(self.dataset)

    def media_key(self, index):
        return self.dataset.media_key(index)

    def __getitem__(self, index):
        sample = dict(self.dataset[index])
        media = HEAVY & set(sample)
        if not media:
            return sample
        key = hashlib.sha256(sample["pixel_values"].numpy().tobytes()).hexdigest()
        shapes = {name: (tuple(sample[name].shape), sample[name].dtype) for name in media}
        entry = self.store.read(key)
        if entry is None:
            rest = KeptExpansion(replacements=("<image>",), modalities=("image",), shapes=shapes)
            return sample | {"features_key": key, "features_rest": rest}
        left = {name: value for name, value in sample.items() if name not in media}
        return left | {"features_key": key, "features": entry.tensors, "features_shapes": entry.expansion.shapes}


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "cache", limit_bytes=1 << 30)


@pytest.fixture
def dataset(tmp_path, processor):
    data = write_data(tmp_path / "data")
    return load_dataset(data / "train.json", media_root=data / "images", processor=processor)


def trained(folder, dataset, processor, train, store=None, collator=MultimodalCollator, towers=None, **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llava(processor), train)
    rests = towers(model) if towers else None
    cache = None if store is None else FeatureCache(plan_features(model, train), store, towers=rests)
    runs = []
    hook = model.get_base_model().model.vision_tower.encoder.register_forward_hook(lambda *_: runs.append(1))
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=dataset if store is None else KeptDataset(dataset, store),
        data_collator=collator(processor),
        features=cache,
    )
    trainer.train()
    hook.remove()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], cache, len(runs)


@pytest.mark.parametrize("collator", [MultimodalCollator, PackedCollator])
@pytest.mark.parametrize("train", TRAINS)
def test_losses_are_those_without_a_cache_and_no_tower_runs_twice(tmp_path, dataset, processor, store, train, collator):
    plain, _, _ = trained(tmp_path / "a", dataset, processor, TRAINS[train], collator=collator)
    found, cache, runs = trained(tmp_path / "b", dataset, processor, TRAINS[train], store, collator)
    assert found == pytest.approx(plain, rel=1e-5)
    assert runs == cache.misses == store.figures()["written"] > 0
    # A second run finds all of them.
    again, cache, runs = trained(tmp_path / "c", dataset, processor, TRAINS[train], store, collator)
    assert again == pytest.approx(plain, rel=1e-5)
    assert (runs, cache.misses) == (0, 0)


def test_both_stages_share_features_where_a_projector_trains_in_one(processor):
    model = get_peft_model(tiny_llava(processor), TRAINS["lora"])
    plan = plan_features(model, {**TRAINS["lora"], "projector": "full"})
    first = get_peft_model(tiny_llava(processor), TRAINS["projector"])
    assert plan.identity(model) == plan_features(first, TRAINS["projector"]).identity(first)


def test_under_bf16_autocast_kept_features_are_those_that_it_computes(tmp_path, dataset, processor, store):
    plain, _, _ = trained(tmp_path / "a", dataset, processor, TRAINS["lora"], bf16=True)
    found, _, _ = trained(tmp_path / "b", dataset, processor, TRAINS["lora"], store, bf16=True)
    assert found == pytest.approx(plain, rel=1e-3)
    sample = next(sample for sample in KeptDataset(dataset, store) if "features" in sample)
    assert {tensor.dtype for tensor in sample["features"].values()} == {torch.bfloat16}


def test_activation_checkpointing_and_a_cache_go_together(tmp_path, dataset, processor, store):
    options = {"activation_checkpointing": True}
    plain, _, _ = trained(tmp_path / "a", dataset, processor, TRAINS["both"])
    found, cache, runs = trained(tmp_path / "b", dataset, processor, TRAINS["both"], store, **options)
    assert found == pytest.approx(plain, rel=1e-5)
    assert runs == cache.misses


def test_evaluation_runs_the_towers(tmp_path, dataset, processor, store):
    model = get_peft_model(tiny_llava(processor), TRAINS["projector"])
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2),
        train_dataset=KeptDataset(dataset, store),
        eval_dataset=dataset,
        data_collator=MultimodalCollator(processor),
        features=FeatureCache(plan_features(model, TRAINS["projector"]), store),
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)


def test_a_store_that_cannot_write_costs_time_only(tmp_path, dataset, processor):
    (tmp_path / "file").touch()
    store = FeatureStore(tmp_path / "file", limit_bytes=1 << 30)
    plain, _, _ = trained(tmp_path / "a", dataset, processor, TRAINS["projector"])
    found, cache, _ = trained(tmp_path / "b", dataset, processor, TRAINS["projector"], store)
    assert found == pytest.approx(plain, rel=1e-5)
    assert store.off is not None
    assert cache.misses > len(dataset)


def test_features_without_a_cache_in_training_are_refused(tmp_path, dataset, processor, store):
    model = get_peft_model(tiny_llava(processor), TRAINS["projector"])
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=KeptDataset(dataset, store),
        data_collator=MultimodalCollator(processor),
    )
    with pytest.raises(RecipeError, match="features=FeatureCache"):
        trainer.train()


class Noted(RestingTowers):
    """Towers that note when they move; host and device are one here."""

    def __init__(self, model):
        super().__init__(model)
        self.moves = []

    def rest(self):
        self.moves.append("rest")
        super().rest()

    def wake(self):
        if self.resting:
            self.moves.append("wake")
        super().wake()


def test_towers_rest_while_features_are_kept_and_are_back_for_one_that_is_not(
    tmp_path, dataset, processor, store, monkeypatch
):
    monkeypatch.setattr(training_features, "_REST_AFTER", 2)
    plain, _, _ = trained(tmp_path / "a", dataset, processor, TRAINS["projector"])
    trained(tmp_path / "b", dataset, processor, TRAINS["projector"], store)
    kept, cache, _ = trained(tmp_path / "c", dataset, processor, TRAINS["projector"], store, towers=Noted)
    assert kept == pytest.approx(plain, rel=1e-5)
    assert (cache.towers.moves, cache.rested) == (["rest", "wake"], True)
    for lost in list((tmp_path / "cache").rglob("*.safetensors"))[::2]:
        lost.unlink()
    found, cache, runs = trained(tmp_path / "d", dataset, processor, TRAINS["projector"], store, towers=Noted)
    assert found == pytest.approx(plain, rel=1e-5)
    assert runs == cache.misses > 0
    assert not cache.towers.resting


def test_towers_rest_before_the_first_forward_where_features_are_expected(tmp_path, dataset, processor, store):
    trained(tmp_path / "a", dataset, processor, TRAINS["projector"], store)
    model = get_peft_model(tiny_llava(processor), TRAINS["projector"])
    cache = FeatureCache(plan_features(model, TRAINS["projector"]), store, towers=Noted(model))
    cache.expect_kept()
    seen = []
    model.get_base_model().get_decoder().register_forward_pre_hook(lambda *_: seen.append(cache.towers.resting))
    MultimodalTrainer(
        model=model,
        args=arguments(tmp_path / "b", max_steps=1),
        train_dataset=KeptDataset(dataset, store),
        data_collator=MultimodalCollator(processor),
        features=cache,
    ).train()
    assert seen
    assert all(seen)
    assert cache.towers.moves == ["rest", "wake"]


def test_only_what_is_frozen_and_plain_rests(processor):
    model = get_peft_model(tiny_llava(processor), {"projector": "full", "vision": {"r": 4}})
    towers = RestingTowers(model)
    vision = model.get_base_model().model.vision_tower
    frozen = [weight for weight in vision.parameters() if not weight.requires_grad]
    # The first stays, by whose place transformers tells where the model is.
    assert towers.bytes == sum(weight.nbytes for weight in frozen[1:]) > 0
    before = [(weight.data_ptr(), weight.device) for weight in model.parameters()]
    towers.rest()
    assert towers.resting
    towers.rest()
    towers.wake()
    assert not towers.resting
    assert [(weight.data_ptr(), weight.device) for weight in model.parameters()] == before


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_the_device_that_a_model_says_it_is_on_stays(family):
    model = FIRST_CLASS[family]()[0].requires_grad_(False)
    towers = RestingTowers(model)
    resting = {id(weight) for weight in towers._weights}
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    assert resting
    # `PreTrainedModel.device` is that of its first weight.
    assert not resting.intersection(id(next(module.parameters())) for module in models)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_towers_leave_the_memory_of_a_gpu(processor):
    model = tiny_llava(processor).to("cuda")
    vision = model.model.vision_tower
    towers, numbers = RestingTowers(model), [weight.cpu() for weight in vision.parameters()]
    before = torch.cuda.memory_allocated()
    towers.rest()
    assert torch.cuda.memory_allocated() <= before - towers.bytes
    towers.wake()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(numbers, vision.parameters(), strict=True))
    assert all(weight.is_cuda for weight in vision.parameters())
