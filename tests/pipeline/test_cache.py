"""Features kept before training: `mmpeft data cache`."""

import json

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import mmpeft
from mmpeft import Recipe
from mmpeft.cli.main import app
from mmpeft.core.errors import OutputError, RecipeError
from mmpeft.core.files import read_json
from mmpeft.pipeline.cache import fill_cache
from tests.project import TWO_STAGES, write_project


@pytest.fixture
def project(tmp_path):
    def write(**changes):
        path = write_project(tmp_path, **changes)
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe["data"]["cache"] = {"directory": str(tmp_path / "cache")}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write


def entries(folder):
    return sorted((folder / "cache" / "features").glob("*/*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", [(), ("stages.0.trainer.bf16=true", "stages.1.trainer.bf16=true")])
def test_a_run_finds_all_that_was_kept_ahead(tmp_path, project, precision):
    path = project(stages=[{**stage, "trainer": {}} for stage in TWO_STAGES])
    recipe = Recipe.from_yaml(path, (f"output={tmp_path / 'run'}", *precision))
    steps = []
    filled = fill_cache(recipe, on_progress=lambda done, total: steps.append((done, total)))
    assert filled.media == filled.written == len(entries(tmp_path)) > 0
    assert (filled.present, filled.refused, filled.stage) == (0, 0, "projector")
    assert filled.bytes > 0
    assert steps[-1] == (filled.media, filled.media)
    mmpeft.run(recipe)
    for number, stage in enumerate(TWO_STAGES, start=1):
        figures = read_json(tmp_path / "run" / "stages" / f"{number:02d}-{stage['name']}" / "stage.json")["figures"]
        told = {each["name"]: each for each in figures["speedups"]}["data.cache.features"]
        assert told["on"]
        assert "towers ran for 0 of" in told["why"]
    assert len(entries(tmp_path)) == filled.media


def test_what_is_missing_is_added_and_the_rest_stays(tmp_path, project):
    recipe = Recipe.from_yaml(project())
    first = fill_cache(recipe)
    kept = entries(tmp_path)
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-9])
    second = fill_cache(recipe, stage="language")
    assert (second.written, second.present) == (2, first.media - 2)
    assert second.bytes == first.bytes
    assert entries(tmp_path) == kept


def test_the_command_says_what_it_kept_in_words_and_as_json(tmp_path, project):
    path = project()
    done = CliRunner().invoke(app, ["data", "cache", str(path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["written"] == told["media"] == len(entries(tmp_path))
    assert told["directory"] == str(tmp_path / "cache" / "features")
    again = CliRunner().invoke(app, ["data", "cache", str(path)])
    assert f"0 kept now, {told['media']} before" in again.stdout


def test_a_full_cache_takes_no_more_and_says_so(tmp_path, project):
    path = project()
    done = CliRunner().invoke(app, ["data", "cache", str(path), "--set", "data.cache.limit_bytes=5000"])
    assert done.exit_code == 0, done.output
    assert "have no room; raise data.cache.limit_bytes" in done.stderr
    assert sum(entry.stat().st_size for entry in entries(tmp_path)) <= 5000


@pytest.mark.parametrize(
    ("changes", "stage", "said"),
    [
        ({}, "langage", "no stage 'langage' in the recipe; it has: projector, language"),
        ({"data.augment.flip": "true"}, None, "data.augment varies pictures from epoch to epoch"),
        ({"stages.0.train.vision": "{r: 2}"}, None, "the vision tower trains"),
        ({"stages.0.train.vision": "{r: 2}"}, "language", "'projector' before it trains the vision tower"),
        ({"data.streaming": "true"}, None, "a stream's samples are not known before it is read"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(project, changes, stage, said):
    recipe = Recipe.from_yaml(project(), tuple(f"{key}={value}" for key, value in changes.items()))
    with pytest.raises(RecipeError) as caught:
        fill_cache(recipe, stage=stage)
    assert said in str(caught.value)


def test_a_place_that_cannot_be_written_is_an_error_here(tmp_path, project):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot be written .*set data\.cache\.directory"):
        fill_cache(Recipe.from_yaml(project()))


def told(folder, output="run"):
    """What the first stage says of the cache."""
    figures = read_json(folder / output / "stages" / "01-projector" / "stage.json")["figures"]
    return {each["name"]: each for each in figures["speedups"]}["data.cache.features"]


@pytest.mark.slow
def test_one_pass_takes_what_is_there_of_these_media_and_not_of_others(tmp_path, project):
    once = ("stages.0.max_steps=1", "stages.1.max_steps=1")
    path = project()
    recipe = Recipe.from_yaml(path, once)
    fill_cache(recipe)
    for picture in (tmp_path / "data" / "images").glob("*.png"):
        Image.open(picture).transpose(Image.Transpose.ROTATE_90).point(lambda value: 255 - value).save(picture)
    mmpeft.run(recipe.model_copy(update={"output": tmp_path / "run"}))
    assert told(tmp_path)["why"].startswith("no medium is shown twice")
    fill_cache(recipe)
    mmpeft.run(recipe.model_copy(update={"output": tmp_path / "again"}))
    assert "features of earlier runs are there" in told(tmp_path, "again")["why"]


@pytest.mark.slow
def test_a_bound_that_holds_next_to_nothing_does_not_pay(tmp_path, project):
    mmpeft.run(Recipe.from_yaml(project(), (f"output={tmp_path / 'run'}", "data.cache.limit_bytes=100")))
    assert not told(tmp_path)["on"]
    assert "data.cache.limit_bytes has room for 100 B" in told(tmp_path)["why"]
    assert not entries(tmp_path)
