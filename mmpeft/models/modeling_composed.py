"""A vision-language model of any encoders, projector and causal language model, where the LLaVA class does not fit.

This file is saved beside a model's weights and must run without mmpeft: relative imports, torch and transformers only.
Written against transformers 5.24, whose forward argument for a cache is `cache`.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import torch_compilable_check

from .configuration_composed import ComposedConfig
from .processing_composed import ComposedProcessor
from .projectors import build_projector, count_tokens


class ComposedForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Pictures and text in, text out.

        pixel_values [images, 3, height, width]
          |-> vision_towers[0] -> hidden_states[layer] without prefix tokens [images, patches, width 0] -.
          '-> re-normalised -> vision_towers[1] -> ...                       [images, patches, width 1] -+-> joined
                                                                                                          |
        input_ids [rows, length] -> embeddings, picture tokens replaced by   multi_modal_projector <------'
                                    the projector's output                   [images, tokens, text width]
          '-> language_model (the whole causal language model, its head included) -> logits, loss

    So whatever the language model does to its logits (a bias, a cap, a scale) and its loss is kept.
    """

    config: ComposedConfig
    config_class = ComposedConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__(config)
        self.vision_towers = nn.ModuleList(AutoModel.from_config(vision) for vision in config.vision_configs)
        self.multi_modal_projector = build_projector(
            config.projector_kind,
            sum(vision.hidden_size for vision in config.vision_configs),
            config.text_config.hidden_size,
            config.projector_options,
        )
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The vision tower for "image" (all of them where there are two); the model itself otherwise."""
        if modality != "image":
            return super().get_encoder(modality=modality)
        return self.vision_towers[0] if len(self.vision_towers) == 1 else self.vision_towers

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.language_model.get_decoder()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """The encoders' joined patch features and what the projector makes of them.

        Args:
            pixel_values: [images, 3, height, width], normalised for the first encoder.

        Returns:
            `last_hidden_state` [images, patches, sum of widths]; `pooler_output`, a list with one tensor
            [tokens, text width] a picture.
        """
        joined, projected = self.project_images(pixel_values)
        pooled: Any = list(projected)
        return BaseModelOutputWithPooling(last_hidden_state=joined, pooler_output=pooled)

    def project_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`get_image_features` in two tensors: [images, patches, sum of widths] and [images, tokens, text width]."""
        layer = self.config.vision_feature_layer
        features = []
        for index, tower in enumerate(self.vision_towers):
            pixels = self._normalised_for(index, pixel_values).to(next(tower.parameters()).dtype)
            # `or True`: layer 0 counts as "no hidden states"; another number keeps that one layer only.
            hidden = tower(pixels, output_hidden_states=layer or True, return_dict=True).hidden_states[layer]
            features.append(hidden[:, self.config.prefix_tokens[index] :])
        joined = features[0] if len(features) == 1 else torch.cat(features, dim=-1)
        return joined, self.multi_modal_projector(joined)

    def _normalised_for(self, index: int, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels as encoder `index` expects them: exact, since both normalisations are affine."""
        mean, std = self.config.image_mean, self.config.image_std
        if mean[index] == mean[0] and std[index] == std[0]:
            return pixel_values
        scale = [first / own for first, own in zip(std[0], std[index], strict=True)]
        shift = [(first - own) / wide for first, own, wide in zip(mean[0], mean[index], std[index], strict=True)]
        return pixel_values * _per_channel(scale, pixel_values) + _per_channel(shift, pixel_values)

    def _picture_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[rows, length], true where a picture's feature belongs."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _with_pictures(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, features: list[torch.Tensor]
    ) -> torch.Tensor:
        """`inputs_embeds` with the pictures' features in the places of their tokens, in order."""
        mask = self._picture_mask(input_ids, inputs_embeds)
        joined = torch.cat(features, dim=0).to(inputs_embeds)
        found = mask.sum()
        torch_compilable_check(
            found == joined.shape[0],
            f"the text holds {found} picture tokens (id {self.config.image_token_id}), but {len(features)} pictures "
            f"give {joined.shape[0]} features; write one picture token a picture and let the processor expand it, "
            "and do not cut the text inside a picture",
        )
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), joined)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output over text and pictures.

        Args:
            input_ids: [rows, length]; each picture stands as `tokens_per_image` picture tokens.
            pixel_values: [images, 3, height, width], in the order of the pictures in the text.
            attention_mask: [rows, length], 1 for text and pictures, 0 for padding.
            position_ids: [rows, length].
            cache: keys and values of earlier tokens.
            inputs_embeds: [rows, length, text width], in place of `input_ids`.
            labels: [rows, length], -100 where there is no loss.
            logits_to_keep: the last so many positions (0: all), or their indices as a 1-D tensor.
            mm_encoder_outputs: {"image": what `get_image_features` gave}, in place of `pixel_values`.
            **kwargs: go to the language model and its loss (`num_items_in_batch`, `shift_labels`, `use_cache`).

        Returns:
            What the language model returns: `loss`, `logits` [rows, kept, vocabulary], `cache`, ...

        Raises:
            ValueError: picture tokens and features differ in number, or two inputs exclude each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        images = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if images is not None:
                raise ValueError("give pixel_values or mm_encoder_outputs, not both")
            images = self.get_image_features(pixel_values)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if images is not None:
            inputs_embeds = self._with_pictures(input_ids, inputs_embeds, images.pooler_output)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )


def _per_channel(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """[channels, 1, 1], in the precision and on the device of `like`."""
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]


ComposedForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

# Beside a model's weights this file is a module of transformers' own making, and must not take the place of a class
# that an installed mmpeft has registered.
if not __name__.startswith("transformers_modules"):
    AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
    AutoModelForImageTextToText.register(ComposedConfig, ComposedForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(ComposedConfig, ComposedProcessor, exist_ok=True)

__all__ = ["ComposedConfig", "ComposedForConditionalGeneration", "ComposedProcessor", "count_tokens"]
