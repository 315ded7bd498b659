"""A vision tower and its projector as llama.cpp has them, in a file of their own (`mmproj`).

llama.cpp does not compute any tower: each kind of projector has a graph of its own (tools/mtmd/models), so what is
written is one of the shapes below, and what does not fit one of them is refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmpeft.core.errors import ModelError
from mmpeft.export.gguf_file import Piece, gguf_package

_QUICK_GELU, _GELU, _SILU = "quick_gelu", "gelu_pytorch_tanh", "silu"


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """A family of models as llama.cpp sees pictures.

    Attributes:
        tower, projector: where they are, as parameters are named.
        language: where the language model's body is.
        check: refuses what llama.cpp does not compute.
        keys: writes the keys that describe the tower.
        pieces: the file's tensors for one tensor of the tower or projector; none where it has no use of it.
        notes: how llama.cpp treats pictures otherwise than the processor.
        picture: how chat templates write a picture, of which llama.cpp writes all but its own mark by itself.
    """

    tower: str
    projector: str
    language: str
    check: Callable[[Any, str], None]
    keys: Callable[[Any, Any, Any], None]
    pieces: Callable[[Any, str, tuple[int, ...]], Iterator[Piece]]
    notes: Callable[[Any, Any], list[str]]
    picture: str = "{token}"

    def marked(self, prompt: str, token: str, mark: str) -> str:
        """A prompt with llama.cpp's mark in the place of each picture.

        Args:
            prompt: as a chat template writes it.
            token: that stands for a picture in it.
            mark: llama.cpp's.
        """
        return prompt.replace(self.picture.format(token=token), mark)


def vision_shape(config: Any, name: str) -> VisionShape:
    """How a model's tower and projector are written.

    Args:
        config: of the whole model.
        name: of the model, for messages.

    Raises:
        ModelError: mmpeft does not write it as GGUF, or llama.cpp would compute something else.
    """
    found = SHAPES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"{name}: a model of type {config.model_type} is not written as GGUF; these are: {', '.join(SHAPES)}"
        )
    found.check(config, name)
    return found


def _common_keys(writer: Any, config: Any, processor: Any, *, blocks: int, heads: int, eps: float) -> None:
    vision, pictures = config.vision_config, processor.image_processor
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(heads)
    writer.add_vision_attention_layernorm_eps(eps)
    normal = getattr(pictures, "do_normalize", True)
    writer.add_vision_image_mean(list(pictures.image_mean) if normal else [0.0] * 3)
    writer.add_vision_image_std(list(pictures.image_std) if normal else [1.0] * 3)


def _refuse(name: str, why: str) -> None:
    raise ModelError(f"{name}: {why}, which llama.cpp does not compute")


# LLaVA: CLIP or SigLIP, and two linear layers with GELU between them.

_TOWERS: Mapping[str, tuple[str, str, str]] = {
    "clip_vision_model": (_QUICK_GELU, "default", "CLIP"),
    "siglip_vision_model": (_GELU, "full", "SigLIP"),
}
"""By the type of the tower's configuration: its activation, how its features are chosen, and its name."""

_LLAVA_UNUSED = re.compile(r"(post_layernorm|head)\.")
"""Of towers: what comes behind the blocks, whose outputs LLaVA takes."""


def feature_blocks(config: Any) -> int:
    """How many blocks of the tower LLaVA's features go through."""
    layer, count = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return int(layer if layer >= 0 else count + 1 + layer)


def _check_llava(config: Any, name: str) -> None:
    vision = config.vision_config
    if vision.model_type not in _TOWERS:
        _refuse(name, f"its vision tower is of type {vision.model_type}, and LLaVA's other than CLIP and SigLIP is one")
    activation, strategy, _ = _TOWERS[vision.model_type]
    if vision.hidden_act not in (_QUICK_GELU, _GELU, "gelu"):
        _refuse(name, f"the activation of its tower is {vision.hidden_act} instead of {activation}")
    if not isinstance(config.vision_feature_layer, int):
        _refuse(name, f"it joins the features of layers {config.vision_feature_layer}")
    if feature_blocks(config) < 1:
        _refuse(name, "its features go through no block of its tower")
    if config.vision_feature_select_strategy != strategy:
        _refuse(name, f"it chooses features by {config.vision_feature_select_strategy!r} instead of {strategy!r}")
    if getattr(config, "projector_kind", "mlp") != "mlp" or config.projector_hidden_act != "gelu":
        kind = getattr(config, "projector_kind", config.projector_hidden_act)
        _refuse(name, f"its projector is of kind {kind!r} instead of two linear layers with GELU between them")
    if not config.multimodal_projector_bias:
        _refuse(name, "its projector has no biases")


def _llava_keys(writer: Any, config: Any, processor: Any) -> None:
    vision, blocks = config.vision_config, feature_blocks(config)
    _common_keys(writer, config, processor, blocks=blocks, heads=vision.num_attention_heads, eps=vision.layer_norm_eps)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_use_gelu(vision.hidden_act != _QUICK_GELU)
    # Without it llama.cpp leaves the last of the file's blocks out; the numbers have to be 32 bits with a sign.
    writer.add_array("clip.vision.feature_layer", [blocks])


def _llava_pieces(config: Any, parameter: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    if parameter.startswith("model.multi_modal_projector."):
        # Layers of a sequence in which GELU is number 1.
        leaf = parameter.removeprefix("model.multi_modal_projector.linear_")
        number, kind = leaf.split(".")
        yield Piece(source=parameter, name=f"mm.{2 * (int(number) - 1)}.{kind}", shape=shape)
        return
    rest = parameter.removeprefix("model.vision_tower.").removeprefix("vision_model.")
    block = re.match(r"encoder\.layers\.(\d+)\.", rest)
    if not _LLAVA_UNUSED.match(rest) and not (block and int(block[1]) >= feature_blocks(config)):
        yield _mapped(config, parameter, f"vision_tower.vision_model.{rest}", shape)


def _mapped(config: Any, parameter: str, known: str, shape: tuple[int, ...]) -> Piece:
    vision = config.vision_config
    package = gguf_package()
    blocks = getattr(vision, "num_hidden_layers", None) or vision.depth
    # Layers of projectors are counted in the same map: Qwen's has number 2.
    names = package.get_tensor_name_map(package.MODEL_ARCH.MMPROJ, max(blocks, 3))
    name = names.get_name(known, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ModelError(f"{parameter}: GGUF has no name for this tensor of a vision tower; mmpeft does not write it")
    return Piece(source=parameter, name=name, shape=shape, exact="_embd" in name and "patch" not in name)


_CLASS_TOKEN = (
    "llama.cpp puts the class token of a CLIP tower behind the patches and counts as if it stood before them (its "
    "issue 25814): the first patch is lost and positions are off by one, so answers differ from the source's; models "
    "on SigLIP are not affected"
)


def _llava_notes(config: Any, processor: Any) -> list[str]:
    pictures, side = processor.image_processor, config.vision_config.image_size
    size = dict(getattr(pictures, "crop_size", None) or {}) if getattr(pictures, "do_center_crop", False) else {}
    size = size or dict(pictures.size)
    notes = [
        f"llama.cpp fills pictures that are not square up to a square and scales that to {side} x {side} pixels; the "
        f"processor {'cuts out the middle' if getattr(pictures, 'do_center_crop', False) else 'stretches them'}: give "
        "llama.cpp square pictures"
    ]
    if config.vision_config.model_type == "clip_vision_model":
        notes.insert(0, _CLASS_TOKEN)
    if set(size.values()) != {side}:
        notes.append(f"the processor gives pictures of {size}, llama.cpp of {side} x {side} pixels")
    return notes + _resampling(pictures, Image.Resampling.BICUBIC)


def _resampling(pictures: Any, own: Image.Resampling) -> list[str]:
    given = getattr(pictures, "resample", own)
    if given is None or int(given) == own:
        return []
    return [f"llama.cpp scales pictures by {own.name.lower()}, the processor by {Image.Resampling(given).name.lower()}"]


# Qwen2.5-VL


_QWEN_WINDOW = 112
"""Pixels; a number in llama.cpp's code."""


def _check_qwen(config: Any, name: str) -> None:
    vision = config.vision_config
    full = vision.fullatt_block_indexes
    every = full[0] + 1 if full else 0
    if not full or list(full) != list(range(every - 1, full[-1] + 1, every)):
        _refuse(name, f"its tower looks at whole pictures in blocks {full}, at no regular distance")
    if vision.hidden_act != _SILU:
        _refuse(name, f"the activation of its tower is {vision.hidden_act}")
    if vision.window_size != _QWEN_WINDOW:
        _refuse(name, f"its tower looks through windows of {vision.window_size} pixels instead of {_QWEN_WINDOW}")
    if vision.temporal_patch_size != 2:
        _refuse(name, f"its tower takes {vision.temporal_patch_size} pictures at a time")


def _qwen_keys(writer: Any, config: Any, processor: Any) -> None:
    vision = config.vision_config
    # transformers has this number in its code; llama.cpp wants it written.
    _common_keys(writer, config, processor, blocks=vision.depth, heads=vision.num_heads, eps=1e-6)
    writer.add_clip_projector_type(gguf_package().VisionProjectorType.QWEN25VL)
    # Pictures keep their size; llama.cpp asks for a number all the same.
    writer.add_vision_image_size(40 * vision.patch_size)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(vision.fullatt_block_indexes[0] + 1)


def _qwen_pieces(config: Any, parameter: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    known = parameter.removeprefix("model.")
    if known == "visual.patch_embed.proj.weight":
        # Of one picture, two at a time: llama.cpp adds what the two make.
        for time, suffix in enumerate(("", ".1")):
            yield Piece(source=parameter, name=f"v.patch_embd.weight{suffix}", shape=shape, take=_at(time))
    elif ".attn.qkv." in known:
        for number, part in enumerate("qkv"):
            piece = _mapped(config, parameter, known.replace(".qkv.", f".{part}."), shape)
            yield Piece(source=parameter, name=piece.name, shape=shape, take=_third(number))
    else:
        yield _mapped(config, parameter, known, shape)


def _at(time: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[:, :, time]


def _third(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.chunk(3)[number]


def _qwen_notes(_: Any, processor: Any) -> list[str]:
    return [
        "llama.cpp gives a picture 8 to 4096 tokens (--image-min-tokens, --image-max-tokens), whatever the processor's "
        "own limits of pixels",
        *_resampling(processor.image_processor, Image.Resampling.BICUBIC),
    ]


# SmolVLM and Idefics3


def _check_smolvlm(config: Any, name: str) -> None:
    if config.vision_config.hidden_act not in (_GELU, "gelu"):
        _refuse(name, f"the activation of its tower is {config.vision_config.hidden_act}")


def _smolvlm_keys(writer: Any, config: Any, processor: Any) -> None:
    vision = config.vision_config
    _common_keys(
        writer,
        config,
        processor,
        blocks=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        eps=vision.layer_norm_eps,
    )
    writer.add_clip_projector_type(gguf_package().VisionProjectorType.IDEFICS3)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(config.scale_factor)
    longest = dict(processor.image_processor.size or {}).get("longest_edge", vision.image_size)
    writer.add_vision_preproc_image_size(longest)


def _smolvlm_pieces(config: Any, parameter: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    yield _mapped(config, parameter, parameter, shape)


def _smolvlm_notes(_: Any, processor: Any) -> list[str]:
    pictures = processor.image_processor
    notes = _resampling(pictures, Image.Resampling.LANCZOS)
    if not getattr(pictures, "do_image_splitting", True):
        notes.append("llama.cpp cuts large pictures into tiles, the processor does not")
    return notes


SMOLVLM = VisionShape(
    tower="model.vision_model",
    projector="model.connector",
    language="model.text_model",
    check=_check_smolvlm,
    keys=_smolvlm_keys,
    pieces=_smolvlm_pieces,
    notes=_smolvlm_notes,
)

SHAPES: Mapping[str, VisionShape] = {
    "llava": VisionShape(
        tower="model.vision_tower",
        projector="model.multi_modal_projector",
        language="model.language_model",
        check=_check_llava,
        keys=_llava_keys,
        pieces=_llava_pieces,
        notes=_llava_notes,
    ),
    "qwen2_5_vl": VisionShape(
        tower="model.visual",
        projector="model.visual.merger",
        language="model.language_model",
        check=_check_qwen,
        keys=_qwen_keys,
        pieces=_qwen_pieces,
        notes=_qwen_notes,
        picture="<|vision_start|>{token}<|vision_end|>",
    ),
    "smolvlm": SMOLVLM,
    "idefics3": SMOLVLM,
}
"""By the type of a model's configuration."""
