"""The built wheel: what is in it, and that it works where no checkout is."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from mmpeft.core.assets import asset_directory

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="hatchling is not installed: run `make setup`")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with the wheel, and behind it the libraries of this one but not its editable mmpeft.

    A line in a .pth file adds a directory without reading the .pth files in it, which is where the editable
    install of mmpeft lies.
    """
    folder = tmp_path_factory.mktemp("installed")
    environment = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.fixture
def run(installed, tmp_path):
    """Run a program of the installed environment in an empty folder, with an empty home and no hub."""

    def call(program, *arguments):
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
        }
        (tmp_path / "cwd").mkdir(exist_ok=True)
        done = subprocess.run(
            [installed / "bin" / program, *arguments],
            cwd=tmp_path / "cwd",
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return call


def test_it_holds_the_code_and_every_shipped_file_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("adapters", "recipes", "hub_cards"):
        folder = asset_directory(kind)
        shipped = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert shipped
        assert {f"mmpeft/_assets/{kind}/{name}" for name in shipped} <= names
    assert {"mmpeft/py.typed", "mmpeft/cli/main.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mmpeft", "optimum"}
    assert [name for name in names if name.startswith("optimum")] == ["optimum/commands/register/register_mmpeft.py"]
    kinds = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert kinds <= {".py", ".typed", ".json", ".yaml", ".j2", ".css", ".js", ".html", ".md"}


def test_it_is_small(wheel):
    """Text only, and nothing of it so large that it would be data."""
    assert wheel.stat().st_size < 2**20
    with zipfile.ZipFile(wheel) as archive:
        assert max(entry.file_size for entry in archive.infolist()) < 64_000


def test_mmpeft_comes_from_the_wheel(run, installed):
    code = "import json, mmpeft, torch; print(json.dumps([mmpeft.__file__, mmpeft.__version__, torch.__file__]))"
    mmpeft_file, version, torch_file = json.loads(run("python", "-c", code))
    assert Path(mmpeft_file).is_relative_to(installed)
    assert not Path(torch_file).is_relative_to(installed)
    assert version == "0.1.0"


def test_recipes_and_presets_are_found_without_a_checkout(run):
    listed = json.loads(run("mmpeft", "recipes", "list", "--json"))["recipes"]
    assert {"quickstart", "llava/two-stage"} <= {recipe["name"] for recipe in listed}
    assert "llava/two-stage" in run("mmpeft", "recipes", "list")
    code = (
        "from mmpeft.core.assets import asset_directory; from peft import PeftConfig; "
        "print(PeftConfig.from_pretrained(asset_directory('adapters') / 'llava' / 'projector-lora').r)"
    )
    assert run("python", "-c", code).strip() == "16"


def test_the_smallest_quickstart_runs_from_the_wheel(run, tmp_path):
    output = tmp_path / "cwd" / "out"
    result = json.loads(run("mmpeft", "quickstart", "--smallest", "--output", "out", "--json"))
    assert set(result["scores"]) >= {"before", "after"}
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    assert (output / "adapter" / "README.md").is_file()
    assert "<html" in (output / "report.html").read_text(encoding="utf-8")


def test_optimum_cli_has_our_exporters():
    """Here, where the editable install has the same file in the same place; beside the wheel it would come twice."""
    pytest.importorskip("optimum", reason="optimum is not installed")
    program = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    words = [sys.executable, "-c", program, "export", "mmpeft", "int8", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--auto-skip" in done.stdout
