"""Listings of stores that obstore accesses over HTTP, even if obstore fails at a key."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError, InvalidPathError
from obstore.store import AzureStore, MemoryStore

from fennflow.exceptions import IncompleteListingException
from fennflow.printable import brief

if TYPE_CHECKING:
    from obstore import ListResult, ListStream, ObjectMeta
    from obstore.store import ObjectStore

LISTED_AT_ONCE = 1000
ASKED_AT_ONCE = 10
SHOWN = 3

_ODD_KEY = re.compile(
    r'Path "(?P<key>.*?)"(?: contained empty path segment|: Encountered illegal character)',
    re.DOTALL,
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
NO_BREAK_SPACE = "\xa0"
REPLACEMENT = "\ufffd"


async def listed(
    store: ObjectStore, prefix: str, start_after: str
) -> AsyncGenerator[tuple[str, ObjectMeta]]:
    """Iterate over the objects under a prefix that come after a key in the store's order.

    obstore fails at a page that has a key with a control character, or an empty, `.` or `..`
    segment, so anyone who can upload such a key could stop every listing. Then the directories are
    listed one by one. All except those that directly contain such a key are complete. Of these, the
    keys before the page with the odd key and those after the odd key are listed.

    Raises:
        IncompleteListingException: at the end, if some could not be listed.
    """
    walk = _Walk(store, prefix, start_after)
    async for meta in walk.run():
        yield meta["path"], meta
    if walk.incomplete:
        raise _incomplete(list(dict.fromkeys(walk.incomplete)))


def _incomplete(directories: Sequence[str]) -> IncompleteListingException:
    names = ", ".join(brief(each) if each else "the top" for each in directories[:SHOWN])
    more = f" and {len(directories) - SHOWN} more" if len(directories) > SHOWN else ""
    message = (
        f"Not all objects below {names}{more} could be listed: there is one with an empty, '.' or "
        "'..' segment, or a control character, U+FFFE or U+FFFF in its key, and obstore cannot list it, "
        "or its neighbours. All other directories were listed. Delete such objects, or use fennflow-s3."
    )
    return IncompleteListingException(message, prefixes=directories)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A directory of which some pages could not be listed.

    Args:
        directory: empty for the bucket.
        odd: the key at which obstore failed, if the error names it.
        last: the last key before the page that has it; empty if that is the first page.
    """

    directory: str
    odd: str | None
    last: str


class _Walk:
    """Lists a bucket directory by directory.

    Args:
        store: the obstore store.
        prefix: the prefix that is listed.
        start_after: a key; objects up to it are left out.

    Attributes:
        incomplete: prefixes below which not all objects could be listed.
    """

    def __init__(self, store: ObjectStore, prefix: str, start_after: str) -> None:
        self._store = store
        self._prefix = prefix
        self._start_after = start_after
        self.incomplete: list[str] = []
        self._failures: list[_Failure] = []

    async def run(self) -> AsyncGenerator[ObjectMeta]:
        """Iterate over the listed objects; some may come twice."""
        async for meta in self._paged(self._prefix.rpartition("/")[0], self._start_after):
            yield meta
        while self._failures:
            failure = self._failures.pop()
            directory = failure.directory
            try:
                found: ListResult[Sequence[ObjectMeta]]
                found = await obstore.list_with_delimiter_async(  # pyright: ignore[reportUnknownMemberType]
                    self._store, directory or None
                )
            except InvalidPathError:
                self.incomplete.append(_below(directory))
                async for meta in self._around(failure):
                    yield meta
                continue
            # It treats `a/` and `/a` as `a`.
            objects = [meta for meta in found["objects"] if _is_in(directory, meta["path"])]
            async for meta in self._there(objects):
                yield meta
            below = [path for path in found["common_prefixes"] if _is_in(directory, path)]
            for path in below:
                async for meta in self._tree(path, failure):
                    yield meta
            if failure.odd and not any(failure.odd.startswith(_below(path)) for path in below):
                # It is in a directory without a name, which obstore does not report.
                name, slash, _ = failure.odd.removeprefix(_below(directory)).partition("/")
                self.incomplete.append(f"{_below(directory)}{name}{slash}")

    async def _tree(self, directory: str, above: _Failure) -> AsyncGenerator[ObjectMeta]:
        """Iterate over the objects below a directory whose parent has failed."""
        below = _below(directory)
        if not (below.startswith(self._prefix) or self._prefix.startswith(below)):
            return
        if above.odd is not None and above.odd.startswith(below):
            last = above.last if above.last.startswith(below) else ""
            self._failures.append(_Failure(directory, above.odd, last))
            return
        async for meta in self._paged(directory, ""):
            yield meta

    async def _paged(self, directory: str, start_after: str) -> AsyncGenerator[ObjectMeta]:
        """Iterate over the objects below a directory until a page fails, and note the failure."""
        last = ""
        try:
            async for page in _pages(self._store, directory, start_after):
                last = page[-1]["path"]
                async for meta in self._there(page):
                    yield meta
        except InvalidPathError as error:
            self._failures.append(_Failure(directory, _odd_key(error), last))

    async def _around(self, failure: _Failure) -> AsyncGenerator[ObjectMeta]:
        """Iterate over the objects that can be listed in a directory that directly contains odd keys.

        These are the objects after the odd keys, and the subdirectories in which the pages before
        them end.
        """
        directory, passed = failure.directory, ""
        while True:
            for child in _children(directory, failure.last, failure.odd):
                async for meta in self._tree(child, failure):
                    yield meta
            next_one = _offset_after(directory, failure.odd)
            if next_one <= passed:
                return
            passed, last = next_one, ""
            try:
                async for page in _pages(self._store, directory, passed, by_offset=True):
                    last = page[-1]["path"]
                    async for meta in self._there(page):
                        yield meta
            except InvalidPathError as error:
                failure = _Failure(directory, _odd_key(error), last)
            else:
                return

    async def _there(self, page: Sequence[ObjectMeta]) -> AsyncGenerator[ObjectMeta]:
        """Iterate over the objects of a page that exist, each once.

        obstore removes the slash of a directory marker `a/`, which S3's console creates, and of
        `/a`. Markers are empty, so a request is sent for each empty object, and for each that comes
        twice. It is also sent for each name with U+FFFD: SeaweedFS puts it in place of characters
        that XML cannot hold, since obstore does not request encoded keys.
        """
        # obstore accepts only whole segments as a prefix; the rest is compared here.
        listed = [meta for meta in page if self._is_listed(meta["path"])]
        by_path = {meta["path"]: meta for meta in listed}
        times = Counter(meta["path"] for meta in listed)
        asked = [
            meta
            for path, meta in by_path.items()
            if times[path] > 1 or not meta["size"] or REPLACEMENT in path
        ]
        answers = await _asked_for(self._store, asked)
        for path, meta in by_path.items():
            found = answers.get(path, meta)
            if found is not None:
                yield found
            elif REPLACEMENT in path and meta["size"]:
                self.incomplete.append(_below(path.rpartition("/")[0]))

    def _is_listed(self, path: str) -> bool:
        return path.startswith(self._prefix) and path.encode() > self._start_after.encode()


def _children(directory: str, *keys: str | None) -> list[str]:
    """Return the subdirectories that have keys, and whose names obstore accepts."""
    found: list[str] = []
    for key in keys:
        below = _below(directory)
        name, slash, _ = (key or "").removeprefix(below).partition("/")
        odd = name in {"", ".", ".."} or _CONTROL.search(name)
        if slash and not odd and (key or "").startswith(below):
            found.append(f"{below}{name}")
    return list(dict.fromkeys(found))


def _offset_after(directory: str, odd: str | None) -> str:
    """Return an offset after an odd key in a directory that obstore accepts; empty if there is none."""
    below = _below(directory)
    if odd is None or not odd.startswith(below):
        return ""
    name = odd.removeprefix(below).partition("/")[0]
    control = _CONTROL.search(name)
    if control is None:
        return f"{below}{name}0"  # the character after the slash
    return f"{below}{name[: control.start()]}{' ' if control[0] < ' ' else NO_BREAK_SPACE}"


def _odd_key(error: InvalidPathError) -> str | None:
    """Return the key that obstore names; a wrong one does not affect what counts as listed."""
    found = _ODD_KEY.search(str(error))
    return None if found is None else found["key"]


def _below(directory: str) -> str:
    return directory and f"{directory}/"


def _is_in(directory: str, path: str) -> bool:
    return bool(path) and path != directory and path.rpartition("/")[0] == directory


async def _pages(
    store: ObjectStore, directory: str, start_after: str, *, by_offset: bool = False
) -> AsyncGenerator[Sequence[ObjectMeta]]:
    """Iterate over the pages of what is below a directory, a thousand objects in a request.

    Args:
        store: the obstore store.
        directory: empty for the bucket.
        start_after: a key; objects up to it are left out.
        by_offset: use an offset on Azure, too, although its order differs; otherwise it begins with
            the keys that cannot be listed.
    """
    azure = isinstance(store, AzureStore)
    # Its overloads use types of a package that is not installed.
    pages: ListStream[Sequence[ObjectMeta]] = obstore.list(  # pyright: ignore[reportUnknownMemberType]
        store,
        directory or None,
        offset=None if azure and not by_offset else start_after or None,
        chunk_size=LISTED_AT_ONCE,
    )
    if azure:
        # Azure has a different order, and its emulator ignores offsets.
        after = start_after.encode()
        found: list[ObjectMeta] = []
        failure: InvalidPathError | None = None
        try:
            async for page in pages:
                found += [each for each in page if each["path"].encode() > after]
        except InvalidPathError as error:
            failure = error
        if found:
            yield sorted(found, key=lambda each: each["path"].encode())
        if failure is not None:
            raise failure
        return
    async for page in pages:
        if page:
            yield page


async def _asked_for(
    store: ObjectStore, listed: Sequence[ObjectMeta]
) -> dict[str, ObjectMeta | None]:
    """Return what the store says of objects, by path; None of those that are not there."""
    limit = asyncio.Semaphore(ASKED_AT_ONCE)

    async def look(meta: ObjectMeta) -> ObjectMeta | None:
        async with limit:
            try:
                return await obstore.head_async(store, meta["path"])
            except FileNotFoundError:
                return None
            except (BaseError, OSError):
                return meta  # a listing needs fewer permissions, and shows that it exists

    answers: dict[str, ObjectMeta | None] = {}
    if isinstance(store, MemoryStore):
        return answers  # it lists what it holds
    for start in range(0, len(listed), LISTED_AT_ONCE):
        some = listed[start : start + LISTED_AT_ONCE]
        async with asyncio.TaskGroup() as group:
            tasks = {meta["path"]: group.create_task(look(meta)) for meta in some}
        answers |= {path: task.result() for path, task in tasks.items()}
    return answers
