"""Configuration of a composed model that the LLaVA class cannot express.

This file is saved beside a model's weights and must run without mmpeft: relative imports, torch and transformers only.
"""

from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


class ComposedConfig(PreTrainedConfig):
    """One or two vision encoders, a projector, and a whole causal language model.

    Attributes:
        vision_config: the (first) encoder's configuration.
        second_vision_config: the second encoder's, for a fusion; None for one encoder.
        text_config: the language model's configuration.
        projector_kind: a name in `projectors.PROJECTORS`.
        projector_options: keyword arguments of the projector's class.
        vision_feature_layer: index into an encoder's `hidden_states`; -2 is the output of the layer before the last.
        prefix_tokens: per encoder, how many leading tokens (CLS, registers) are no patches and are dropped.
        image_mean, image_std: per encoder, the normalisation of its pixels. `pixel_values` come in the first's;
            the second gets them as (pixels * std[0] + mean[0] - mean[1]) / std[1].
        image_token_id: id of the token that marks a picture's features in `input_ids`.
        tokens_per_image: how many of them one picture takes.
    """

    model_type = "mmpeft_composed"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "second_vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model", optional=True),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    second_vision_config: Any = None
    text_config: Any = None
    projector_kind: str = "mlp"
    projector_options: dict[str, Any] = field(default_factory=dict)
    vision_feature_layer: int = -2
    prefix_tokens: list[int] = field(default_factory=list)
    image_mean: list[list[float]] = field(default_factory=list)
    image_std: list[list[float]] = field(default_factory=list)
    image_token_id: int = 0
    tokens_per_image: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        encoders = len(self.vision_configs)
        self.prefix_tokens = self.prefix_tokens or [0] * encoders
        self.image_mean = self.image_mean or [[0.0] * 3] * encoders
        self.image_std = self.image_std or [[1.0] * 3] * encoders
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

    @property
    def vision_configs(self) -> list[Any]:
        """The encoders' configurations, in the order of the model's `vision_towers`."""
        return [config for config in (self.vision_config, self.second_vision_config) if config is not None]


ComposedConfig.register_for_auto_class()
