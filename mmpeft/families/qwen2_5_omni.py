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
The processor resizes videos by a size of its own (`videos_kwargs`), not by its video processor's.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils import cached_file

from mmpeft.families.projecting import qwen_merger
from mmpeft.families.spec import FamilySpec

SPEAKERS = "spk_dict.pt"
"""The voices, beside the weights; transformers reads them with `weights_only=True`, so they can run no code."""


class WholeOmni:
    """Loads the whole model as `AutoModelForMultimodalLM` does, but can also say which weights are missing.

    Works around transformers 5.24, where `Qwen2_5OmniForConditionalGeneration.from_pretrained` with
    `output_loading_info=True` ends in `'tuple' object has no attribute 'load_speakers'`; once
    tests/families/test_qwen_omni.py says that it does not, this class can go.
    """

    @classmethod
    def from_pretrained(
        cls, name: str, *, config: transformers.PreTrainedConfig, **options: Any
    ) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
        """The model with its voices, and transformers' report on the loading."""
        model_class: Any = transformers.MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]
        options.pop("trust_remote_code", None)
        parent: Any = super(model_class, model_class)
        model, report = parent.from_pretrained(name, config=config, **{**options, "output_loading_info": True})
        speakers = cached_file(name, SPEAKERS, _raise_exceptions_for_missing_entries=False)
        if speakers is not None:
            model.load_speakers(speakers)
        return model, report


SPEC = FamilySpec(
    name="qwen2_5_omni",
    model_types=("qwen2_5_omni_thinker", "qwen2_5_omni"),
    processors=("Qwen2_5OmniProcessor",),
    supervised_logits=False,
    packable=True,
    project=qwen_merger,
    parts={
        "vision": ("model.visual",),
        "audio": ("model.audio_tower",),
        "projector": ("model.visual.merger", "model.audio_tower.proj"),
        "language": ("model.language_model", "lm_head"),
    },
    positions="media",
    modalities=("image", "video", "audio"),
    trained_submodule={"qwen2_5_omni": "thinker"},
    loaders={"qwen2_5_omni": WholeOmni},
    boxes="resized_pixels",
    cacheable=("vision", "audio"),
    note="Only the thinker is trained; the talker is left as it is and speaks what the trained thinker writes.",
)
