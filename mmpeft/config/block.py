"""What the blocks of a recipe have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Block(BaseModel):
    """A part of a recipe: frozen, unknown keys fail."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def no_bool(value: Any) -> Any:
    """Refuse `true` where a number is meant, which pydantic takes for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("mmpeft", "expected a number, found {value}", {"value": value})
    return value


def raise_all(problems: list[tuple[str, str]]) -> None:
    """Refuse a value for several reasons at once: pairs of a key within it and what is wrong."""
    if problems:
        raise PydanticCustomError(
            "mmpeft_problems", "{count} problem(s)", {"problems": problems, "count": len(problems)}
        )
