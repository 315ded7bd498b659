"""Processor of a composed model that the LLaVA class cannot express.

This file is saved beside a model's weights and must run without mmpeft: relative imports, torch and transformers only.
"""

from typing import Any

from transformers.processing_utils import MultiModalData, ProcessorMixin


class ComposedProcessor(ProcessorMixin):
    r"""An image processor and a tokenizer; a picture's token is written as often as the picture has features.

        text    "<image>\nWhat is it?"  ->  "<image><image><image><image>\nWhat is it?"    (tokens_per_image = 4)
        images  a picture                ->  pixel_values [1, 3, height, width]

    The image processor gives every picture the same size, so `tokens_per_image` is a constant of the model.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        tokens_per_image: int = 1,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokens_per_image = tokens_per_image
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that takes the place of one picture's token."""
        return self.image_token * self.tokens_per_image

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.tokens_per_image] * count, num_image_patches=[1] * count)


ComposedProcessor.register_for_auto_class()
