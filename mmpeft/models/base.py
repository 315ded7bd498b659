"""The transformers model that a training or an evaluation is about, with an adapter around it or without."""

from typing import Any

from peft import PeftModel


def base_of(model: Any) -> Any:
    """The transformers model in a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def quantized_as(config: Any) -> str | None:
    """By which method the weights of a model with this configuration are quantized; None if they are not.

    Such as `compressed-tensors` or `bitsandbytes`.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))
