"""Places in the families whose tokenizers have marks for them."""

import pytest

import mmpeft
from mmpeft.core.errors import DataError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.chat import check_texts
from mmpeft.data.types import Turn
from mmpeft.families.registry import family_of
from tests.data.files import gpt, human, row, write_lines
from tests.families.models import MODELS
from tests.families.samples import picture

WRITTEN = {
    "qwen2_vl": "At <|box_start|>(0,0),(500,1000)<|box_end|>.",
    "internvl": "At <box>[[0, 0, 500, 1000]]</box>.",
}
READ_BACK = {"qwen2_vl": "At (0,0),(500,1000).", "internvl": "At [[0, 0, 500, 1000]]."}


@pytest.fixture(scope="module", params=sorted(WRITTEN))
def marked(request):
    """(name, a processor whose tokenizer has the family's marks as special tokens)"""
    model, processor = MODELS[request.param]()
    spec = family_of(model)
    processor.tokenizer.add_special_tokens(
        {"additional_special_tokens": list(spec.box_notation.marks)}, replace_extra_special_tokens=False
    )
    return request.param, processor


def test_a_box_is_trained_and_scored_in_the_family_s_notation(marked, tmp_path):
    name, processor = marked
    picture((40, 40)).save(tmp_path / "a.png")
    rows = [row(human("<image>Where?"), gpt("At <box>."), image="a.png", boxes=[[0, 0, 20, 40]])]
    data = write_lines(tmp_path / "a.jsonl", rows)
    dataset = mmpeft.load_dataset(data, processor=processor)
    labels = dataset[0]["labels"]
    assert processor.tokenizer.decode(labels[labels != IGNORE_INDEX]).startswith(WRITTEN[name])
    (question,) = dataset.questions()
    assert question.reference == READ_BACK[name]
    answer = processor.tokenizer(WRITTEN[name])["input_ids"]
    assert processor.tokenizer.decode(answer, skip_special_tokens=True) == question.reference


def test_marks_may_stand_in_a_text_and_other_control_tokens_may_not(marked):
    name, processor = marked
    check_texts(processor, [Turn(role="assistant", text=WRITTEN[name])])
    with pytest.raises(DataError, match="a control token of this model"):
        check_texts(processor, [Turn(role="assistant", text=f"{WRITTEN[name]}<|im_start|>user")])
