import pytest
import torch
from torch import nn

from mmpeft.core.errors import ModelError
from mmpeft.models.compose import compose_model
from mmpeft.models.projectors import PROJECTORS, build_projector, count_tokens, register_projector
from tests.tiny import tiny_clip, tiny_image_processor, tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def _registry():
    before = dict(PROJECTORS)
    yield
    PROJECTORS.clear()
    PROJECTORS.update(before)


def compose(projector):
    tokenizer = tiny_tokenizer()
    return compose_model(
        vision=tiny_clip(),
        language=tiny_llama(tokenizer),
        tokenizer=tokenizer,
        image_processor=tiny_image_processor(),
        projector=projector,
    )


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_tokens_told_are_tokens_given(kind):
    projector = build_projector(kind, 6, 10, {})
    for patches in (4, 16, 36):
        assert projector(torch.randn(2, patches, 6)).shape == (2, count_tokens(projector, patches), 10)


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_no_bare_parameters(kind):
    """Every parameter sits in a Linear, LayerNorm or Embedding that `modules_to_save` can wrap."""
    for module in build_projector(kind, 6, 10, {}).modules():
        if any(True for _ in module.parameters(recurse=False)):
            assert type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding)


def test_pixel_shuffle_joins_neighbours():
    seen = []
    projector = build_projector("pixel_shuffle_mlp", 1, 3, {})
    projector.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    projector(torch.arange(16.0)[None, :, None])
    assert seen[0][0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(("patches", "text"), [(9, r"9 patches \(3 x 3\)"), (8, "8 patches:")])
def test_pixel_shuffle_refuses_odd_grids(patches, text):
    with pytest.raises(ModelError, match=text):
        count_tokens(build_projector("pixel_shuffle_mlp", 4, 4, {}), patches)


def test_resampler_looks_at_every_patch():
    projector = build_projector("resampler", 6, 8, {"num_queries": 2, "depth": 1, "num_heads": 2})
    features = torch.randn(1, 5, 6, requires_grad=True)
    projector(features).square().sum().backward()
    assert (features.grad.abs().sum(-1) > 0).all()


def test_resampler_refuses_heads_that_do_not_divide():
    with pytest.raises(ModelError, match="num_heads=3 must divide the language model's width 8"):
        build_projector("resampler", 6, 8, {"num_heads": 3})


def test_unknown_activation():
    with pytest.raises(ModelError, match="hidden_act 'gelo'"):
        build_projector("mlp", 6, 8, {"hidden_act": "gelo"})


def test_unregistered_kind_says_what_to_import():
    with pytest.raises(ModelError, match=r"projector 'mine' is not registered .*import the module"):
        build_projector("mine", 6, 8, {})


class Pooled(nn.Module):
    num_tokens = 1

    def __init__(self, vision_width, text_width, power=1):
        super().__init__()
        self.power = power
        self.linear = nn.Linear(vision_width, text_width)

    def forward(self, features):
        return self.linear(features.mean(1, keepdim=True) ** self.power)


def test_a_users_own_projector(tmp_path):
    register_projector("pooled")(Pooled)
    model, processor = compose({"kind": "pooled", "power": 2})
    assert processor.tokens_per_image == 1
    assert model.multi_modal_projector.power == 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again.multi_modal_projector) is Pooled
    assert again.multi_modal_projector.power == 2


def test_registering_again_is_harmless_but_a_taken_name_is_refused():
    register_projector("pooled")(Pooled)
    register_projector("pooled")(Pooled)
    with pytest.raises(ModelError, match="projector 'mlp' is MlpProjector already"):
        register_projector("mlp")(Pooled)


def test_a_projector_that_does_not_tell_its_tokens():
    with pytest.raises(ModelError, match="Silent does not tell how many tokens"):

        @register_projector("silent")
        class Silent(nn.Module):
            pass


def test_a_projector_that_tells_wrong_tokens():
    class Liar(Pooled):
        num_tokens = 2

    register_projector("liar")(Liar)
    with pytest.raises(ModelError, match="projector 'liar' tells 2 tokens for 4 patches, but gives 1"):
        compose("liar")
