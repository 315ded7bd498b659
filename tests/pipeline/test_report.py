import html
import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
import yaml

from mmpeft.core.errors import OutputError
from mmpeft.core.files import read_json, write_json
from mmpeft.pipeline.record import read_run
from mmpeft.pipeline.report import MOST_KINDS, wilson, write_report
from tests.pipeline.fake_run import PICTURES, RECIPE, write_fake_run

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"


class Page(HTMLParser):
    """What a browser would see: elements that stay open, ids, tags with their attributes, text by class."""

    void = frozenset({"meta", "img", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]

    def of_class(self, name):
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]


def page_of(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = write_fake_run(tmp_path_factory.mktemp("whole"))
    return run, page_of(run)


@pytest.fixture
def run(whole, tmp_path):
    """A copy to spoil; its pictures stay where they are."""
    return shutil.copytree(whole[0], tmp_path / "receipts")


def edit(path, change):
    value = read_json(path)
    change(value)
    write_json(path, value)


def test_the_page_is_whole_and_stands_alone(whole):
    run, page = whole
    text = (run / "report.html").read_text(encoding="utf-8")
    assert page.open == []
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"\b(?:href|src)=\"(?!#|data:)", text)
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in policy["content"]
    assert "script-src" not in policy["content"]
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert page.all("meta", name="viewport")


def test_links_in_the_page_have_their_places(whole):
    _, page = whole
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"].removeprefix("#") for attrs in page.all("a")} <= ids
    assert {attrs["for"] for attrs in page.all("label")} <= ids


def test_the_headline_figures(whole):
    text = whole[1].text
    for shown in (
        "Exact match on held-out questions, before → after language 0.0 % → 93.8 %",
        "96 held-out questions; 95 % interval 87.0 to 97.1 %",
        "Training time 3 min 50 s 4 min 31 s the whole run",
        "Samples a second 7.66 314 tokens a second",
        "Peak memory 2.31 GiB Made-up CPU, 2 cores",
        "Trainable parameters 5.29 M 3.9 % of 135 M, stage language",
        "tower → mlp projector → language-135M",
    ):
        assert shown in text


def test_curves_and_bars_for_people_and_screen_readers(whole):
    labels = [attrs["aria-label"] for attrs in whole[1].all("svg", role="img")]
    accuracy, loss, rates = labels
    assert accuracy == (
        "Exact match by kind of question; over all: before 0.0 %, after projector 66.7 %, after language 93.8 %"
    )
    assert loss.startswith("Training loss by step: stage projector from ")
    assert rates == "Learning rate by step of language, projector"
    titles = [word for word in whole[1].words if word.startswith("step 51\n")]
    assert any("loss" in title and "smoothed" in title for title in titles)


def test_every_section_says_what_it_should(whole):
    text = whole[1].text
    for shown in (
        "projector done 50 800 1 min 38 s 8.15 334 2.10 GiB",
        "projector full 406,656 406,656 0.002",
        "language lora 135 M 4.88 M 0.001",
        "vision frozen 566,016 - -",
        "training data/train.json 6,786 3 2 3f3f3f3f3f3f3f3f",
        "held out data/eval.json 96 0 0 a7a7a7a7a7a7a7a7",
        "data/train.json 4121 412 picture 'digit-0412.png' is corrupt",
        "2 training samples were skipped",
        "3 training samples are longer than max_length",
        "torch 2.13.0 · transformers 5.24.0",
        "cpu, 1 process",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        '/adapter")',
    ):
        assert shown in text
    assert yaml.safe_dump(RECIPE, sort_keys=False).split("\n")[0] in text
    assert "not recorded" not in text


def test_right_and_wrong_are_marked_by_colour_sign_and_word(whole):
    _, page = whole
    cards = page.of_class("card")
    assert 0 < len(cards) <= PICTURES
    assert page.of_class("has-wrong")
    assert page.of_class("has-fixed")
    assert page.all("img", **{"class": "tiny"})
    assert all(attrs["src"].startswith("data:image/png;base64,") for attrs in page.all("img"))
    css = (whole[0] / "report.html").read_text(encoding="utf-8")
    assert 'content: "✓ "' in css
    assert 'content: "✗ "' in css
    rows = page.of_class("row")
    wrong = len(page.of_class("wrong"))
    # Before training every answer was wrong.
    assert len(page.of_class("yes")) == page.words.count(", right") == len(rows) - wrong
    assert len(page.of_class("no")) == page.words.count(", wrong") == len(rows) + wrong
    assert f"All {len(rows)} Fixed {len(rows) - wrong} Still wrong {wrong}" in page.text


def test_nothing_from_a_run_can_become_markup(tmp_path):
    run = write_fake_run(tmp_path, answers={"0000-digit": EVIL})

    def poison(value):
        if isinstance(value, dict):
            return {(key if key in KEPT else f"{key}{EVIL}"): poison(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return EVIL + value if isinstance(value, str) and value not in KEPT else value

    # Keys and values by which the report finds its way stay; every other string is hostile.
    KEPT = {  # noqa: N806
        *("before", "after", "projector", "language", "metrics", "by_kind", "predictions", "exact_match", "anls"),
        *("count", "id", "image", "images", "kind", "prompt", "answer", "reference", "seconds", "versions", "mmpeft"),
        *("train", "eval", "file", "media_root", "samples", "truncated", "skipped", "index", "line", "reason"),
        *("stages", "name", "steps", "parts", "state", "parameters", "trainable", "learning_rate", "status"),
        *("figures", "output", "device", "hardware", "started", "processes", "fingerprint", "done", "adapter"),
        *("base_model", "family", "peak_memory_bytes", "step", "loss"),
    }
    for path in [*run.glob("*.json"), *run.rglob("stage.json"), run / "adapter" / "mmpeft.json"]:
        value = read_json(path)
        write_json(path, poison(value))
    (run / "recipe.yaml").write_text(f"model: {json.dumps(EVIL)}\n", encoding="utf-8")
    metrics = run / "stages" / "01-projector" / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "loss": 1.0, "learning_rate": {EVIL: 1e-3}}) + "\n", encoding="utf-8")
    page = page_of(run)
    assert page.open == []
    assert not page.all("script")
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert {attrs["class"] for attrs in page.all("span") if "alert" in (attrs.get("class") or "")} <= {
        f"pill {EVIL}{state}" for state in ("frozen", "full", "lora")
    }
    assert page.text.count("alert('x')") > 20
    assert html.escape("<script>", quote=False) in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["recipe.yaml", "plan.json", "data.json", "evaluation.json", "run.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "wrong"])
def test_a_file_that_is_missing_or_spoiled_is_named(run, name, how):
    path = run / name
    if how == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text(encoding="utf-8")[:40] if how == "cut" else "[1, 2]", encoding="utf-8")
    page = page_of(run)
    assert page.open == []
    if name.endswith(".json"):
        assert f"{name} {'is not there' if how == 'gone' else 'cannot be read'}" in page.text
    elif how == "gone":
        assert "recipe.yaml is not there, so this report lacks the recipe" in page.text


def test_a_run_that_has_only_begun_still_gets_a_report(tmp_path):
    empty = tmp_path / "begun"
    empty.mkdir()
    text = page_of(empty).text
    for shown in ("begun", "plan.json is not there", "There is no adapter yet", "No step was logged", "not recorded"):
        assert shown in text


def test_an_interrupted_run_says_where_it_stands(run):
    shutil.rmtree(run / "adapter")
    edit(run / "stages/02-language/stage.json", lambda state: state.update(status="interrupted", figures=None))
    metrics = run / "stages/02-language/metrics.jsonl"
    rows = metrics.read_text(encoding="utf-8").splitlines()[:21]
    metrics.write_text("\n".join(rows) + '\n{"step": 22, "lo', encoding="utf-8")
    edit(run / "evaluation.json", lambda value: [value.pop(name) for name in ("language", "after")])
    text = page_of(run).text
    assert "Stage language was interrupted after step 21 of 60; the same command goes on from there." in text
    assert "There is no adapter yet" in text
    assert "before → after projector 0.0 % → 66.7 %" in text
    assert "Once the run is done, transformers and peft are enough" in text
    shutil.rmtree(run / "stages/02-language")
    assert "Stage language had not started" in page_of(run).text


@pytest.mark.parametrize(
    ("status", "said"), [("failed", "failed after step 60"), ("running", "had not ended (step 60")]
)
def test_a_stage_that_did_not_end_says_so(run, status, said):
    edit(run / "stages/02-language/stage.json", lambda state: state.update(status=status))
    assert said in page_of(run).text


def test_a_stage_of_several_processes_says_how_they_shared_it(run):
    path = run / "stages" / "02-language" / "stage.json"
    state = read_json(path)
    state["figures"] |= {"processes": 4, "shared_as": "fsdp2 with context_parallel: 2"}
    write_json(path, state)
    text = write_report(run).read_text(encoding="utf-8")
    assert "language: 4 processes, fsdp2 with context_parallel: 2." in text
    assert "projector: 4 processes" not in text


def test_a_resumed_stage_says_so(run):
    edit(run / "stages/02-language/stage.json", lambda state: state.update(resumed_from=30))
    assert "Stage language was resumed from the checkpoint of step 30" in page_of(run).text


def test_a_loss_that_is_not_finite_is_named_and_not_drawn(run):
    metrics = run / "stages/01-projector/metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    rows[6]["loss"] = math.nan
    rows[9]["loss"] = math.inf
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    page = page_of(run)
    assert "Stage projector: the loss was not a finite number at 2 steps, first 7." in page.text
    assert all("nan" not in attrs.get("points", "") for attrs in page.all("polyline"))


def test_a_recipe_without_held_out_data(run):
    (run / "evaluation.json").unlink()
    edit(run / "data.json", lambda data: data.update(eval=None))
    text = page_of(run).text
    assert "The recipe names no held-out data" in text
    assert "evaluation.json is not there" not in text
    assert "No held-out question was scored" in text


def test_pictures_that_are_gone_are_named(run, tmp_path):
    edit(run / "data.json", lambda data: data["eval"].update(media_root=str(tmp_path / "elsewhere")))
    page = page_of(run)
    assert not page.all("img")
    assert "digit-0003.png" in page.text
    assert any("digit-0003.png' does not exist" in attrs["title"] for attrs in page.of_class("gone"))


def test_pictures_under_a_relative_media_root(run, monkeypatch, whole):
    monkeypatch.chdir(whole[0].parent)
    edit(run / "data.json", lambda data: data["eval"].update(media_root="images"))
    assert page_of(run).all("img")


def test_what_was_not_recorded_is_said(run):
    edit(run / "data.json", lambda data: data["train"].pop("truncated"))
    edit(run / "stages/01-projector/stage.json", lambda state: state["figures"].pop("tokens_per_second"))
    text = page_of(run).text
    assert "training data/train.json 6,786 not recorded 2" in text
    assert "projector done 50 800 1 min 38 s 8.15 not recorded" in text


def test_a_model_as_result_is_what_is_loaded(run):
    shutil.rmtree(run / "adapter")
    edit(run / "stages/02-language/stage.json", lambda state: state.update(output="model"))
    text = page_of(run).text
    assert '/stages/02-language/model")' in text
    assert "There is no adapter yet" not in text


def test_other_metrics_kinds_and_stages(run):
    """Without exact match, with more kinds than the chart draws, Chinese names, and one question without a kind."""

    def change(evaluation):
        evaluation.pop("after")
        for entry in evaluation.values():
            entry["metrics"].pop("exact_match")
            for row in entry["predictions"]:
                row.pop("exact_match")
            entry["by_kind"] = {f"颜色 {index}": {"count": 2, "anls": 0.25} for index in range(20)}
            entry["by_kind"][""] = {"count": 1, "anls": 0.5}

    edit(run / "evaluation.json", change)
    page = page_of(run)
    assert "ANLS on held-out questions" in page.text
    assert f"{21 - MOST_KINDS} more kinds of question stand in the table." in page.text
    assert "An answer counts as right from ANLS 0.5 on." in page.text
    assert "颜色 19" in page.text
    assert "(no kind)" in page.text


def test_a_run_without_kinds_has_one_bar_group(run):
    def change(evaluation):
        for entry in evaluation.values():
            entry["by_kind"] = {"": {"count": 96, **entry["metrics"]}}

    edit(run / "evaluation.json", change)
    page = page_of(run)
    assert len(page.of_class("bar")) == 3
    assert "(no kind)" not in page.text


def test_writing_again_gives_the_same_page(whole):
    run, _ = whole
    before = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_the_order_of_evaluations(run):
    edit(
        run / "evaluation.json", lambda value: value.update({name: value.pop(name) for name in ("before", "projector")})
    )
    assert [name for name, _ in read_run(run).evaluations] == ["before", "projector", "language"]


def test_no_such_run(tmp_path):
    with pytest.raises(OutputError, match=r"nowhere: no such run directory; expected the `output` of a recipe"):
        write_report(tmp_path / "nowhere")


def test_known_wilson_intervals():
    """Newcombe 1998, Statistics in Medicine 17:857, table I: 81/263 and 0/20."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_what_made_it_faster_stands_in_the_report_stage_by_stage(run):
    text = write_report(run).read_text(encoding="utf-8")
    table = text[text.index("What made it faster") :].partition("</table>")[0]
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", table))
    assert "batch.packing on 12,300 tokens it can be packed" in words
    assert "data.cache on 2.00 KiB, 12 s one pass" in words
    assert "data.cache off" in words
    assert "batch.share_media off - it needs batch.packing" in words


def test_what_made_evaluation_faster_stands_beside_it(run):
    row = {"name": "evaluate.share_media", "on": True, "why": "16 questions on 2 pictures", "saved": {"tokens": 3200}}
    edit(run / "evaluation.json", lambda value: value["before"].update(speedups=[row]))
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", write_report(run).read_text(encoding="utf-8")))
    assert "questions before evaluate.share_media on 3,200 tokens 16 questions on 2 pictures" in words
