"""Models and adapters to the Hub and back: over HTTP, each client a process with a cache of its own."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from mmpeft.core.files import read_json
from tests.hub import local_hub
from tests.plain import PRELUDE
from tests.project import write_data, write_project

COMMON = f"""{PRELUDE}
import sys
from pathlib import Path
import torch
from PIL import Image

def inputs(processor):
    picture = Image.new("RGB", (9, 9), (200, 40, 90))
    return processor(images=[picture], text=["<image>这是什么?"], return_tensors="pt")

def logits(model, processor):
    with torch.no_grad():
        return model(**inputs(processor)).logits
"""

PUBLISH = f"""{COMMON}
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, get_peft_model
from mmpeft import compose_model, load_model
from tests.tiny import tiny_clip, tiny_image_processor, tiny_llama, tiny_tokenizer

tokenizer = tiny_tokenizer(image_token=False)
tiny_clip().push_to_hub("me/clip")
tiny_image_processor().push_to_hub("me/clip")
tiny_llama(tokenizer).push_to_hub("me/lm")
tokenizer.push_to_hub("me/lm")

made = {{}}
model, processor = compose_model(
    vision=tiny_clip(), language=tiny_llama(tokenizer), tokenizer=tokenizer, image_processor=tiny_image_processor()
)
made["in memory"] = logits(model, processor)
for repo, projector in (("me/base", "mlp"), ("me/own", "pixel_shuffle_mlp")):
    model, processor = compose_model(vision="me/clip", language="me/lm", projector=projector)
    made[repo], made[f"{{repo}} class"] = logits(model, processor), type(model).__name__
    model.push_to_hub(repo)
    processor.push_to_hub(repo)

base, processor = load_model("me/base")
folder = Path(sys.argv[2])
base.config.save_pretrained(folder)
processor.save_pretrained(folder)
torch.save(base.state_dict(), folder / "pytorch_model.bin")
create_repo("me/pickled")
upload_folder(repo_id="me/pickled", folder_path=folder)

config = LoraConfig(
    r=2,
    target_modules=r".*language_model.*\\.q_proj",
    modules_to_save=["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    init_lora_weights=False,
)
adapted = get_peft_model(base, config).eval()
made["me/adapter"] = logits(adapted, processor)
adapted.push_to_hub("me/adapter")

torch.save(made, sys.argv[1])
"""

LOAD = f"""{COMMON}
import mmpeft
made = {{}}
for repo in sys.argv[2:]:
    model, processor = mmpeft.load_model(repo, device="cpu")
    made[repo], made[f"{{repo}} class"] = logits(model, processor), type(model).__name__
torch.save(made, sys.argv[1])
"""

PLAIN = f"""{COMMON}
import importlib.util
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
assert importlib.util.find_spec("mmpeft") is None, "mmpeft can be imported"
made = {{}}
processor = AutoProcessor.from_pretrained("me/own", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("me/own", trust_remote_code=True).eval()
made["me/own"] = logits(model, processor)
batch = inputs(processor)
tokens = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
made["new tokens"] = tokens.shape[1] - batch["input_ids"].shape[1]
made["module"] = type(model).__module__
processor = AutoProcessor.from_pretrained("me/base")
base = AutoModelForImageTextToText.from_pretrained("me/base").eval()
made["me/base"] = logits(base, processor)
made["adapter by peft"] = logits(PeftModel.from_pretrained(base, "me/adapter").eval(), processor)
made["adapter by transformers"] = logits(AutoModelForImageTextToText.from_pretrained("me/adapter").eval(), processor)
torch.save(made, sys.argv[1])
"""

UPLOAD = f"""{COMMON}
import mmpeft
from huggingface_hub import create_repo, upload_folder
create_repo("me/trained")
upload_folder(repo_id="me/trained", folder_path=sys.argv[1])
here, there = (logits(*mmpeft.load_model(name, device="cpu")) for name in (sys.argv[1], "me/trained"))
assert torch.equal(here, there)
model, processor = mmpeft.load_model("me/base", adapter="me/trained", device="cpu")
assert torch.equal(here, logits(model, processor))
assert (here - logits(*mmpeft.load_model("me/base", device="cpu"))).abs().max() > 1e-4
"""

ERRORS = """
import json, sys
import mmpeft
said = {}
for line in sys.argv[1:]:
    try:
        mmpeft.load_model(*line.split("+")[:1], **({"adapter": line.split("+")[1]} if "+" in line else {}))
    except mmpeft.MMPeftError as error:
        said[line] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with local_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """Logits of what was pushed, by the name of its repository."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "pickled").mkdir()
    hub.python(PUBLISH, folder / "logits.pt", folder / "pickled", home=folder / "home")
    return torch.load(folder / "logits.pt", weights_only=True)


@pytest.fixture(scope="module")
def warm(hub, published, tmp_path_factory):
    """A cache that holds the base, the model of our own class and the adapter; logits of those."""
    home = tmp_path_factory.mktemp("warm")
    hub.python(LOAD, home / "logits.pt", "me/base", "me/own", "me/adapter", home=home)
    return home, torch.load(home / "logits.pt", weights_only=True)


@pytest.fixture(scope="module")
def said(hub, published, tmp_path_factory):
    """Kind and message of the error about a name, or about BASE+ADAPTER."""
    names = ("me/pickled", "me/nowhere", "me/base+me/nothing", "me/lm", "me/gated", "me/base+me/gated")
    hub.create("me/gated")
    hub.commit("me/gated", lambda draft: (draft / "adapter_config.json").write_text("{}"))
    hub.gated.add("me/gated")
    return json.loads(hub.python(ERRORS, *names, home=tmp_path_factory.mktemp("errors")))


def assert_same(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@pytest.mark.slow
class TestRoundTrip:
    def test_parts_by_hub_id_are_the_parts(self, published):
        assert published["me/base class"] == "LlavaForConditionalGeneration"
        assert published["me/own class"] == "ComposedForConditionalGeneration"
        assert_same(published["me/base"], published["in memory"])

    def test_what_was_pushed_names_no_directory_of_this_machine(self, hub, published, tmp_path_factory):
        root = str(tmp_path_factory.getbasetemp())
        for repo in ("clip", "lm", "base", "own", "adapter"):
            for file in hub.head(f"me/{repo}").rglob("*"):
                assert root.encode() not in (file.read_bytes() if file.is_file() else b""), (repo, file.name)
        assert read_json(hub.head("me/adapter") / "adapter_config.json")["base_model_name_or_path"] == "me/base"

    @pytest.mark.parametrize("repo", ["me/base", "me/own", "me/adapter"])
    def test_load_model_gives_the_same_logits(self, published, warm, repo):
        assert_same(warm[1][repo], published[repo])

    def test_classes_after_loading(self, warm):
        assert warm[1]["me/base class"] == "LlavaForConditionalGeneration"
        assert warm[1]["me/own class"] == "ComposedForConditionalGeneration"
        assert warm[1]["me/adapter class"].startswith("PeftModel")

    def test_loads_without_mmpeft(self, hub, published, tmp_path):
        hub.python(PLAIN, tmp_path / "logits.pt", home=tmp_path, mmpeft=False)
        made = torch.load(tmp_path / "logits.pt", weights_only=True)
        assert made["module"].startswith("transformers_modules.")
        assert made["new tokens"] == 5
        assert_same(made["me/own"], published["me/own"])
        assert_same(made["me/base"], published["me/base"])
        assert_same(made["adapter by peft"], published["me/adapter"])
        assert_same(made["adapter by transformers"], published["me/adapter"])
        assert (made["me/base"] - published["me/adapter"]).abs().max() > 1e-3


@pytest.mark.slow
class TestWhatCannotBeLoaded:
    def test_pickles_are_refused_unread(self, hub, said):
        kind, message = said["me/pickled"]
        assert kind == "ModelError"
        assert "me/pickled: no safetensors weights (found: pytorch_model.bin)" in message
        assert "save_pretrained" in message
        assert not [line for line in hub.requests if line.startswith("GET") and line.endswith(".bin")]

    def test_repository_that_does_not_exist(self, said):
        kind, message = said["me/nowhere"]
        assert kind == "ModelError"
        assert "me/nowhere: neither a local directory nor a repository on the Hub" in message
        assert "HF_HUB_OFFLINE" not in message

    def test_adapter_that_does_not_exist(self, said):
        kind, message = said["me/base+me/nothing"]
        assert kind == "AdapterError"
        assert "me/nothing: neither a local directory nor a repository on the Hub" in message

    @pytest.mark.parametrize("line", ["me/gated", "me/base+me/gated"])
    def test_gated_repository(self, said, line):
        _, message = said[line]
        assert "me/gated: a gated repository" in message
        assert "hf auth login" in message

    def test_language_model_alone(self, said):
        kind, message = said["me/lm"]
        assert kind == "ModelError"
        assert "'llama' is not supported" in message
        assert "compose_model" in message


@pytest.mark.slow
class TestHubThatCannotBeReached:
    NAMES = ("me/never", "me/base+me/other")

    def check(self, said):
        for line, name, expected in (
            ("me/never", "me/never", "ModelError"),
            ("me/base+me/other", "me/other", "AdapterError"),
        ):
            kind, message = said[line]
            assert kind == expected
            assert message.startswith(f"{name}: no such directory here, and the Hub cannot be reached")
            assert "give a local directory" in message

    def test_server_that_is_down(self, hub, tmp_path):
        """huggingface_hub tries for some twenty seconds; the first failure is the last."""
        down = {"HF_ENDPOINT": "http://127.0.0.1:9"}
        self.check(json.loads(hub.python(ERRORS, *self.NAMES, home=tmp_path, timeout=60, **down)))

    def test_offline_what_is_cached_still_loads(self, hub, published, warm, tmp_path):
        home, _ = warm
        program = f"{LOAD}\nsys.argv = ['', *{self.NAMES}]\n{ERRORS}"
        repos = ("me/base", "me/own", "me/adapter")
        before = len(hub.requests)
        printed = hub.python(program, tmp_path / "logits.pt", *repos, home=home, HF_HUB_OFFLINE="1")
        assert len(hub.requests) == before
        made = torch.load(tmp_path / "logits.pt", weights_only=True)
        for repo in repos:
            assert_same(made[repo], published[repo])
        self.check(json.loads(printed))


@pytest.mark.slow
def test_a_run_from_a_hub_id(hub, published, tmp_path):
    write_data(tmp_path / "data", train=8, held_out=2)
    (tmp_path / "base").mkdir()  # so that write_project writes no model
    stages = [
        {"name": "projector", "train": {"projector": "full"}, "learning_rate": 1e-2, "max_steps": 2},
        {"name": "language", "train": {"language": {"r": 2}}, "learning_rate": 1e-2, "max_steps": 2},
    ]
    recipe = write_project(tmp_path, model="me/base", stages=stages, batch={"size": 4, "micro": 4})
    home = tmp_path / "home"

    def run_again():
        done = subprocess.run(
            [sys.executable, "-m", "mmpeft", "run", str(recipe)],
            env=hub.environment(home),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout + done.stderr

    assert "unchanged" not in run_again()
    adapter = tmp_path / "run" / "adapter"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == "me/base"
    facts = read_json(adapter / "mmpeft.json")
    assert facts["base_model"] == "me/base"
    assert str(home) not in yaml.safe_dump(facts)
    hub.python(UPLOAD, adapter, home=home)
    assert run_again().count("unchanged") == 2
    hub.commit("me/base", lambda draft: (draft / "README.md").write_text("# another commit"))
    assert "unchanged" not in run_again()


@pytest.mark.slow
def test_graphs_on_the_hub_are_known_by_their_list(hub, tmp_path):
    hub.create("me/graphs")
    hub.commit("me/graphs", lambda draft: (draft / "onnx.json").write_text("{}"))
    done = hub.mmpeft("generate", "me/graphs", "--prompt", "x", home=tmp_path / "home")
    assert done.returncode == 1
    assert "onnx.json: cannot be read" in done.stderr
    assert "export or copy the model again" in done.stderr
    done = hub.mmpeft("generate", "me/nowhere", "--prompt", "x", home=tmp_path / "home")
    assert "me/nowhere: neither a local directory nor a repository on the Hub" in done.stderr
