"""A step's loss and its update do not depend on how it is cut into micro-batches."""

import numpy as np
import pytest
import torch

from mmpeft import MultimodalCollator, MultimodalTrainer, get_peft_model
from mmpeft.core.errors import RecipeError
from mmpeft.data.balancing import Cut, Steps
from mmpeft.data.cutting import Bounds, CostModel
from mmpeft.data.encode import encode_sample
from mmpeft.data.sample_lengths import LENGTHS
from mmpeft.data.types import Media
from mmpeft.families.registry import family_of
from tests.families.models import FIRST_CLASS
from tests.families.samples import picture, sample_of
from tests.training.test_trainer import arguments


def one_step(family, folder, micro, **options):
    torch.manual_seed(0)
    model, processor = FIRST_CLASS[family]()
    sees = "image" in family_of(model).modalities
    media = Media(images=[picture((32, 32))] if sees else [])
    rows = [
        encode_sample(
            processor, sample_of(("<image>" if sees else "") + f"{n}?", "yes " * (3 * n + 1), images=int(sees)), media
        )
        for n in range(4)
    ]
    collator = MultimodalCollator(processor, supervised_only=False if options else None)
    model = get_peft_model(model, {"language": {"r": 4}})
    trainer = MultimodalTrainer(
        model=model,
        args=arguments(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
            learning_rate=1.0,
            **options,
        ),
        train_dataset=rows,
        data_collator=collator,
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora_B" in name])
    return trainer.state.log_history[0]["loss"], weights


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_a_step_is_the_same_in_one_micro_batch_and_in_four(family, tmp_path):
    whole, update = one_step(family, tmp_path / "whole", 4)
    parted, parted_update = one_step(family, tmp_path / "parted", 1)
    assert parted == pytest.approx(whole, rel=1e-5)
    assert torch.linalg.norm(update) > 0
    assert torch.linalg.norm(parted_update - update) < 1e-5 * torch.linalg.norm(update)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_audio"])
def test_label_smoothing_is_of_the_next_token_however_a_step_is_cut(family, tmp_path):
    whole, update = one_step(family, tmp_path / "whole", 4, label_smoothing_factor=1e-9)
    parted, parted_update = one_step(family, tmp_path / "parted", 1, label_smoothing_factor=1e-9)
    plain, _ = one_step(family, tmp_path / "plain", 4)
    assert parted == pytest.approx(whole, rel=1e-5)
    assert torch.linalg.norm(parted_update - update) < 1e-5 * torch.linalg.norm(update)
    # Hardly smoothed at all, it is the cross-entropy.
    assert whole == pytest.approx(plain, rel=1e-5)


def test_a_loss_that_no_count_reaches_cannot_have_a_budget(tmp_path):
    model, processor = FIRST_CLASS["qwen2_audio"]()
    model.config.get_text_config().output_router_logits = True
    steps = Steps(lengths=lambda epoch: np.zeros(4, dtype=LENGTHS), samples=4, size=4, seed=0)

    def trainer(tokens):
        cut = Cut(steps=steps, bounds=Bounds(tokens=tokens), costs=CostModel(), accumulation=1)
        collator = MultimodalCollator(processor)
        return MultimodalTrainer(model=model, args=arguments(tmp_path), cut=cut, data_collator=collator)

    assert trainer(None).cut is None
    with pytest.raises(RecipeError, match=r"batch\.tokens: .* use batch\.micro"):
        trainer(100)
