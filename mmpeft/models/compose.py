"""A vision-language model out of a vision encoder (or two), a new projector and a causal language model."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import ModelError
from mmpeft.models.chat import ensure_image_token, ensure_pad_token, grow_embeddings, multimodal_chat_template
from mmpeft.models.checkpoints import check_complete, load_weights, reading
from mmpeft.models.configuration_composed import ComposedConfig
from mmpeft.models.devices import pick_device, pick_dtype
from mmpeft.models.gguf import load_gguf
from mmpeft.models.modeling_composed import ComposedForConditionalGeneration
from mmpeft.models.native import express_as_llava, llava_processor
from mmpeft.models.processing_composed import ComposedProcessor
from mmpeft.models.projectors import PROJECTORS, build_projector, count_tokens
from mmpeft.models.towers import Tower, load_encoder, load_image_processor, measure_tower, pixels_of

logger = logging.getLogger(__name__)


def compose_model(
    *,
    vision: str | PreTrainedModel | Sequence[str | PreTrainedModel],
    language: str | PreTrainedModel,
    projector: str | Mapping[str, Any] = "mlp",
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    image_processor: Any = None,
    chat_template: str | None = None,
    image_token: str = "<image>",
    vision_feature_layer: int = -2,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Join a vision encoder and a language model by a new, untrained projector.

        pictures -> vision encoder -> [patches, vision width] -> projector -> [tokens, text width]
                                                                                     |
        text -> tokenizer -> embeddings, with a picture's tokens in its place  <-----'  -> language model -> text

    The result is a native `LlavaForConditionalGeneration` with a `LlavaProcessor` where that class computes the
    same as the parts (one encoder with at most one leading token, projector `mlp` or `linear`, a plain head), which
    is checked by running both; else a `ComposedForConditionalGeneration`. The log says which and why.

    Args:
        vision: hub id, directory or model of a vision encoder that gives a feature a patch (CLIP, SigLIP, ViT, DINOv2,
            with registers or without; of CLIP and SigLIP the vision half is taken). Two of them are fused: their
            features are joined by patch, so both must give the same grid.
        language: hub id, directory, `.gguf` file (its tokenizer is used too) or model of a causal language model.
        projector: a registered kind, or {"kind": ..., **options}.
        tokenizer: in place of the one beside `language`; needed where that is a model in memory.
        image_processor: in place of the one beside `vision`; needed where that is a model in memory. For two
            encoders a list of two; the pictures are resized by the first.
        chat_template: Jinja, in place of the language model's own.
        image_token: the token that marks a picture; added to a tokenizer that lacks it.
        vision_feature_layer: which of the encoder's hidden states to take; -2, as in LLaVA, is the output of the layer
            before the last. For an encoder trained from scratch in a few layers, -1 may serve better.
        dtype: of all weights; None takes float32 on a CPU and the checkpoints' own on an accelerator.
        device: where the model is put; None leaves it on the CPU.
        seed: of the projector's initial weights.
        trust_remote_code: whether code that comes with a checkpoint may run.

    Returns:
        The model, in eval mode, and its processor. Models given in memory become part of it; tokenizers are copied.

    Raises:
        ModelError: a part cannot be read, or the parts do not fit; the message has the numbers.
    """
    target = pick_device(device if device is not None else "cpu")
    precision = pick_dtype(dtype, target)
    kind, options = _projector_choice(projector)
    text, words = _load_language(language, tokenizer, dtype=precision, trust_remote_code=trust_remote_code)
    ensure_pad_token(words)
    image_token_id = ensure_image_token(words, image_token)
    template = multimodal_chat_template(words, chat_template, image_token=image_token)
    grow_embeddings(text, words)
    words.chat_template = template
    precision = text.dtype if isinstance(precision, str) else precision
    towers, pictures = _load_towers(
        vision, image_processor, layer=vision_feature_layer, dtype=precision, trust_remote_code=trust_remote_code
    )
    _unify([text, *(tower.model for tower in towers)], precision)
    parts = _Parts(
        language=text,
        towers=towers,
        projector=_new_projector(kind, options, towers, text, seed),
        kind=kind,
        options=options,
        layer=vision_feature_layer,
        image_token_id=image_token_id,
    )
    model, native = _build(parts)
    processor: Any = (
        llava_processor(towers[0], pictures, words, image_token=image_token, chat_template=template)
        if native
        else ComposedProcessor(
            image_processor=pictures,
            tokenizer=words,
            tokens_per_image=parts.tokens,
            image_token=image_token,
            chat_template=template,
        )
    )
    _set_generation(model, text, words)
    cast(nn.Module, model).to(target)
    _check_whole(model, processor, parts)
    return model, processor


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What a composed model is made of."""

    language: PreTrainedModel
    towers: list[Tower]
    projector: nn.Module
    kind: str
    options: dict[str, Any]
    layer: int
    image_token_id: int

    @property
    def tokens(self) -> int:
        """Tokens of one picture."""
        return count_tokens(self.projector, self.towers[0].patches)


def _projector_choice(projector: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = {"kind": projector} if isinstance(projector, str) else dict(projector)
    if "kind" not in options:
        raise ModelError(f"projector {options!r} names no kind; expected a name or {{'kind': name, **options}}")
    kind = options.pop("kind")
    if kind not in PROJECTORS:
        raise ModelError(f"projector {kind!r} is not registered{did_you_mean(str(kind), sorted(PROJECTORS))}")
    return kind, options


def _load_language(
    language: str | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None,
    *,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(tokenizer, str):
        with reading(tokenizer, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
    elif tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
    if isinstance(language, PreTrainedModel):
        if tokenizer is None:
            raise ModelError("the language model is a model in memory: give its tokenizer= too")
        model = language.eval()
    elif Path(language).suffix == ".gguf":
        model, own = load_gguf(language, dtype=torch.float32 if isinstance(dtype, str) else dtype)
        tokenizer = tokenizer or own
    else:
        model, missing = load_weights(
            AutoModelForCausalLM,
            language,
            kind="causal language model",
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        check_complete(language, missing)
        if tokenizer is None:
            with reading(language, "tokenizer"):
                tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=trust_remote_code)
    if model.get_output_embeddings() is None:
        raise ModelError(f"{type(model).__name__} has no language-model head; expected a causal language model")
    return model, tokenizer


def _load_towers(
    vision: str | PreTrainedModel | Sequence[str | PreTrainedModel],
    image_processor: Any,
    *,
    layer: int,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> tuple[list[Tower], Any]:
    """The measured encoders, and the image processor of the first, which makes the pixels for all."""
    sources = [vision] if isinstance(vision, str | PreTrainedModel) else list(vision)
    if not 1 <= len(sources) <= 2:
        raise ModelError(f"vision= names {len(sources)} encoders; one or two can be composed")
    given = list(image_processor) if isinstance(image_processor, list | tuple) else [image_processor]
    given += [None] * (len(sources) - len(given))
    processors = [
        processor or load_image_processor(source, trust_remote_code=trust_remote_code)
        for source, processor in zip(sources, given, strict=True)
    ]
    pixels = pixels_of(processors[0])
    towers = []
    for source, processor in zip(sources, processors, strict=True):
        model, missing = load_encoder(source, dtype=dtype, trust_remote_code=trust_remote_code)
        name = source if isinstance(source, str) else type(model).__name__
        towers.append(measure_tower(model, processor, pixels, name=name, layer=layer, missing=missing))
    if len({tower.grid for tower in towers}) > 1:
        grids = ", ".join(
            f"{tower.name} gives {tower.grid[0]} x {tower.grid[1]} patches of {tower.patch} pixels" for tower in towers
        )
        raise ModelError(
            f"at {pixels.shape[2]} x {pixels.shape[3]} pixels {grids}; features are joined patch by patch, so the "
            "grids must be equal: choose encoders of one patch size"
        )
    return towers, processors[0]


def _unify(models: list[PreTrainedModel], dtype: torch.dtype) -> None:
    """Weights to one precision; buffers (rotary frequencies) keep theirs, as `from_pretrained` does.

    A configuration that names a directory of this machine forgets it: it would be published with the model.
    """
    for model in models:
        if model.config.name_or_path and Path(model.config.name_or_path).is_dir():
            model.config.name_or_path = ""
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype


def _new_projector(
    kind: str, options: dict[str, Any], towers: list[Tower], language: PreTrainedModel, seed: int
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector(
            kind, sum(tower.width for tower in towers), language.config.hidden_size, dict(options)
        )
    return projector.to(device=language.device, dtype=language.dtype).eval()


def _build(parts: _Parts) -> tuple[PreTrainedModel, bool]:
    """The model, and whether it is a native LLaVA."""
    native, reason = express_as_llava(
        parts.language,
        parts.towers,
        parts.projector,
        kind=parts.kind,
        options=parts.options,
        layer=parts.layer,
        image_token_id=parts.image_token_id,
    )
    if native is not None:
        logger.info("composed a native LlavaForConditionalGeneration: its text-only logits equal the language model's")
        return native, True
    logger.info("composed a ComposedForConditionalGeneration, not a native LLaVA: %s", reason)
    return _own_class(parts), False


def _own_class(parts: _Parts) -> ComposedForConditionalGeneration:
    visions = [copy.deepcopy(tower.model.config) for tower in parts.towers]
    config = ComposedConfig(
        vision_config=visions[0],
        second_vision_config=visions[1] if len(visions) > 1 else None,
        text_config=copy.deepcopy(parts.language.config),
        projector_kind=parts.kind,
        projector_options=dict(parts.options),
        vision_feature_layer=parts.layer,
        prefix_tokens=[tower.prefix for tower in parts.towers],
        image_mean=[tower.mean for tower in parts.towers],
        image_std=[tower.std for tower in parts.towers],
        image_token_id=parts.image_token_id,
        tokens_per_image=parts.tokens,
    )
    config.dtype = parts.language.dtype
    with torch.device("meta"):
        model = ComposedForConditionalGeneration(config)
    model.vision_towers = nn.ModuleList(tower.model for tower in parts.towers)
    model.multi_modal_projector = parts.projector
    model.language_model = parts.language
    model.config.vision_config = parts.towers[0].model.config
    model.config.second_vision_config = parts.towers[1].model.config if len(parts.towers) > 1 else None
    model.config.text_config = parts.language.config
    return model.eval()


def _set_generation(model: PreTrainedModel, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The language model's own generation settings, with an end and a padding token where it has none."""
    generation = copy.deepcopy(language.generation_config)
    if generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id
    model.generation_config = generation


def _check_whole(model: PreTrainedModel, processor: Any, parts: _Parts) -> None:
    """One picture goes through, and `logits_to_keep` is honoured.

    Raises:
        ModelError: the projector gives another number of tokens than it tells, or the language model does not take
            embeddings or `logits_to_keep` in the usual form.
    """
    picture = Image.new("RGB", (80, 60), (30, 160, 90))
    inputs = processor(images=picture, text=f"{processor.image_token} a", return_tensors="pt").to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        given = cast(Any, model).get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
        if given.shape[0] != parts.tokens:
            raise ModelError(
                f"projector {parts.kind!r} tells {parts.tokens} tokens for {parts.towers[0].patches} patches, but "
                f"gives {given.shape[0]}; mend its num_tokens"
            )
        kept = torch.tensor([0, 1], device=model.device)
        try:
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"],
                logits_to_keep=kept,
            ).logits
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{type(parts.language).__name__} does not take pictures as embeddings: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
    if logits.shape[1] != len(kept) or not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"{type(parts.language).__name__} gives logits {tuple(logits.shape)} for {len(kept)} kept positions, or "
            "not finite ones; it cannot be composed"
        )
