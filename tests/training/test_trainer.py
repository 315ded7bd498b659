import json
import re

import pytest
import torch
from transformers import AutoProcessor, Trainer, TrainingArguments

from mmpeft import MultimodalCollator, MultimodalTrainer, get_peft_model, load_dataset
from mmpeft.core.errors import OutputError, RecipeError
from mmpeft.methods.plan import base_name
from mmpeft.training.callbacks import MetricsFile, read_metrics
from mmpeft.training.computing import Compute
from mmpeft.training.parts import parameter_groups, rates_now
from mmpeft.training.resume import check_writers, last_checkpoint, seal_checkpoint
from tests.project import StopAfter, write_data
from tests.tiny import tiny_llava

TRAIN = {"projector": "full", "language": {"r": 4}}


@pytest.fixture
def dataset(tmp_path, processor):
    data = write_data(tmp_path / "data")
    return load_dataset(data / "train.json", media_root=data / "images", processor=processor)


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    return TrainingArguments(**(defaults | options))


def losses(trainer_class, folder, dataset, processor, train=TRAIN, **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llava(processor), train)
    trainer = trainer_class(
        model=model,
        args=arguments(folder),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
        **options,
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_losses_are_those_of_the_plain_trainer_to_the_bit(tmp_path, dataset, processor):
    plain = losses(Trainer, tmp_path / "b", dataset, processor)
    ours = losses(MultimodalTrainer, tmp_path / "a", dataset, processor, compute=Compute(spare_mask=False))
    assert len(ours) == 2 * 3  # 22 samples, 8 a step, two epochs
    assert ours == plain
    # Attention without a mask is another kernel, and rounds otherwise.
    assert losses(MultimodalTrainer, tmp_path / "c", dataset, processor) == pytest.approx(plain, rel=1e-6)
    assert ours[-1] < ours[0]


def test_one_rate_for_all_parts_equals_the_plain_trainer(tmp_path, dataset, processor):
    rates = {"projector": 1e-2, "language": 1e-2}
    ours = losses(MultimodalTrainer, tmp_path / "a", dataset, processor, learning_rates=rates)
    plain = losses(Trainer, tmp_path / "b", dataset, processor)
    assert ours == pytest.approx(plain, abs=1e-6)


def test_each_part_has_its_own_rate(tmp_path, dataset, processor):
    model = get_peft_model(tiny_llava(processor), TRAIN)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
        learning_rates={"projector": 1e-2, "language": 1e-12},
    )
    trainer.train()
    moved = {
        part: max(
            (parameter - before[name]).abs().max().item()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and part in base_name(name)
        )
        for part in ("multi_modal_projector", "language_model")
    }
    assert moved["multi_modal_projector"] > 1e-3
    assert moved["language_model"] < 1e-10


def test_weight_decay_reaches_matrices_only(processor):
    model = get_peft_model(tiny_llava(processor), {"projector": "full"})
    decay = [name for name, parameter in model.named_parameters() if parameter.ndim > 1]
    groups = parameter_groups(model, {"projector": 1e-3}, decay=decay, weight_decay=0.1)
    assert {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups} == {0.1: {2}, 0.0: {1}}


def test_a_part_without_a_rate_is_an_error(processor):
    model = get_peft_model(tiny_llava(processor), TRAIN)
    with pytest.raises(RecipeError, match="no learning rate for its part"):
        parameter_groups(model, {"projector": 1e-3}, decay=(), weight_decay=0)


def test_rates_follow_the_schedule_together():
    groups = [
        {"part": "projector", "lr": 0.5e-3, "initial_lr": 1e-3},
        {"part": "language", "lr": 1e-4, "initial_lr": 2e-4},
    ]
    assert rates_now(groups, 0.25e-3) == {"projector": 0.25e-3, "language": 0.5e-4}


def test_metrics_have_speed_memory_and_the_rate_of_each_part(tmp_path, dataset, processor):
    path = tmp_path / "metrics.jsonl"
    rates = {"projector": 1e-2, "language": 1e-3}
    losses(MultimodalTrainer, tmp_path, dataset, processor, learning_rates=rates, callbacks=[MetricsFile(path)])
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["learning_rate"] == pytest.approx(rates)
    for row in rows:
        assert row["samples_per_second"] > 0
        assert row["tokens_per_second"] > row["samples_per_second"]
        assert row["memory_bytes"] > 2**20
    assert rows[-1]["elapsed_seconds"] > rows[0]["elapsed_seconds"]


def test_text_alone_gives_a_projector_that_trains_by_itself_no_gradient(tmp_path, dataset, processor):
    """Sixteen samples without a picture before or after six with one, in micro-batches of two."""
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}] * 16
    rows += json.loads(dataset.path.read_text(encoding="utf-8"))[:6]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    mixed = load_dataset(path, media_root=dataset.media_root, processor=processor)
    model = get_peft_model(tiny_llava(processor), {"projector": "full"})
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(tmp_path / "out", per_device_train_batch_size=2, gradient_accumulation_steps=1),
        train_dataset=mixed,
        data_collator=MultimodalCollator(processor),
    )
    trainer.train()
    assert trainer.state.global_step == 22
    seen = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert 0.0 in seen
    assert max(seen) > 0
    assert not model._forward_hooks


def test_all_samples_are_counted_whether_or_not_a_step_is_logged(tmp_path, dataset, processor):
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_llava(processor), TRAIN),
        args=arguments(tmp_path, logging_steps=2, max_steps=3),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
    )
    trainer.train()
    assert trainer.samples_trained == 22
    assert trainer.tokens_trained > 22


@pytest.mark.parametrize(
    ("train", "carried"),
    [
        (TRAIN, {}),
        ({"language": {"r": 4, "use_dora": True}}, {}),
        ({"language": {"r": 4, "init_lora_weights": "pissa"}}, {}),
        ({"language": {"r": 4}}, {"projector": "full"}),
        ({"language": "full"}, {}),
    ],
    ids=["lora", "dora", "pissa", "carried", "full"],
)
def test_a_resumed_run_ends_with_the_weights_of_one_that_never_stopped(tmp_path, dataset, processor, train, carried):
    def run(folder, stop=None, resume=None):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llava(processor), train, carried=carried)
        trainer = MultimodalTrainer(
            model=model,
            args=arguments(folder, save_strategy="steps", save_steps=2),
            train_dataset=dataset,
            data_collator=MultimodalCollator(processor),
            callbacks=[MetricsFile(folder / "metrics.jsonl"), *([StopAfter(stop)] if stop else [])],
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    want = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop=5)
    path, step = last_checkpoint(tmp_path / "b")
    assert step == 4
    got = run(tmp_path / "b", resume=str(path))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [row["step"] for row in rows[1]] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


class Epochs(torch.utils.data.Dataset):
    """A data set that writes down for which epoch each sample was taken."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.seen = []

    def set_epoch(self, epoch):
        self.dataset.set_epoch(epoch)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.seen.append(self.dataset.epoch)
        return self.dataset[index]


@pytest.mark.parametrize(("step", "left"), [(2, [6, 22]), (4, [0, 14])])
def test_the_data_set_knows_its_epoch_from_the_start_and_where_a_run_goes_on(tmp_path, dataset, processor, step, left):
    def trainer(**options):
        return MultimodalTrainer(
            model=get_peft_model(tiny_llava(processor), TRAIN),
            args=arguments(tmp_path, save_strategy="steps", save_steps=2),
            train_dataset=Epochs(dataset),
            data_collator=MultimodalCollator(processor),
            **options,
        )

    with pytest.raises(KeyboardInterrupt):
        trainer(callbacks=[StopAfter(step + 1)]).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert [resumed.train_dataset.seen.count(epoch) for epoch in (0, 1)] == left


def test_a_checkpoint_cut_short_is_removed_and_the_one_before_taken(tmp_path, caplog):
    for step, state in ((2, json.dumps({"global_step": 2})), (4, '{"global_st'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    seal_checkpoint(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert "checkpoint-6 is damaged (it was cut short" in caplog.text


def test_a_checkpoint_that_was_not_sealed_is_removed(tmp_path, caplog):
    """The first process may have written all of its files where another was killed at its own."""
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    seal_checkpoint(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 2)
    (tmp_path / "checkpoint-2" / "seal.json").unlink()
    assert last_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert caplog.text.count("it was cut short") == 2


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("optimizer.pt", cut, r"optimizer.pt has \d+ bytes instead of \d+"),
        ("adapter_model.safetensors", flip, "the content of adapter_model.safetensors has changed"),
        ("rng_state.pth", lambda path: path.unlink(), "rng_state.pth is missing"),
        ("seal.json", lambda path: path.write_text("{"), "seal.json cannot be read"),
        ("trainer_state.json", lambda path: path.write_text("{"), "it was cut short"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path, dataset, processor, caplog, name, spoil, said
):
    def trainer():
        return MultimodalTrainer(
            model=get_peft_model(tiny_llava(processor), TRAIN),
            args=arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4),
            train_dataset=dataset,
            data_collator=MultimodalCollator(processor),
        )

    trainer().train()
    newest = tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path) == (newest, 4)
    spoil(newest / name)
    with pytest.raises(OutputError, match=f"cannot resume from .*checkpoint-4: {said}"):
        trainer().train(resume_from_checkpoint=str(newest))
    assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 2)
    assert not newest.exists()
    assert re.search(f"checkpoint-4 is damaged .{said}", caplog.text)


def test_a_checkpoint_that_is_written_twice_is_whole(tmp_path, dataset, processor):
    for _ in range(2):
        MultimodalTrainer(
            model=get_peft_model(tiny_llava(processor), TRAIN),
            args=arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2),
            train_dataset=dataset,
            data_collator=MultimodalCollator(processor),
        ).train()
        assert last_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 2)
        assert "seal.json" not in json.loads((tmp_path / "checkpoint-2" / "seal.json").read_text())


def test_no_checkpoint_at_all(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_a_disk_that_fills_up_at_a_checkpoint_leaves_no_half_of_one(tmp_path, dataset, processor, monkeypatch):
    model = get_peft_model(tiny_llava(processor), TRAIN)
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(tmp_path, save_strategy="steps", save_steps=2),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
    )

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OutputError, match=r"checkpoint-2: the disk is full"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("train", [TRAIN, {"language": "full"}], ids=["lora", "full"])
def test_the_best_checkpoint_is_the_one_that_is_kept(tmp_path, dataset, processor, train):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llava(processor), train)
    best = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        # The worst one is the best, so that it is not the last.
        "greater_is_better": True,
    }
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(tmp_path, **best),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=MultimodalCollator(processor),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_save_model_writes_the_processor_beside_the_adapter(tmp_path, dataset, processor):
    trainer = MultimodalTrainer(
        model=get_peft_model(tiny_llava(processor), TRAIN),
        args=arguments(tmp_path),
        train_dataset=dataset,
        data_collator=MultimodalCollator(processor),
        processing_class=processor,
    )
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoProcessor.from_pretrained(tmp_path / "saved").image_token == processor.image_token


def test_label_smoothing_needs_the_logits_of_every_position(tmp_path, dataset, processor):
    with pytest.raises(RecipeError, match=r"label_smoothing_factor=0.1 .*supervised_only=False"):
        MultimodalTrainer(
            model=get_peft_model(tiny_llava(processor), TRAIN),
            args=arguments(tmp_path, label_smoothing_factor=0.1),
            train_dataset=dataset,
            data_collator=MultimodalCollator(processor),
        )


def test_deepspeeds_checkpoints_go_on_with_as_many_processes_alone(tmp_path):
    plain, shared = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    plain.mkdir()
    (shared / "global_step2").mkdir(parents=True)
    for rank in range(2):
        (shared / "global_step2" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_writers(None, zero=2, processes=2)
    check_writers(plain, zero=None, processes=3)
    check_writers(shared, zero=2, processes=2)
    with pytest.raises(OutputError, match="it was written by ddp, fsdp2 or one process; go on as the run was begun"):
        check_writers(plain, zero=2, processes=2)
    with pytest.raises(OutputError, match=r"it was written by DeepSpeed \(zero1, zero2, zero3\)"):
        check_writers(shared, zero=None, processes=2)
    with pytest.raises(OutputError, match="it has the shares of 2 processes, and here are 4"):
        check_writers(shared, zero=3, processes=4)
