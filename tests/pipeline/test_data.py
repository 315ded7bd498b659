import datasets
import pytest

from mmpeft.config.data import DataConfig
from mmpeft.config.recipe import Recipe
from mmpeft.data.dataset import load_dataset
from mmpeft.pipeline.data import describe_data
from tests.data.files import picture
from tests.tiny import tiny_processor


@pytest.mark.parametrize("name", ["pictures", "pictures/captions.csv"])
def test_the_media_root_is_the_sources_own(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "pictures/a.png")
    if name.endswith(".csv"):
        (tmp_path / name).write_text("image,text\na.png,red\n")
    else:
        (tmp_path / "pictures/a.txt").write_text("red")
    recipe = Recipe.model_validate({"model": "m", "data": DataConfig(train=name), "stages": "two-stage"})
    described = describe_data(recipe, load_dataset(name, processor=tiny_processor()), None)
    assert described["train"]["media_root"] == "pictures"
