"""`mmpeft push` to a hub and back: over HTTP, each client a process with a cache of its own."""

import json
import signal
import subprocess
import sys
import time
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmpeft
from mmpeft import Recipe, run
from mmpeft.core.files import read_json, write_json
from tests.hub import READER, Fault, local_hub
from tests.hub.store import files_of, sha256
from tests.plain import PRELUDE
from tests.processes import injected
from tests.project import TWO_STAGES, write_base, write_project

pytestmark = pytest.mark.slow

SHORT = [{**TWO_STAGES[0], "max_steps": 2}, {**TWO_STAGES[1], "max_steps": 2}]

LOGITS = f"""{PRELUDE}
import importlib.util, sys
import torch
from PIL import Image

def logits(model, processor):
    picture = Image.new("RGB", (9, 9), (200, 40, 90))
    batch = processor(images=[picture], text=["<image>这是什么?"], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits
"""

PLAIN = f"""{LOGITS}
assert importlib.util.find_spec("mmpeft") is None, "mmpeft can be imported"
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
repo, base, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(repo)
plain = AutoModelForImageTextToText.from_pretrained(base)
made = {{"base": logits(plain, processor)}}
made["auto"] = logits(AutoModelForImageTextToText.from_pretrained(repo), processor)
made["peft"] = logits(PeftModel.from_pretrained(plain, repo), processor)
torch.save(made, out)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with local_hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture(autouse=True)
def _sound_afterwards(hub):
    yield
    hub.faults.clear()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A run that has ended, its base and its data."""
    folder = tmp_path_factory.mktemp("project")
    run(Recipe.from_yaml(write_project(folder, stages=SHORT)))
    return folder


@pytest.fixture(scope="module")
def pushed(hub, project, tmp_path_factory):
    """What `mmpeft push --json` said of the run."""
    done = hub.mmpeft(
        *("push", project / "run", "me/receipts", "--base-model", "me/base", "--license", "mit", "--json"),
        home=tmp_path_factory.mktemp("home"),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def sharded(folder, seed):
    """A model in several files, whose content no other has."""
    base = write_base(folder)
    torch.manual_seed(seed)
    weights = {
        name: tensor + torch.randn_like(tensor) for name, tensor in load_file(base / "model.safetensors").items()
    }
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {f"model-0000{at + 1}-of-00003.safetensors": names[at::3] for at in range(3)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    write_json(base / "model.safetensors.index.json", index)
    return base


def large_files(folder):
    return sorted(sha256(file) for file in folder.glob("*.safetensors"))


class TestRoundTrip:
    def test_it_is_whole_private_and_one_commit(self, hub, pushed):
        names = {row["name"] for row in pushed["files"]}
        for repo in ("me/receipts", "me/base"):
            assert hub.is_private(repo)
            assert hub.commits(repo) == 2
        assert hub.names("me/receipts") == names | {"mmpeft_files.json"}
        assert {"adapter_model.safetensors", "README.md", "evaluation.json", "processor_config.json"} <= names
        assert pushed["pushed"]["created"]
        assert pushed["pushed"]["private"]
        assert pushed["pushed"]["commit"] == hub.head("me/receipts").name
        sizes = {name: file.stat().st_size for name, file in files_of(hub.head("me/receipts"))}
        assert {row["name"]: row["bytes"] for row in pushed["files"]}.items() <= sizes.items()

    def test_nothing_of_it_names_a_folder_of_this_machine(self, hub, pushed, project, tmp_path_factory):
        for repo in ("me/receipts", "me/base"):
            for name, file in files_of(hub.head(repo)):
                assert str(tmp_path_factory.getbasetemp()).encode() not in file.read_bytes(), (repo, name)

    def test_where_there_is_no_mmpeft_it_gives_the_same_logits(self, hub, pushed, project, tmp_path):
        hub.python(PLAIN, "me/receipts", "me/base", tmp_path / "logits.pt", home=tmp_path, mmpeft=False)
        made = torch.load(tmp_path / "logits.pt", weights_only=True)
        namespace: dict = {}
        exec(LOGITS.removeprefix(PRELUDE), namespace)
        here = namespace["logits"](*mmpeft.load_model(project / "run" / "adapter", device="cpu"))
        torch.testing.assert_close(made["auto"], here, rtol=0, atol=1e-5)
        torch.testing.assert_close(made["peft"], here, rtol=0, atol=1e-5)
        assert (made["base"] - here).abs().max() > 1e-3

    def test_again_nothing_is_sent_and_what_is_gone_is_removed(self, hub, pushed, project, tmp_path):
        command = ("push", project / "run", "me/receipts", "--base-model", "me/base", "--license", "mit", "--json")
        hub.commit("me/receipts", lambda draft: (draft / "notes.md").write_text("by hand"))
        before, sent = hub.commits("me/receipts"), len(hub.put)
        done = hub.mmpeft(*command, home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not json.loads(done.stdout)["pushed"]["created"]
        assert (hub.commits("me/receipts"), len(hub.put)) == (before, sent)
        done = hub.mmpeft(*command, "--exclude", "evaluation.json", home=tmp_path)
        assert json.loads(done.stdout)["pushed"]["removed"] == ["evaluation.json"]
        assert hub.commits("me/receipts") == before + 1
        assert len(hub.put) == sent
        assert "evaluation.json" not in hub.names("me/receipts")
        assert "notes.md" in hub.names("me/receipts")

    def test_what_is_there_by_hand_does_not_hinder_it(self, hub, tmp_path):
        hub.create("me/by-hand")
        hub.commit("me/by-hand", lambda draft: (draft / "mmpeft_files.json").write_text("[]"))
        done = hub.mmpeft("push", write_base(tmp_path / "base"), "me/by-hand", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert "its mmpeft_files.json is damaged" in done.stderr
        assert "model.safetensors" in hub.names("me/by-hand")

    def test_a_base_of_that_name_with_other_weights_is_refused(self, hub, pushed, project, tmp_path):
        hub.create("me/other-base")
        hub.commit("me/other-base", lambda draft: (draft / "model.safetensors").write_bytes(b"something else"))
        done = hub.mmpeft("push", project / "run", "me/elsewhere", "--base-model", "me/other-base", home=tmp_path)
        assert done.returncode == 1
        assert "me/other-base: its weights are not those of" in done.stderr
        assert not (hub.repos / "me" / "elsewhere").exists()

    def test_it_is_trained_again_from_what_was_pushed(self, hub, pushed, project, tmp_path):
        """In a folder where the data lie as the recipe says; the base comes from the hub."""
        (tmp_path / "data").symlink_to(project / "data")
        command = ("reproduce", "me/receipts", "--output", "again", "--json")
        done = hub.mmpeft(*command, home=tmp_path / "home", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["unchecked"] == []
        assert found["identical"] or found["elsewhere"], found
        assert found["largest_difference"] < 1e-5
        rows = read_json(tmp_path / "data" / "train.json")
        (tmp_path / "changed").mkdir()
        write_json(tmp_path / "changed" / "train.json", rows[1:])
        change = ("--set", "data.train=changed/train.json")
        done = hub.mmpeft("reproduce", "me/receipts", *change, home=tmp_path / "home", cwd=tmp_path)
        assert done.returncode == 3
        assert "changed/train.json: not the data.train that the adapter was trained with" in done.stderr
        hub.create("me/changed")
        hub.commit("me/changed", lambda draft: copytree(hub.head("me/base"), draft, dirs_exist_ok=True))
        hub.commit("me/changed", lambda draft: save_file({"a": torch.zeros(1)}, draft / "model.safetensors"))
        change = ("--set", "model=me/changed")
        done = hub.mmpeft("reproduce", "me/receipts", *change, home=tmp_path / "home", cwd=tmp_path)
        assert done.returncode == 1
        assert "me/changed: not the model that the adapter was trained on" in done.stderr
        assert "model.safetensors" in done.stderr


class TestDryRun:
    def test_files_and_sizes_are_listed_and_no_hub_is_asked(self, hub, project, tmp_path):
        before = len(hub.requests)
        command = ("push", project / "run", "me/dry", "--base-model", "me/base", "--license", "mit", "--dry-run")
        done = hub.mmpeft(*command, home=tmp_path, COLUMNS="120")
        assert done.returncode == 0, done.stderr
        for said in ("adapter_model.safetensors", "KiB", "written for the Hub", "nothing was sent", "private"):
            assert said in done.stdout
        assert not [line for line in hub.requests[before:] if line.startswith(("POST", "PUT"))]
        assert not (hub.repos / "me" / "dry").exists()

    def test_the_licence_is_that_of_the_base_on_the_hub(self, hub, project, tmp_path):
        hub.create("me/licensed")
        hub.commit("me/licensed", lambda draft: (draft / "README.md").write_text("---\nlicense: gemma\n---\n# x\n"))
        command = ("push", project / "run", "me/dry", "--base-model", "me/licensed", "--dry-run", "--json")
        done = hub.mmpeft(*command, home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["license"] == {"license": "gemma"}
        done = hub.mmpeft("card", project / "run", "--base-model", "me/licensed", home=tmp_path)
        assert "license: gemma" in done.stdout
        assert "Licence: gemma." in done.stdout

    def test_a_secret_is_found_there_already(self, hub, tmp_path):
        base = write_base(tmp_path / "base")
        (base / "notes.txt").write_text(f"\nkey=ghp_{'a1B2' * 9}\n")
        done = hub.mmpeft("push", base, "me/secret", "--dry-run", home=tmp_path / "home")
        assert done.returncode == 1
        assert "notes.txt:2: a GitHub token (ghp_...)" in done.stderr
        assert not (hub.repos / "me" / "secret").exists()


class TestFaults:
    def test_what_passes_is_tried_again_and_there_is_one_commit(self, hub, tmp_path):
        base = sharded(tmp_path / "base", 1)
        soon = {"headers": {"Retry-After": "0"}}
        hub.faults += [
            Fault("GET /api/models/me/tried", 500, **soon),
            Fault("POST /api/repos/create", 500, **soon),
            Fault("POST /api/validate-yaml", 429, **soon),
            Fault("POST .*/preupload/", 503, **soon),
            Fault("POST .*objects/batch", 500, **soon),
            Fault("PUT /objects", 500, **soon),
            Fault("PUT /objects", None),
            Fault("POST .*/commit/main", 500, **soon),
            Fault("POST .*/commit/main", 412, **soon),
            Fault("POST .*/commit/main", None, carried_out=True),
        ]
        done = hub.mmpeft("push", base, "me/tried", "--license", "mit", "--public", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert [fault.pattern for fault in hub.faults if fault.times] == []
        assert hub.commits("me/tried") == 2
        assert large_files(hub.head("me/tried")) == large_files(base)
        assert sorted(oid for oid in hub.put if oid in large_files(base)) == large_files(base)
        assert not hub.is_private("me/tried")

    def test_a_hub_that_goes_on_failing_has_nothing_of_it(self, hub, tmp_path):
        base = sharded(tmp_path / "base", 2)
        hub.faults.append(Fault("POST .*/commit/main", 500, times=99, headers={"Retry-After": "0"}))
        done = hub.mmpeft("push", base, "me/failing", home=tmp_path / "home")
        assert done.returncode == 1
        assert "the Hub did not take it in 6 attempts (answer 500)" in done.stderr
        assert "large files that arrived are not sent again" in done.stderr
        assert hub.names("me/failing") == set()
        hub.faults.clear()
        sent = len(hub.put)
        assert hub.mmpeft("push", base, "me/failing", home=tmp_path / "home").returncode == 0
        assert len(hub.put) == sent
        assert large_files(hub.head("me/failing")) == large_files(base)

    def test_interrupted_in_the_middle_it_goes_on_where_it_stopped(self, hub, tmp_path):
        base = sharded(tmp_path / "base", 3)
        hub.faults.append(Fault("PUT /objects", None, times=10**6, skip=1))
        process = subprocess.Popen(
            [sys.executable, "-m", "mmpeft", "push", str(base), "me/stopped"],
            env=hub.environment(tmp_path / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 120
        while not set(hub.put) & set(large_files(base)) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 130, said
        first = set(hub.put) & set(large_files(base))
        assert len(first) == 1
        assert hub.names("me/stopped") == set()
        hub.faults.clear()
        done = hub.mmpeft("push", base, "me/stopped", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert sorted(oid for oid in hub.put if oid in large_files(base)) == large_files(base)
        assert large_files(hub.head("me/stopped")) == large_files(base)
        assert hub.commits("me/stopped") == 2

    @pytest.mark.parametrize(
        ("token", "repo", "said"),
        [
            (READER, "me/denied", "this token may not write there; make one with the role `write`"),
            ("dummy", "others/denied", "this token may not write there"),
            ("unknown", "me/denied", "the Hub does not know this token; log in again"),
            ("", "me/denied", "not logged in; `hf auth login`"),
        ],
    )
    def test_who_may_not_write(self, hub, tmp_path, token, repo, said):
        done = hub.mmpeft("push", write_base(tmp_path / "base"), repo, home=tmp_path / "home", HF_TOKEN=token)
        assert done.returncode == 1
        assert f"{repo}: {said}" in done.stderr
        assert not (hub.repos / repo).exists()

    def test_a_repository_that_is_there_stays_as_visible_as_it_is(self, hub, tmp_path):
        hub.create("me/there")
        hub.commit("me/there", lambda draft: (draft / "notes.md").write_text("by hand"))
        done = hub.mmpeft("push", write_base(tmp_path / "base"), "me/there", "--json", home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert not json.loads(done.stdout)["pushed"]["private"]
        assert "notes.md" in hub.names("me/there")

    def test_a_card_that_the_hub_refuses_is_said_and_nothing_goes(self, hub, tmp_path):
        base, before = write_base(tmp_path / "base"), len(hub.put)
        done = hub.mmpeft("push", base, "me/refused", "--license", "my-own", home=tmp_path / "home")
        assert done.returncode == 1
        assert "the Hub refuses the card, nothing was sent" in done.stderr
        assert '"license" must be one of' in done.stderr
        assert hub.names("me/refused") == set()
        assert len(hub.put) == before


class TestRecipe:
    def command(self, folder, *words):
        return ("run", folder / "recipe.yaml", "--set", "hub={repo: me/ran, base_model: me/ran-base}", "--json", *words)

    def test_the_run_ends_with_a_push(self, hub, tmp_path):
        write_project(tmp_path, stages=SHORT)
        done = hub.mmpeft(*self.command(tmp_path), home=tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["published"] == f"{hub.endpoint}/me/ran"
        assert hub.is_private("me/ran")
        assert {"adapter_model.safetensors", "recipe.yaml", "figures/loss.svg"} <= hub.names("me/ran")
        assert read_json(hub.head("me/ran") / "adapter_config.json")["base_model_name_or_path"] == "me/ran-base"
        assert "model.safetensors" in hub.names("me/ran-base")

    def test_of_two_processes_one_pushes_and_the_other_waits(self, hub, tmp_path):
        write_project(tmp_path, stages=SHORT, processes=2)
        # Their own limit for waiting is half an hour (gloo) or ten minutes (NCCL); a push may take longer.
        impatient = injected(tmp_path / "site", IMPATIENT)
        hub.faults.append(Fault("POST .*/me/ran-two/commit/main", 429, headers={"Retry-After": "15"}))
        two = ("--set", "hub={repo: me/ran-two, base_model: me/ran-two-base}")
        done = hub.mmpeft("run", tmp_path / "recipe.yaml", *two, "--json", home=tmp_path / "home", **impatient)
        assert done.returncode == 0, done.stderr[-4000:]
        assert "Traceback" not in done.stderr
        assert "answer 429; attempt 2 of 6 in 15 s" in done.stderr
        assert json.loads(done.stdout)["published"] == f"{hub.endpoint}/me/ran-two"
        assert hub.commits("me/ran-two") == hub.commits("me/ran-two-base") == 2
        assert {"adapter_model.safetensors", "recipe.yaml", "figures/loss.svg"} <= hub.names("me/ran-two")

    def test_of_two_processes_both_end_where_the_hub_does_not_take_it(self, hub, tmp_path):
        write_project(tmp_path, stages=SHORT, processes=2)
        hub.faults.append(Fault("POST .*/me/ran-off/commit/main", 400, times=99))
        two = ("--set", "hub={repo: me/ran-off, base_model: me/ran-off-base}")
        done = hub.mmpeft("run", tmp_path / "recipe.yaml", *two, "--json", home=tmp_path / "home")
        assert done.returncode == 1
        assert done.stderr.count("error: the run is done, but not pushed: me/ran-off") == 1
        assert "Traceback" not in done.stderr
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
        assert hub.names("me/ran-off") == set()
        denied = hub.mmpeft(
            *("run", tmp_path / "recipe.yaml", "--set", f"output={tmp_path / 'denied'}", *two),
            home=tmp_path / "home",
            HF_TOKEN=READER,
        )
        assert denied.returncode == 1
        assert denied.stderr.count("me/ran-off: this token may not write there") == 1
        assert not (tmp_path / "denied" / "stages").exists()

    def test_who_may_not_write_is_told_before_anything_is_trained(self, hub, tmp_path):
        write_project(tmp_path, stages=SHORT)
        done = hub.mmpeft(*self.command(tmp_path), home=tmp_path / "home", HF_TOKEN=READER)
        assert done.returncode == 1
        assert "me/ran: this token may not write there" in done.stderr
        assert not (tmp_path / "run" / "stages").exists()


IMPATIENT = """
import datetime, functools
from torch import distributed
distributed.init_process_group = functools.partial(
    distributed.init_process_group, timeout=datetime.timedelta(seconds=10)
)
"""

TRAINER = f"""{PRELUDE}
import sys
from pathlib import Path
from transformers import TrainingArguments
import mmpeft

project = Path(sys.argv[1])
model, processor = mmpeft.load_model("me/trainer-base", device="cpu")
peft_model = mmpeft.get_peft_model(model, {{"projector": "full", "language": {{"r": 2}}}})
dataset = mmpeft.load_dataset(project / "data/train.json", media_root=project / "data/images", processor=processor)
trainer = mmpeft.MultimodalTrainer(
    model=peft_model,
    args=TrainingArguments(
        sys.argv[2], max_steps=2, save_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        push_to_hub=True, hub_model_id="me/by-trainer", hub_private_repo=True, hub_token="dummy",
    ),
    train_dataset=dataset,
    data_collator=mmpeft.MultimodalCollator(processor),
    processing_class=processor,
)
trainer.train()
trainer.push_to_hub()
peft_model.push_to_hub("me/by-model")
processor.push_to_hub("me/by-model")
mmpeft.save_adapter(peft_model, sys.argv[3], processor=processor)
"""


def test_push_to_hub_of_trainer_and_model_works(hub, project, tmp_path):
    done = hub.mmpeft("push", project / "base", "me/trainer-base", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    hub.python(TRAINER, project, tmp_path / "out", tmp_path / "adapter", home=tmp_path / "home")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert hub.is_private("me/by-trainer")
    for repo in ("me/by-trainer", "me/by-model"):
        assert {"adapter_config.json", "adapter_model.safetensors", "processor_config.json"} <= hub.names(repo)
        there = load_file(hub.head(repo) / "adapter_model.safetensors")
        assert set(there) == set(weights)
        assert all(torch.equal(there[name], weights[name]) for name in weights)
        assert read_json(hub.head(repo) / "adapter_config.json")["base_model_name_or_path"] == "me/trainer-base"
    for name, file in files_of(hub.head("me/by-trainer")):
        assert b"hub_token" not in file.read_bytes() or b"dummy" not in file.read_bytes(), name
