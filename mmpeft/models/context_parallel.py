"""A language model whose tokens are shared out over a group of processes, all of which run the same samples.

    embeddings    t t t t t t t t      all tokens in every process
    layers        t t t t|t t t t      each has a part of every row
      attention   h h h h|h h h h      all tokens for a part of the heads, sent there and back
    norm, head    t t t t t t t t      all tokens in every process

Weights stay as they are, whole or shared by layer (`mmpeft.models.sharded`); what a layer keeps for the backward is a
part of it. Each layer sends queries, keys and values once and attention's output once, forward and backward, whatever
the number of processes (DeepSpeed-Ulysses, Jacobs et al. 2023, arXiv:2309.14509). Attention itself is the one that
would be in force without: rows of several samples stay apart as `mmpeft.models.tree_attention` keeps them.

What trains in a layer has, in each process, the part of its gradient that comes from its tokens.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmpeft.core.errors import ModelError
from mmpeft.families.registry import trained_model
from mmpeft.models.base import base_of
from mmpeft.models.dimensions import key_heads
from mmpeft.models.groups import Group, Rows, entering, filled, form_group, group_of, leaving, sent
from mmpeft.models.tree_attention import EXACT, attending_by


@dataclass(frozen=True)
class ContextParallel(Group):
    """A group of processes that have a part of the tokens each, and this one's place in it."""


def share_tokens(model: Any, parallel: ContextParallel) -> None:
    """Let a group have a part of each row, while `context_parallel_on` is in force.

    Args:
        model: a transformers model, with an adapter or without.

    Raises:
        ModelError: its layers mix tokens in other ways than attention, or its heads cannot be shared by so many.
    """
    base: Any = base_of(model)
    text, decoder, name = base.config.get_text_config(), trained_model(base).get_decoder(), type(base).__name__
    if text.model_type not in EXACT:
        raise ModelError(
            f"distributed.context_parallel: layers of {text.model_type!r} pass tokens on otherwise than by attention, "
            "or were not tested with it; use fsdp2 or zero3"
        )
    if hasattr(decoder, "_deepstack_process"):
        raise ModelError(
            f"distributed.context_parallel: {name} adds pictures' features between layers, to whole rows; use "
            "tensor_parallel"
        )
    heads, pairs = _heads_of(text)
    if heads % parallel.degree or (pairs % parallel.degree and parallel.degree % pairs):
        raise ModelError(
            f"distributed.context_parallel: {heads} attention heads and {pairs} key value heads of {name}'s language "
            f"model cannot be shared by {parallel.degree} processes; use a divisor of {heads} that divides {pairs} or "
            "is a multiple of it"
        )
    form_group(base, parallel)


def parts_of_layers(model: Any) -> list[nn.Parameter]:
    """What trains where tokens are shared out: its gradient is the sum of those that the processes of a group have."""
    if not isinstance(group_of(model), ContextParallel):
        return []
    layers = trained_model(base_of(model)).get_decoder().layers
    return [weight for weight in layers.parameters() if weight.requires_grad]


@contextlib.contextmanager
def context_parallel_on(model: Any) -> Iterator[None]:
    """Let each process of a model's group run its part of the tokens; for another model nothing changes.

    To be entered behind what else says how the model attends.
    """
    parallel = group_of(model)
    if not isinstance(parallel, ContextParallel):
        yield
        return
    base: Any = base_of(model)
    text, layers = base.config.get_text_config(), trained_model(base).get_decoder().layers
    within = text._attn_implementation
    tokens = _Tokens(parallel, _heads_of(text), ALL_ATTENTION_FUNCTIONS[within])
    name = f"mmpeft_context_{within}"
    AttentionInterface.register(name, torch.compiler.disable(tokens.attend))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[within])
    hooks = [
        layers[0].register_forward_pre_hook(functools.partial(entering, tokens.rows.part), with_kwargs=True),
        *(layer.register_forward_pre_hook(tokens.positions, with_kwargs=True) for layer in layers),
        layers[-1].register_forward_hook(functools.partial(leaving, tokens.rows.whole)),
    ]
    try:
        with attending_by(base, name):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _heads_of(text: Any) -> tuple[int, int]:
    """Of queries, and of keys and values."""
    return int(text.num_attention_heads), key_heads(text)


class _Tokens:
    """What layers do with a part of each row.

    Args:
        heads: those of queries, and those of keys and values.
        attention: of transformers' `AttentionInterface`, for whole rows.
    """

    def __init__(self, parallel: ContextParallel, heads: tuple[int, int], attention: Any) -> None:
        self.parallel, self.attention, self.rows = parallel, attention, Rows(parallel)
        queries, pairs = heads
        self.repeats = max(1, parallel.degree // pairs)
        self.heads = queries // parallel.degree, pairs * self.repeats // parallel.degree

    def positions(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before every layer: rotary embeddings [..., tokens, channels] of its part."""
        whole = kwargs.get("position_embeddings")
        if whole is None:
            return None
        return args, {**kwargs, "position_embeddings": tuple(self._part_of(each) for each in whole)}

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """An attention function of transformers: of a part of the tokens, [rows, heads, part, channels]."""
        degree, own = self.parallel.degree, self.heads
        if self.repeats > 1:
            key, value = (each.repeat_interleave(self.repeats, dim=1) for each in (key, value))
        # All three at once, each process's heads beside each other.
        parts = [each.unflatten(1, (degree, -1)) for each in (query, key, value)]
        together = sent(torch.cat(parts, dim=2).flatten(1, 2), self._by_heads, self._by_tokens)
        queries, keys, values = together[:, :, : self.rows.length].split((own[0], own[1], own[1]), dim=1)
        called: Any = module
        if self.repeats > 1:
            groups = own[0] // own[1]
            called = SimpleNamespace(
                num_key_value_groups=groups, is_causal=getattr(module, "is_causal", True), training=module.training
            )
        found, _ = self.attention(called, queries, keys, values, attention_mask, **kwargs)
        back = sent(filled(found.transpose(1, 2), degree), self._by_tokens, self._by_heads)
        return back.transpose(1, 2).contiguous(), None

    def _part_of(self, positions: torch.Tensor) -> torch.Tensor:
        return filled(positions, self.parallel.degree).chunk(self.parallel.degree, dim=-2)[self.parallel.rank]

    def _by_heads(self, x: torch.Tensor) -> torch.Tensor:
        """All heads of a part of the tokens for a part of the heads of all tokens."""
        got = self._exchanged(x.unflatten(1, (self.parallel.degree, -1)).transpose(0, 1))
        return got.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _by_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The other way round."""
        got = self._exchanged(x.unflatten(2, (self.parallel.degree, -1)).permute(2, 0, 1, 3, 4))
        return got.transpose(0, 1).flatten(1, 2)

    def _exchanged(self, parts: torch.Tensor) -> torch.Tensor:
        """[processes, ...]: each gets what the others have for it, in their order."""
        parts = parts.contiguous()
        got = torch.empty_like(parts)
        self.parallel.send(distributed.all_to_all_single, got, parts)
        return got
