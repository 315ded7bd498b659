"""Qwen2-Audio (`Qwen2AudioForConditionalGeneration`): recordings and text, no pictures.

`input_features` are a row a recording, padded to the feature extractor's chunk (30 s); `feature_attention_mask` says
how much of it counts. `AutoModelForMultimodalLM` loads it; `AutoModelForImageTextToText` does not know it.
Its forward computes the loss itself: it takes neither `logits_to_keep` nor `shift_labels` nor `num_items_in_batch`.
"""

from mmpeft.families.spec import FamilySpec

SPEC = FamilySpec(
    name="qwen2_audio",
    model_types=("qwen2_audio",),
    processors=("Qwen2AudioProcessor",),
    supervised_logits=False,
    parts={
        "audio": ("model.audio_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    },
    modalities=("audio",),
    cacheable=("audio",),
    note="A recording is cut at the feature extractor's chunk, 30 seconds.",
)
