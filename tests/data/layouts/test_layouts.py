"""What each layout's rows become, and what is said of those that cannot be read."""

import json
import re

import datasets
import pytest

from mmpeft.core.errors import DataError
from mmpeft.data.arrow import cached_rows, row_of
from mmpeft.data.check import check_data
from mmpeft.data.formats import describe, parse_row, read_rows, read_samples
from mmpeft.data.mend import mend_data
from mmpeft.data.types import Box
from tests.data.files import gpt, human, row, write_json, write_lines

Q, A = "Which colour?", "red"


def only(tmp_path, value, **options):
    (sample,) = read_samples(write_lines(tmp_path / "a.jsonl", [value]), **options)
    return sample


def texts(sample):
    return [(turn.role, turn.text) for turn in sample.turns]


def chat(*contents, **fields):
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return {**fields, "messages": turns}


PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": Q}]
WITH_IMAGE = [
    row(human(f"<image>{Q}"), gpt(A), image="a.png"),
    chat(f"<image>{Q}", A, images=["a.png"]),
    chat(PARTS, A),
    chat(PARTS, [{"type": "text", "text": A}]),
    chat([{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": Q}], A),
    chat([{"type": "image_url", "value": "a.png"}, {"type": "text", "value": Q}], A),
    chat([{"type": "image"}, {"type": "text", "text": Q}], A, images=["a.png"]),
    chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": Q}], A),
    {"conversation": [{"human": f"<image>{Q}", "assistant": A}], "images": ["a.png"]},
    {"instruction": f"<image>{Q}", "input": "", "output": A, "images": ["a.png"]},
    {"query": f"<image>{Q}", "response": A, "history": [], "images": ["a.png"]},
    {"image": "a.png", "question": f"<image>{Q}", "answer": A},
    {"image_path": "a.png", "prompt": f"<image>{Q}", "label": [A, "blue", A]},
]


@pytest.mark.parametrize("value", WITH_IMAGE)
def test_every_layout_says_the_same(tmp_path, value):
    sample = only(tmp_path, value)
    assert (texts(sample), sample.images) == ([("user", f"<image>{Q}"), ("assistant", A)], ("a.png",))
    assert parse_row(value, file=tmp_path / "a.jsonl", index=0, line=1) == sample


def test_videos_recordings_and_parts_keep_their_order(tmp_path):
    wav = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    film = {"type": "video", "video": "file:///data/b.mp4"}
    sample = only(tmp_path, chat([film, {"type": "text", "text": "and"}, wav], A))
    assert sample.turns[0].text == "<video>and<audio>"
    assert (sample.videos, sample.audios) == (("file:///data/b.mp4",), ("data:audio/wav;base64,AAAA",))


def test_a_caption_answers_the_question_of_the_caller(tmp_path):
    value = {"file_name": "a.png", "text": "a red square"}
    assert only(tmp_path, value).turns[0].text == "<image>\nDescribe the picture."
    assert only(tmp_path, value, question="What is it?").turns[0].text == "<image>\nWhat is it?"
    assert only(tmp_path, {"file_name": "a.mp4", "text": "rain"}).videos == ("a.mp4",)


def test_system_texts_and_history_come_first(tmp_path):
    value = {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["q", "a"]]}
    expected = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "i\nj"), ("assistant", "o")]
    assert texts(only(tmp_path, value)) == expected
    assert texts(only(tmp_path, row(system="s")))[0] == ("system", "s")


def test_what_objects_refer_to_is_written_into_the_text(tmp_path):
    objects = {"ref": ["sheep"], "bbox": [[90.9, 160.8, 135, 212.8], [1, 2]]}
    value = chat("<image><image>Find the <ref-object>", "<bbox> or <bbox>", images=["a.png", "b.png"], objects=objects)
    sample = only(tmp_path, value)
    assert [turn.text for turn in sample.turns] == ["<image><image>Find the sheep", "<box> or <box>"]
    assert sample.boxes == (Box(values=(90.9, 160.8, 135.0, 212.8)), Box(values=(1.0, 2.0)))
    objects |= {"bbox": [[0, 0, 1, 1], [0.5, 0.5]], "bbox_type": "norm1", "image_id": [1, 0]}
    assert only(tmp_path, value).boxes[0] == Box(values=(0, 0, 1, 1), picture=1, unit="fraction")


def test_boxes_of_a_llava_row_are_kept_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    value = row(human("<image>q"), gpt("at <box>"), image="a.png", boxes=[[1, 2, 3, 4]], box_unit="thousandths")
    sample = only(tmp_path, value)
    assert sample.boxes == (Box(values=(1, 2, 3, 4), unit="thousandths"),)
    rows, _ = cached_rows(tmp_path / "a.jsonl")
    assert row_of(rows[0]).sample == sample
    assert only(tmp_path, row(human("say <box>"), gpt("<box>"))).boxes == ()


BAD = {
    "`image_url` of message 0 is the https URL 'https://x/a.png', and URLs are off: download it": chat(
        [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}], A
    ),
    "the URL of `image_url` of message 0 is empty": chat([{"type": "image_url", "image_url": {"url": " "}}], A),
    "a part of type 'imgae'; did you mean 'image'?": chat([{"type": "imgae"}], A),
    "1 picture but 2 <image> placeholders": chat([{"type": "image"}, {"type": "image"}], A, images=["a.png"]),
    "both name media; keep one of them": chat(PARTS, A, images=["b.png"]),
    "message 1 holds `tool_calls`; tools are not trained on": {
        "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": None, "tool_calls": [1]}]
    },
    "message 1 sets `loss` to False; every answer is trained on alike": {
        "messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A, "loss": False}]
    },
    "message 1 is from 'tool_call'; tools are not trained on": {
        "messages": [{"role": "user", "content": Q}, {"role": "tool_call", "content": A}]
    },
    "`assistant` of pair 0 is null; expected a string": {"conversation": [{"human": Q}]},
    "message 0 has no `content` (its keys: `role`)": {"messages": [{"role": "user"}]},
    "message 0 is from 'usr'; did you mean 'user'?": {"messages": [{"role": "usr", "content": Q}]},
    "message 1 (from assistant) has an empty content": chat(Q, ""),
    "the last turn is from user; expected an assistant turn": chat(Q),
    "both a `system` key and a system turn": row({"from": "system", "value": "s"}, human(Q), gpt(A), system="s"),
    "`history` is a string; expected a list of [question, answer]": {"query": Q, "response": A, "history": "x"},
    "entry 0 of `history` is no [question, answer]": {"query": Q, "response": A, "history": [["a"]]},
    "`output` is empty": {"instruction": Q, "output": " "},
    "an empty list of answers": {"question": Q, "answers": []},
    "a list of answers holds a boolean": {"question": Q, "answers": [True]},
    "the answer is a boolean; expected a string": {"question": Q, "answer": True},
    "whose ending tells of no picture": {"file_name": "a.xyz", "text": "t"},
    "box [1.0, nan] has a value that is NaN": row(human("<image>"), gpt("<box>"), image="a", boxes=[[1, float("nan")]]),
    "box 0 is no list of 2 or 4 numbers": chat(Q, A, objects={"bbox": [[1, 2, 3]]}),
    "box 0 holds a string; expected numbers": row(boxes=[["1", 2]]),
    "`boxes` is a number; expected a list": row(boxes=3),
    "`box_unit` is 'pixel'; did you mean 'pixels'?": row(boxes=[], box_unit="pixel"),
    "`bbox_type` is 'norm'; did you mean 'norm1'?": chat(Q, A, objects={"bbox_type": "norm"}),
    "`image_id` has 1 entries for 2 boxes": chat(Q, A, objects={"bbox": [[1, 2], [1, 2]], "image_id": [0]}),
    "1 box but 0 <box> placeholders": row(human("<image>q"), gpt("a"), image="a", boxes=[[1, 2]]),
    "box 0 is in picture 1, but there are 1": row(
        human("<image>q"), gpt("<box>"), image="a", boxes=[{"values": [1, 2], "picture": 1}]
    ),
    "is reversed; expected x1": row(human("<image>q"), gpt("<box>"), image="a", boxes=[[5, 5, 1, 9]]),
    "1 entries in `ref` but 2 <ref-object> placeholders": chat("<ref-object><ref-object>", A, objects={"ref": ["x"]}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_row_says_what_is_wrong(tmp_path, message):
    (found,) = read_rows(write_lines(tmp_path / "a.jsonl", [BAD[message]]))
    assert message in found.problem.reason


FILE_ERRORS = {
    "rows hold `conversations` (LLaVA/ShareGPT) and `messages` (chat messages (OpenAI, ms-swift, LLaMA-Factory)); "
    "say which is meant, such as columns: {conversations: conversations}": row(messages=[]) | chat(Q, A),
    "rows hold `instruction`, `output` (alpaca) and `question`, `answer` (question and answer columns)": {
        "instruction": Q,
        "output": A,
        "question": Q,
        "answer": A,
    },
    "rows hold `image`, `frage`, `antwort`, which is no layout that is known; the nearest is a medium and its caption, "
    "which lacks the caption (`caption`, `text`, `captions`, `label`): rename the keys, or name them in `columns`": {
        "image": "a.png",
        "frage": Q,
        "antwort": A,
    },
    "the nearest is question and answer columns, which lacks the answer": {"question": Q, "antwort": A},
    "the nearest is alpaca, which lacks `output`": {"instruction": Q, "chosen": A, "rejected": "x"},
}


@pytest.mark.parametrize("message", FILE_ERRORS)
def test_an_unknown_or_ambiguous_layout_is_an_error_of_the_file(tmp_path, message):
    path = write_lines(tmp_path / "a.jsonl", [FILE_ERRORS[message]])
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:1: ")
    assert message in check_data(path).errors[0]


def test_a_column_map_says_what_is_meant(tmp_path):
    value = {"image": "b.png", "bild": "a.png", "frage": Q, "antwort": A, "answer": "no", "label": 3}
    columns = {"image": "bild", "question": "frage", "answer": "antwort"}
    sample = only(tmp_path, value, columns=columns)
    assert (sample.images, sample.turns[0].text, sample.turns[1].text) == (("a.png",), f"<image>\n{Q}", A)
    assert "by the column map" in describe(tmp_path / "a.jsonl", columns=columns).why
    two = row(messages=[]) | chat("other", "words")
    assert only(tmp_path, two, columns={"messages": "messages"}).turns[1].text == "words"


def test_a_column_map_that_fits_nothing_says_what_it_might_mean(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"frage": Q, "antwort": A}])
    with pytest.raises(DataError, match="names 'farge', which is no key of the rows; did you mean 'frage'"):
        describe(path, columns={"question": "farge"})
    with pytest.raises(DataError, match="to 'questoin', which no layout reads; did you mean 'question'"):
        describe(path, columns={"questoin": "frage"})


def test_a_row_of_another_layout_than_those_before_is_named(tmp_path):
    _, second, third = read_rows(write_lines(tmp_path / "a.jsonl", [row(), chat(Q, A), {"id": "x"}]))
    assert second.problem.reason.startswith("it is of another layout (chat messages (OpenAI")
    assert "than the rows before (LLaVA/ShareGPT); part the two" in second.problem.reason
    assert "no `conversations`; add human and gpt turns" in third.problem.reason


def test_two_columns_that_could_be_the_question_are_asked_about(tmp_path):
    (found,) = read_rows(write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "problem": "b", "answer": A}]))
    assert "the columns `prompt` and `problem` could both be the question; say which: columns" in found.problem.reason


def test_the_layout_and_what_says_so_are_told(tmp_path):
    assert str(describe(write_lines(tmp_path / "a.jsonl", [3, {}, chat(Q, A)]))) == (
        "chat messages (OpenAI, ms-swift, LLaMA-Factory) in JSON Lines (rows hold `messages`)"
    )
    assert describe(write_json(tmp_path / "b.json", [row()])).layout == "LLaVA/ShareGPT"


SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "chat", "images": "pictures"}}
TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "U", "assistant_tag": "B", "system_tag": "S"}


def test_a_dataset_info_beside_the_file_is_followed(tmp_path):
    turns = [{"who": "S", "says": "s"}, {"who": "U", "says": "<image>q"}, {"who": "B", "says": "a"}]
    path = write_lines(tmp_path / "a.jsonl", [{"chat": turns, "pictures": ["a.png"]}, {"chat": turns[:2]}])
    write_json(tmp_path / "dataset_info.json", {"mine": {"file_name": "a.jsonl", **SHAREGPT, "tags": TAGS}})
    good, bad = read_rows(path)
    assert texts(good.sample) == [("system", "s"), ("user", "<image>q"), ("assistant", "a")]
    assert good.sample.images == ("a.png",)
    assert "the last turn is from U; expected a B turn" in bad.problem.reason
    assert describe(path).why == "dataset_info.json beside it says so, under mine"
    write_json(tmp_path / "b.json", [row()])
    assert describe(tmp_path / "b.json").why == "rows hold `conversations`"


def test_alpaca_columns_are_renamed_by_dataset_info(tmp_path):
    path = write_json(tmp_path / "a.json", [{"q": "i", "more": "j", "a": "o"}])
    columns = {"prompt": "q", "query": "more", "response": "a"}
    write_json(tmp_path / "dataset_info.json", {"mine": {"file_name": "a.json", "columns": columns}})
    (sample,) = read_samples(path)
    assert texts(sample) == [("user", "i\nj"), ("assistant", "o")]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("{", "cannot be read"),
        ({"m": {"file_name": "a.json", "formatting": "x"}}, "expected alpaca or sharegpt"),
        ({"m": {"file_name": "a.json", "ranking": True}}, "is preference data"),
        ({"m": {"file_name": "a.json", "columns": []}}, None),
        ({"m": {"file_name": "a.json", "columns": [1]}}, "`columns` is no map of names"),
        ({"m": {"file_name": "a.json"}, "n": {"file_name": "a.json", **SHAREGPT}}, "m, n all describe a.json"),
        ([], None),
        ({"m": 3, "n": {"file_name": "b.json"}}, None),
    ],
)
def test_a_dataset_info_that_cannot_be_followed_is_named(tmp_path, info, message):
    path = write_json(tmp_path / "a.json", [{"instruction": Q, "output": A}])
    (tmp_path / "dataset_info.json").write_text(info if isinstance(info, str) else json.dumps(info))
    if message is None:
        assert describe(path).layout == "alpaca"
        return
    with pytest.raises(DataError, match=message):
        describe(path)


def test_messages_are_mended_too_and_other_containers_are_not(tmp_path):
    value = chat("q", " a ", images=["a.png", "b.png"])
    path = write_lines(tmp_path / "a.jsonl", [value])
    mend_data(path, tmp_path / "b.jsonl", open_media=False)
    (sample,) = read_samples(tmp_path / "b.jsonl")
    assert texts(sample) == [("user", "<image>\n<image>\nq"), ("assistant", "a")]


SWIFT = """
{"messages": [{"role": "user", "content": "Where is the capital of Zhejiang?"}, {"role": "assistant", "content": "The capital of Zhejiang is Hangzhou."}]}
{"messages": [{"role": "user", "content": "<image><image>What is the difference between the two images?"}, {"role": "assistant", "content": "The first one is a kitten, and the second one is a puppy."}], "images": ["/xxx/x.jpg", "/xxx/x.png"]}
{"messages": [{"role": "user", "content": "<audio>What did the audio say?"}, {"role": "assistant", "content": "The weather is really nice today."}], "audios": ["/xxx/x.mp3"]}
{"messages": [{"role": "system", "content": "You are a helpful and harmless assistant."}, {"role": "user", "content": "<image>What is in the image, <video>What is in the video?"}, {"role": "assistant", "content": "The image shows an elephant, and the video shows a puppy running on the grass."}], "images": ["/xxx/x.jpg"], "videos": ["/xxx/x.mp4"]}
"""  # noqa: E501


def test_the_examples_of_ms_swifts_documentation_are_read(tmp_path):
    path = tmp_path / "swift.jsonl"
    path.write_text(SWIFT)
    samples = list(read_samples(path))
    assert [len(sample.images) + len(sample.videos) + len(sample.audios) for sample in samples] == [0, 2, 1, 2]


def test_rows_as_in_llama_factorys_demo_files_are_read(tmp_path):
    demo = {
        "messages": [
            {"content": "<video><audio>What is the video describing?", "role": "user"},
            {"content": "A girl who is drawing a picture of a guitar and feel nervous.", "role": "assistant"},
        ],
        "videos": ["mllm_demo_data/4.mp4"],
        "audios": ["mllm_demo_data/4.mp3"],
    }
    sample = only(tmp_path, demo)
    assert (sample.videos, sample.audios) == (("mllm_demo_data/4.mp4",), ("mllm_demo_data/4.mp3",))
