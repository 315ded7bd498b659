"""YAML with line numbers, overrides from the command line, and validation errors that a person can act on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import RecipeError

Location = tuple[str | int, ...]

_EXPECTED = {
    "tuple_type": "a list",
    "dict_type": "a block of keys and values",
    "model_type": "a block of keys and values",
    "model_attributes_type": "a block of keys and values",
}
"""What pydantic calls by the names of Python's types, as a recipe has it."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's floats (PyYAML reads `1e-3` as text) and duplicate keys refused."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


@dataclass
class Document:
    """A YAML document: its plain value, and the line of each key.

    Attributes:
        value: mappings, lists and scalars.
        source: what to call it in messages, usually the file's path.
        lines: location such as `("stages", 0, "name")` -> line, from 1.
    """

    value: Any
    source: str
    lines: dict[Location, int] = field(default_factory=dict)

    def override(self, text: str) -> None:
        """Set one value from `key.key=value`; list items by index, stages also by name.

        Raises:
            RecipeError: no `=`, a value that is no YAML, or the key leads nowhere.
        """
        path, separator, raw = text.partition("=")
        if not separator or not path:
            raise RecipeError(f"--set {text!r}: expected key=value, as in --set batch.size=8")
        keys = path.split(".")
        target = self.value
        for key in keys[:-1]:
            target = _step(target, key, text)
        last = keys[-1]
        try:
            value = yaml.load(raw, _Loader)
        except yaml.YAMLError as error:
            said = getattr(error, "problem", None) or error
            raise RecipeError(f"--set {text!r}: the value {raw!r} is not valid YAML: {said}") from error
        if isinstance(target, list):
            target[_index(target, last, text)] = value
        else:
            target[last] = value


def _step(target: Any, key: str, text: str) -> Any:
    """One step down; a scalar gives way to a mapping, which validation then judges."""
    if isinstance(target, list):
        return target[_index(target, key, text)]
    if not isinstance(target.get(key), dict | list):
        target[key] = {}
    return target[key]


def _index(items: list[Any], key: str, text: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(items):
        return int(key)
    raise RecipeError(
        f"--set {text!r}: no item {key!r} in a list of {len(items)}{did_you_mean(key, filter(None, names))}"
    )


def load_yaml(path: Path) -> Document:
    """Read a YAML file into plain values with line numbers.

    Raises:
        RecipeError: the file is missing, is not UTF-8 or not YAML, repeats a key, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe; `mmpeft recipes list` shows those that come with mmpeft") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        node = yaml.compose(text, _Loader)
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: expected keys such as `model:`, `data:` and `stages:`; found {value!r}")
    lines: dict[Location, int] = {}
    for location, line in _walk(node, ()):
        if location in lines:
            raise RecipeError(f"{path}:{line}: the key {location[-1]!r} stands twice, first on line {lines[location]}")
        lines[location] = line
    return Document(value=value, source=str(path), lines=lines)


def _walk(node: Any, location: Location) -> Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*location, key.value), key.start_mark.line + 1
            yield from _walk(value, (*location, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*location, index), value.start_mark.line + 1
            yield from _walk(value, (*location, index))


def describe(error: ValidationError, model: type[BaseModel], document: Document) -> str:
    """All problems of a validation, one a line: where, which key, what was found, what was expected."""
    lines = []
    for problem in error.errors(include_url=False):
        location = tuple(key for key in problem["loc"] if not str(key).startswith("<"))  # tags of unions
        inner = problem.get("ctx", {}).get("problems")
        if inner:
            lines += [_line(document, (*location, *key.split(".")) if key else location, text) for key, text in inner]
        else:
            lines.append(_line(document, location, _message(problem, model, location)))
    count = len(lines)
    return f"{document.source}: {count} problem{'s' if count != 1 else ''}:\n" + "\n".join(lines)


def _line(document: Document, location: Location, message: str) -> str:
    known = location
    while known and known not in document.lines:
        known = known[:-1]
    line = f"line {document.lines[known]}: " if known in document.lines else ""
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).lstrip(".")
    return f"  {line}{key or 'recipe'}: {message}"


def _message(problem: Mapping[str, Any], model: type[BaseModel], location: Location) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(location[-1]), _fields_at(model, location[:-1]))}"
    if kind == "missing":
        return "missing; it has no default"
    if kind == "mmpeft":
        return str(problem["msg"])
    if kind == "literal_error":
        expected = str(problem["ctx"]["expected"])
        found = problem["input"]
        names = re.findall(r"'([^']*)'", expected)
        return f"found {found!r}; expected {expected}{did_you_mean(found, names) if isinstance(found, str) else ''}"
    if kind in _EXPECTED:
        return f"found {problem['input']!r}; expected {_EXPECTED[kind]}"
    text = str(problem["msg"])
    return f"found {problem['input']!r}; {text[0].lower()}{text[1:]}"


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    models = [model]
    for step in location:
        if isinstance(step, str):
            models = [
                inner
                for outer in models
                if step in outer.model_fields
                for inner in _models_in(outer.model_fields[step].annotation)
            ]
    return [name for found in models for name in found.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
