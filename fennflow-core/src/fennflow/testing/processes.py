"""Servers that run in separate processes, and end at the latest with the tests that use them."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

READY_WITHIN = 60.0

# The pipe ends with the test process, even if that is killed. Then the server is killed, too.
_GUARD = """\
import contextlib, os, shutil, subprocess, sys, threading
garbage, command = sys.argv[2 : 2 + int(sys.argv[1])], sys.argv[2 + int(sys.argv[1]) :]
server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
def watch():
    sys.stdin.buffer.read()
    server.kill()
threading.Thread(target=watch, daemon=True).start()
code = server.wait()
for path in garbage:
    with contextlib.suppress(FileNotFoundError):
        (shutil.rmtree if os.path.isdir(path) else os.unlink)(path)
sys.exit(code)
"""


def find_program(name: str, package: str) -> str:
    """Return the path of a program in this environment.

    Raises:
        FileNotFoundError: its package is not installed.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}"
    program = shutil.which(name, path=path)
    if program is None:
        message = f"The program {name} is not installed: pip install {package}"
        raise FileNotFoundError(message)
    return program


def free_ports(count: int) -> list[int]:
    """Return free ports that the system does not assign to outgoing connections.

    No other process gets them from this function while this one lives, even before a server listens on
    them.
    """
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            # They are below the ports that Linux and others assign to connections. Tests in several
            # processes may have seeded `random` with the same value.
            port = random.SystemRandom().randrange(15_000, 32_000)
            candidate = stack.enter_context(socket.socket())
            with suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as taken:
                taken.bind(("127.0.0.1", port))
                candidate.bind(("127.0.0.1", port))
                taken.detach()  # the servers use TCP, so the UDP port with this number can stay bound
                found.append(port)
        return found


@contextmanager
def running(
    command: Sequence[str],
    ready: Callable[[], None],
    *,
    env: Mapping[str, str] | None = None,
    garbage: Sequence[Path] = (),
) -> Generator[None]:
    """Run a server until the block or this process ends, in whatever way.

    Args:
        command: the program and its arguments.
        ready: raises OSError while the server is not ready.
        env: variables in addition to those of this process.
        garbage: files and directories to remove when the server has ended.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """
    guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(len(garbage)), *map(str, garbage)]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 - a program of this environment
            [*guard, *command],
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C must reach only the tests, which still need the server to clean up.
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            _wait_until(ready, process, output)
            yield
        finally:
            process.stdin.close()
            process.wait()


def _wait_until(
    ready: Callable[[], None], process: subprocess.Popen[bytes], output: IO[bytes]
) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while True:
        try:
            return ready()
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                output.seek(0)
                last = output.read()[-2000:].decode(errors="replace")
                message = f"The server did not start: exit code {process.poll()}, {error}\n{last}"
                raise RuntimeError(message) from error
            time.sleep(0.05)
