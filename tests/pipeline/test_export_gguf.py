"""The gate of GGUF: llama.cpp is asked what the source was asked, and where it is not installed that is said."""

import importlib.util
import json
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmpeft import export_gguf, run
from mmpeft.cli.main import app
from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import DataError, HubError, OutputError, RecipeError
from mmpeft.pipeline.export_gate import Threshold
from mmpeft.pipeline.publish import prepare
from tests.data.films import film
from tests.project import write_data, write_project
from tests.tiny import IMAGE_SIZE

pytest.importorskip("gguf", reason="the gguf package is not installed")

from mmpeft.export.llama_cpp import binding
from tests.export.gguf_models import llava_of, saved, siglip_llava, tiny


def invoke(*words):
    return CliRunner().invoke(app, ["export", "gguf", *map(str, words)])


def parity_of(folder):
    return json.loads((folder / "parity.json").read_text(encoding="utf-8"))


@pytest.fixture
def base(tmp_path):
    return saved(llava_of("llama"), tmp_path / "base")


class TestWithoutLlamaCpp:
    @pytest.fixture(autouse=True)
    def absent(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cyllama.llama.llama_cpp", None)
        binding.cache_clear()
        yield
        binding.cache_clear()

    def test_it_says_what_to_install_and_is_no_failure(self, base, tmp_path):
        done = invoke(base, tmp_path / "out")
        assert done.exit_code == 0, done.output
        assert "wrote" in done.output
        (line,) = [line for line in done.output.splitlines() if "not compared" in line]
        assert line.endswith("run: pip install --no-deps cyllama")
        assert parity_of(tmp_path / "out")["passed"] is False

    def test_push_wants_to_be_asked(self, base, tmp_path):
        export_gguf(base, tmp_path / "out")
        with pytest.raises(HubError, match=r"not compared with its source .*--unverified"):
            prepare(tmp_path / "out", "me/small", license="mit")
        made = prepare(tmp_path / "out", "me/small", license="mit", base_model="me/base", unverified=True)
        assert "**It was not**" in made.card

    def test_no_question_is_needed(self, base, tmp_path):
        done = export_gguf(base, tmp_path / "out", data=tmp_path / "nowhere.json")
        assert "pip install --no-deps cyllama" in done.parity["why"]


def test_what_nobody_asked_for_is_not_compared(base, tmp_path):
    done = invoke(base, tmp_path / "out", "--no-parity", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["parity"] == {"passed": False, "why": "it was not compared with its source"}


def test_what_is_wrong_is_said_before_anything_is_read(base, tmp_path):
    with pytest.raises(RecipeError, match=r"outtype 'q4_0': expected one of q8_0, f16, bf16"):
        export_gguf(base, tmp_path / "out", outtype="q4_0", compare=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        export_gguf(base, tmp_path / "out")


def decided(made):
    """A model for which the picture and each word count, and its processor."""
    model, processor = made
    model.model.multi_modal_projector.linear_2.weight.data *= 50
    model.lm_head.weight.data *= 30
    return model, processor


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run with pictures that llama.cpp takes as the processor does: square, and as large as the tower's."""
    folder = tmp_path_factory.mktemp("project")
    saved(decided(siglip_llava("llama", tied=False)), folder / "base")
    for file in (write_data(folder / "data") / "images").iterdir():
        Image.open(file).resize((IMAGE_SIZE, IMAGE_SIZE)).save(file)
    run(Recipe.from_yaml(write_project(folder)))
    return folder


@pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="llama.cpp is not installed (pip install --no-deps cyllama)"
)
class TestWithLlamaCpp:
    def rows(self, project, name, *turns, **media):
        """A data file of one sample; texts of user and assistant in turn."""
        talk = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
        (project / name).write_text(json.dumps([{"id": "one", "conversations": talk, **media}]))
        return project / name

    @pytest.mark.slow
    def test_the_runs_own_questions_are_asked_of_both(self, project, tmp_path):
        done = invoke(project / "run" / "adapter", tmp_path / "out", "--outtype", "f16", "--json")
        parity = parity_of(tmp_path / "out")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["parity"] == parity
        assert parity["passed"]
        assert parity["data"] == "data.eval of its run"
        assert parity["questions"] == 4
        assert parity["threshold"] == {"top1": 0.95, "kl": 0.05, "drop": 0.01, "answers": 0.95}
        assert parity["agreement"]["answers"] == 1
        assert parity["agreement"]["top1"] == 1
        assert abs(parity["agreement"]["kl"]) < 1e-3
        assert parity["agreement"]["tokens"] > 8
        assert set(parity["metrics"]["export"]) == {"exact_match"}
        assert parity["bytes"]["source"] > parity["bytes"]["export"] > 0
        # Not everywhere does the system tell.
        assert all(size > parity["bytes"][which] for which, size in parity.get("memory", {}).items())
        assert parity["runtime"].startswith("llama.cpp b")
        made = prepare(tmp_path / "out", "me/small", license="mit", base_model="me/base")
        assert "| Agreement: Answers | 1" in made.card

    @pytest.mark.slow
    def test_what_llama_cpp_computes_otherwise_does_not_pass(self, project, tmp_path):
        """CLIP, of which llama.cpp loses the first patch."""
        base = saved(decided(llava_of("llama", tied=False)), tmp_path / "base")
        data, root = project / "data" / "eval.json", project / "data" / "images"
        done = invoke(base, tmp_path / "out", "--data", data, "--media-root", root, "--outtype", "f16")
        assert done.exit_code == 1, done.output
        parity = parity_of(tmp_path / "out")
        assert parity["agreement"]["kl"] > 0.01
        assert "the same answer is given to" in parity["why"]
        assert f"parity not passed: {parity['why']}" in done.output
        with pytest.raises(HubError, match="too far from those of its source"):
            prepare(tmp_path / "out", "me/small", license="mit", unverified=True)

    def test_layers_are_named_that_int8_changes_most(self, project, tmp_path):
        data = self.rows(project, "text.json", "2 and 2?", "4")
        limits = Threshold(kl=-1.0)
        done = export_gguf(project / "base", tmp_path / "out", data=data, threshold=limits)
        found = {each["name"]: each["error"] for each in done.parity["layers"]}
        assert found.keys() == set(done.result.quantized)
        assert all(0 < error < 0.03 for error in found.values())
        assert f"most is changed by {max(found, key=found.get)}" in done.parity["why"]

    def test_pictures_in_later_turns_have_their_place(self, project, tmp_path):
        data = self.rows(
            project,
            "turns.json",
            "<image>\nbright?",
            "yes, or no",
            "and <image> this?",
            "no, it is not",
            "sure?",
            "yes",
            image=["eval-1.png", "eval-2.png"],
        )
        done = export_gguf(
            project / "base", tmp_path / "out", outtype="f16", data=data, media_root=project / "data" / "images"
        )
        assert done.parity["questions"] == 3
        # Each answer's tokens and the one that ends it.
        assert done.parity["agreement"]["tokens"] == len("yes, or no") + len("no, it is not") + len("yes") + 3
        assert abs(done.parity["agreement"]["kl"]) < 1e-3
        assert done.parity["agreement"]["answers"] == 1

    def test_text_alone_is_asked_too(self, project, tmp_path):
        data = self.rows(project, "text.json", "2 and 2?", "4")
        done = export_gguf(project / "base", tmp_path / "out", outtype="f16", data=data)
        assert abs(done.parity["agreement"]["kl"]) < 1e-3

    def test_penalties_of_the_source_are_left_out(self, project, tmp_path):
        """llama.cpp knows nothing of them."""
        settings = json.loads((project / "base" / "generation_config.json").read_text())
        base = saved(decided(siglip_llava("llama", tied=False)), tmp_path / "base")
        (base / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 50.0}))
        data = self.rows(project, "text.json", "2 and 2?", "4")
        done = export_gguf(base, tmp_path / "out", outtype="f16", data=data)
        assert done.parity["agreement"]["answers"] == 1

    @pytest.mark.parametrize(
        ("family", "projector", "size"),
        [
            ("qwen2_5_vl", "model.visual.merger.mlp.2", (240, 160)),
            ("smolvlm", "model.connector.modality_projection.proj", (16, 16)),
            ("idefics3", "model.connector.modality_projection.proj", (16, 16)),
        ],
    )
    def test_other_families_write_pictures_in_their_way(self, family, projector, size, project, tmp_path):
        model, processor = tiny(family)
        model.get_submodule(projector).weight.data *= 50
        if family == "qwen2_5_vl":
            # llama.cpp (b9190) takes 0, which to large models makes no difference.
            model.config.text_config.rms_norm_eps = 1e-20
            processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 240 * 160}
        saved((model, processor), tmp_path / "base")
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / "ramp.png")
        data = self.rows(
            tmp_path, "data.json", "<image>\nbright?", "yes", "and <image> this?", "no", image=["ramp.png"] * 2
        )
        done = export_gguf(tmp_path / "base", tmp_path / "out", outtype="f16", data=data)
        # With the picture turned it is above 1e-5.
        assert abs(done.parity["agreement"]["kl"]) < 1e-5

    def test_films_are_refused(self, tmp_path):
        made = tiny("qwen2_5_vl")
        film(tmp_path / "film.mp4")
        data = self.rows(tmp_path, "data.json", "<video>\nbright?", "yes", video="film.mp4")
        with pytest.raises(DataError, match=r"sample 'one' has films or recordings.*give --data FILE without them"):
            export_gguf(saved(made, tmp_path / "base"), tmp_path / "out", data=data)
        assert not (tmp_path / "out").exists()

    def test_nothing_to_compare_on_is_said_before_anything_is_written(self, base, tmp_path):
        with pytest.raises(DataError, match=r"nothing to compare the export on.*give --data FILE"):
            export_gguf(base, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_lora_alone_is_not_compared(self, project, tmp_path):
        done = invoke(project / "run" / "adapter", tmp_path / "out", "--lora")
        assert done.exit_code == 0, done.output
        assert "a LoRA alone has no language model; compare an export without --lora" in done.output
        assert "metrics" not in parity_of(tmp_path / "out")
