"""Which modules an NPU's fused operators stand for; their numbers are those of tests/npu_sim/inside.py."""

import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import GELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from mmpeft.models.npu_kernels import FusedModules, npu_kernels_on

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Refusing:
    """The operators of an NPU, of which nothing on a CPU may take one."""

    def __getattr__(self, name):
        def operator(*args, **kwargs):
            raise AssertionError(name)

        return operator


@pytest.fixture(autouse=True)
def _operators(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", Refusing())


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes))


@pytest.mark.parametrize(
    ("make", "norms", "activations", "rotations"),
    [
        (llama, 5, 2, 2),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)), 9, 2, 2),
        (lambda: Phi3ForCausalLM(Phi3Config(**SMALL)), 5, 2, 2),
        (lambda: llama(hidden_act="swish"), 5, 2, 2),
        (lambda: llama(hidden_act="gelu"), 5, 0, 2),
        # 1 + weight, GELU.
        (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL)), 0, 0, 2),
        (lambda: nn.Sequential(nn.LayerNorm(8), nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-5)), 1, 0, 0),
    ],
    ids=["llama", "qwen3", "phi3", "swish", "gelu", "gemma3", "torch"],
)
def test_modules_are_found_by_what_they_compute(make, norms, activations, rotations):
    with npu_kernels_on(make()) as fused:
        assert fused == FusedModules(norms=norms, activations=activations, rotations=rotations)


def test_stretched_positions_stay():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    with npu_kernels_on(llama(rope_parameters=yarn, max_position_embeddings=256)) as fused:
        assert (fused.norms, fused.rotations) == (5, 0)


class Centred(LlamaRMSNorm):
    """With a mean that is taken away."""

    def forward(self, states):
        return super().forward(states - states.mean(-1, keepdim=True))


class Clipped(LlamaMLP):
    """With a limit on the gate."""

    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states)).clamp(max=0.1) * self.up_proj(states))


class Gated(LlamaRMSNorm):
    """With a second argument."""

    def forward(self, states, gate=None):
        return super().forward(states) if gate is None else super().forward(states) * gate


def test_what_computes_something_else_stays():
    config = LlamaConfig(**SMALL)
    gelu = LlamaMLP(config)
    gelu.act_fn = GELUActivation()
    with npu_kernels_on(nn.ModuleList([Centred(8), Clipped(config), gelu])) as fused:
        assert fused.total == 0
    gated, states = Gated(8), torch.randn(2, 8)
    with npu_kernels_on(gated):
        assert torch.equal(gated(states, gate=states), gated(states) * states)


def test_a_cpu_computes_as_ever_and_nothing_stays_behind():
    model = llama()
    ids = torch.arange(6)[None]
    expected = model(ids).logits
    random = torch.get_rng_state()
    with npu_kernels_on(model) as outer, npu_kernels_on(model) as inner:
        assert (outer.total, inner.total) == (9, 0)
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any("forward" in vars(module) for module in model.modules())


def test_lora_stays_in_the_projections():
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]))
    with npu_kernels_on(adapted) as fused:
        assert fused == FusedModules(norms=5, activations=2, rotations=2)


@pytest.mark.parametrize("there", [None, SimpleNamespace(npu_rms_norm=None)])
def test_nothing_is_done_without_the_operators(monkeypatch, there):
    monkeypatch.setitem(sys.modules, "torch_npu", there)
    with npu_kernels_on(llama()) as fused:
        assert fused.total == 0


def test_a_norm_whose_weights_lie_elsewhere_is_known_by_its_whole_size():
    """As under DeepSpeed's stage 3."""
    norm = LlamaRMSNorm(8)
    norm.weight = nn.Parameter(torch.empty(0))
    norm.weight.ds_shape = torch.Size([8])
    with npu_kernels_on(norm) as fused:
        assert fused == FusedModules(norms=1)
