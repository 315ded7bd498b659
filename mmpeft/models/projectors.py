"""Projectors: what carries an encoder's patch features into the language model's embedding space.

    features [images, patches, vision_width]  ->  projector  ->  [images, tokens, text_width]

This file is saved beside a model's weights and must run without mmpeft: relative imports, torch and transformers only.
All parameters sit in leaf modules (Linear, LayerNorm, Embedding) that are called, never read from outside, so that
PEFT's `modules_to_save` can wrap each of them.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

try:
    from mmpeft.core.errors import ModelError
except ImportError:  # beside a model's weights, in a program without mmpeft
    ModelError = ValueError  # type: ignore[misc,assignment]


class Projector(Protocol):
    """What `register_projector` takes: a class called as `(vision_width, text_width, **options)`."""

    def num_tokens(self, patches: int) -> int:
        """How many tokens come out for `patches` patches."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, vision_width] -> [images, num_tokens(patches), text_width]."""


PROJECTORS: dict[str, Callable[..., nn.Module]] = {}
"""Kind -> class. `register_projector` adds to it."""

_Class = TypeVar("_Class", bound=type[nn.Module])


def register_projector(name: str) -> Callable[[_Class], _Class]:
    """Class decorator that makes a projector known under `name`, as `projector: name` in a recipe.

        @mmpeft.register_projector("pooled")
        class Pooled(nn.Module):
            num_tokens = 1                                      # or a method (patches) -> int

            def __init__(self, vision_width, text_width):
                super().__init__()
                self.linear = nn.Linear(vision_width, text_width)

            def forward(self, features):                        # [images, patches, vision_width]
                return self.linear(features.mean(1, keepdim=True))

    The class is not saved with a model: import its module before loading one that uses it.

    Raises:
        ModelError: the name is taken by another class, or the class does not tell its number of tokens.
    """

    def register(cls: _Class) -> _Class:
        if not hasattr(cls, "num_tokens"):
            raise ModelError(
                f"projector {name!r}: {cls.__name__} does not tell how many tokens it gives; add a method "
                "`num_tokens(self, patches) -> int`, or an attribute `num_tokens` where the number is fixed"
            )
        known = PROJECTORS.get(name)
        if known is not None and f"{known.__module__}.{known.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
            raise ModelError(
                f"projector {name!r} is {known.__qualname__} already; register {cls.__name__} by another name"
            )
        PROJECTORS[name] = cls
        return cls

    return register


def build_projector(kind: str, vision_width: int, text_width: int, options: dict[str, Any]) -> nn.Module:
    """A new projector of a registered kind.

    Raises:
        ModelError: the kind is not registered, or does not take these options.
    """
    if kind not in PROJECTORS:
        raise ModelError(
            f"projector {kind!r} is not registered (registered: {', '.join(sorted(PROJECTORS))}); if it is your own, "
            "import the module that calls `register_projector` first"
        )
    cls = PROJECTORS[kind]
    taken = list(inspect.signature(cls).parameters.values())
    names = [parameter.name for parameter in taken[2:] if parameter.kind is not parameter.VAR_KEYWORD]
    unknown = sorted(set(options) - set(names))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        raise ModelError(
            f"projector {kind!r} takes no option {unknown[0]!r}; its options: {', '.join(names) or 'none'}"
        )
    return cls(vision_width, text_width, **options)


def count_tokens(projector: nn.Module, patches: int) -> int:
    """How many tokens a projector says that it gives for `patches` patches of one picture."""
    told: Any = projector.num_tokens
    return int(told(patches)) if callable(told) else int(told)


@register_projector("linear")
class LinearProjector(nn.Module):
    """One linear layer, LLaVA's first form (arXiv:2304.08485).

    [images, patches, vision] -> linear -> [images, patches, text]
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(vision_width, text_width)

    def num_tokens(self, patches: int) -> int:
        """One token a patch."""
        return patches

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, vision_width] -> [images, patches, text_width]."""
        return self.linear(features)


@register_projector("mlp")
class MlpProjector(nn.Module):
    """Two linear layers, LLaVA 1.5's (arXiv:2310.03744).

    [images, patches, vision] -> linear_1 -> act -> linear_2 -> [images, patches, text]
    """

    def __init__(self, vision_width: int, text_width: int, hidden_act: str = "gelu") -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.act = activation(hidden_act)
        self.linear_2 = nn.Linear(text_width, text_width)

    def num_tokens(self, patches: int) -> int:
        """One token a patch."""
        return patches

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, vision_width] -> [images, patches, text_width]."""
        return self.linear_2(self.act(self.linear_1(features)))


@register_projector("fusion_mlp")
class FusionMlpProjector(nn.Module):
    """Three linear layers over the channels of several encoders, Prismatic's (arXiv:2402.07865).

    [images, patches, vision] -> linear_1 -> [..., 4 vision] -> GELU -> linear_2 -> [..., text] -> GELU
                              -> linear_3 -> [images, patches, text]
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, 4 * vision_width)
        self.linear_2 = nn.Linear(4 * vision_width, text_width)
        self.linear_3 = nn.Linear(text_width, text_width)

    def num_tokens(self, patches: int) -> int:
        """One token a patch."""
        return patches

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, vision_width] -> [images, patches, text_width]."""
        hidden = functional.gelu(self.linear_1(features))
        return self.linear_3(functional.gelu(self.linear_2(hidden)))


@register_projector("pixel_shuffle_mlp")
class PixelShuffleMlpProjector(nn.Module):
    """Each 2 x 2 block of patches becomes one token of four times the channels, InternVL's (arXiv:2404.16821).

    a b c d         [a b e f]  [c d g h]
    e f g h    ->   [i j m n]  [k l o p]     -> norm -> linear_1 -> GELU -> linear_2
    i j k l
    m n o p         [images, patches / 4, 4 vision]          -> [images, patches / 4, text]
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * vision_width)
        self.linear_1 = nn.Linear(4 * vision_width, text_width)
        self.linear_2 = nn.Linear(text_width, text_width)

    def num_tokens(self, patches: int) -> int:
        """A quarter of the patches.

        Raises:
            ModelError: the patches form no square of even side.
        """
        side = math.isqrt(patches)
        if side * side != patches or side % 2:
            raise ModelError(
                f"pixel_shuffle_mlp joins 2 x 2 patches and needs a square of even side; the encoder gives {patches} "
                f"patches{f' ({side} x {side})' if side * side == patches else ''}: choose another picture size"
            )
        return patches // 4

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, vision_width] -> [images, patches / 4, text_width]."""
        images, patches, width = features.shape
        half = math.isqrt(patches) // 2
        blocks = features.reshape(images, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
        shuffled = self.norm(blocks.reshape(images, half * half, 4 * width))
        return self.linear_2(functional.gelu(self.linear_1(shuffled)))


@register_projector("resampler")
class ResamplerProjector(nn.Module):
    """Learned queries that look at the patches, as Flamingo's Perceiver resampler does (arXiv:2204.14198).

        queries  [num_queries, text] --------------------+-> block 1 -> ... -> block `depth` -> norm
        features [images, patches, vision] -> input -----'      [images, num_queries, text]

    The number of tokens is `num_queries`, however many patches there are.
    """

    def __init__(
        self, vision_width: int, text_width: int, num_queries: int = 64, depth: int = 2, num_heads: int | None = None
    ) -> None:
        super().__init__()
        heads = num_heads or _default_heads(text_width)
        if text_width % heads or num_queries < 1 or depth < 1:
            raise ModelError(
                f"resampler: num_heads={heads} must divide the language model's width {text_width}, and num_queries="
                f"{num_queries} and depth={depth} must be at least 1"
            )
        self.num_queries = num_queries
        self.queries = nn.Embedding(num_queries, text_width)
        nn.init.trunc_normal_(self.queries.weight, std=0.02)  # as Qwen-VL's (arXiv:2308.12966)
        self.input = nn.Linear(vision_width, text_width)
        self.blocks = nn.ModuleList(_ResamplerBlock(text_width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(text_width)

    def num_tokens(self, patches: int) -> int:
        """One token a query."""
        return self.num_queries

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, vision_width] -> [images, num_queries, text_width]."""
        indices = torch.arange(self.num_queries, device=features.device)
        queries = self.queries(indices).expand(len(features), -1, -1)
        context = self.input(features)
        for block in self.blocks:
            queries = block(queries, context)
        return self.norm(queries)


class _ResamplerBlock(nn.Module):
    """Cross-attention from queries to context and themselves, then a feed-forward layer; both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm, self.context_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """[images, queries, width], [images, patches, width] -> [images, queries, width]."""
        normed = self.query_norm(queries)
        seen = torch.cat([self.context_norm(context), normed], dim=1)
        attended = functional.scaled_dot_product_attention(
            self._split(self.q_proj(normed)), self._split(self.k_proj(seen)), self._split(self.v_proj(seen))
        )
        queries = queries + self.o_proj(attended.transpose(1, 2).flatten(2))
        return queries + self.down_proj(functional.gelu(self.up_proj(self.mlp_norm(queries))))

    def _split(self, hidden: torch.Tensor) -> torch.Tensor:
        """[images, length, width] -> [images, heads, length, width / heads]."""
        return hidden.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _default_heads(width: int) -> int:
    """Heads of about 64 channels; the nearest number below that divides the width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)


def activation(name: str) -> nn.Module:
    """An activation by the name that transformers gives it.

    Raises:
        ModelError: transformers has none of that name.
    """
    if name not in ACT2FN:
        raise ModelError(f"hidden_act {name!r} is not an activation of transformers; say gelu, relu or silu")
    return ACT2FN[name]
