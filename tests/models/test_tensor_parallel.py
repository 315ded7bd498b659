"""Matrices shared out over two real processes: losses and gradients are those of the whole model, family by family."""

import json

import pytest
import torch

from mmpeft.core.errors import ModelError
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.plan import describe_training
from mmpeft.models.tensor_parallel import TensorParallel, share_adapters, share_layers
from tests.families.models import MODELS
from tests.processes import rows_of_two
from tests.tiny import tiny_llava

TRAIN = {"projector": "full", "language": {"r": 4, "lora_alpha": 8}}

REFUSED = {"qwen3_5": "cannot be shared out by columns and rows"}
"""Families whose language models are of another kind."""

PASSING = """
import json
import os
import sys

import mmpeft
import torch
from torch import distributed

from mmpeft.core.errors import ModelError
from mmpeft.methods.attach import get_peft_model
from mmpeft.families.registry import trained_model
from mmpeft.models.base import base_of
from mmpeft.models.tensor_parallel import TensorParallel, partial_parameters, share_adapters, share_layers
from tests.families.models import MODELS
from tests.families.test_adapters import built, gradients, scattered

TRAIN = json.loads(sys.argv[1])
distributed.init_process_group("gloo")
parallel = TensorParallel(2, distributed.get_rank(), distributed.group.WORLD, tokens=json.loads(sys.argv[2]))
for family in MODELS:
    model, batch = built(family)
    whole = scattered(get_peft_model(model, TRAIN)).eval()
    expected = gradients(whole, batch)
    with torch.no_grad():
        logits = whole(**batch).logits
    model, _ = built(family)
    entry = {"family": family}
    try:
        share_layers(base_of(model), parallel)
    except ModelError as error:
        print(json.dumps(entry | {"refused": str(error)}), flush=True)
        continue
    shared = scattered(get_peft_model(model, TRAIN)).eval()
    share_adapters(shared)
    shared.gradient_checkpointing_enable({"use_reentrant": False})
    layer = trained_model(base_of(shared)).get_decoder().layers[0]
    passed = []
    layer.register_forward_hook(lambda module, args, output: passed.append(output.shape[1]))
    found = gradients(shared, batch)
    for parameter in partial_parameters(shared):
        distributed.all_reduce(parameter.grad)
    found = {name: weight.grad for name, weight in shared.named_parameters() if weight.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    entry["gradient"] = max(float((found[name] - expected[name]).abs().max()) for name in found) / largest
    with torch.no_grad():
        entry["logits"] = float((shared(**batch).logits - logits).abs().max())
    entry["tokens"] = [logits.shape[1], passed[0]]
    entry["share"] = sum(w.numel() for w in shared.parameters()) / sum(w.numel() for w in whole.parameters())
    if parallel.rank == 1:
        print(json.dumps(entry), flush=True)
distributed.barrier()
# Not by the interpreter's farewells, as mmpeft.cli.main says.
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True], ids=["matrices", "tokens as well"])
def test_two_processes_compute_what_one_does(tokens, tmp_path):
    rows = rows_of_two(PASSING, tmp_path, json.dumps(TRAIN), json.dumps(tokens))
    found = {row["family"]: row for row in rows}
    assert found.keys() == MODELS.keys()
    assert {name for name, row in found.items() if "refused" in row} == REFUSED.keys()
    for name, row in found.items():
        print(row)
        if name in REFUSED:
            assert REFUSED[name] in row["refused"]
            continue
        assert row["gradient"] < 1e-5, row
        assert row["logits"] < 1e-5, row
        assert row["share"] < 0.95
        whole, between = row["tokens"]
        parts = 2 if tokens and name != "qwen3_vl" else 1
        assert between == -(-whole // parts)


def test_a_process_has_its_share_of_each_matrix_and_a_whole_lora():
    model = tiny_llava()
    total = sum(weight.numel() for weight in model.parameters())
    layer = model.model.language_model.layers[0]
    query, down = layer.self_attn.q_proj.weight.clone(), layer.mlp.down_proj.weight.clone()
    share_layers(model, TensorParallel(2, 1))
    assert torch.equal(layer.self_attn.q_proj.weight, query[len(query) // 2 :])
    assert torch.equal(layer.mlp.down_proj.weight, down[:, down.shape[1] // 2 :])
    peft_model = get_peft_model(model, TRAIN)
    share_adapters(peft_model)
    assert layer.self_attn.q_proj.lora_B["default"].weight.shape == (len(query), 4)
    assert layer.mlp.down_proj.lora_A["default"].weight.shape == (4, down.shape[1])
    assert layer.self_attn.q_proj(torch.rand(1, 3, query.shape[1])).shape[-1] == len(query) // 2
    assert describe_training(peft_model, TRAIN).total == total


def test_what_cannot_be_shared_out_is_refused_by_name():
    model = tiny_llava()
    heads = model.config.text_config.num_key_value_heads
    with pytest.raises(ModelError, match=f"{heads} key value heads of LlavaForCond.*use a divisor of {heads}"):
        share_layers(model, TensorParallel(heads * 2, 0))
