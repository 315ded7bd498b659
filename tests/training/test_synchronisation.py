"""A training step leaves the host free to run ahead of the device: nothing of ours reads a number from it.

Counted are calls that wait for the device where a tensor lies on one. transformers' own, which a forward by itself
makes as well, are left out: the sizes of pictures (`grid_thw.tolist()`) and the check that features fit tokens.
"""

import collections
import traceback

import pytest
import torch
from accelerate.utils import send_to_device
from torch.overrides import TorchFunctionMode

from mmpeft import MultimodalCollator, MultimodalTrainer, get_peft_model
from mmpeft.data.collate import keep_supervised
from mmpeft.data.packing import PackedCollator
from mmpeft.models.positions import with_positions
from tests.families.models import MODELS
from tests.families.test_packing import rows_of
from tests.training.test_trainer import TRAIN, arguments

READS = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "unique_consecutive"}
TRUTH = {"__bool__", "__int__", "__float__", "__index__", "__contains__"}


class Reads(TorchFunctionMode):
    """Counts reads of numbers by the line of mmpeft that makes them, itself or by what it calls."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if self.reads(getattr(function, "__name__", ""), args):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/mmpeft/" in frame.filename]
            self.found[f"{frames[-1].filename.rpartition('/mmpeft/')[2]} {frames[-1].name}"] += 1
        return function(*args, **(kwargs or {}))

    @staticmethod
    def reads(name, args):
        places = args[1] if len(args) > 1 and isinstance(args[1], tuple) else args[1:2]
        masked = any(isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in places)
        return name in READS | TRUTH or (name in ("__getitem__", "__setitem__") and masked)


def reads_of(family, packed, folder):
    model, processor = MODELS[family]()
    collate = (PackedCollator if packed else MultimodalCollator)(processor)
    rows = rows_of(family, processor)
    trainer = MultimodalTrainer(
        model=get_peft_model(model, TRAIN), args=arguments(folder), train_dataset=rows, data_collator=collate
    )
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=len(rows), collate_fn=collate))
    batch = next(iter(batch))
    with trainer.computing.on():
        trainer.training_step(trainer.model, dict(batch))  # the first one looks up what is then known
        with Reads() as reads:
            trainer.training_step(trainer.model, dict(batch))
    return reads.found


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", ["llava", "internvl", "gemma3", "qwen2_5_vl", "qwen3_vl"])
def test_a_step_reads_no_number_of_its_own_accord(family, packed, tmp_path):
    found = reads_of(family, packed, tmp_path)
    # What the forward reads comes by way of the Trainer; positions of packed rows from the host, see below.
    assert found.keys() <= {"training/trainer.py compute_loss", "models/positions.py with_positions"}
    assert packed or "models/positions.py with_positions" not in found


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_computed_without_the_device(family):
    """A meta device has no numbers: reading one there is an error."""
    model, processor = MODELS[family]()
    batch = PackedCollator(processor)(rows_of(family, processor))
    expected = with_positions(model, batch)["position_ids"]
    there = send_to_device(batch, torch.device("meta"))
    assert there["input_ids"].is_meta
    assert torch.equal(with_positions(model, there | {"input_ids": batch["input_ids"]})["position_ids"], expected)
    assert with_positions(model, there)["position_ids"].is_meta


def test_a_read_is_found_and_named():
    with Reads() as reads:
        keep_supervised(torch.tensor([[1, 2, -100]]))
    assert reads.found == {"data/collate.py keep_supervised": 1}
