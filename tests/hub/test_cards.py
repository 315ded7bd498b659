"""The rules by which the tests' hub takes cards."""

import pytest

from tests.hub.cards import problems


def card(text):
    return f"---\n{text}\n---\n# title\n"


@pytest.mark.parametrize(
    "text",
    [
        "license: apache-2.0\nbase_model: a/b\nbase_model_relation: adapter",
        "license: other\nlicense_name: mine\nbase_model: [a/b, c/d]",
        "language: [zh, en]\ntags: [a]\npipeline_tag: image-text-to-text",
        "model-index:\n- name: x\n  results: []",
    ],
)
def test_what_it_takes(text):
    assert problems(card(text)) == ([], [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("license: gpl-2.0-or-later", '"license" must be one of'),
        ("license: other", '"license_name" is required'),
        ("base_model: /srv/me/base", '"base_model" with value "/srv/me/base" is not valid'),
        ("base_model_relation: lora", '"base_model_relation" must be one of'),
        ("datasets: [./x]", '"datasets" with value'),
        ("tags: one", '"tags" must be an array'),
        ("language: German", '"language" must be'),
        ("pipeline_tag: pictures", '"pipeline_tag" must be one of'),
        ("model-index:\n- results: []", '"model-index[0].name" is required'),
        ("model-index:\n- name: x\n  results:\n  - task: {type: a}\n    metrics: []", "dataset.name"),
        ("a: [", "Invalid YAML"),
    ],
)
def test_what_it_refuses(text, said):
    errors, _ = problems(card(text))
    assert any(said in error for error in errors)


def test_a_card_without_metadata_is_a_warning():
    assert problems("# title\n") == ([], ["empty or missing yaml metadata in repo card"])
