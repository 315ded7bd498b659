"""The transformers model that a training or an evaluation is about, with an adapter around it or without."""

from typing import Any

from peft import PeftModel


def base_of(model: Any) -> Any:
    """The transformers model in a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
