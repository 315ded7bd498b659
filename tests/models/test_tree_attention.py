"""Every type of language model that packed rows are allowed for gives the gradients of its samples one by one."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from mmpeft.core.tree import Segment, Tree
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.packing import PackedCollator
from mmpeft.data.types import Media
from mmpeft.models.tree_attention import EXACT, NAME, tree_attention, tree_attention_on
from tests.families.samples import picture, sample_of
from tests.tiny import IMAGE_TOKENS, tiny_clip_config, tiny_processor

INSIDE = {"gemma3_text"} | {name for name in EXACT if name.endswith(("_vl_text", "_omni_text"))}
"""Tested inside the families that they come with: tests/families/test_packing.py."""


def llava_around(model_type, processor):
    """A tiny LLaVA with a language model of that type, its weights large enough for attention to matter."""
    sizes = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "phi3":
        sizes |= {"rope_scaling": None}
    text = AutoConfig.for_model(model_type, **sizes)
    config = LlavaConfig(
        vision_config=tiny_clip_config().to_dict(),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)
    return model


def gradients(model, batch, count):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("model_type", sorted(EXACT - INSIDE))
def test_loss_and_gradients_are_those_of_the_samples_one_by_one(model_type):
    processor = tiny_processor()
    model = llava_around(model_type, processor)
    assert model.config.text_config._attn_implementation == "sdpa"
    shown = Media(images=[picture((24, 24))])
    made = [
        (sample_of("<image>\nWhat is it?", "a cat", images=1), shown),
        (sample_of("1 + 1?", "2"), Media()),
        (sample_of("<image>\nWhich colour?", "red and blue", images=1), shown),
    ]
    rows = [encode_sample(processor, *each) for each in made]
    count = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    total, expected = 0.0, {}
    for row in rows:
        loss, found = gradients(model, MultimodalCollator(processor, supervised_only=False)([row]), count)
        total += loss
        for name, gradient in found.items():
            expected[name] = expected.get(name, 0) + gradient
    with tree_attention_on(model):
        assert model.config.text_config._attn_implementation == NAME
        loss, packed = gradients(model, PackedCollator(processor)(rows), count)
    assert loss == pytest.approx(total, rel=1e-5)
    assert packed.keys() == expected.keys()
    # Against the largest of all: a key's bias has none but noise, since softmax takes no notice of it.
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


class Counted(TorchDispatchMode):
    """How often attention runs, and how many masks are made."""

    def __init__(self):
        super().__init__()
        self.attention = self.masks = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.attention += "_scaled_dot_product" in name and "backward" not in name
        self.masks += name.startswith("aten.tril")
        return function(*args, **(kwargs or {}))


def row_of(*lengths, parent=0):
    """A segment of `parent` tokens, one of each length on it, and one of 7 by itself."""
    segments, at = [Segment(start=0, end=parent)] if parent else [], parent
    for length in lengths:
        segments.append(Segment(start=at, end=at + length, parent=(0, parent) if parent else None))
        at += length
    segments.append(Segment(start=at, end=at + 7))
    return Tree(segments=tuple(segments), samples=len(lengths) + 1, tokens=at + 7, padded=at + 7)


def one_square_mask(query, key, value, tree, window):
    """The same attention under a mask of the whole row."""
    tokens = query.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for segment in tree.segments:
        seen[segment.start : segment.end, segment.start : segment.end] = True
        before = segment.parent[1] - segment.parent[0] if segment.parent else 0
        if segment.parent:
            seen[segment.start : segment.end, slice(*segment.parent)] = True
        for token in range(segment.start, segment.end):
            place = before + token - segment.start
            for other in range(tokens):
                inside = segment.start <= other
                back = place - (before + other - segment.start if inside else other)
                seen[token, other] &= back >= 0 and (window is None or back < window)
    out = scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    ("tree", "calls"),
    [
        (row_of(5, 5, 5, 4, parent=11), 4),
        (row_of(5, 4, 5, parent=11), 5),
        (row_of(6, 6, 6), 2),
        (row_of(7, 7), 1),
    ],
)
def test_segments_of_one_length_run_together_and_masks_are_made_once(tree, calls, window):
    tokens = tree.segments[-1].end
    made = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, tokens, 8, generator=made).requires_grad_() for heads in (4, 2, 2))
    with Counted() as counted:
        for _ in range(3):
            found, _ = tree_attention(None, query, key, value, None, sliding_window=window, tree=tree)
    assert counted.attention == 3 * calls
    lengths = {(s.end - s.start, s.parent) for s in tree.segments if s.parent or (window and s.end - s.start > window)}
    assert counted.masks == len(lengths)
    expected = one_square_mask(query, key, value, tree, window)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(found.square().sum(), (query, key, value))
    theirs = torch.autograd.grad(expected.square().sum(), (query, key, value))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_masks_that_evaluation_made_serve_training():
    tree = row_of(5, 5, parent=11)
    query, key, value = (torch.randn(1, heads, 28, 8) for heads in (4, 2, 2))
    with torch.inference_mode():
        tree_attention(None, query, key, value, None, tree=tree)
    tree_attention(None, query.requires_grad_(), key, value, None, tree=tree)[0].sum().backward()
    assert query.grad.abs().sum() > 0


def test_a_forward_that_is_no_row_keeps_its_window():
    model = llava_around("mistral", tiny_processor())
    model.config.get_text_config().sliding_window = 4
    ids = torch.arange(12)[None] + 5
    expected = model(input_ids=ids).logits
    with tree_attention_on(model):
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.config.get_text_config().sliding_window = None
    assert not torch.allclose(model(input_ids=ids).logits, expected), (
        "the window changed nothing, so nothing was tested"
    )
