import json

import pytest
import yaml

from mmpeft.export.portable import Portable, cached_id, project_root


@pytest.fixture
def portable(tmp_path):
    return Portable(roots=[tmp_path / "project"], names={str(tmp_path / "base"): "me/base"})


def test_a_path_below_the_project_is_relative_to_it(portable, tmp_path):
    assert portable.text(f"{tmp_path}/project/data/train.json") == "data/train.json"
    assert portable.text(f"{tmp_path}/project") == "."
    assert portable.text(f"{tmp_path}/projects/x.json") == "x.json"


def test_a_base_takes_its_name_on_the_hub(portable, tmp_path):
    assert portable.text(f"{tmp_path}/base") == "me/base"
    assert portable.text(f"{tmp_path}/base/") == "me/base"
    assert portable.text(f"cannot read {tmp_path}/base: gone") == "cannot read me/base: gone"
    assert portable.text(f"cannot read {tmp_path}/base2/x") == f"cannot read {tmp_path}/base2/x"


def test_a_path_elsewhere_keeps_its_last_part(portable):
    assert portable.text("/usr/elsewhere/pictures") == "pictures"
    assert portable.text("/usr/models--o--n-7B/snapshots/0123abc") == "o/n-7B"
    assert cached_id("/x/models--a--b/snapshots/12/") == "a/b"


def test_paths_within_a_sentence_lose_the_project(portable, tmp_path):
    assert portable.text(f"{tmp_path}/project/a.png: corrupt") == "a.png: corrupt"


@pytest.mark.parametrize("text", ["/yes/no", "data/train.json", "me/base", "/", "", "12/3", "a\n/usr/x/y"])
def test_what_is_no_path_stays(portable, text):
    assert portable.text(text) == text


def test_our_files_are_rewritten_and_only_where_they_have_to_be(portable, tmp_path):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/base", "r": 4, "inner": [{"p": "/usr/a/b"}]}))
    assert json.loads(portable.file(file)) == {"base_model_name_or_path": "me/base", "r": 4, "inner": [{"p": "b"}]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tmp_path}/base\ndata:\n  train: {tmp_path}/project/列.json\n")
    assert yaml.safe_load(portable.file(recipe)) == {"model": "me/base", "data": {"train": "列.json"}}
    recipe.write_text("model: me/base\n# a comment\n")
    assert portable.file(recipe) is None
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"p": f"{tmp_path}/base"}))
    assert portable.file(other) is None


def test_the_project_is_what_the_paths_of_a_recipe_share():
    assert str(project_root(["/srv/me/p/data/train.json", "/srv/me/p/data/images", "/srv/me/p/runs/x"])) == "/srv/me/p"
    assert project_root(["/data/train.json", "/runs/x"]) is None
    assert project_root(["data/train.json"]) is None
