import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmpeft import AdapterError, DataError, ModelError, Recipe, merge, run
from mmpeft.cli.main import app
from mmpeft.core.files import read_json, write_json
from mmpeft.pipeline.directory import RunDirectory
from mmpeft.pipeline.reproduce import reproduce
from tests.project import TWO_STAGES, write_project
from tests.tiny import tiny_clip, tiny_image_processor, tiny_llama, tiny_tokenizer

SHORT = [{**TWO_STAGES[0], "max_steps": 2}, {**TWO_STAGES[1], "max_steps": 2}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    run(Recipe.from_yaml(write_project(folder, stages=SHORT, deterministic=True)))
    return folder


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy whose facts a test may change."""
    shutil.copytree(trained / "run" / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter, **facts):
    file = adapter / "mmpeft.json"
    write_json(file, {**read_json(file), **facts})


def test_the_same_bits_and_scores_come_out(trained, tmp_path):
    found = reproduce(trained / "run" / "adapter", output=tmp_path / "again")
    assert found.identical
    assert found.elsewhere == found.unchecked == ()
    assert (found.differing, found.largest_difference, found.tensor) == (0, 0.0, None)
    assert found.tensors == len(load_file(trained / "run" / "adapter" / "adapter_model.safetensors"))
    assert {metric: then for metric, (then, _) in found.scores.items()} == read_json(
        trained / "run" / "evaluation.json"
    )["after"]["metrics"]
    assert (tmp_path / "again" / "report.html").is_file()


def test_other_weights_are_found_and_are_status_1(adapter, tmp_path):
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    done = CliRunner().invoke(app, ["reproduce", str(adapter), "--output", str(tmp_path / "again"), "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["identical"]
    assert (found["differing"], found["tensor"]) == (1, name)
    assert found["largest_difference"] == pytest.approx(0.5)
    # On another machine bits may differ.
    change(adapter, machine={**read_json(adapter / "mmpeft.json")["machine"], "hardware": "Other CPU, 2 cores"})
    done = CliRunner().invoke(app, ["reproduce", str(adapter), "--output", str(tmp_path / "again")])
    assert done.exit_code == 0
    assert "not the same: hardware: Other CPU, 2 cores then" in done.stdout


class TestWhatHasChanged:
    def test_the_base(self, trained, adapter, tmp_path):
        base = tmp_path / "base"
        shutil.copytree(trained / "base", base)
        weights = load_file(base / "model.safetensors")
        save_file({name: tensor * 2 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"base: not the model .* differ: model.safetensors.* --set model=DIR"):
            reproduce(adapter, output=tmp_path / "again", overrides=[f"model={base}"])
        assert not (tmp_path / "again" / "stages").exists()

    def test_the_commit_of_a_base_from_the_hub(self, trained, adapter, tmp_path):
        """Fetched into a directory, as the message says, its commit stands beside the files."""
        base = tmp_path / "base"
        shutil.copytree(trained / "base", base)
        change(adapter, base=[{"role": "model", "name": "me/base", "commit": "a" * 40}])
        note = base / ".cache" / "huggingface" / "download" / "config.json.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'b' * 40}\n{'c' * 40}\n1.0\n")
        with pytest.raises(ModelError, match=rf"newest commit is {'b' * 40}, .* trained on {'a' * 40}; fetch that one"):
            reproduce(adapter, output=tmp_path / "again", overrides=[f"model={base}"])
        note.write_text(f"{'a' * 40}\n{'c' * 40}\n1.0\n")
        assert reproduce(adapter, output=tmp_path / "again", overrides=[f"model={base}"]).unchecked == ()
        note.unlink()
        found = reproduce(adapter, output=tmp_path / "again", overrides=[f"model={base}"])
        assert "was not compared: a directory" in found.unchecked[0]

    def test_the_training_file(self, trained, adapter, tmp_path):
        rows = read_json(trained / "data" / "train.json")
        write_json(tmp_path / "train.json", rows[:-1])
        with pytest.raises(DataError, match=r"train.json: not the data.train .*22 samples.*--set data.train=FILE"):
            reproduce(adapter, output=tmp_path / "again", overrides=[f"data.train={tmp_path / 'train.json'}"])

    @pytest.mark.slow
    @pytest.mark.parametrize("hashed", [True, False])
    def test_the_media(self, trained, adapter, tmp_path, monkeypatch, hashed):
        images = tmp_path / "images"
        shutil.copytree(trained / "data" / "images", images)
        if hashed:
            assert reproduce(adapter, output=tmp_path / "as before", overrides=[f"data.media_root={images}"]).identical
            shutil.copyfile(images / "train-1.png", images / "train-2.png")
        else:
            monkeypatch.setattr("mmpeft.pipeline.origin.HASHED", 10)
            change(adapter, media={"train": "sizes:0", "eval": None})
        with pytest.raises(DataError, match=r"the media of data.train are not those .* --set data.media_root=FOLDER"):
            reproduce(adapter, output=tmp_path / "again", overrides=[f"data.media_root={images}"])

    def test_a_file_that_is_gone(self, adapter, tmp_path):
        with pytest.raises(DataError, match="Say where the data lie now"):
            reproduce(adapter, output=tmp_path / "again", overrides=[f"data.train={tmp_path / 'gone.json'}"])

    def test_what_was_not_recorded_is_said(self, adapter, tmp_path):
        facts = read_json(adapter / "mmpeft.json")
        for key in ("base", "media", "machine"):
            del facts[key]
        write_json(adapter / "mmpeft.json", facts)
        found = reproduce(adapter, output=tmp_path / "again")
        assert found.identical
        assert len(found.unchecked) == 3
        assert "base model was not compared" in found.unchecked[0]
        assert found.elsewhere == ("what it was made with is not recorded",)


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read"), ("[]", "holds a list")])
def test_a_damaged_record_is_refused(text, said, adapter):
    (adapter / "mmpeft.json").write_text(text)
    with pytest.raises(AdapterError, match=f"mmpeft.json: {said}"):
        reproduce(adapter)


def test_an_adapter_without_a_record_is_refused(adapter, tmp_path):
    (adapter / "mmpeft.json").unlink()
    with pytest.raises(AdapterError, match=r"no mmpeft.json with a recipe"):
        reproduce(adapter, output=tmp_path / "again")


def test_the_run_itself_is_not_written_over(trained):
    with pytest.raises(AdapterError, match="the adapter itself lies there"):
        reproduce(trained / "run" / "adapter", output=trained / "run")


@pytest.mark.slow
def test_a_composed_base_is_composed_again(tmp_path):
    tokenizer = tiny_tokenizer(image_token=False)
    for name, parts in (
        ("vision", (tiny_clip(), tiny_image_processor())),
        ("language", (tiny_llama(tokenizer), tokenizer)),
    ):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    model = {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "language"), "vision_feature_layer": -1}
    run(Recipe.from_yaml(write_project(tmp_path, model=model, stages=SHORT[:1])))
    found = reproduce(tmp_path / "run" / "adapter", output=tmp_path / "again")
    assert found.identical
    tiny_clip(seed=1).save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match=r"not the vision .* --set model.vision=DIR"):
        reproduce(tmp_path / "run" / "adapter", output=tmp_path / "other")
    # What was composed is recorded as well: the adapter is not merged into anything else.
    merge(tmp_path / "run" / "adapter", tmp_path / "merged")
    [weights] = RunDirectory(tmp_path / "run").base_model.glob("*.safetensors")
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(AdapterError, match=r"model\.safetensors has changed since the adapter was trained"):
        merge(tmp_path / "run" / "adapter", tmp_path / "other")
