"""A whole run of a type without a file of facts, experts and all, and its adapter in plain PEFT."""

import json

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import mmpeft
from tests.families.samples import picture
from tests.families.test_generic_data import CASES, fitted

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.slow
def test_a_mixture_of_experts_trains_in_two_stages_from_one_recipe(tmp_path):
    processor, tokens, *sizes = CASES["qwen3_vl_moe"]()
    fitted("qwen3_vl_moe", processor, tokens, sizes[0]).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = []
    for number in range(8):
        picture((40, 32), number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": ("a cat", "a dog")[number % 2]}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    recipe = {
        "model": str(tmp_path / "model"),
        "data": {"train": str(tmp_path / "train.json"), "media_root": str(tmp_path)},
        "stages": [
            {"name": "projector", "train": {"projector": "full"}, "learning_rate": 1e-3},
            {
                "name": "language",
                "train": {"projector": "full", "language": {"r": 2, "target_parameters": EXPERTS}},
                "learning_rate": 1e-3,
                "epochs": 2,
            },
        ],
        "batch": {"size": 4},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = mmpeft.run(mmpeft.Recipe.from_yaml(tmp_path / "recipe.yaml"))
    assert [stage["status"] for stage in result.stages] == ["trained", "trained"]
    batch = AutoProcessor.from_pretrained(tmp_path / "model")(
        text=["<|vision_start|><|image_pad|><|vision_end|>What?"], images=[picture((40, 32))], return_tensors="pt"
    )
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(**batch).logits
        plain = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()(**batch).logits
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "adapter", dtype=torch.float32).eval()
        assert not torch.equal(plain, before)
        torch.testing.assert_close(loaded(**batch).logits, plain, rtol=0, atol=1e-6)
    stored = PeftConfig.from_pretrained(tmp_path / "run" / "adapter")
    assert all(".language_model." in name for name in stored.target_parameters)
