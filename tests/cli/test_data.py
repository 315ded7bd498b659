import json
import subprocess
import sys

import yaml
from typer.testing import CliRunner

from mmpeft.cli.data import app
from tests.data.files import colour_set, gpt, human, picture, row, write_lines
from tests.tiny import tiny_processor


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_check_counts_a_good_file(tmp_path):
    result = invoke("check", colour_set(tmp_path))
    assert result.exit_code == 0
    assert "4 samples (no kind: 3, sum: 1), 3 pictures, 8 turns" in result.stdout
    assert "0 errors, 0 warnings" in result.stdout


def test_check_ends_with_status_3_and_names_every_error(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(), {"id": "[red]x"}, row(image="no.png")])
    result = invoke("check", path)
    assert result.exit_code == 3
    assert f"error: {path}:2: sample 1 (id '[red]x'): no `conversations`" in result.stdout
    assert f"error: {path}:3: sample 2" in result.stdout
    assert "2 errors" in result.stdout
    missing = invoke("check", tmp_path / "none.json")
    assert missing.exit_code == 3
    assert "none.json: no such file" in missing.stdout


def test_check_as_json_is_one_object_on_stdout(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(), row(image="no.png")])
    result = invoke("check", path, "--json")
    assert result.exit_code == 3
    value = json.loads(result.stdout)
    assert (value["samples"], value["pictures"], len(value["errors"]), value["file"]) == (1, 0, 1, str(path))


def test_the_media_root_is_an_option(tmp_path):
    colour_set(tmp_path / "pictures")
    path = write_lines(tmp_path / "a.jsonl", [row(image="0.png")])
    assert invoke("check", path).exit_code == 3
    assert invoke("check", path, "--media-root", tmp_path / "pictures").exit_code == 0


def test_show_prints_turns_and_pictures_with_their_sizes(tmp_path):
    result = invoke("show", colour_set(tmp_path), "-n", 2)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "sample 0  id 's0'  line 2",
        "  picture    0.png  16 x 12",
        "  user       <image>",
        "             Which colour?",
        "  assistant  red",
        "sample 1  id 's1'  line 16",
        "  picture    1.png  16 x 12",
        "  user       <image>",
        "             Which colour?",
        "  assistant  green",
    ]


def test_show_keeps_text_as_it_is_and_names_pictures_it_cannot_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(human("[bold]这是什么?"), gpt("猫"), image="no.png", kind="k")])
    shown = invoke("show", path).stdout
    assert "sample 0  id '0'  line 1  kind 'k'" in shown
    assert "[bold]这是什么?" in shown
    assert "picture 'no.png' does not exist" in shown
    value = json.loads(invoke("show", path, "--json").stdout)
    assert value["samples"][0]["turns"][1] == {"role": "assistant", "text": "猫"}


def test_show_goes_on_after_a_row_that_is_no_sample(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(), {}, row(gpt("x"), human("y")), row(id="last")])
    result = invoke("show", path, "-n", 4)
    assert result.exit_code == 0
    assert f"error: {path}:2: sample 1: no `conversations`" in result.stdout
    assert "id 'last'" in result.stdout


def test_check_finds_what_stands_in_the_held_out_file_too(tmp_path):
    path = colour_set(tmp_path)
    result = invoke("check", path, "--eval", path)
    assert result.exit_code == 3
    assert "the same pictures and question as sample 0 in line 2" in result.stdout
    assert "4 errors" in result.stdout


def test_check_without_media_looks_for_no_picture(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(image="no.png")])
    assert invoke("check", path).exit_code == 3
    result = invoke("check", path, "--no-media", "--max-length", 5)
    assert result.exit_code == 0
    assert "cut 1" in result.stdout


def test_check_writes_a_mended_copy(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(), row(image="no.png")])
    assert invoke("check", path, "--fix", tmp_path / "b.jsonl").exit_code == 3
    assert invoke("check", tmp_path / "b.jsonl").exit_code == 0
    assert len(json.loads((tmp_path / "b.jsonl.changes.json").read_text())) == 1


def test_show_with_a_model_prints_tokens_and_writes_a_page(tmp_path):
    tiny_processor().save_pretrained(tmp_path / "model")
    result = invoke("show", colour_set(tmp_path), "-n", 1, "--model", tmp_path / "model", "--html", tmp_path / "a.html")
    assert result.exit_code == 0, result.output
    assert "<image> x 4" in result.stdout
    assert "data:image/png" in (tmp_path / "a.html").read_text()


def test_show_without_a_model_writes_a_page_of_turns_and_pictures(tmp_path):
    result = invoke("show", colour_set(tmp_path), "-n", 2, "--html", tmp_path / "a.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png") == 2
    assert "Which colour?" in page


def test_show_prints_samples_as_an_epoch_has_them(tmp_path):
    colour_set(tmp_path)
    block = {"crop": {"area": [0.2, 0.5]}, "paraphrase": {"Which colour?": ["What colour is it?", "Its colour?"]}}
    recipe = {"model": "m", "data": {"train": "t.json", "augment": block}, "stages": "lora", "seed": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (tmp_path / "block.yaml").write_text(yaml.safe_dump({**block, "seed": 3}), encoding="utf-8")
    options = ("-n", 1, "--html", tmp_path / "a.html", "--augment", tmp_path / "recipe.yaml")
    shown = [invoke("show", tmp_path / "train.json", *options, "--epoch", epoch) for epoch in range(4)]
    assert all(result.exit_code == 0 for result in shown), shown[0].output
    assert all("cropped to" in result.stdout for result in shown)
    assert len({result.stdout.partition("in epoch")[2][2:] for result in shown}) > 1
    page = (tmp_path / "a.html").read_text()
    assert page.count("data:image/png") == 2
    assert "<h3>original</h3>" in page
    assert "<h3>epoch 3</h3>" in page
    alone = ("-n", 1, "--augment", tmp_path / "block.yaml", "--json", "--epoch", 3)
    value = json.loads(invoke("show", tmp_path / "train.json", *alone).stdout)
    assert value["samples"][0]["augmented"]["notes"][-1].startswith("cropped to")


def test_show_names_a_bad_augmentation_by_its_line(tmp_path):
    colour_set(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m\ndata:\n  train: t\n  augment:\n    flip: swop\n", encoding="utf-8")
    result = invoke("show", tmp_path / "train.json", "--augment", tmp_path / "recipe.yaml")
    assert "line 5: flip.sided: found 'swop'" in str(result.exception)
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: {train: t}\n", encoding="utf-8")
    result = invoke("show", tmp_path / "train.json", "--augment", tmp_path / "recipe.yaml")
    assert "has no `data.augment`" in str(result.exception)


def test_checking_data_needs_neither_torch_nor_transformers():
    code = "import sys, mmpeft.data.check; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_check_says_what_it_reads_and_takes_a_column_map(tmp_path):
    (tmp_path / "a.csv").write_text("frage,antwort\n1 + 1,2\n")
    result = invoke("check", tmp_path / "a.csv")
    assert result.exit_code == 3
    assert "the nearest is" in result.stdout
    columns = ("--column", "question=frage", "--column", "answer=antwort")
    result = invoke("check", tmp_path / "a.csv", *columns)
    assert result.exit_code == 0
    first = "question and answer columns in CSV (rows hold `question`, `answer`, by the column map)"
    assert result.stdout.splitlines()[0] == first
    value = json.loads(invoke("check", tmp_path / "a.csv", *columns, "--json").stdout)
    assert (value["source"]["container"], value["source"]["layout"]) == ("CSV", "question and answer columns")


def test_show_takes_a_question_for_captions(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("red")
    result = invoke("show", tmp_path, "--question", "Colour?")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[2:] == ["  user       <image>", "             Colour?", "  assistant  red"]
