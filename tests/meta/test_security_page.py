"""The page on security names tests that exist, in every row of its tables."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "security.md").read_text()
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@cache
def functions(file: str) -> frozenset[str]:
    """Return the functions of a module of tests."""
    path = TESTS / file
    nodes = ast.parse(path.read_text()).body if path.is_file() else ()
    return frozenset(
        each.name for each in nodes if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def test_every_test_that_the_page_names_exists() -> None:
    found = NAMED.findall(PAGE)
    assert len(found) > 60
    assert [f"{file}::{name}" for file, name in found if name not in functions(file)] == []


def test_every_row_of_what_holds_names_a_test() -> None:
    tables = re.findall(r"^\| .*\| shown by \|\n\| -.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert len(tables) == 2
    rows = "".join(tables).splitlines()
    assert [each for each in rows if not NAMED.search(each) and "](#" not in each] == []
