"""Numbers and layout are those of compressed-tensors itself."""

import pytest
import torch

from mmpeft.export.w8a8 import quantization_config, quantize_rows, scale_of, tokens_through_int8

quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")


def arguments(strategy, *, dynamic=False):
    return quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy=strategy, dynamic=dynamic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_become_what_the_library_makes_of_them(dtype):
    weight = torch.randn(6, 10).to(dtype)
    weight[2] = 0
    whole, scale = quantize_rows(weight)
    assert whole.dtype == torch.int8
    assert scale.shape == (6, 1)
    assert scale.dtype == dtype
    theirs = lifecycle.quantize(weight.float(), scale.float(), torch.zeros(6, 1), arguments("channel"), torch.int8)
    assert torch.equal(whole, theirs)
    low, high = weight.float().amin(1, keepdim=True), weight.float().amax(1, keepdim=True)
    wanted, _ = helpers.calculate_qparams(low, high, arguments("channel"))
    rows = [row for row in range(6) if row != 2]
    torch.testing.assert_close(
        scale.float()[rows], wanted[rows], rtol=5e-3 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    assert (whole.float() * scale.float() - weight.float()).abs().max() <= 0.51 * scale.float().max()


def test_activations_pass_as_the_library_passes_them():
    x = torch.randn(2, 5, 8) * torch.tensor([0.01, 1, 1, 1, 30]).view(1, 5, 1)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = helpers.calculate_qparams(low, high, arguments("token", dynamic=True))
    theirs = lifecycle.fake_quantize(x, scale, zero, arguments("token", dynamic=True))
    torch.testing.assert_close(tokens_through_int8(x), theirs)


def test_a_scale_is_never_zero():
    tiny = scale_of(torch.tensor([0.0, 1e-9]), torch.float16)
    assert tiny[0] == 1
    assert tiny[1] > 0


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_configuration_is_one_that_the_library_reads(activations):
    block = quantization_config(["lm_head"], activations=activations)
    read = quantization.QuantizationConfig.model_validate(block)
    [scheme] = read.config_groups.values()
    assert scheme.weights.strategy == "channel"
    assert scheme.input_activations.dynamic is (activations == "dynamic")
    assert read.ignore == ["lm_head"]
    assert read.format == "int-quantized"
