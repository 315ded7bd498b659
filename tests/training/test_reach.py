"""Forwards that use nothing that trains: loss and gradients with the touch are those without it, to the bit."""

import pytest
import torch

from mmpeft import MultimodalCollator, get_peft_model
from mmpeft.data.encode import encode_sample
from mmpeft.data.types import Media
from mmpeft.training.reach import reach_what_trains
from tests.families.qwen import tiny_qwen2_5_omni
from tests.families.samples import film, picture, sample_of, sound

MEDIA = {
    "text": ((), Media()),
    "picture": (("<image>",), Media(images=(picture((56, 56)),))),
    "film": (("<video>",), Media(videos=(film(),))),
    "recording": (("<audio>",), Media(audios=(sound(),))),
}
TRAINED = {
    "projector": {"projector": "full"},
    "towers": {"vision": {"r": 2}, "audio": {"r": 2}, "projector": "full"},
    "language": {"projector": "full", "language": {"r": 2}},
}


@pytest.fixture(scope="module")
def omni():
    return tiny_qwen2_5_omni()


def batch_of(processor, kind):
    marks, media = MEDIA[kind]
    sample = sample_of(" ".join((*marks, "what is it?")), "a thing")
    return MultimodalCollator(processor)([encode_sample(processor, sample, media)])


def gradients(model, batches, *, touched):
    """Losses of some batches, and what their backward passes leave in sum."""
    model.zero_grad()
    hook = model.register_forward_hook(reach_what_trains) if touched else None
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.item())
    if hook is not None:
        hook.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses, found


def same(one, two):
    return all(
        (one[name] is None and two[name] is None) or (one[name] is not None and torch.equal(one[name], two[name]))
        for name in one
    )


@pytest.fixture(params=TRAINED)
def model(request, omni):
    torch.manual_seed(0)
    model = get_peft_model(tiny_qwen2_5_omni()[0], TRAINED[request.param])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.train()


@pytest.mark.parametrize("kind", list(MEDIA)[1:])
def test_a_batch_that_uses_what_trains_is_left_alone(model, omni, kind):
    batch = batch_of(omni[1], kind)
    want, got = (gradients(model, [batch], touched=touched) for touched in (False, True))
    assert got[0] == want[0]
    assert same(got[1], want[1])
    moved = [name for name, gradient in got[1].items() if gradient is not None and gradient.abs().max() > 0]
    assert moved


@pytest.mark.parametrize("kind", list(MEDIA)[1:])
def test_text_beside_media_adds_exactly_nothing(model, omni, kind):
    text, other = batch_of(omni[1], "text"), batch_of(omni[1], kind)
    for batches in ([other, text], [text, other]):
        want, got = (gradients(model, batches, touched=touched) for touched in (False, True))
        assert got[0] == want[0]
        for name, gradient in got[1].items():
            if want[1][name] is not None:
                assert torch.equal(gradient, want[1][name])
            else:  # What the touch alone has reached.
                assert gradient is None or not gradient.any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_text_alone_has_a_backward_pass_with_gradients_of_zero(omni, checkpointing):
    model = get_peft_model(tiny_qwen2_5_omni()[0], TRAINED["towers"]).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.base_model.model.activation_checkpointing_enable()
    losses, found = gradients(model, [batch_of(omni[1], "text")], touched=True)
    assert all(gradient is not None and not gradient.any() for gradient in found.values())
    assert losses == gradients(model, [batch_of(omni[1], "text")], touched=False)[0]
