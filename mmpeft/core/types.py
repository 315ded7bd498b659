"""Names that several floors share."""

from typing import Literal, get_args

Part = Literal["vision", "audio", "projector", "language"]
"""A part of a multimodal model that is trained or frozen as a whole."""

PARTS: tuple[Part, ...] = get_args(Part)

IGNORE_INDEX = -100
"""Label of a position that carries no loss (torch.nn.CrossEntropyLoss's default `ignore_index`)."""

Modality = Literal["image", "video", "audio"]
"""A kind of media that stands in a conversation beside its text."""

MODALITIES: tuple[Modality, ...] = get_args(Modality)
