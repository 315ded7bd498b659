"""Tokens shared out over two real processes: losses and gradients are those of the whole model, family by family."""

import json

import pytest
import torch
from transformers import TrainingArguments

from mmpeft import Recipe
from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.models.context_parallel import ContextParallel, context_parallel_on, share_tokens
from mmpeft.models.last_layer import last_layer_obstacle
from mmpeft.pipeline.compute import why_uncompiled
from tests.families.models import MODELS
from tests.processes import rows_of_two
from tests.project import write_project
from tests.tiny import tiny_llava

TRAIN = {"projector": "full", "language": {"r": 4, "lora_alpha": 8}}

REFUSED = {"qwen3_5": "otherwise than by attention", "qwen3_vl": "between layers"}
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
from mmpeft.models.context_parallel import ContextParallel, context_parallel_on, parts_of_layers, share_tokens
from tests.families.models import MODELS
from tests.families.test_adapters import built, gradients, scattered

TRAIN = json.loads(sys.argv[1])
distributed.init_process_group("gloo")
parallel = ContextParallel(2, distributed.get_rank(), distributed.group.WORLD)
for family in MODELS:
    model, batch = built(family)
    whole = scattered(get_peft_model(model, TRAIN)).eval()
    expected = gradients(whole, batch)
    with torch.no_grad():
        logits = whole(**batch).logits
    model, _ = built(family)
    entry = {"family": family}
    try:
        share_tokens(model, parallel)
    except ModelError as error:
        print(json.dumps(entry | {"refused": str(error)}), flush=True)
        continue
    shared = scattered(get_peft_model(model, TRAIN)).eval()
    shared.gradient_checkpointing_enable({"use_reentrant": False})
    passed = []
    layer = trained_model(base_of(shared)).get_decoder().layers[-1].mlp
    layer.register_forward_hook(lambda module, args, output: passed.append(output.shape[1]))
    with context_parallel_on(shared):
        gradients(shared, batch)
        for parameter in parts_of_layers(shared):
            distributed.all_reduce(parameter.grad)
        found = {name: weight.grad for name, weight in shared.named_parameters() if weight.grad is not None}
        with torch.no_grad():
            entry["logits"] = float((shared(**batch).logits - logits).abs().max())
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    entry["gradient"] = max(float((found[name] - expected[name]).abs().max()) for name in found) / largest
    entry["tokens"] = [logits.shape[1], passed[0]]
    with torch.no_grad():
        entry["off again"] = float((shared(**batch).logits - logits).abs().max())
    if parallel.rank == 1:
        print(json.dumps(entry), flush=True)
distributed.barrier()
# Not by the interpreter's farewells, as mmpeft.cli.main says.
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    rows = rows_of_two(PASSING, tmp_path, json.dumps(TRAIN))
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
        assert row["off again"] < 1e-6, row
        whole, in_layers = row["tokens"]
        assert in_layers == -(-whole // 2)


def test_heads_that_cannot_be_shared_are_refused_by_name():
    model = tiny_llava()
    heads = model.config.text_config.num_attention_heads
    with pytest.raises(ModelError, match=rf"{heads} attention heads and .* cannot be shared by {heads * 3} processes"):
        share_tokens(model, ContextParallel(heads * 3, 0))


@pytest.mark.parametrize("degree", [2, 4])
def test_each_process_attends_by_its_heads_for_all_tokens(degree):
    """Of one process of a group, which sends nothing: shapes are its own. Four are more than keys have heads."""
    model = tiny_llava()
    text = model.config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 2)
    before = text._attn_implementation
    share_tokens(model, ContextParallel(degree, 1))
    widths = []
    layer = model.model.language_model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    ids = torch.arange(3, 24)[None]
    with context_parallel_on(model):
        assert text._attn_implementation == f"mmpeft_context_{before}"
        logits = model(input_ids=ids).logits
    assert logits.shape[1] == 21
    assert widths == [-(-21 // degree)]
    assert text._attn_implementation == before
    model(input_ids=ids)
    assert widths[-1] == 21
    assert "context_parallel" in last_layer_obstacle(model)


def test_layers_are_not_compiled_beside_it(tmp_path):
    model = tiny_llava()
    share_tokens(model, ContextParallel(2, 0))
    recipe = Recipe.from_yaml(write_project(tmp_path), ("compute.compile=true",))
    with pytest.raises(RecipeError, match=r"compute\.compile: processes that run samples together were not tested"):
        why_uncompiled(recipe, model, TrainingArguments(str(tmp_path / "out"), use_cpu=True), samples=1)
