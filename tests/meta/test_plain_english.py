"""Sources, tests and docs are in plain English: words of the former dialect do not come back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
READ = (
    "*.md",
    "docs/**/*.md",
    "fennflow-*/*.md",
    "fennflow-*/src/**/*.py",
    "fennflow-*/src/**/*.tmpl",
    "examples/**/*.py",
    "examples/**/*.md",
    "benchmarks/*.py",
    "tests/**/*.py",
)
# What to write instead is in CONTRIBUTING.md.
AVOIDED = re.compile(
    r"""\b(?:
        lies|lie|lay|lying
        |tells?(?!\()|telling|told
        |mends?|mended|mending
        |anew
        |minds?|minded
        |whoever
        |somebody|nobody|anybody
        |in\ the\ words\ of
        |bury|buries|buried|burial|dig|dug|gravedigger
        |doubtful|in\ doubt
        |(?<!there\ )(?<!There\ )(?:is|are|was|were)\ no\ (?!longer|more|other)
        |besides?
        |learnt
        |as\ nothing
        |tombstones?
        |settled
        |as\ ever
        |for\ ever
        |likewise
        |in\ vain
        |said\ of
        |half\ characters?
        |truth\ values?
        |lets?\ go\ of|letting\ go\ of
        |comes?\ to\ (?:an|its|their)\ end
        |(?:sees?|seeing|saw|seen)\ to\ it
        |without\ a\ word
        |behind\ (?:its|his|their)\ back
        |by\ who
        |(?<=[.;:\#]\ )who\ (?:waits|waited|has|had|comes|came|appends|takes|recovers|holds|stops|uses|reads)
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)


def avoided(text: str) -> Iterator[tuple[int, str]]:
    """Yield each word to avoid outside of `code`, and its line."""
    for number, line in enumerate(text.splitlines(), start=1):
        for found in AVOIDED.finditer(re.sub(r"`[^`]*`", "``", line)):
            yield number, found.group()


def test_no_word_of_the_former_dialect_is_used() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for pattern in READ
        for path in sorted(ROOT.glob(pattern))
        if path != Path(__file__)
        for number, word in avoided(path.read_text())
    ]
    assert found == [], "say it in plain English, see CONTRIBUTING.md: " + "; ".join(found)


def test_words_to_avoid_are_found() -> None:
    text = "The bytes lie there.\nThere is no such file.\nIt is no file.\nCall stream.tell()."
    assert list(avoided(text)) == [(1, "lie"), (3, "is no ")]
    text = "Locks are fair: who waits longest is next.\nA user who waits is served."
    assert list(avoided(text)) == [(1, "who waits")]


if __name__ == "__main__":
    test_no_word_of_the_former_dialect_is_used()
