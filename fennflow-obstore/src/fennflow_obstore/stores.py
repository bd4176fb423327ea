"""The stores of obstore that a connector uses: one for each namespace and use."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, from_url

from fennflow.exceptions import ConfigException, ConnectorCapabilityException
from fennflow.printable import brief
from fennflow_obstore.errors import is_panic, words_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from fennflow_obstore.config import ObstoreConnectorConfig

MAX_EXPIRES_IN = 7 * 24 * 3600
"""The longest time in seconds for which a URL may be signed."""

Use = Literal["reading", "writing", "deleting singly"]
"""`reading` retries by itself; `writing` does not, since obstore would not report it (P20)."""

_memories: dict[tuple[str, str], MemoryStore] = {}


def check_signable(expires_in: float) -> None:
    """Refuse a time for which stores do not sign URLs.

    Raises:
        ConnectorCapabilityException: the time is out of range.
    """
    if not 1 <= expires_in <= MAX_EXPIRES_IN:
        message = f"URLs are signed for 1 to {MAX_EXPIRES_IN} seconds, not for {brief(expires_in)}."
        raise ConnectorCapabilityException(message)


SECONDS_AT_EXIT = 0.1
"""How long a process that used obstore waits at its exit for obstore's threads.

They release the objects of a call after its result has arrived. A thread that does so while the
interpreter shuts down aborts the process (obstore 0.12.1): 4 of 100 short programs on a busy
machine, and none of 200 that had waited this long.
"""

_process: list[int] = []
"""The process that first opened a connector: it has obstore's threads, which a child does not have."""


def check_process() -> None:
    """Refuse to work in a child of the process that used obstore first.

    Raises:
        ConnectorCapabilityException: this is such a child.
    """
    if not _process:
        _process.append(os.getpid())
        atexit.register(time.sleep, SECONDS_AT_EXIT)
    if _process[0] != os.getpid():
        message = (
            "This process was forked from one that had used obstore, whose threads do not survive a "
            "fork: no request would ever end. Open units of work on obstore after the fork only, "
            "start workers by spawn, or use S3ConnectorConfig."
        )
        raise ConnectorCapabilityException(message)


class Stores:
    """Opens stores at first use.

    Args:
        config: the config of the connector.
    """

    def __init__(self, config: ObstoreConnectorConfig) -> None:
        self._config = config
        self._stores: dict[tuple[str, Use], ObjectStore] = {}

    def of(self, namespace: str, use: Use) -> ObjectStore:
        """Return the store of a namespace.

        Raises:
            ConfigException: the config is not valid, or the namespace is not one path segment.
        """
        if (namespace, use) not in self._stores:
            self._stores[namespace, use] = self._new(namespace, use)
        return self._stores[namespace, use]

    def root(self, namespace: str) -> Path:
        """Return the directory of a namespace of local files."""
        _check_segment(self._config.url, namespace)
        return Path(unquote(urlsplit(self._config.url).path)) / namespace

    def close(self) -> None:
        """Release all stores; Rust closes their connections."""
        self._stores.clear()

    def _new(self, namespace: str, use: Use) -> ObjectStore:
        config = self._config
        _check_segment(config.url, namespace)
        url = config.url if config.url.endswith("/") else f"{config.url}/"
        if config.scheme == "memory":
            return _memories.setdefault((url, namespace), MemoryStore())
        # The overloads depend on the kind of store, which the URL determines here.
        make: Callable[..., ObjectStore] = from_url
        try:
            if config.scheme == "file":
                directory = self.root(namespace)
                _make(directory, config.directory_mode)
                return LocalStore(directory, automatic_cleanup=True)
            options = {name: value.get_secret_value() for name, value in config.options.items()}
            client_options: dict[str, Any] = {
                "timeout": timedelta(hours=1),
                "read_timeout": timedelta(minutes=5),
                "allow_http": options.get("endpoint", "").startswith("http://"),
                **config.client_options,
            }
            if use == "deleting singly" and config.speaks_s3:
                options["disable_bulk_delete"] = "true"
            return make(
                f"{url}{namespace}",
                config=options,
                client_options=client_options,
                retry_config={"max_retries": config.max_attempts - 1 if use == "reading" else 0},
            )
        except BaseException as error:
            # A Rust panic because of an unexpected option is not an `Exception`.
            if not (isinstance(error, (BaseError, ValueError, TypeError)) or is_panic(error)):
                raise
            words = words_of(error)
            for value in _values(config):
                words = words.replace(value, "***")
            message = f"ObstoreConnectorConfig cannot open {url}: {words}"
            raise ConfigException(message) from None  # the cause contains the values


def _values(config: ObstoreConnectorConfig) -> Sequence[str]:
    """Return the option values that are texts, the longest first; any of them may be a secret."""
    options = (value.get_secret_value() for value in config.options.values())
    values = {*options, *(each for each in config.client_options.values() if isinstance(each, str))}
    return sorted(values - {""}, key=len, reverse=True)


def _check_segment(url: str, namespace: str) -> None:
    if not namespace or "/" in namespace or "\0" in namespace or namespace in {".", ".."}:
        message = f"The namespace {namespace!r} cannot follow {url}: it has to be one path segment."
        raise ConfigException(message)


def _make(directory: Path, mode: int) -> None:
    """Create the directory of a namespace, unless it exists."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.is_symlink():
            message = (
                f"{directory} is a symbolic link, and links below {directory.parent} are not "
                "followed. Use the url of the directory to which it leads."
            )
            raise ConfigException(message)
        with suppress(FileExistsError):
            directory.mkdir()
            directory.chmod(mode)  # independent of the umask
        if not directory.is_dir():
            message = f"{directory} is a file, but a namespace is a directory. Move the file."
            raise ConfigException(message)
    except OSError as error:
        message = f"The directory {directory} cannot be created: {error}"
        raise ConfigException(message) from error
