"""LoRA's products added in place give PEFT's own numbers; what is not plain runs as PEFT has it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.models.fused_lora import lora_fused


class Block(torch.nn.Module):
    """Two linear layers, with a bias and without."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(12, 20)
        self.two = torch.nn.Linear(20, 6, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def make(dtype=torch.float32, targets=("one", "two"), **lora):
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **lora)
    model = get_peft_model(Block().to(dtype), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


class Products(TorchDispatchMode):
    """How many results of at least so many numbers are made."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.made = numbers, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        writes = function.namespace == "aten" and not function.is_view and function.overloadpacket.__name__[-1] != "_"
        self.made += writes and isinstance(out, torch.Tensor) and out.numel() >= self.numbers
        return out


def step(model, x, *, autocast=False):
    """Output, gradient of the input and of each weight, and how many tensors of the output's size were made."""
    model.zero_grad()
    own = x.clone().requires_grad_()
    with Products(x.shape[0] * x.shape[1] * 6) as products:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(own)
        y.float().square().sum().backward()
    return (
        y.detach(),
        own.grad,
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        products.made,
    )


def both(model, x, **how):
    plain = step(model, x, **how)
    with lora_fused(model) as layers:
        fused = step(model, x, **how)
    assert not any("forward" in vars(module) for module in model.modules())
    return plain, fused, layers


def test_outputs_and_gradients_are_those_of_peft():
    model = make().double()
    plain, fused, layers = both(model, torch.randn(2, 7, 12, dtype=torch.float64))
    assert layers == 2
    torch.testing.assert_close(fused[:3], plain[:3], rtol=1e-12, atol=1e-12)
    assert len(fused[2]) == 4
    assert fused[3] < plain[3]


def test_half_precision_is_no_further_from_double_than_peft():
    x = torch.randn(2, 40, 12)
    exact = step(make(torch.bfloat16).double(), x.bfloat16().double())
    model = make(torch.bfloat16)
    plain, fused, layers = both(model, x.bfloat16(), autocast=True)
    assert layers == 2
    assert fused[0].dtype == torch.bfloat16
    for name, gradient in fused[2].items():
        assert gradient.dtype == torch.float32
        off, peft_off = (
            (each[2][name].double() - exact[2][name]).norm() / exact[2][name].norm() for each in (fused, plain)
        )
        assert off < max(2 * peft_off, 2**-8), name


def test_an_input_without_gradient_costs_none():
    model = make()
    with lora_fused(model):
        model(torch.randn(3, 5, 12)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "lora",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True, "targets": ["one"]}],
    ids=["dropout", "dora", "bias"],
)
def test_variants_run_as_peft_has_them(lora):
    model = make(**lora)
    with lora_fused(model) as layers:
        assert layers == 0
        assert model(torch.randn(2, 3, 12)).shape == (2, 3, 6)


def test_layers_with_hooks_or_trainable_weights_run_as_they_are():
    model = make()
    inner = model.base_model.model
    seen = []
    inner.one.base_layer.register_forward_hook(lambda *_: seen.append(1))
    inner.two.base_layer.weight.requires_grad_(True)
    with lora_fused(model) as layers:
        model(torch.randn(2, 3, 12)).sum().backward()
    assert layers == 0
    assert seen == [1]
    assert inner.two.base_layer.weight.grad is not None


def test_adapters_that_are_off_merged_or_several_are_left_to_peft():
    model, x = make(), torch.randn(2, 3, 12)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["one"], init_lora_weights=False))
    with lora_fused(model) as layers:
        assert layers == 2
        with torch.no_grad():
            one = model(x)
            model.set_adapter("second")
            second = model(x)
            model.base_model.set_adapter(["default", "second"])
            together = model(x)
            with model.disable_adapter():
                off = model(x)
            model.merge_adapter()
            merged = model(x)
    expected = make()
    with torch.no_grad():
        torch.testing.assert_close(one, expected(x))
        with expected.disable_adapter():
            torch.testing.assert_close(off, expected(x))
    assert not torch.allclose(second, one)
    torch.testing.assert_close(merged, together, rtol=1e-4, atol=1e-5)
