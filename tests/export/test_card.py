import copy
import re

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from mmpeft.export.card import render_card
from tests.pipeline.fake_run import RECIPE, write_facts, write_fake_run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = write_fake_run(tmp_path_factory.mktemp("card"))
    return write_facts(run)


@pytest.fixture
def facts(made):
    return copy.deepcopy(made)


def body(card):
    return ModelCard(card).text


def table_rows(card):
    return [line for line in body(card).splitlines() if line.startswith("|")]


def test_the_metadata_is_what_the_hub_reads(facts):
    data = ModelCard(render_card(facts)).data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "peft"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.base_model == "made-up/language-135M"
    assert data.get("base_model_relation") == "adapter"
    assert {"mmpeft", "lora", "llava"} <= set(data.tags)
    assert data.license is None
    assert data.language is None
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"exact_match": 0.9375, "anls": 0.9375}
    assert {result.dataset_name for result in data.eval_results} == {"eval.json"}
    assert data.model_name == "adapter"


def test_it_reads_back_as_it_was_written(facts):
    facts["language"] = ["zh", "en"]
    facts["recipe"]["output"] = "runs/receipts"
    card = ModelCard(render_card(facts))
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    assert card.data.language == ["zh", "en"]
    assert card.data.model_name == "receipts"
    assert "# receipts" in card.text


def test_it_says_what_it_is_how_to_load_it_and_how_good_it_is(facts):
    card = body(render_card(facts))
    for shown in (
        "trained with mmpeft 0.1.0 in 2 stages: `projector`, `language`",
        "composed of `tower` (local), a new projector (mlp) and [made-up/language-135M](https://huggingface.co/",
        "| Language | lora, 135 M parameters, 4.88 M trained in the last stage |",
        "| Vision | frozen, 566,016 parameters |",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "| digit | 24 | 0.0 % | 95.8 % | 0.0 % | 95.8 % |",
        "| **all** | 96 | 0.0 % | **93.8 %** | 0.0 % | **93.8 %** |",
        f"| training | train.json | 6,786 | 3 | 2 | `{'3f' * 32}` |",
        "2 training samples were skipped",
        "3 training samples were longer than `max_length`",
        "torch 2.13.0 · transformers 5.24.0",
    ):
        assert shown in card
    loading = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    compile(loading, "card", "exec")
    assert len(loading.splitlines()) == 3


def test_the_recipe_in_the_card_is_the_recipe(facts):
    facts["recipe"]["note"] = "```\n# not a heading\n````"
    found = re.search(r"^(`{3,})yaml\n(.*?)^\1$", body(render_card(facts)), re.S | re.M)
    assert found.group(1) == "`" * 5
    assert yaml.safe_load(found.group(2)) == {**RECIPE, "note": facts["recipe"]["note"]}


def test_every_table_has_as_many_cells_in_each_row(facts):
    facts["by_kind"]["after"]["a|b\n<script>alert(1)</script> *x*"] = {"count": 3, "exact_match": 1, "anls": 1}
    rows = table_rows(render_card(facts))
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(cells) == {3, 7}
    assert "<script" not in render_card(facts)
    assert r"a\|b &lt;script&gt;alert(1)&lt;/script&gt; \*x\*" in render_card(facts)


def test_what_is_absent_is_said_and_not_made_up():
    card = render_card({})
    data = ModelCard(card).data
    assert data.base_model is None
    assert data.eval_results is None
    assert data.library_name == "peft"
    assert "Results: not recorded" in card
    assert "How well it answers is not known" in card
    assert "| Base model | not recorded |" in card
    assert "Recipe: not recorded" in card
    assert "Versions: not recorded" in card
    assert card.count("not recorded") > 10
    assert not re.search(r"\d %", card)


@pytest.mark.parametrize(
    "key", ["recipe", "stages", "parts", "data", "versions", "metrics", "by_kind", "family", "base_model"]
)
@pytest.mark.parametrize("how", ["absent", "empty", "none"])
def test_any_fact_may_be_absent(facts, key, how):
    facts.pop(key) if how == "absent" else facts.update({key: None if how == "none" else type(facts[key])()})
    card = render_card(facts)
    assert ModelCard(card).data.library_name == "peft"
    assert "None" not in card


def test_a_run_without_held_out_data(facts):
    facts["data"]["eval"] = None
    facts["metrics"] = facts["by_kind"] = {}
    card = render_card(facts)
    assert ModelCard(card).data.eval_results is None
    assert "| held out | not recorded | not recorded |" in card


def test_a_run_without_kinds_has_one_row(facts):
    for entry in facts["by_kind"].values():
        everything = {"count": 96, "exact_match": 0.5, "anls": 0.5}
        entry.clear()
        entry[""] = everything
    rows = [row for row in table_rows(render_card(facts)) if "93.8 %" in row]
    assert rows == ["| **all** | 96 | 0.0 % | **93.8 %** | 0.0 % | **93.8 %** |"]
    assert "(no kind)" not in render_card(facts)


def test_a_model_of_the_hub_is_linked(facts):
    facts["recipe"]["model"] = facts["base_model"] = "someone/vision-language-7B"
    card = ModelCard(render_card(facts))
    assert card.data.base_model == "someone/vision-language-7B"
    assert "[someone/vision-language-7B](https://huggingface.co/someone/vision-language-7B)" in card.text
    assert "no model of the Hub" not in card.text


def test_a_directory_is_no_model_of_the_hub(facts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name in ("models/mine", str(tmp_path / "models" / "mine")):
        facts["recipe"]["model"] = facts["base_model"] = name
        card = ModelCard(render_card(facts))
        assert card.data.base_model is None
        assert "| Base model | `mine` (local) |" in card.text
        assert "The base model is a directory, no model of the Hub" in card.text
        assert str(tmp_path) not in card.text.split("## Recipe")[0]


def test_data_sets_of_the_hub_are_named(facts):
    assert ModelCard(render_card(facts)).data.datasets is None
    facts["data"]["train"]["sources"] = [
        {"file": "hf:/org/receipts", "weight": 1.0},
        {"file": "hf:/org/charts/train.parquet", "weight": 2.0},
        {"file": "data/own.json", "weight": 1.0},
    ]
    assert ModelCard(render_card(facts)).data.datasets == ["org/receipts", "org/charts"]


def test_two_encoders_are_both_named(facts):
    facts["recipe"]["model"] = {
        "vision": ["org/siglip", "org/dinov2"],
        "language": "org/llm",
        "projector": {"kind": "fused_mlp"},
    }
    facts["family"] = "composed"
    card = ModelCard(render_card(facts))
    assert card.data.base_model == ["org/llm", "org/siglip", "org/dinov2"]
    assert "[org/siglip](https://huggingface.co/org/siglip) and [org/dinov2]" in card.text
    assert r"a new projector (fused\_mlp)" in card.text
    assert card.text.count("trust_remote_code=True") == 2
