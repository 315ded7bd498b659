"""The recipes that come with mmpeft: what there is, what each is for, and a copy to edit."""

from dataclasses import dataclass
from pathlib import Path

from mmpeft.config.names import nearest
from mmpeft.core.assets import asset_directory
from mmpeft.core.errors import OutputError, RecipeError
from mmpeft.core.files import write_text


@dataclass(frozen=True, kw_only=True)
class ShippedRecipe:
    """One file under `recipes/`.

    Attributes:
        name: its path there without the suffix, such as `llava/two-stage`.
        description: the sentence in the comment on its first line.
        path: where it lies in this installation.
    """

    name: str
    description: str
    path: Path


def shipped_recipes() -> list[ShippedRecipe]:
    """Every shipped recipe, by name. `accelerate/` holds settings for `accelerate launch`, not recipes of runs."""
    root = asset_directory("recipes")
    return sorted(
        (
            ShippedRecipe(
                name=path.relative_to(root).with_suffix("").as_posix(), description=_first_comment(path), path=path
            )
            for path in root.rglob("*.yaml")
        ),
        key=lambda recipe: recipe.name,
    )


def find_recipe(name: str) -> ShippedRecipe:
    """The shipped recipe of this name.

    Raises:
        RecipeError: there is none; the message gives the nearest names.
    """
    recipes = {recipe.name: recipe for recipe in shipped_recipes()}
    if name not in recipes:
        close = nearest(name, recipes, count=3)
        hint = f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(recipes)}"
        raise RecipeError(f"no recipe named {name!r} comes with mmpeft; {hint}")
    return recipes[name]


def copy_recipe(name: str, destination: Path | None = None, *, force: bool = False) -> Path:
    """Copy a shipped recipe and return where it was written.

    `destination` is a file, or a folder that exists; by default the current folder.

    Raises:
        RecipeError: no recipe has this name.
        OutputError: the file exists and `force` is not set, or the place cannot be written.
    """
    recipe = find_recipe(name)
    target = destination or Path()
    if target.is_dir():
        target = target / recipe.path.name
    if target.exists() and not force:
        raise OutputError(f"{target} exists; give another destination, or --force to overwrite it")
    write_text(target, recipe.path.read_text(encoding="utf-8"))
    return target


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.removeprefix("#").strip() if line.startswith("#") else ""
