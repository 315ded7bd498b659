"""How often each short answer stands: a file whose answers are classes should not hold one class alone."""

from collections import Counter

SHORT_WORDS, SHORT_CHARACTERS = 5, 40
"""An answer of at most so many is taken for a class."""

MOST_CLASSES = 10_000
"""Distinct short answers that are counted; with more the answers are no classes."""

TOP = 10
"""Answers that the report names."""

FEWEST_ANSWERS = 20
"""Short answers below which nothing is said of their balance."""

LARGEST_SHARE, FEWEST_EXAMPLES, CLASS_LIMIT = 0.8, 3, 50


_AROUND = " .,;:!?"
"""What may stand around an answer without making it another."""


class Balance:
    """Counts short answers."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.total = self.short = 0

    def add(self, answer: str) -> None:
        """Count an assistant turn."""
        self.total += 1
        answer = answer.strip()
        if len(answer) > SHORT_CHARACTERS or len(answer.split()) > SHORT_WORDS:
            return
        self.short += 1
        if answer in self.answers or len(self.answers) < MOST_CLASSES:
            self.answers[answer] += 1

    def top(self) -> dict[str, int]:
        """The most frequent short answers."""
        return dict(self.answers.most_common(TOP))

    def warnings(self) -> list[str]:
        """What is out of balance, in words; nothing where answers are free text."""
        found: list[str] = []
        if self.short < FEWEST_ANSWERS or 2 * self.short < self.total or len(self.answers) > CLASS_LIMIT:
            return found
        spellings: dict[str, list[str]] = {}
        for answer in self.answers:
            spellings.setdefault(answer.lower().strip(_AROUND), []).append(answer)
        for several in spellings.values():
            if len(several) > 1:
                named = ", ".join(f"{answer!r} ({self.answers[answer]})" for answer in several[:TOP])
                found.append(f"short answers differ by letters' case or by stops alone: {named}; write them all alike")
        (answer, count), *_ = self.answers.most_common(1)
        if count > LARGEST_SHARE * self.short:
            found.append(
                f"{count / self.short:.0%} of {self.short} short answers are {answer!r}; a model that always says it "
                "scores as much: add samples of the others"
            )
        if rare := sorted(name for name, number in self.answers.items() if number < FEWEST_EXAMPLES):
            names = ", ".join(repr(name) for name in rare[:TOP]) + (", ..." if len(rare) > TOP else "")
            found.append(
                f"{len(rare)} of {len(self.answers)} short answers stand under {FEWEST_EXAMPLES} times: {names}; "
                "add samples, or merge the spellings"
            )
        return found
