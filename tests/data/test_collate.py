import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.collate import MultimodalCollator, keep_supervised
from mmpeft.data.encode import encode_sample
from tests.data.test_chat import conversation
from tests.data.test_encode import media_of, sample_of

CONVERSATIONS = (
    ("<image>\nWhich colour?", "red"),
    ("1 + 1?", "two, of course"),
    ("<image> or <image>?", "the first", "why?", "它更红"),
)


@pytest.fixture
def encoded(processor):
    return [
        encode_sample(
            processor,
            sample_of(conversation(*texts), texts[0].count("<image>")),
            media_of(texts[0].count("<image>")),
        )
        for texts in CONVERSATIONS
    ]


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return loss.detach(), gradients


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_rows_are_padded_on_the_right_and_pictures_stand_in_one_tensor(processor, encoded):
    batch = MultimodalCollator(processor, supervised_only=False)(encoded)
    longest = max(len(sample["input_ids"]) for sample in encoded)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    for number, sample in enumerate(encoded):
        length = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][number, :length], sample["input_ids"])
        assert torch.equal(batch["labels"][number, :length], sample["labels"])
        assert (batch["input_ids"][number, length:] == processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][number, length:] == IGNORE_INDEX).all()
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (longest - length)
    expected = torch.cat([encoded[0]["pixel_values"], encoded[2]["pixel_values"]])
    assert torch.equal(batch["pixel_values"], expected)


def test_a_batch_without_pictures_has_no_pixels(processor, encoded):
    assert "pixel_values" not in MultimodalCollator(processor)([encoded[1], encoded[1]])


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_columns_are_rounded_up(processor, encoded, multiple):
    batch = MultimodalCollator(processor, pad_to_multiple_of=multiple)(encoded)
    columns = batch["input_ids"].shape[1]
    longest = max(len(sample["input_ids"]) for sample in encoded)
    assert columns % multiple == 0
    assert longest <= columns < longest + multiple
    assert batch["attention_mask"].shape == batch["labels"].shape == batch["input_ids"].shape
    padding = batch["attention_mask"] == 0
    assert (batch["labels"][padding] == IGNORE_INDEX).all()
    assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(processor, encoded):
    processor.tokenizer.pad_token = None
    batch = MultimodalCollator(processor)(encoded[:2])
    assert batch["input_ids"][1, -1] == processor.tokenizer.eos_token_id or batch["attention_mask"].all()


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4))
def test_the_kept_columns_are_those_before_a_label(rows):
    labels = torch.tensor([[column if flag else IGNORE_INDEX for column, flag in enumerate(row)] for row in rows])
    found = keep_supervised(labels)
    expected = [column for column in range(6) if any(row[column + 1] for row in rows)]
    assert found["logits_to_keep"].tolist() == (expected or [0])
    for row, kept in zip(labels.tolist(), found["shift_labels"].tolist(), strict=True):
        assert kept == [row[column + 1] for column in found["logits_to_keep"].tolist()]


def test_supervised_only_changes_neither_loss_nor_gradients(processor, llava, encoded):
    plain = MultimodalCollator(processor, supervised_only=False)(encoded)
    sparing = MultimodalCollator(processor)(encoded)
    assert 0 < len(sparing["logits_to_keep"]) < plain["input_ids"].shape[1]
    assert llava(**sparing).logits.shape[1] == len(sparing["logits_to_keep"])
    loss, gradients = loss_and_gradients(llava, plain)
    other, other_gradients = loss_and_gradients(llava, sparing)
    assert abs(loss - other) <= 1e-6
    assert largest_difference(gradients, other_gradients) <= 1e-6


def test_a_batch_is_the_sum_of_its_samples(processor, llava, encoded):
    collator = MultimodalCollator(processor)
    tokens = sum((sample["labels"] != IGNORE_INDEX).sum() for sample in encoded)
    whole, gradients = loss_and_gradients(llava, collator(encoded), num_items_in_batch=tokens)
    llava.zero_grad()
    losses = [llava(**collator([sample]), num_items_in_batch=tokens).loss for sample in encoded]
    sum(losses).backward()
    parts = {name: parameter.grad for name, parameter in llava.named_parameters() if parameter.grad is not None}
    assert abs(whole - sum(losses)) <= 1e-6
    assert largest_difference(gradients, parts) <= 1e-6


def test_a_batch_without_a_label_costs_nothing(processor, llava, encoded):
    blank = {**encoded[0], "labels": torch.full_like(encoded[0]["labels"], IGNORE_INDEX)}
    loss, gradients = loss_and_gradients(
        llava, MultimodalCollator(processor)([blank]), num_items_in_batch=torch.tensor(5)
    )
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())
