"""Listings of the stores that obstore speaks to over HTTP, also where it fails at a key."""

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
    """Iterate over the objects under a prefix that follow a key in the order of the store.

    obstore fails at a page that has a key with a control character, or an empty, `.` or `..`
    segment: anyone who can upload such a key would stop every listing. Then the directories are
    listed one by one, and all but those that have such a key themselves can be. Of these, what
    comes before the page with the key, and what follows the key.

    Raises:
        IncompleteListingException: at the end, if some could not be listed.
    """
    walk = _Walk(store, prefix)
    # obstore takes whole segments for a prefix: the rest is compared here.
    async for meta in walk.run(prefix.rpartition("/")[0], start_after):
        path = meta["path"]
        if not path.startswith(prefix) or path.encode() <= start_after.encode():
            continue
        # SeaweedFS sends it in the place of what XML cannot hold, as obstore does not ask for encoded keys.
        if REPLACEMENT in path and await _is_missing(store, path):
            walk.incomplete.append(_below(path.rpartition("/")[0]))
        else:
            yield path, meta
    if walk.incomplete:
        raise _incomplete(list(dict.fromkeys(walk.incomplete)))


async def _is_missing(store: ObjectStore, path: str) -> bool:
    try:
        await obstore.head_async(store, path)
    except FileNotFoundError:
        return True
    except (BaseError, OSError):
        return False  # a listing needs fewer rights, and says that it is there
    return False


def _incomplete(directories: Sequence[str]) -> IncompleteListingException:
    names = ", ".join(brief(each) if each else "the top" for each in directories[:SHOWN])
    more = f" and {len(directories) - SHOWN} more" if len(directories) > SHOWN else ""
    message = (
        f"Not all below {names}{more} could be listed: there is an object with an empty, '.' or "
        "'..' segment, or a control character, U+FFFE or U+FFFF in its key, and obstore cannot list it, "
        "or what is next to it. All other directories were listed. Delete such objects, or use fennflow-s3."
    )
    return IncompleteListingException(message, prefixes=directories)


@dataclass(frozen=True, slots=True)
class _Failure:
    """A directory whose pages could not all be listed.

    Args:
        directory: empty for the bucket.
        odd: the key at which obstore failed, if it names that.
        last: the last key before the page that has it; empty if that is the first one.
    """

    directory: str
    odd: str | None
    last: str


class _Walk:
    """Lists a bucket by directories.

    Args:
        store: of obstore.
        prefix: what is listed.

    Attributes:
        incomplete: prefixes below which not all could be listed.
    """

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self.incomplete: list[str] = []
        self._failures: list[_Failure] = []

    async def run(self, top: str, start_after: str) -> AsyncGenerator[ObjectMeta]:
        """Iterate over what is below a directory and follows a key; some may come twice."""
        async for meta in self._paged(top, start_after):
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
            for meta in found["objects"]:
                if _is_in(directory, meta["path"]):  # it takes `a/`, and `/a`, for `a`
                    yield meta
            below = [path for path in found["common_prefixes"] if _is_in(directory, path)]
            for path in below:
                async for meta in self._tree(path, failure):
                    yield meta
            if failure.odd and not any(failure.odd.startswith(_below(path)) for path in below):
                # In a directory without a name, of which obstore says nothing.
                name, slash, _ = failure.odd.removeprefix(_below(directory)).partition("/")
                self.incomplete.append(f"{_below(directory)}{name}{slash}")

    async def _tree(self, directory: str, above: _Failure) -> AsyncGenerator[ObjectMeta]:
        """Iterate over what is below a directory, of which one above has failed."""
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
        """Iterate over what is below a directory until a page fails, and note that."""
        last = ""
        try:
            async for meta in _pages(self._store, directory, start_after):
                last = meta["path"]
                yield meta
        except InvalidPathError as error:
            self._failures.append(_Failure(directory, _odd_key(error), last))

    async def _around(self, failure: _Failure) -> AsyncGenerator[ObjectMeta]:
        """Iterate over what can be listed of a directory that has odd keys itself.

        That is what follows these keys, and the directories in it in which the pages before them end.
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
                async for meta in _pages(self._store, directory, passed, by_offset=True):
                    last = meta["path"]
                    yield meta
            except InvalidPathError as error:
                failure = _Failure(directory, _odd_key(error), last)
            else:
                return


def _children(directory: str, *keys: str | None) -> list[str]:
    """Return the directories in a directory that have keys, and names that obstore takes."""
    found: list[str] = []
    for key in keys:
        below = _below(directory)
        name, slash, _ = (key or "").removeprefix(below).partition("/")
        odd = name in {"", ".", ".."} or _CONTROL.search(name)
        if slash and not odd and (key or "").startswith(below):
            found.append(f"{below}{name}")
    return list(dict.fromkeys(found))


def _offset_after(directory: str, odd: str | None) -> str:
    """Return an offset that obstore takes, behind an odd key in a directory; empty if there is none."""
    below = _below(directory)
    if odd is None or not odd.startswith(below):
        return ""
    name = odd.removeprefix(below).partition("/")[0]
    control = _CONTROL.search(name)
    if control is None:
        return f"{below}{name}0"  # the character after the slash
    return f"{below}{name[: control.start()]}{' ' if control[0] < ' ' else NO_BREAK_SPACE}"


def _odd_key(error: InvalidPathError) -> str | None:
    """Return the key that obstore names; a wrong one has no effect on what counts as listed."""
    found = _ODD_KEY.search(str(error))
    return None if found is None else found["key"]


def _below(directory: str) -> str:
    return directory and f"{directory}/"


def _is_in(directory: str, path: str) -> bool:
    return bool(path) and path != directory and path.rpartition("/")[0] == directory


async def _pages(
    store: ObjectStore, directory: str, start_after: str, *, by_offset: bool = False
) -> AsyncGenerator[ObjectMeta]:
    """Iterate over what is below a directory, a thousand in a request.

    Args:
        store: of obstore.
        directory: empty for the bucket.
        start_after: a key; what comes before it is left out.
        by_offset: let Azure leave it out, too, although its order is its own: else it begins with what
            cannot be listed.
    """
    azure = isinstance(store, AzureStore)
    # Its overloads name types of a package that is not installed.
    pages: ListStream[Sequence[ObjectMeta]] = obstore.list(  # pyright: ignore[reportUnknownMemberType]
        store,
        directory or None,
        offset=None if azure and not by_offset else start_after or None,
        chunk_size=LISTED_AT_ONCE,
    )
    if azure:
        # It has an order of its own, and its emulator ignores offsets.
        after = start_after.encode()
        found: list[ObjectMeta] = []
        failure: InvalidPathError | None = None
        try:
            async for page in pages:
                found += [each for each in page if each["path"].encode() > after]
        except InvalidPathError as error:
            failure = error
        for meta in await _objects(store, sorted(found, key=lambda each: each["path"].encode())):
            yield meta
        if failure is not None:
            raise failure
        return
    async for page in pages:
        for meta in await _objects(store, page):
            yield meta


async def _objects(store: ObjectStore, found: Sequence[ObjectMeta]) -> list[ObjectMeta]:
    """Return the objects of a page, each once.

    obstore takes a slash off the mark of a directory, `a/`, which S3's console creates, and off
    `/a`. Marks are empty: each empty object is asked for, and each that comes twice.
    """
    if isinstance(store, MemoryStore):
        return list(found)
    limit = asyncio.Semaphore(ASKED_AT_ONCE)

    async def look(meta: ObjectMeta) -> ObjectMeta | None:
        async with limit:
            try:
                return await obstore.head_async(store, meta["path"])
            except FileNotFoundError:
                return None
            except (BaseError, OSError):
                return meta  # a listing needs fewer rights, and says that it is there

    by_path = {meta["path"]: meta for meta in found if meta["path"]}
    times = Counter(meta["path"] for meta in found)
    asked = [meta for path, meta in by_path.items() if times[path] > 1 or not meta["size"]]
    async with asyncio.TaskGroup() as group:
        tasks = {meta["path"]: group.create_task(look(meta)) for meta in asked}
    seen = [tasks[path].result() if path in tasks else meta for path, meta in by_path.items()]
    return [meta for meta in seen if meta is not None]
