import pytest
import yaml

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError

MINIMAL = {"model": "some/model", "data": {"train": "train.json"}, "stages": "two-stage"}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(tmp_path, text):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(write(tmp_path, text))
    return str(caught.value)


def test_three_keys_suffice_and_the_rest_has_defaults():
    recipe = Recipe.from_dict(MINIMAL)
    assert [stage.name for stage in recipe.stages] == ["projector", "language"]
    assert recipe.stages[1].train == {"projector": "full", "language": {"r": 16, "lora_alpha": 32}}
    assert recipe.batch.size == 16


def test_a_recipe_survives_the_way_through_yaml(tmp_path):
    recipe = Recipe.from_dict(MINIMAL | {"model": {"vision": "图/塔", "language": "b"}})
    path = write(tmp_path, yaml.safe_dump(recipe.to_dict(), allow_unicode=True))
    assert Recipe.from_yaml(path) == recipe


def test_three_mistakes_get_three_messages_each_with_line_key_finding_and_nearest_name(tmp_path):
    text = """\
model: some/model
data:
  train: train.json
  on_eror: skip
stages:
  - name: projector
    train: {projektor: full}
    learning_rte: 1e-3
"""
    message = problems(tmp_path, text)
    assert "3 problems" in message
    assert "line 4: data.on_eror: unknown key; did you mean 'on_error'?" in message
    assert "line 7: stages[0].train.projektor: unknown part 'projektor'; did you mean 'projector'?" in message
    assert "line 8: stages[0].learning_rte: unknown key; did you mean 'learning_rate'?" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": "two-stag"}, "stages: unknown preset 'two-stag'; did you mean 'two-stage'?"),
        ({"batch": {"size": 0}}, "batch.size: found 0; input should be greater than or equal to 1"),
        (
            {"data": {"train": "t", "on_error": "skp"}},
            "data.on_error: found 'skp'; expected 'error' or 'skip'",
        ),
        ({"model": {"vison": "a", "language": "b"}}, "model.vison: unknown key; did you mean 'vision'?"),
        ({"model": 3}, "model: found 3; input should be a valid string"),
        ({"stages": []}, "stages: "),
        ({"dtype": "float23"}, "did you mean 'float32'?"),
        ({"hub": {"repo": "receipts"}}, "hub.repo: found 'receipts'; string should match pattern"),
        ({"hub": {"repo": "me/x", "public": True}}, "hub.public: unknown key"),
    ],
)
def test_a_wrong_value_is_named(change, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(MINIMAL | change)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"train": {"language": {"rnk": 4}}}, "train.language.rnk: unknown LoRA field 'rnk'"),
        (
            {"train": {"language": {"r": 0}}},
            "train.language.r: found 0; expected a whole number of at least 1",
        ),
        ({"train": {"language": "ful"}}, "found 'ful'; expected 'full', 'frozen' or LoRA fields"),
        ({"train": {"language": "frozen"}}, "nothing would be trained"),
        ({"train": {"language": {"r": 4, "init_lora_weights": "eva"}}}, "needs a pass over data"),
        ({"train": {"language": {"r": 4, "modules_to_save": ["x"]}}}, "give the projector `full` instead"),
        (
            {"train": {"language": {"r": 4}}, "learning_rate": {"projector": 1e-3}},
            "learning_rate.projector: projector is not trained in this stage; trained: language",
        ),
        (
            {"train": {"language": {"r": 4}}, "trainer": {"seed": 1}},
            "trainer.seed: is set elsewhere in the recipe: seed",
        ),
        (
            {"train": {"language": {"r": 4}}, "trainer": {"push_to_hub": True}},
            "trainer.push_to_hub: is set elsewhere in the recipe: hub",
        ),
        (
            {"train": {"language": {"r": 4}}, "trainer": {"warmup_ratio": 1}},
            "`warmup_steps` below 1 is the same ratio",
        ),
        (
            {"train": {"language": {"r": 4}}, "trainer": {"lr_schedulr_type": "cosine"}},
            "unknown training argument; did you mean 'lr_scheduler_type'?",
        ),
        ({"train": {"language": {"r": 4}}, "name": "before"}, "the name 'before' is taken"),
    ],
)
def test_a_wrong_stage_is_named(stage, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(MINIMAL | {"stages": [{"name": "one", **stage}]})
    assert said in str(caught.value)


def test_overrides_reach_by_key_by_index_and_by_stage_name(tmp_path):
    path = write(tmp_path, "model: m\ndata: {train: t}\nstages:\n  - {name: a, train: {projector: full}}\n")
    recipe = Recipe.from_yaml(path, ("batch.size=8", "stages.a.learning_rate=1e-3", "stages.0.max_steps=5"))
    assert (recipe.batch.size, recipe.stages[0].learning_rate, recipe.stages[0].max_steps) == (8, 1e-3, 5)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("output=[", r"--set 'output=\[': the value '\[' is not valid YAML"),
        ("batch", "expected key=value"),
        ("stages.b.epochs=1", "no item 'b' in a list of 1"),
        ("stages.a.epochs.x=1", r"stages\[0\].epochs: found \{'x': 1\}"),
    ],
)
def test_an_override_that_leads_nowhere_is_named(tmp_path, override, said):
    path = write(tmp_path, "model: m\ndata: {train: t}\nstages:\n  - {name: a, train: {projector: full}}\n")
    with pytest.raises(RecipeError, match=said):
        Recipe.from_yaml(path, (override,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n", "expected keys such as `model:`"),
        ("model: a\nmodel: b\n", r"recipe.yaml:2: the key 'model' stands twice, first on line 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, said):
    assert said in problems(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        Recipe.from_yaml(tmp_path / "nothing.yaml")


def test_floats_are_read_as_yaml_1_2_does(tmp_path):
    path = write(
        tmp_path,
        "model: m\ndata: {train: t}\nstages:\n"
        "  - {name: a, train: {projector: full}, learning_rate: 1e-3, trainer: {adam_epsilon: 1e-6}}\n",
    )
    assert Recipe.from_yaml(path).stages[0].trainer["adam_epsilon"] == 1e-6


def test_plain_values_take_overrides_too():
    recipe = Recipe.from_dict(MINIMAL, ("seed=7", "hub={repo: me/receipts}"))
    assert (recipe.seed, recipe.hub.repo, recipe.hub.private) == (7, "me/receipts", True)
    assert "seed" not in MINIMAL
    with pytest.raises(RecipeError, match="sed: unknown key; did you mean 'seed'"):
        Recipe.from_dict(MINIMAL, ("sed=7",))


def test_a_recipe_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        Recipe.from_dict(MINIMAL).seed = 3


def test_stages_of_a_preset_are_reached_by_name(tmp_path):
    path = write(tmp_path, yaml.safe_dump(MINIMAL))
    recipe = Recipe.from_yaml(path, ("stages.language.learning_rate.language=1e-4", "stages.0.epochs=2"))
    assert recipe.stages[1].learning_rate == {"projector": 2e-5, "language": 1e-4}
    assert recipe.stages[0].epochs == 2
    assert Recipe.from_yaml(path).stages[0].epochs == 1


def test_a_value_of_another_shape_is_named_in_the_words_of_a_recipe(tmp_path):
    message = problems(tmp_path, "model: m\ndata: train.json\nstages: {projector: {train: {projector: full}}}\n")
    assert "line 2: data: found 'train.json'; expected a block of keys and values" in message
    assert "expected a list" in message


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"train": []}, "data.train: found an empty list; expected at least one source"),
        ({"train": [{"path": "a", "weigth": 2}]}, "data.train[0].weigth: unknown key; did you mean 'weight'?"),
        ({"train": [{"weight": 2}]}, "data.train[0].path: missing"),
        ({"train": ["a", 3]}, "data.train[1]: found 3; expected a block of keys and values"),
        ({"train": [{"path": "a", "weight": 0}]}, "data.train[0].weight: found 0; input should be greater than 0"),
        ({"train": {"path": "a", "weight": True}}, "data.train.weight: expected a number, found "),
        ({"train": "a", "eval": ["b"]}, "data.eval: found a list; expected one file"),
        ({"train": "a", "eval": {"path": "b", "weight": 2}}, "data.eval.weight: found 2; held-out questions"),
    ],
)
def test_a_source_that_cannot_be_meant_is_named(data, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({**MINIMAL, "data": data})
    assert said in str(caught.value)
    assert "1 problem:" in str(caught.value)


def test_sources_are_written_as_a_path_a_block_or_a_list():
    sources = ["a.json", {"path": "b.json", "weight": 2, "columns": {"question": "frage"}}]
    recipe = Recipe.from_dict({**MINIMAL, "data": {"train": sources, "eval": {"path": "c.csv", "question": "what?"}}})
    assert [(str(source.path), source.weight) for source in recipe.data.sources] == [("a.json", 1.0), ("b.json", 2.0)]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    one = Recipe.from_dict({**MINIMAL, "data": {"train": "a.json"}})
    assert one.to_dict()["data"]["train"] == "a.json"
    assert (
        one.data.sources[0].path == Recipe.from_dict({**MINIMAL, "data": {"train": sources[:1]}}).data.sources[0].path
    )


def test_a_step_is_cut_by_samples_or_by_tokens_and_a_stream_by_samples_only():
    assert Recipe.from_dict({**MINIMAL, "batch": {"tokens": 4096}}).batch.balance
    with pytest.raises(RecipeError, match=r"batch\.micro: `tokens` says how a step is cut, too; leave one"):
        Recipe.from_dict({**MINIMAL, "batch": {"micro": 4, "tokens": 4096}})
    streamed = {**MINIMAL, "data": {"train": "a.jsonl", "streaming": True}, "batch": {"tokens": 4096}}
    streamed["stages"] = [{"name": "a", "train": {"projector": "full"}, "max_steps": 3}]
    with pytest.raises(RecipeError, match=r"batch\.tokens: a stream's samples have no length .* use batch\.micro"):
        Recipe.from_dict(streamed)


@pytest.mark.parametrize(
    ("workers", "said"),
    [("atuo", "data.workers: found 'atuo'; expected 'auto'"), (-1, "data.workers: found -1"), (True, "data.workers: ")],
)
def test_workers_are_a_count_or_auto(workers, said):
    value = {**MINIMAL, "data": {**MINIMAL["data"], "workers": workers}}
    with pytest.raises(RecipeError, match=said) as found:
        Recipe.from_dict(value)
    assert len(str(found.value).splitlines()) <= 2
