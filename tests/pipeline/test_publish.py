"""What would be pushed, and what is refused: nothing here reaches a hub."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mmpeft import AdapterError, HubError, ModelError, Recipe, run
from mmpeft.core.files import read_json, write_json
from mmpeft.pipeline.publish import prepare, preview, push_prepared
from tests.hub.cards import problems
from tests.pipeline.fake_run import write_fake_run
from tests.project import TWO_STAGES, write_base, write_project

SHORT = [{**TWO_STAGES[0], "max_steps": 2}, {**TWO_STAGES[1], "max_steps": 2}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    run(Recipe.from_yaml(write_project(folder, stages=SHORT)))
    return folder


@pytest.fixture
def project(trained, tmp_path):
    """A copy that a test may spoil."""
    copy = tmp_path / "project"
    shutil.copytree(trained, copy)
    for file in (copy / "run").rglob("*"):
        if file.suffix in (".json", ".yaml"):
            file.write_text(file.read_text().replace(str(trained), str(copy)))
    return copy


@pytest.fixture
def made(trained):
    return prepare(trained / "run", "me/receipts", base_model="me/base", license="apache-2.0")


def contents(publication):
    return {
        name: source.read_bytes() if isinstance(source, Path) else source for name, source in publication.files.items()
    }


def export(folder: Path, kind: str, parity: dict | None) -> Path:
    """An export as the exporters leave it: tiny weights, its origin, and how it compared with its source."""
    if kind in ("onnx", "gguf"):
        write_base(folder)
        for file in [*folder.glob("*.safetensors"), folder / "config.json"]:
            file.unlink()
        (folder / f"decoder.{kind}").write_bytes(b"GGUF" + bytes(64))
    else:
        write_base(folder)
    facts = {"artefact": ARTEFACTS[kind], "base_model": "org/base-7B", "versions": {"mmpeft": "0.1.0"}}
    write_json(folder / "mmpeft.json", facts)
    if parity is not None:
        write_json(folder / "parity.json", parity)
    return folder


ARTEFACTS = {
    "int8": "int8 model",
    "bnb": "bitsandbytes model",
    "onnx": "ONNX model",
    "gguf": "GGUF",
    "merged": "merged model",
}

PASSED = {
    "passed": True,
    "why": "",
    "threshold": {"top1": 0.98},
    "agreement": {"tokens": 100, "top1": 0.9941, "kl": 0.0012},
    "metrics": {"source": {"exact_match": 0.94}, "export": {"exact_match": 0.93}},
    "bytes": {"source": 1000, "export": 530},
}


def test_a_run_brings_adapter_processor_card_scores_recipe_and_charts(made):
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "evaluation.json",
        "figures/accuracy.svg",
        "figures/loss.svg",
        "mmpeft.json",
        "processor_config.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    } == set(made.files)


def test_nothing_in_it_names_a_folder_of_this_machine(made, trained):
    for name, content in contents(made).items():
        assert str(trained).encode() not in content, name
    facts = json.loads(contents(made)["mmpeft.json"])
    assert facts["base_model"] == facts["recipe"]["model"] == "me/base"
    assert facts["base_model_relative"] is None
    assert facts["recipe"]["data"]["train"] == facts["data"]["train"]["file"] == "data/train.json"
    assert facts["recipe"]["output"] == "run"
    assert yaml.safe_load(contents(made)["recipe.yaml"])["data"]["media_root"] == "data/images"
    assert json.loads(contents(made)["adapter_config.json"])["base_model_name_or_path"] == "me/base"


def test_what_lies_here_is_left_as_it_is(project):
    before = {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}
    prepare(project / "run", "me/receipts", base_model="me/base")
    assert before == {file: file.read_bytes() for file in project.rglob("*") if file.is_file()}


def test_the_adapter_of_a_run_is_the_run(trained, made):
    again = prepare(trained / "run" / "adapter", "me/receipts", base_model="me/base", license="apache-2.0")
    assert contents(again) == contents(made)


def test_its_card_says_what_it_is_and_passes_the_hubs_rules(made, trained):
    assert problems(made.card) == ([], [])
    data = ModelCard(made.card).data
    assert (data.base_model, data.get("base_model_relation")) == ("me/base", "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "image-text-to-text", "apache-2.0")
    after = read_json(trained / "run" / "evaluation.json")["after"]["metrics"]
    assert {row.metric_type: row.metric_value for row in data.eval_results} == after
    for said in (
        'from_pretrained("me/receipts")',
        'mmpeft.load_model("me/receipts")',
        "modules_to_save",
        "It was not run in vLLM",
        "![Training loss by step](figures/loss.svg)",
        "mmpeft reproduce me/receipts",
    ):
        assert said in made.card


def test_every_figure_of_the_card_stands_in_a_file_of_the_run(made, trained):
    """Shares to one decimal, counts, hashes: each number of its tables is one of the record's."""
    told = json.dumps(json.loads(contents(made)["mmpeft.json"]))
    known = {text for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", told) for text in _ways(number)}
    body = made.card.split("---\n", 2)[2].split("## Recipe")[0]
    for row in re.findall(r"^\|.*\|$", body, re.M):
        for number in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\w.])", row.replace("SHA-256", "")):
            assert number.replace(",", "") in known, row


def _ways(number: str) -> set[str]:
    value = float(number)
    return {number, f"{value:g}", f"{value:.1f}", f"{value * 100:.1f}", f"{value:.0f}", f"{value / 1e6:.2f}"}


def test_a_base_that_only_lies_here_is_refused_with_file_and_line(trained):
    with pytest.raises(HubError, match=r"adapter_config.json:\d+: base_model_name_or_path.*--base-model") as caught:
        prepare(trained / "run", "me/receipts")
    line = int(re.search(r"adapter_config.json:(\d+)", str(caught.value))[1])
    lines = (trained / "run" / "adapter" / "adapter_config.json").read_text().splitlines()
    assert "base_model_name_or_path" in lines[line - 1]


def test_a_licence_is_that_of_the_bases_card(project):
    (project / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n")
    made = prepare(project / "run", "me/receipts", base_model="me/base")
    assert made.license == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert ModelCard(made.card).data.license_name == "mine"
    assert problems(made.card) == ([], [])
    (project / "base" / "README.md").unlink()
    made = prepare(project / "run", "me/receipts", base_model="me/base")
    assert made.license == {}
    assert ModelCard(made.card).data.license is None
    with pytest.raises(HubError, match="licence is not known, and the repository would be public"):
        push_prepared(made, private=False)


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("notes.md", "a\nmy token is hf_" + "aB3" * 11, 2),
        ("chat_template.jinja", "{# from /srv/alice/templates/x.jinja #}", 1),
        ("evaluation.json", '{\n "key": "AKIAABCDEFGH12345678"\n}', 2),
    ],
)
def test_a_secret_or_a_path_that_cannot_be_rewritten_is_named_and_nothing_goes(project, file, text, line):
    place = project / "run" if file == "evaluation.json" else project / "run" / "adapter"
    (place / file).write_text(text)
    with pytest.raises(HubError, match=f"(?s)must not leave this machine.*{re.escape(file)}:{line}: "):
        prepare(project / "run", "me/receipts", base_model="me/base")
    made = prepare(project / "run", "me/receipts", base_model="me/base", exclude=[file])
    assert file not in made.files


def test_a_card_of_ones_own_is_searched_too(trained, tmp_path):
    own = tmp_path / "mine.md"
    own.write_text("# mine\n")
    assert prepare(trained / "run", "me/x", base_model="me/base", card=own).card == "# mine\n"
    own.write_text(f"# mine, from {trained}\n")
    with pytest.raises(HubError, match=r"README.md:1: an absolute path"):
        prepare(trained / "run", "me/x", base_model="me/base", card=own)


def test_what_training_leaves_behind_does_not_go(project):
    adapter = project / "run" / "adapter"
    torch.save({}, adapter / "training_args.bin")
    (adapter / "checkpoint-4").mkdir()
    (adapter / "checkpoint-4" / "x.json").write_text("{}")
    (adapter / ".env").write_text("TOKEN=1")
    (adapter / "more.zip").write_bytes(b"PK")
    made = prepare(adapter, "me/x", base_model="me/base")
    assert not {"training_args.bin", "checkpoint-4/x.json", ".env"} & set(made.files)
    assert made.left_out["training_args.bin"] == "pickled: reading it can run code"
    assert made.left_out[".env"] == "hidden"
    assert made.left_out["more.zip"] == "packed: it cannot be searched for secrets"


def test_a_link_out_of_the_folder_is_refused_by_name(project, tmp_path):
    adapter, private = project / "run" / "adapter", tmp_path / "private"
    private.mkdir()
    (private / "diary.txt").write_text("dear diary")
    (adapter / "notes.txt").symlink_to(private / "diary.txt")
    with pytest.raises(HubError, match=r"notes.txt: a link to .*diary.txt.*--exclude notes.txt"):
        prepare(adapter, "me/x", base_model="me/base")
    (adapter / "private").symlink_to(private)
    (adapter / "nowhere").symlink_to(private / "gone")
    made = prepare(adapter, "me/x", base_model="me/base", exclude=("notes.txt",))
    assert not {name for name in made.files if "notes" in name or "private" in name}
    assert made.left_out["private"] == made.left_out["nowhere"] == "a link to a folder, or to nothing"
    (adapter / "inside.txt").symlink_to("README.md")
    (adapter / "README.md").write_text("inside")
    assert "inside.txt" in prepare(adapter, "me/x", base_model="me/base", exclude=("notes.txt",)).files


def test_a_model_in_the_hubs_cache_may_be_pushed(tmp_path):
    """Its files are links to what was downloaded."""
    cache = tmp_path / "models--org--base"
    snapshot = write_base(cache / "snapshots" / "0123abc")
    (cache / "blobs").mkdir()
    for file in snapshot.iterdir():
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert "model.safetensors" in prepare(snapshot, "me/base").files


def test_where_the_hub_may_not_be_asked_it_is_said_at_once(made):
    with pytest.raises(HubError, match="me/receipts: HF_HUB_OFFLINE is set; unset it to push"):
        push_prepared(replace(made, base_folder=None), private=True)


class TestNotWhole:
    def test_weights_that_are_no_numbers(self, project):
        file = project / "run" / "adapter" / "adapter_model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[1]
        weights[name].view(-1)[3] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match=f"{re.escape(name)} has values that are not finite"):
            prepare(project / "run", "me/x", base_model="me/base")

    def test_no_processor(self, project):
        (project / "run" / "adapter" / "processor_config.json").unlink()
        with pytest.raises(AdapterError, match=r"no processor .* save it there"):
            prepare(project / "run", "me/x", base_model="me/base")

    def test_weights_that_are_not_there(self, project):
        (project / "run" / "adapter" / "adapter_model.safetensors").unlink()
        with pytest.raises(AdapterError, match=r"no adapter_model.safetensors"):
            prepare(project / "run", "me/x", base_model="me/base")

    @pytest.mark.parametrize("how", ["missing", "truncated", "no header"])
    def test_a_shard(self, tmp_path, how):
        base = write_base(tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        names = sorted(weights)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in parts.items():
            save_file({name: weights[name] for name in part}, base / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        write_json(base / "model.safetensors.index.json", index)
        assert set(parts) <= set(prepare(base, "me/base").files)
        shard = base / "model-00002-of-00002.safetensors"
        if how == "missing":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[: -10 if how == "truncated" else 5])
        with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors"):
            prepare(base, "me/base")

    def test_settings_that_cannot_be_read(self, project):
        adapter = project / "run" / "adapter"
        for text, said in (("{", "cannot be read"), ("[]", "holds a list")):
            (adapter / "adapter_config.json").write_text(text)
            for make in (lambda: prepare(adapter, "me/x", base_model="me/base"), lambda: preview(adapter)):
                with pytest.raises(AdapterError, match=rf"adapter_config.json: {said}.*train or copy it again"):
                    make()

    @pytest.mark.parametrize("name", ["mmpeft.json", "parity.json"])
    def test_facts_that_cannot_be_read(self, tmp_path, name):
        folder = export(tmp_path / "out", "int8", PASSED)
        for text, said in (("{", "not valid JSON"), ("[]", "holds a list")):
            (folder / name).write_text(text)
            with pytest.raises(HubError, match=rf"{name}: {said}.*make it again"):
                prepare(folder, "me/small")

    def test_limits_that_are_infinite_are_weights_like_any_other(self, tmp_path):
        """Gemma 4 clamps by buffers of one number, which may be infinite."""
        base = write_base(tmp_path / "base")
        weights = load_file(base / "model.safetensors")
        for limit in (float("inf"), float("nan")):
            stored = {**weights, "model.clamp.max": torch.tensor(limit)}
            save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
            if limit == float("inf"):
                assert "model.safetensors" in prepare(base, "me/base").files
        with pytest.raises(ModelError, match=r"model.clamp.max has values that are not finite"):
            prepare(base, "me/base")

    @pytest.mark.parametrize("kind", ["onnx", "gguf"])
    def test_a_file_of_an_export(self, tmp_path, kind):
        data = f"decoder.{kind}.data" if kind == "onnx" else f"more.{kind}"
        folder = export(tmp_path / "out", kind, PASSED)
        (folder / data).write_bytes(b"GGUF" + bytes(90))
        facts = read_json(folder / "mmpeft.json")
        sizes = {name: (folder / name).stat().st_size for name in (f"decoder.{kind}", data)}
        write_json(folder / "mmpeft.json", {**facts, "files": sorted(sizes), "sizes": sizes})
        assert set(sizes) <= set(prepare(folder, "me/small").files)
        (folder / data).write_bytes(b"GGUF" + bytes(80))
        with pytest.raises(ModelError, match=rf"{re.escape(data)}: cut short or changed: it has 84 bytes"):
            prepare(folder, "me/small")
        (folder / data).unlink()
        with pytest.raises(ModelError, match=rf"no {re.escape(data)}; make it again"):
            prepare(folder, "me/small")

    def test_a_run_that_has_not_ended(self, project):
        shutil.rmtree(project / "run" / "adapter")
        with pytest.raises(HubError, match="no result yet"):
            prepare(project / "run", "me/x")

    def test_a_folder_that_holds_something_else(self, tmp_path):
        with pytest.raises(HubError, match=r"holds no adapter_config.json, no config.json"):
            prepare(tmp_path, "me/x")
        with pytest.raises(HubError, match="no such directory"):
            prepare(tmp_path / "nowhere", "me/x")

    @pytest.mark.parametrize("repo", ["x", "me/x/y", "me/", "a b/c", "/me/x"])
    def test_a_name_that_no_repository_has(self, trained, repo):
        with pytest.raises(HubError, match="no name of a repository"):
            prepare(trained / "run", repo, base_model="me/base")


@pytest.mark.parametrize("kind", ["int8", "bnb", "onnx", "gguf", "merged"])
class TestExports:
    def test_one_that_passed_goes_with_its_figures(self, tmp_path, kind):
        made = prepare(export(tmp_path / "out", kind, PASSED), "me/small", license="mit")
        assert made.kind == kind
        assert {"parity.json", "mmpeft.json", "processor_config.json"} <= set(made.files)
        assert problems(made.card) == ([], [])
        data = ModelCard(made.card).data
        assert data.base_model == "org/base-7B"
        assert data.get("base_model_relation") == ("finetune" if kind == "merged" else "quantized")
        assert kind in data.tags
        assert "| Agreement: Top1 | 0.9941 |" in made.card
        assert "| Bytes: Export | 530 |" in made.card
        assert "| threshold: Top1 | 0.98 |" in made.card
        assert "No held-out question was scored" not in made.card
        assert "mmpeft 0.1.0" in made.card.split("## Versions")[1]
        for block in re.findall(r"```python\n(.*?)```", made.card, re.S):
            compile(block, "card", "exec")

    def test_one_that_failed_is_refused(self, tmp_path, kind):
        folder = export(tmp_path / "out", kind, {**PASSED, "passed": False, "why": "top-1 agreement 0.41"})
        with pytest.raises(HubError, match=r"too far from those of its source .*top-1 agreement 0.41"):
            prepare(folder, "me/small", unverified=True)

    def test_one_that_was_not_compared_has_to_be_asked_for(self, tmp_path, kind):
        folder = export(tmp_path / "out", kind, None)
        if kind == "merged":
            assert "Compared" not in prepare(folder, "me/small").card
            return
        with pytest.raises(HubError, match=r"not compared with its source .*--unverified"):
            prepare(folder, "me/small")
        card = prepare(folder, "me/small", unverified=True).card
        assert "**It was not**" in card
        assert problems(card) == ([], [])


def test_an_export_that_nobody_compared_counts_as_not_compared(tmp_path):
    folder = export(tmp_path / "out", "int8", {"passed": False, "why": "it was not compared with its source"})
    with pytest.raises(HubError, match=r"not compared with its source .*--unverified"):
        prepare(folder, "me/small")


def test_the_card_of_a_run_can_be_seen_before(tmp_path, trained):
    assert "# run\n" in preview(trained / "run")
    assert "# receipts\n" in preview(trained / "run", "me/receipts")
    fake = write_fake_run(tmp_path)
    with pytest.raises(HubError):
        preview(fake)


def test_pure_lora_says_how_vllm_serves_it(project):
    adapter = project / "run" / "adapter"
    weights = {
        name: tensor for name, tensor in load_file(adapter / "adapter_model.safetensors").items() if ".lora_" in name
    }
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    card = prepare(project / "run", "me/receipts", base_model="me/base").card
    assert "vllm serve me/base --enable-lora --lora-modules receipts=me/receipts" in card


def test_a_model_that_a_run_trained_in_full_goes_with_the_runs_record(tmp_path):
    stages = [{"name": "tower", "train": {"vision": "full"}, "learning_rate": 1e-4, "max_steps": 1}]
    run(Recipe.from_yaml(write_project(tmp_path, stages=stages)))
    made = prepare(tmp_path / "run", "me/seeing", license="mit")
    assert made.kind == "model"
    assert {"config.json", "model.safetensors", "evaluation.json", "figures/loss.svg"} <= set(made.files)
    assert problems(made.card) == ([], [])
    assert "| Vision | full, 7,680 parameters, 7,680 trained in the last stage |" in made.card
    assert ModelCard(made.card).data.eval_results
    assert str(tmp_path) not in made.card


def test_a_base_by_itself_says_what_it_is_and_no_more(tmp_path):
    card = prepare(write_base(tmp_path / "base"), "me/base").card
    assert "not recorded" not in card.replace("Licence of this: not recorded", "").replace("Versions: not recorded", "")
    assert "| Base model |" not in card


def test_a_merged_model_is_known_by_its_facts(tmp_path):
    facts = {"artefact": "merged model", "files": [], "base_model": "org/base", "merged_adapter": "runs/x/adapter"}
    write_json(write_base(tmp_path / "merged") / "mmpeft.json", facts)
    made = prepare(tmp_path / "merged", "me/merged", license="mit")
    assert made.kind == "merged"
    assert ModelCard(made.card).data.base_model == "org/base"
    assert "an adapter merged into its base" in made.card
