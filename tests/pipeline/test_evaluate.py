"""Evaluations share what their questions begin with, say so, and answer the same without."""

import json

import mmpeft
from mmpeft import Recipe
from mmpeft.core.files import read_json
from mmpeft.pipeline.inputs import evaluation_hash
from tests.project import TWO_STAGES, write_project


def project(folder, **evaluate):
    """Four questions on each held-out picture."""
    path = write_project(
        folder,
        stages=[{**TWO_STAGES[1], "max_steps": 1}],
        evaluate={"metrics": ["exact_match"], "max_new_tokens": 3, **evaluate},
    )
    file = folder / "data" / "eval.json"
    rows = [
        {**row, "conversations": [{"from": "human", "value": f"<image>\nbright? {'really? ' * number}"}, *row_end]}
        for row in json.loads(file.read_text(encoding="utf-8"))
        for row_end in [row["conversations"][1:]]
        for number in range(4)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    return Recipe.from_yaml(path)


def evaluated(recipe):
    mmpeft.run(recipe)
    return read_json(recipe.output / "evaluation.json")


def test_a_run_says_what_sharing_spared_and_answers_the_same_without(tmp_path):
    shared = evaluated(project(tmp_path / "shared"))
    plain = evaluated(project(tmp_path / "plain", share_media=False))
    assert list(shared) == ["before", "language", "after"]
    for name in shared:
        assert shared[name]["predictions"] == plain[name]["predictions"]
        assert shared[name]["metrics"] == plain[name]["metrics"]
        work = shared[name]["work"]
        assert work["prompts"] < work["padded"] == plain[name]["work"]["prompts"]
        (sharing,) = shared[name]["speedups"]
        assert sharing["name"] == "evaluate.share_media"
        assert sharing["on"]
        assert sharing["saved"] == {"tokens": work["padded"] - work["prompts"]}
        (sharing,) = plain[name]["speedups"]
        assert not sharing["on"]
        assert sharing["saved"] == {}


def test_answers_are_not_asked_for_again_because_of_it(tmp_path):
    recipes = project(tmp_path), project(tmp_path, share_media=False), project(tmp_path, max_new_tokens=4)
    first, second, third = (evaluation_hash(recipe, data="d", model="m") for recipe in recipes)
    assert first == second != third
