"""What holds of the project as a whole: imports, names, docstrings, and what may lie in git."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmpeft
from benchmarks.import_time import measure

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "mmpeft").rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "datasets", "pydantic", "numpy")

# Where one developer or one build machine keeps things.
MACHINE_PATH = re.compile(rb"(?<![\w.])/(?:work|root|tmp|home|Users|opt)(?=/[A-Za-z0-9])")


def in_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def tracked_files():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if done.returncode:
        pytest.skip("not a git checkout: what is tracked is not known")
    return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_importing_mmpeft_takes_less_than_300_ms():
    assert min(measure(3)) < 0.3


@pytest.mark.parametrize("statement", ["import mmpeft", "import mmpeft.cli.main"])
def test_neither_the_package_nor_its_program_imports_a_heavy_library_before_it_is_used(statement):
    code = f"import sys; {statement}; print([name for name in {HEAVY} if name in sys.modules])"
    heavy = ast.literal_eval(in_fresh_process(code))
    assert heavy == []


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'get_peft_modle'"):
        mmpeft.get_peft_modle  # noqa: B018


@pytest.mark.parametrize("name", mmpeft.__all__)
def test_each_public_name_resolves_and_is_documented(name):
    value = getattr(mmpeft, name)
    assert name in dir(mmpeft)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_every_module_says_what_it_is():
    silent = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(path.relative_to(ROOT).as_posix())
    assert silent == []


def test_every_test_file_is_collected():
    """A file of tests that is not called test_*.py, or a folder without __init__.py, would never run."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    holding = [path for path in files if re.search(r"^(async )?def test_|^class Test", path.read_text(), re.MULTILINE)]
    assert holding
    # npu_sim/inside.py is run by test_simulation.py, in a process that has the device.
    assert [path.name for path in holding if not path.name.startswith("test_")] == ["inside.py"]
    assert [path for path in holding if not (path.parent / "__init__.py").is_file()] == []
    empty = [path.name for path in files if path.name.startswith("test_") and path not in holding]
    assert empty == []


def test_no_tracked_file_is_large():
    large = {path.name: path.stat().st_size for path in tracked_files() if path.stat().st_size > 1 << 20}
    assert large == {}


def test_no_tracked_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if path.suffix not in {".png", ".jpg"}
        for match in MACHINE_PATH.finditer(path.read_bytes())
    ]
    assert found == []
