"""Count the files and named functions of FennFlow that one overwrite passes through.

`python tests/meta/overwrite_size.py` prints them, in memory: one unit of work that puts a file over a
committed one, from its construction to the end of the clean-up. Not counted: the first use of an
engine, lambdas, comprehensions and generated methods.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from fennflow import UnitOfWork
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField

PACKAGES = ("fennflow", "fennflow_memory")


class UOW(UnitOfWork):
    """One bucket in memory."""

    files = RepoField(CrudRepository, namespace="files")


async def overwrite() -> None:
    """Put a file, from the second time on over a committed one."""
    async with UOW() as uow:
        await uow.files.put(TextContent.from_content("new", filename="a.txt"))


async def passed() -> set[tuple[str, str]]:
    """Return file and name of the functions that every overwrite enters, once the engine is warm."""
    found: list[set[tuple[str, str]]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        named = not code.co_name.startswith("<") and not code.co_filename.startswith("<")
        if event == "call" and named and package in PACKAGES:
            found[-1].add((code.co_filename, code.co_qualname))

    for _ in range(2):
        await overwrite()
    for _ in range(3):  # what an engine does at intervals is in one of them at most
        found.append(set())
        sys.setprofile(note)
        try:
            await overwrite()
        finally:
            sys.setprofile(None)
    return set.intersection(*found)


def main() -> None:
    """Print the numbers, and how many functions of each file."""
    functions = asyncio.run(passed())
    files = Counter(file for file, _ in functions)
    for file, count in sorted(files.items()):
        print(f"{count:4} {file.partition('/src/')[2] or Path(file).name}")
    print(f"{len(files)} files, {len(functions)} functions")


if __name__ == "__main__":
    main()
