"""A composed model as a native `LlavaForConditionalGeneration`, where that class computes the same."""

import copy
import logging
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from mmpeft.models.towers import Tower

logger = logging.getLogger(__name__)

NATIVE_KINDS = ("mlp", "linear")
"""Projector kinds that LLaVA's own projector can hold: its two layers, or one and a fixed identity."""


_PROBE_LENGTH = 12
"""Tokens of the text on which LLaVA and the language model are compared, spread over the vocabulary."""


def express_as_llava(
    language: PreTrainedModel,
    towers: list[Tower],
    projector: nn.Module,
    *,
    kind: str,
    options: Mapping[str, Any],
    layer: int,
    image_token_id: int,
) -> tuple[LlavaForConditionalGeneration | None, str]:
    """The LLaVA model of these parts, which it shares, if it computes what they compute.

    LLaVA keeps the language model's body and gives it a plain linear head. Whether that is the same language model
    is seen by running both on a short text: logits and loss have to be equal.

    Returns:
        The model and "", or None and the reason why LLaVA cannot express it.
    """
    if len(towers) > 1:
        return None, "LLaVA has one vision encoder"
    tower = towers[0]
    if kind not in NATIVE_KINDS:
        return None, f"LLaVA has no {kind!r} projector"
    if tower.prefix > 1:
        return None, f"LLaVA drops at most one leading token, and {tower.name} has {tower.prefix}"
    try:
        model = _assemble(language, tower, projector, kind, options, layer, image_token_id)
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        return None, f"LLaVA does not take {type(language).__name__}: {' '.join(str(error).split())[:200]}"
    reason = _difference(language, model, tower)
    return (None, reason) if reason else (model, "")


def llava_processor(
    tower: Tower, image_processor: Any, tokenizer: Any, *, image_token: str, chat_template: str
) -> LlavaProcessor:
    """The processor that goes with `express_as_llava`'s model."""
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy=_strategy(tower),
        num_additional_image_tokens=tower.prefix,
        image_token=image_token,
        chat_template=chat_template,
    )


def _strategy(tower: Tower) -> Literal["default", "full"]:
    """LLaVA's "default" drops one leading token (CLS), its "full" none."""
    return "default" if tower.prefix == 1 else "full"


def _assemble(
    language: PreTrainedModel,
    tower: Tower,
    projector: nn.Module,
    kind: str,
    options: Mapping[str, Any],
    layer: int,
    image_token_id: int,
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=copy.deepcopy(tower.model.config),
        text_config=copy.deepcopy(language.config),
        image_token_index=image_token_id,
        image_seq_length=tower.patches,
        projector_hidden_act="linear" if kind == "linear" else options.get("hidden_act", "gelu"),
        vision_feature_select_strategy=_strategy(tower),
        vision_feature_layer=layer,
    )
    config.projector_kind = kind
    config.dtype = language.dtype
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    body, head = language.get_decoder(), language.get_output_embeddings()
    for built, given in ((model.model.vision_tower, tower.model), (model.model.language_model, body)):
        if type(built) is not type(given):
            raise TypeError(f"a saved model would be read as {type(built).__name__}, not {type(given).__name__}")
    if getattr(head, "bias", None) is not None:
        raise TypeError("its head has a bias")
    model.model.vision_tower = tower.model
    model.model.language_model = body
    model.lm_head = head
    _fill_projector(model.model.multi_modal_projector, projector, kind)
    model.config.vision_config, model.config.text_config = tower.model.config, language.config
    model.tie_weights()
    return model.eval()


def _fill_projector(native: Any, projector: Any, kind: str) -> None:
    if kind == "mlp":
        native.linear_1, native.linear_2 = projector.linear_1, projector.linear_2
        return
    native.linear_1 = projector.linear
    width = projector.linear.out_features
    native.linear_2 = nn.Linear(width, width).to(projector.linear.weight)
    with torch.no_grad():
        native.linear_2.weight.copy_(torch.eye(width))
        native.linear_2.bias.zero_()
    native.linear_2.requires_grad_(False)


def _difference(language: PreTrainedModel, model: LlavaForConditionalGeneration, tower: Tower) -> str:
    """Why the two are not the same model; "" if they are."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return "LLaVA has weights that the parts do not have"
    embeddings = cast(torch.Tensor, language.get_input_embeddings().weight)
    step = max(1, embeddings.shape[0] // _PROBE_LENGTH)
    ids = torch.arange(0, embeddings.shape[0], step, device=embeddings.device)[:_PROBE_LENGTH]
    ids = ids[ids != model.config.image_token_id][None]
    with torch.no_grad():
        own, native = language(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
    if own.logits.shape != native.logits.shape:
        return f"LLaVA gives logits {tuple(native.logits.shape)}, the language model {tuple(own.logits.shape)}"
    scale = max(1.0, float(own.logits.abs().max()))
    tolerance = scale * (1e-5 if own.logits.dtype in (torch.float32, torch.float64) else 1e-2)
    apart = float((own.logits - native.logits).abs().max())
    if not apart <= tolerance:
        return f"LLaVA's logits on text alone differ from the language model's by {apart:.2g}"
    if not abs(float(own.loss) - float(native.loss)) <= max(tolerance, 1e-5):
        return f"LLaVA's loss on text alone is {float(native.loss):.4g}, the language model's {float(own.loss):.4g}"
    return ""
