"""A whole Qwen2.5-Omni: its thinker is trained, its talker is left alone and goes on speaking."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from mmpeft.families.registry import family_of, trained_model
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.plan import describe_training
from mmpeft.models.checkpoints import load_weights
from tests.families.qwen import CODES, tiny_whole_omni
from tests.families.test_qwen_adapters import LORA, PROJECTOR, batch_of

TRAIN = {**PROJECTOR, **LORA}


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_whole_omni(tmp_path / "omni")


@pytest.fixture
def batch(checkpoint):
    return batch_of(AutoProcessor.from_pretrained(checkpoint), ("image", "audio"))


def whole(checkpoint):
    return AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def train(peft_model, batch, *, steps=8):
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = peft_model(**batch).loss
        loss.backward()
        optimizer.step()
    return loss.item()


def speak(omni, batch):
    """The answer's tokens and its waveform."""
    prompt = {name: tensor for name, tensor in batch.items() if name not in ("labels", "pixel_values")}
    torch.manual_seed(0)
    return omni.generate(
        **prompt,
        # By this name, for transformers 5.24 hands plain `pixel_values` to the talker too, which refuses them.
        thinker_pixel_values=batch["pixel_values"],
        thinker_max_new_tokens=5,
        thinker_min_new_tokens=5,
        thinker_do_sample=False,
        thinker_suppress_tokens=list(range(256, omni.thinker.get_input_embeddings().num_embeddings)),
        talker_max_new_tokens=8,
        talker_min_new_tokens=8,
        talker_eos_token_id=[CODES - 3],
        token2wav_num_steps=3,
    )


def test_training_the_whole_touches_the_thinker_only_and_lowers_its_loss(checkpoint, batch):
    omni = whole(checkpoint)
    before = {name: p.clone() for name, p in omni.named_parameters()}
    peft_model = get_peft_model(omni, TRAIN)
    assert isinstance(peft_model, PeftModel)
    assert peft_model.get_base_model() is omni.thinker is trained_model(omni)
    assert {row.part for row in describe_training(peft_model, TRAIN).parts} == {
        "vision",
        "audio",
        "projector",
        "language",
    }
    with torch.no_grad():
        first = peft_model(**batch).loss.item()
    assert train(peft_model, batch) < first - 0.01
    for name, parameter in omni.named_parameters():
        if name.startswith(("talker.", "token2wav.")):
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
            assert parameter.grad is None, name
    assert {name.split(".")[0] for name, p in omni.named_parameters() if p.grad is not None} == {"thinker"}


def test_the_talker_speaks_what_the_trained_thinker_writes(checkpoint, batch):
    omni = whole(checkpoint)
    untrained, first_wave = speak(omni, batch)
    train(get_peft_model(omni, TRAIN), batch)
    tokens, wave = speak(omni.eval(), batch)
    assert tokens.tolist() != untrained.tolist()
    assert wave.shape == first_wave.shape
    assert wave.isfinite().all()
    assert wave.abs().max() > 0


def test_the_adapter_loads_on_the_thinker_alone_and_inside_the_whole_by_plain_peft(checkpoint, batch, tmp_path):
    omni = whole(checkpoint)
    peft_model = get_peft_model(omni, TRAIN)
    train(peft_model, batch)
    with torch.no_grad():
        expected = peft_model.eval()(**batch).logits
    tokens, wave = speak(omni.eval(), batch)
    adapter = save_adapter(peft_model, tmp_path / "adapter")
    assert peft_model.peft_config["default"].base_model_name_or_path == str(checkpoint)

    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    alone = PeftModel.from_pretrained(thinker, adapter).eval()
    fresh = whole(checkpoint)
    inside = PeftModel.from_pretrained(fresh.thinker, adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(**batch).logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(inside(**batch).logits, expected, rtol=0, atol=0)
    again, wave_again = speak(fresh, batch)
    assert again.tolist() == tokens.tolist()
    torch.testing.assert_close(wave_again, wave, rtol=0, atol=0)


def test_merging_leaves_a_whole_model_that_needs_no_adapter(checkpoint, batch, tmp_path):
    omni = whole(checkpoint)
    peft_model = get_peft_model(omni, TRAIN)
    train(peft_model, batch)
    with torch.no_grad():
        expected = peft_model.eval()(**batch).logits
    omni.thinker = peft_model.merge_and_unload()
    omni.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged" / "spk_dict.pt").write_bytes((checkpoint / "spk_dict.pt").read_bytes())
    with torch.no_grad():
        torch.testing.assert_close(whole(tmp_path / "merged").thinker(**batch).logits, expected, rtol=0, atol=1e-5)


def test_the_whole_loads_with_a_report_of_what_is_missing_and_with_its_voices(checkpoint, batch):
    config = AutoConfig.from_pretrained(checkpoint)
    loader = family_of(whole(checkpoint)).loaders[config.model_type]
    omni, missing = load_weights(
        loader, str(checkpoint), kind="model", dtype=torch.float32, trust_remote_code=False, config=config
    )
    assert missing == []
    assert list(omni.speaker_map) == ["Chelsie"]
    _, wave = speak(omni, batch)
    assert wave.isfinite().all()
    (checkpoint / "spk_dict.pt").unlink()
    silent, _ = load_weights(
        loader, str(checkpoint), kind="model", dtype=torch.float32, trust_remote_code=False, config=config
    )
    assert silent.speaker_map == {}


def test_transformers_still_cannot_report_on_a_whole_omni_itself(checkpoint):
    with pytest.raises(AttributeError, match="load_speakers"):
        AutoModelForMultimodalLM.from_pretrained(checkpoint, output_loading_info=True)


def test_the_whole_and_the_thinker_are_one_family(checkpoint):
    omni = whole(checkpoint)
    assert family_of(omni) is family_of(omni.thinker)
    assert trained_model(omni.thinker) is omni.thinker
