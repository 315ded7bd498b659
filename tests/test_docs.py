"""The documentation says what is: recipes parse, commands and options exist, links resolve, pages run.

A fenced block with a file name behind its language (```yaml digits.yaml) is a file that the page's commands use.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml
from pydantic import BaseModel

import mmpeft
from mmpeft.cli.main import app
from mmpeft.config.recipe import Recipe
from mmpeft.data.augment import augmentation_of
from mmpeft.data.formats import parse_row
from tests.plain import PRELUDE

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = ["adapters", "augment", "data", "distributed", "evaluate", "export", "formats", "hub", "train"]
"""Not deploy.md: a model of two steps, as the quickstart of these tests makes, is rightly kept back by the gate."""

FENCE = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(mmpeft [^`]+)`")

GLOBAL_OPTIONS = ("-v", "--verbose", "--version", "-h", "--help")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@dataclass(frozen=True)
class Block:
    language: str
    file: str
    text: str


def blocks(page, language=None):
    found = [Block(*match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if language in (None, block.language)]


def command_lines(page):
    """Each `mmpeft ...` of the page's shell blocks, comments cut off, launchers in front taken away.

    Blocks of `bash` run here after the quickstart; those of `sh` need hardware or hosts of their own."""
    lines = []
    for block in blocks(page, "bash") + blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] in (["accelerate"], ["torchrun"]):
                words = words[words.index("-m") + 1 :]
            if words[:1] == ["mmpeft"]:
                lines.append(words[1:])
    return lines


def parse(words, *, whole=True):
    """Let the program's own parser judge a command line; nothing is run. Not `whole`: arguments may be missing."""
    command = typer.main.get_command(app)
    words = [word for word in words if word not in GLOBAL_OPTIONS]
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"no such command: {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if not hasattr(command, "commands"):
        command.make_context(command.name, words, resilient_parsing=not whole)


@pages
def test_recipes_parse(page, tmp_path):
    for block in blocks(page, "yaml"):
        value = yaml.safe_load(block.text)
        if isinstance(value, dict) and {"model", "data", "stages"} <= value.keys():
            (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
            Recipe.from_yaml(tmp_path / "recipe.yaml")
        elif page.stem == "augment" and block.file:
            augmentation_of(value)
        else:
            pytest.fail(f"a YAML block of {page.name} is no whole recipe: {block.text[:60]!r}")


@pages
def test_data_parses(page):
    for block in blocks(page, "json"):
        for index, row in enumerate(json.loads(block.text)):
            parse_row(row, file=page, index=index, line=1)


@pages
def test_commands_and_their_options_exist(page):
    for words in command_lines(page):
        parse(words)


@pages
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets


@pages
def test_commands_named_in_the_text_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for line in INLINE.findall(text):
        words = shlex.split(line)[1:]
        if "COMMAND" not in words:
            parse(words, whole=False)


@pages
def test_links_resolve(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    missing = [
        target
        for target in LINK.findall(text)
        if not re.match(r"[a-z]+:|#", target) and not (page.parent / target.partition("#")[0]).exists()
    ]
    assert missing == []


@pages
def test_python_compiles_and_uses_public_names_only(page):
    for block in blocks(page, "python"):
        tree = ast.parse(block.text)
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "mmpeft"
        }
        assert used <= set(mmpeft.__all__)


def test_the_parser_of_this_file_rejects_what_does_not_exist():
    for line in ("rnu recipe.yaml", "run recipe.yaml --fast", "data chekc x", "run", "recipes copy"):
        with pytest.raises(Exception, match=r"(?i)no such|missing|unexpected"):
            parse(line.split())
    with pytest.raises(Exception, match=r"(?i)no such"):
        parse(["data", "chekc"], whole=False)


def models_in(model):
    yield model
    for field in model.model_fields.values():
        stack = [field.annotation]
        while stack:
            annotation = stack.pop()
            stack += get_args(annotation)
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from models_in(annotation)


def test_the_page_on_recipes_names_every_key_and_no_other():
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    keys = {name for model in models_in(Recipe) for name in model.model_fields}
    tables = re.findall(r"^\| key \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", "".join(tables), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(cells)))
    assert named == keys


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    shell(["mmpeft", "quickstart", "--smallest"], folder)
    return folder


def shell(words, folder):
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNABLE)
def test_the_page_runs_after_the_quickstart(name, quickstart):
    page = ROOT / "docs" / f"{name}.md"
    ran = 0
    for block in blocks(page):
        if block.file:
            (quickstart / block.file).write_text(block.text, encoding="utf-8")
    for block in blocks(page, "bash"):
        for line in block.text.splitlines():
            shell(shlex.split(line, comments=True), quickstart)
            ran += 1
    for block in blocks(page, "python"):
        if block.file:
            program = f"{PRELUDE}\nimport runpy\nrunpy.run_path({block.file!r}, run_name='__main__')"
            shell([sys.executable, "-c", program], quickstart)
            ran += 1
    assert ran


def test_figures_of_scale_are_those_that_the_benchmark_wrote():
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "scale.json").read_text(encoding="utf-8"))
    named = re.findall(r"\(((?:`[a-z]\w*(?:\.-?\w+)+`(?:, )?)+)\)", text)
    named = [names for names in named if names.split(".")[0].strip("`") in found]
    assert len(named) > 30
    for names in named:
        before = text[: text.index(f"({names})")].rpartition("|")[2]
        for name in re.findall(r"`(.+?)`", names):
            value = found
            for key in name.split("."):
                value = value[int(key) if isinstance(value, list) else key]
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            assert re.search(rf"(?<![\d.,]){re.escape(shown)}(?![\d.,]*\d)", before), (name, value)
