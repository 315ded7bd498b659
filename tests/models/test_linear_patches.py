"""Patches projected by a matrix product: the numbers of the convolution, and only where it takes patches one by one."""

import copy

import pytest
import torch

from mmpeft.models.linear_patches import patches_linear
from tests.families.models import FIRST_CLASS


def conv(**settings):
    torch.manual_seed(0)
    return torch.nn.Conv3d(3, 8, **{"kernel_size": (2, 4, 4), "stride": (2, 4, 4), **settings})


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_convolution(bias):
    own = conv(bias=bias)
    plain = copy.deepcopy(own)
    patches = torch.randn(5, 3, 2, 4, 4, requires_grad=True)
    other = patches.detach().clone().requires_grad_()
    with patches_linear(torch.nn.Sequential(own)) as count:
        out = own(patches)
        out.square().sum().backward()
    expected = plain(other)
    expected.square().sum().backward()
    assert count == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches.grad, other.grad, rtol=1e-5, atol=1e-4)
    for left, right in zip(own.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-5, atol=1e-4)


def test_a_convolution_that_moves_over_its_input_goes_on():
    own, pictures = conv(), torch.randn(2, 3, 4, 8, 8)
    expected = own(pictures)
    with patches_linear(torch.nn.Sequential(own)):
        assert torch.equal(own(pictures), expected)


@pytest.mark.parametrize("settings", [{"stride": (2, 2, 2)}, {"padding": 1}, {"dilation": (1, 2, 2)}])
def test_a_convolution_whose_patches_overlap_is_left_alone(settings):
    with patches_linear(torch.nn.Sequential(conv(**settings))) as count:
        assert count == 0


def test_an_input_of_another_width_fails_as_ever():
    own = conv()
    with patches_linear(torch.nn.Sequential(own)), pytest.raises(RuntimeError, match="channels"):
        own(torch.randn(5, 4, 2, 4, 4))


def test_nothing_stays_behind_and_an_inner_use_leaves_it_to_the_outer():
    own = conv()
    with patches_linear(own) as outer, patches_linear(own) as inner:
        assert (outer, inner) == (1, 0)
        assert "forward" in vars(own)
    assert "forward" not in vars(own)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_qwen_line_has_such_a_convolution(family):
    model, _ = FIRST_CLASS[family]()
    with patches_linear(model) as count:
        assert count == 1
