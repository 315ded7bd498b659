"""A whole Qwen2.5-Omni: its thinker is trained, its talker is left alone and goes on speaking."""

import dataclasses

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from mmpeft.core.errors import DataError
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.labels import conversation_of
from mmpeft.data.load_media import MediaLimits, load_media
from mmpeft.data.types import Media, Sample, Turn
from mmpeft.families.registry import family_of, trained_model
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.plan import describe_training
from mmpeft.models.checkpoints import load_weights
from tests.data.films import film as write_film
from tests.families.qwen import CODES, tiny_whole_omni
from tests.families.samples import film, picture, sample_of, sound
from tests.families.test_adapters import LORA, PROJECTOR

TRAIN = {**PROJECTOR, **LORA}


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_whole_omni(tmp_path / "omni")


@pytest.fixture
def batch(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint)
    sample = sample_of("<image>\n<audio>\nWhat is it?", "It is red.", images=1, audios=1)
    media = Media(images=[picture((29, 13))], audios=[sound(1)])
    return MultimodalCollator(processor, supervised_only=False)([encode_sample(processor, sample, media)])


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


@pytest.fixture
def parts(checkpoint):
    """The processor and the thinker of a whole checkpoint."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    return processor, whole(checkpoint).thinker


def test_a_film_with_its_sound_is_what_transformers_makes_of_it(parts):
    processor, thinker = parts
    sample = sample_of("<video>\nWhat is said?", "Hello.", videos=1)
    logits = []
    for track in (sound(1), sound(1, seed=5)):
        shown = dataclasses.replace(film(), audio=track)
        row = encode_sample(processor, sample, Media(videos=[shown]))
        batch = MultimodalCollator(processor, supervised_only=False)([row])
        assert batch["use_audio_in_video"] is True
        text = conversation_of(processor, sample.turns).text
        own = processor(
            text=[text],
            videos=[torch.from_numpy(shown.frames).permute(0, 3, 1, 2)],
            audio=[track.samples],
            videos_kwargs={"do_sample_frames": False, "fps": shown.fps / 12},
            load_audio_from_video=True,
            audio_from_video_indices=[0],
            return_tensors="pt",
        )
        with torch.no_grad():
            logits.append(thinker(**batch).logits)
            length = batch["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"], own["input_ids"][:, :length])
            expected = thinker(**own, use_audio_in_video=True).logits[:, :length]
        torch.testing.assert_close(logits[-1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_positions_follow_the_rate_at_which_a_film_is_shown(parts):
    processor, _ = parts
    sample = sample_of("<video>\nWhat?", "Hello.", videos=1)
    row = encode_sample(processor, sample, Media(videos=[film()]))  # every 12th frame of 24 a second, in pairs
    assert row["video_second_per_grid"].tolist() == [1.0]
    slow = dataclasses.replace(film(), fps=6.0)
    assert encode_sample(processor, sample, Media(videos=[slow]))["video_second_per_grid"].tolist() == [4.0]
    two = sample_of("<video><video>\nWhat?", "Hello.", videos=2)
    with pytest.raises(DataError, match="films of one frame rate in a sample"):
        encode_sample(processor, two, Media(videos=[film(), slow]))


def test_a_film_without_sound_is_silent_where_sound_is_asked_for(tmp_path):
    write_film(tmp_path / "a.mp4", frames=50, rate=25)
    sample = Sample(id="x", turns=(Turn(role="user", text="<video>?"),), videos=("a.mp4",), index=0, line=1)
    (silent,) = load_media(sample, root=tmp_path, limits=MediaLimits(use_audio_in_video=True)).videos
    assert silent.audio.samples.shape == (32_000,)
    assert not silent.audio.samples.any()
    (plain,) = load_media(sample, root=tmp_path, limits=MediaLimits()).videos
    assert plain.audio is None


def test_films_with_sound_and_without_do_not_share_a_batch(parts):
    processor, _ = parts
    sample = sample_of("<video>\nWhat?", "Hello.", videos=1)
    rows = [
        encode_sample(processor, sample, Media(videos=[dataclasses.replace(film(), audio=track)]))
        for track in (sound(1), None)
    ]
    with pytest.raises(DataError, match="films with sound and films without stand in one batch"):
        MultimodalCollator(processor)(rows)
