"""Qwen2.5-Omni: pictures, video and audio in; the thinker writes text, the talker says it.

    Qwen2_5OmniForConditionalGeneration                 model type qwen2_5_omni: no forward of its own
    |- thinker   Qwen2_5OmniThinkerForConditionalGeneration    qwen2_5_omni_thinker: what is trained
    |- talker    reads the thinker's hidden states
    '- token2wav

The paths below are the thinker's. An adapter trained on it is put on in place, so the full model around it answers
and speaks with it: `PeftModel.from_pretrained(omni.thinker, adapter)`, or on the thinker alone, which its class loads
out of the full checkpoint.

`input_features` are a row a recording, padded to the feature extractor's chunk; `feature_attention_mask` says how much
of it counts. The forward computes its own positions from the grids, the mask and `video_second_per_grid`.
"""

from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni_thinker", "qwen2_5_omni"),
    processors=("Qwen2_5OmniProcessor",),
    supervised_logits=False,
    parts={
        "vision": ("model.visual",),
        "audio": ("model.audio_tower",),
        "projector": ("model.visual.merger", "model.audio_tower.proj"),
        "language": ("model.language_model", "lm_head"),
    },
    modalities=("image", "video", "audio"),
    trained_submodule={"qwen2_5_omni": "thinker"},
    boxes="resized_pixels",
    cacheable=("vision", "audio"),
    note="Only the thinker is trained; the talker is left as it is and speaks what the trained thinker writes.",
)
