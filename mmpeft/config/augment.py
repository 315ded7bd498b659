"""The recipe's `data.augment` block: how samples are varied from epoch to epoch, for small data."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from mmpeft.config.block import Block, no_bool

Share = Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=1)]


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("mmpeft", "{message}", {"message": message})


def _range(value: Any, least: float, most: float, wanted: str) -> Any:
    """A pair of numbers around 1 or below it, first the smaller."""
    numbers = isinstance(value, list | tuple) and all(
        isinstance(one, int | float) and not isinstance(one, bool) for one in value
    )
    if not numbers or len(value) != 2 or not least < value[0] <= value[1] <= most:
        raise _wrong(f"found {value!r}; expected {wanted}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


class CropConfig(Block):
    """Cut a part out of each picture and film; boxes stay whole and move with it."""

    probability: Share = 1.0
    area: tuple[float, float] = (0.8, 1.0)
    """Least and greatest share of the picture's area that is kept."""
    aspect: tuple[float, float] = (0.8, 1.25)
    """Least and greatest factor by which width : height may change."""
    except_kinds: tuple[str, ...] = ()
    """Samples of these kinds are left as they are."""

    @field_validator("area", mode="before")
    @classmethod
    def _check_area(cls, value: Any) -> Any:
        return _range(value, 0, 1, "two shares of the area, above 0 and up to 1, the smaller first, as in [0.8, 1.0]")

    @field_validator("aspect", mode="before")
    @classmethod
    def _check_aspect(cls, value: Any) -> Any:
        wanted = "two factors, one up to 1 and one from 1 on, as in [0.8, 1.25]"
        low, high = _range(value, 0, float("inf"), wanted)
        if not low <= 1 <= high < float("inf"):
            raise _wrong(f"found {value!r}; expected {wanted}")
        return value


class ColourConfig(Block):
    """Change the colours of each picture and film."""

    probability: Share = 1.0
    brightness: Share = 0.2
    """0.2 is a factor from 0.8 to 1.2; so for contrast and saturation."""
    contrast: Share = 0.2
    saturation: Share = 0.2
    hue: Annotated[float, BeforeValidator(no_bool), Field(ge=0, le=0.5)] = 0.0
    """Turn around the colour circle, either way, at most; 0.5 is half of it. Leave it at 0 where colours are asked."""
    except_kinds: tuple[str, ...] = ()
    """Samples of these kinds are left as they are."""


class FlipConfig(Block):
    """Mirror all of a sample's pictures and films left to right; boxes move along."""

    probability: Share = 0.5
    sided: Literal["leave", "swap"] = "leave"
    """What is done with a sample whose text names a side: it is left as it is, or left and right change places."""
    words: dict[str, str | None] = Field(default_factory=dict)
    """Words beside the English ones that name a side, with their opposites: `{links: rechts, ostwärts: null}`; with a
    word that has none, or of a plain list, a sample is always left as it is."""
    except_kinds: tuple[str, ...] = ()
    """Samples of these kinds, such as those that read text or digits, are left as they are."""

    @field_validator("words", mode="before")
    @classmethod
    def _listed_words(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list | tuple) and all(map(_is_text, value)) else value

    @field_validator("words", mode="after")
    @classmethod
    def _check_words(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for word, opposite in value.items():
            if not word.strip() or (opposite is not None and not opposite.strip()):
                raise _wrong(f"found {word!r}: {opposite!r}; expected words, as in {{links: rechts}}")
        return value


def _switch(value: Any) -> Any:
    """`crop: true` is `crop: {}`, and `crop: false` is to leave it out."""
    if isinstance(value, bool):
        return {} if value else None
    return value


def _sided(value: Any) -> Any:
    """`flip: swap` is `flip: {sided: swap}`."""
    return {"sided": value} if isinstance(value, str) else _switch(value)


def _paraphrases(value: Any) -> Any:
    if value is None or isinstance(value, str | Path):
        return value
    return paraphrase_table(value)


def paraphrase_table(value: Any) -> dict[str, tuple[str, ...]]:
    """A mapping from each text to all that may stand in its place, itself among them.

    Args:
        value: a mapping of a text to its alternatives, or a list of lists of texts that mean the same.

    Raises:
        PydanticCustomError: neither, an empty text, or one text in two places.
    """
    table: dict[str, tuple[str, ...]] = {}
    for keys, texts in _groups(value):
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise _wrong(f"found {text!r} among the texts for {keys[0]!r}; expected texts that are not empty")
        options = tuple(dict.fromkeys(text.strip() for text in texts))
        for key in keys:
            if key.strip() in table:
                raise _wrong(f"the text {key.strip()!r} stands in two places; put its alternatives together")
            table[key.strip()] = options
    return table


def _groups(value: Any) -> Iterator[tuple[list[str], list[Any]]]:
    """For each group of texts, those that it takes the place of, and all that may stand there."""
    if isinstance(value, Mapping):
        for key, texts in value.items():
            if not isinstance(key, str) or not isinstance(texts, list | tuple) or not texts:
                raise _wrong(f"found {key!r}: {texts!r}; expected a text and a list of alternatives")
            # In their order where the text is among them, so that a table that was written is read back as it was.
            yield [key], list(texts) if key in texts else [key, *texts]
    elif isinstance(value, list | tuple):
        for texts in value:
            if (
                not isinstance(texts, list | tuple)
                or len(texts) < 2
                or not all(isinstance(text, str) for text in texts)
            ):
                raise _wrong(f"found {texts!r}; expected a list of texts that mean the same")
            yield list(dict.fromkeys(texts)), list(texts)
    else:
        raise _wrong(f"found {value!r}; expected texts with lists of alternatives, lists of texts, or a file of these")


class AugmentConfig(Block):
    """How training samples are varied; held-out samples never are. `{}` changes nothing."""

    crop: Annotated[CropConfig | None, BeforeValidator(_switch)] = None
    colour: Annotated[ColourConfig | None, BeforeValidator(_switch)] = None
    flip: Annotated[FlipConfig | None, BeforeValidator(_sided)] = None
    paraphrase: Annotated[Path | dict[str, tuple[str, ...]] | None, BeforeValidator(_paraphrases)] = None
    """Other ways to say a user's text: `{"What is it?": ["What do you see?"]}`, lists of texts that mean the same, or a
    YAML or JSON file of either."""
