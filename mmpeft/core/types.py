"""Names that several floors share."""

from typing import Literal, get_args

Part = Literal["vision", "projector", "language"]
"""A part of a multimodal model that is trained or frozen as a whole."""

PARTS: tuple[Part, ...] = get_args(Part)

IGNORE_INDEX = -100
"""Label of a position that carries no loss (torch.nn.CrossEntropyLoss's default `ignore_index`)."""
