"""The local file of the state: temporary, or kept in a directory for one process at a time."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from fennflow.exceptions import ConfigException


@contextmanager
def state_file(cache_dir: Path | None, name: str) -> Generator[tuple[Path, bool]]:
    """Return a path for the state that no other process uses during the block, and whether it is kept.

    Args:
        cache_dir: the directory where files are kept; None for a temporary file.
        name: of the catalog, without a slash.

    Raises:
        ConfigException: the directory cannot be used.
    """
    if cache_dir is not None:
        try:
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = sqlite3.connect(cache_dir / f"{name}.lock", timeout=0, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            message = f"BucketBackendConfig(cache_dir={str(cache_dir)!r}) cannot be used: {error}."
            raise ConfigException(message) from error
        with closing(lock):
            if _taken(lock):
                path = cache_dir / f"{name}.db"
                path.touch(mode=0o600)
                yield path, True
                return
    with tempfile.TemporaryDirectory(prefix="fennflow-", ignore_cleanup_errors=True) as folder:
        yield Path(folder) / "catalog.db", False


def _taken(lock: sqlite3.Connection) -> bool:
    """Return whether this process got the lock, which ends with the connection or the process."""
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        return False  # another process uses the file
    return True


def remove(path: Path) -> None:
    """Remove the files of a state."""
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).unlink()
