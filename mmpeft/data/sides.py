"""Words that name a side, left or right: found in a text, and changed for their opposites."""

import functools
import re
from collections.abc import Mapping

_WORDS: Mapping[str, str] = {
    "left": "right",
    "leftmost": "rightmost",
    "leftward": "rightward",
    "leftwards": "rightwards",
    "lefthand": "righthand",
    "leftside": "rightside",
    "clockwise": "counterclockwise",
    "左": "右",
}
_ONE_WAY: Mapping[str, str] = {
    "anticlockwise": "clockwise",
    "anti-clockwise": "clockwise",
    "anti clockwise": "clockwise",
    "counter-clockwise": "clockwise",
    "counter clockwise": "clockwise",
}


class Sides:
    """The words that name a side: the English ones and 左 and 右, and a user's own.

    A word counts by itself, whatever the case of its letters: `left-hand` holds one, `leftover` does not. Chinese is
    written without spaces, so 左 counts wherever it stands.

    Args:
        words: further words with their opposites; None for a word that has none.
    """

    def __init__(self, words: Mapping[str, str | None] | None = None) -> None:
        self._opposites: dict[str, str | None] = {**_WORDS, **{right: left for left, right in _WORDS.items()}}
        self._opposites |= _ONE_WAY
        for word, opposite in (words or {}).items():
            self._opposites[word.lower()] = opposite
            if opposite is not None:
                self._opposites.setdefault(opposite.lower(), word)
        longest_first = sorted(self._opposites, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_alone, longest_first)), re.IGNORECASE)

    def named(self, text: str) -> bool:
        """Whether a text names a side."""
        return bool(self._pattern.search(text))

    def swappable(self, text: str) -> bool:
        """Whether every side that a text names has an opposite."""
        return all(self._opposites[found.group().lower()] is not None for found in self._pattern.finditer(text))

    def swapped(self, text: str) -> str:
        """The text with every side as its opposite; a word without one stays."""
        return self._pattern.sub(lambda found: self._opposite(found.group()), text)

    def _opposite(self, word: str) -> str:
        opposite = self._opposites[word.lower()]
        if opposite is None:
            return word
        if word.isupper() and len(word) > 1:
            return opposite.upper()
        return opposite[0].upper() + opposite[1:] if word[0].isupper() else opposite


@functools.lru_cache(maxsize=16)
def sides_of(words: tuple[tuple[str, str | None], ...]) -> Sides:
    """`Sides` with these words, made once."""
    return Sides(dict(words))


def _alone(word: str) -> str:
    """A pattern of the word by itself, where its script puts spaces between words."""
    spaced = ord(word[0]) < 0x2E80  # CJK radicals: where the scripts without spaces begin
    return rf"(?<!\w){re.escape(word)}(?!\w)" if spaced else re.escape(word)
