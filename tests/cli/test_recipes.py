import json
import sys

import pytest
from typer.testing import CliRunner

from mmpeft.cli import main, recipes
from mmpeft.config.shipped import shipped_recipes
from mmpeft.core.errors import OutputError


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(recipes.app, list(arguments))

    return invoke


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_shows_every_recipe_with_its_first_comment_line(run):
    result = run("list", "--json")
    assert result.exit_code == 0
    listed = {recipe["name"]: recipe["description"] for recipe in json.loads(result.stdout)["recipes"]}
    assert listed.keys() == {recipe.name for recipe in shipped_recipes()}
    assert {"quickstart", "llava/two-stage", "llava/full-language", "accelerate/cpu_ddp"} <= listed.keys()
    assert listed["quickstart"].startswith("The quickstart:")
    assert all(description.endswith(".") for description in listed.values())


def test_list_for_people_is_a_table(run):
    result = run("list")
    assert result.exit_code == 0
    assert "llava/two-stage" in result.stdout
    assert "description" in result.stdout


def test_copy_writes_the_same_bytes_under_the_recipes_own_name(run, folder):
    result = run("copy", "llava/two-stage")
    assert result.exit_code == 0
    shipped = next(recipe.path for recipe in shipped_recipes() if recipe.name == "llava/two-stage")
    assert (folder / "two-stage.yaml").read_bytes() == shipped.read_bytes()
    assert "mmpeft run two-stage.yaml" in result.stdout


@pytest.mark.parametrize(("given", "written"), [("mine.yaml", "mine.yaml"), ("sub", "sub/lora.yaml")])
def test_copy_takes_a_file_or_a_folder_that_exists(run, folder, given, written):
    (folder / "sub").mkdir()
    result = run("copy", "llava/lora", given, "--json")
    assert json.loads(result.stdout) == {"recipe": "llava/lora", "path": written}
    assert (folder / written).is_file()


def test_copy_refuses_to_overwrite_until_forced(run, folder):
    (folder / "quickstart.yaml").write_text("my own work\n")
    result = run("copy", "quickstart")
    assert isinstance(result.exception, OutputError)
    assert "quickstart.yaml exists" in str(result.exception)
    assert "--force" in str(result.exception)
    assert (folder / "quickstart.yaml").read_text() == "my own work\n"
    assert run("copy", "quickstart", "--force").exit_code == 0
    assert (folder / "quickstart.yaml").read_text().startswith("# The quickstart")


@pytest.mark.parametrize(
    ("name", "said"), [("lava/two-stge", "nearest: llava/two-stage"), ("42", "there are: accelerate/cpu_ddp")]
)
def test_an_unknown_name_gets_the_nearest_ones_and_status_2(folder, monkeypatch, capsys, name, said):
    monkeypatch.setattr(sys, "argv", ["mmpeft", "recipes", "copy", name])
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"no recipe named '{name}'" in message
    assert said in message
    assert list(folder.iterdir()) == []
