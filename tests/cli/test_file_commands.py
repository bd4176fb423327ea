"""The program's commands about files, run as users run them."""

from __future__ import annotations

import asyncio
import os
import pty
from pathlib import Path

from fennflow.files import TextContent
from fennflow.testing import Fault, S3Server
from shells import PROGRAM, Shell

LONG = os.urandom(3 << 20)


async def fill(shell: Shell, **files: str) -> None:
    async with shell.site.uow_class() as uow:
        for name, body in files.items():
            path = name.replace("__", "/") + ".txt"
            await uow.files.put(TextContent.from_content(body, filename=path))


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


async def test_files_are_listed(shell: Shell) -> None:
    await fill(shell, a="1", letters__ann="Dear Ann", letters__bob="Dear Bob")
    assert (await shell("ls", "app:UOW")).out.split() == ["letters/", "a.txt"]
    done = await shell("ls", "app:UOW", "files:letters/")
    assert done.out.split() == ["letters/ann.txt", "letters/bob.txt"]
    done = await shell("ls", "-r", "app:UOW", "files:")
    assert done.out.split() == ["a.txt", "letters/ann.txt", "letters/bob.txt"]
    done = await shell("ls", "-l", "app:UOW")
    assert [line.split()[-1] for line in done.out.splitlines()] == ["path", "letters/", "a.txt"]
    assert "text/plain" in done.out
    rows = (await shell("ls", "app:UOW", "--json")).json
    assert rows[0] == {"path": "letters/"}
    assert (rows[1]["path"], rows[1]["size"]) == ("a.txt", 1)


async def test_files_are_told_about_and_written_out(shell: Shell) -> None:
    await fill(shell, a="Zoë", b="!")
    assert (await shell("cat", "app:UOW", "files:a.txt", ":/b.txt")).out == "Zoë!"
    done = await shell("stat", "app:UOW", "files:a.txt")
    assert "4 bytes" in done.out
    [info] = (await shell("stat", "app:UOW", "files:a.txt", "--json")).json
    assert (info["media_type"], info["size"]) == ("text/plain", 4)
    done = await shell("cat", "app:UOW", "files:none")
    assert (done.code, done.out) == (1, "")
    assert "NoSuchKeyException" in done.err


async def test_a_directory_goes_in_and_comes_back_the_same(shell: Shell) -> None:
    source = shell.directory / "in"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "long.bin").write_bytes(LONG)
    (source / "deep" / "er" / "note").write_text("no media type is told by this name")
    (source / "empty.txt").touch()
    done = await shell("cp", "-r", "app:UOW", "in", "files:box", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["files"] == 3
    assert done.json["bytes"] == len(LONG) + 34
    objects = await shell.site.store.objects()
    assert set(objects) == {"box/long.bin", "box/deep/er/note", "box/empty.txt"}
    done = await shell("cp", "-r", "app:UOW", "files:box", "out")
    assert (done.code, done.out) == (0, "Copied 3 files, 3,145,762 bytes.\n")
    assert tree(shell.directory / "out") == tree(source)


async def test_files_move_in_out_and_inside(shell: Shell) -> None:
    (shell.directory / "a.txt").write_text("1")
    done = await shell("mv", "app:UOW", "a.txt", "files:dir/")
    assert (done.code, done.out) == (0, "Moved 1 file, 1 bytes.\n")
    assert not (shell.directory / "a.txt").exists()
    assert (await shell("mv", "app:UOW", "files:dir/a.txt", "files:b.txt")).code == 0
    assert await shell.site.store.objects() == {"b.txt": b"1"}
    assert (await shell("cp", "app:UOW", "files:b.txt", "files:copies/")).code == 0
    assert (await shell("mv", "app:UOW", "files:b.txt", ".")).code == 0
    assert (shell.directory / "b.txt").read_text() == "1"
    assert await shell.site.store.objects() == {"copies/b.txt": b"1"}


async def test_files_are_deleted_all_or_none(shell: Shell) -> None:
    await fill(shell, a="1", b="2", c__d="3", c__e="4")
    done = await shell("rm", "app:UOW", "files:a.txt", "files:none.txt")
    assert done.code == 1
    assert "none.txt" in done.err
    assert len(await shell.site.store.objects()) == 4
    done = await shell("rm", "app:UOW", "files:a.txt", "--json")
    assert done.json["paths"] == ["files:a.txt"]
    assert (await shell("rm", "-r", "--yes", "app:UOW", "files:c")).out == "Deleted 2 files.\n"
    assert set(await shell.site.store.objects()) == {"b.txt"}
    assert (await shell("rm", "-r", "--yes", "app:UOW", "files:c")).code == 1


async def test_what_fails_half_way_leaves_nothing(shell: Shell, moto: S3Server) -> None:
    (shell.directory / "in").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (shell.directory / "in" / name).write_text(name)
    await fill(shell, x="1", y="2")
    with moto.failing(
        lambda request: (
            Fault.BEFORE
            if (request.method, request.key) in {("PUT", "in/b.txt"), ("GET", "y.txt")}
            else None
        )
    ):
        done = await shell("mv", "-r", "app:UOW", "in", "files:in", AWS_MAX_ATTEMPTS="1")
        assert done.code == 1
        done = await shell("mv", "-r", "app:UOW", "files:", "out", AWS_MAX_ATTEMPTS="1")
        assert done.code == 1
    assert set(tree(shell.directory / "in")) == {"a.txt", "b.txt", "c.txt"}
    assert tree(shell.directory / "out") == {}
    assert set(await shell.site.store.objects()) == {"x.txt", "y.txt"}


async def test_no_file_of_a_command_replaces_another_one_of_it(shell: Shell) -> None:
    for name in ("one", "two"):
        (shell.directory / name).mkdir()
        (shell.directory / name / "x.txt").write_text(name)
    await fill(shell, a__b="1", a__c__b="2")
    before = await shell.site.store.objects()
    for arguments in (
        ("mv", "app:UOW", "one/x.txt", "two/x.txt", "files:dir/"),
        ("mv", "-r", "app:UOW", "files:a", "files:a/c"),
    ):
        done = await shell(*arguments)
        assert done.code == 1, arguments
        assert "FilepathsCollisionError" in done.err
    assert await shell.site.store.objects() == before
    assert (shell.directory / "one" / "x.txt").read_text() == "one"
    assert (shell.directory / "two" / "x.txt").read_text() == "two"


async def test_what_is_no_place_is_used_wrongly(shell: Shell) -> None:
    for arguments in (
        ("cat", "app:UOW", "nothing:a"),
        ("cp", "app:UOW", "a", "b"),
        ("rm", "app:UOW", "a"),
        ("cp", "app:UOW", "files:a", "flies:b"),
        ("cp", "app:UOW", "flies:b", "files:a"),
    ):
        done = await shell(*arguments)
        assert done.code == 2, arguments
        assert "FIELD:PATH" in done.err
    done = await shell("cp", "app:UOW", "no-such-file", "files:")
    assert done.code == 1
    assert "There is no file" in done.err


async def test_progress_is_shown_on_a_terminal(shell: Shell) -> None:
    (shell.directory / "long.bin").write_bytes(LONG)
    terminal, side = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "cp", "app:UOW", "long.bin", "files:"),
        cwd=shell.directory,
        env={**shell.environment, "TERM": "xterm"},
        stdout=side,
        stderr=side,
    )
    os.close(side)
    shown = bytearray()

    def read() -> None:
        try:
            while more := os.read(terminal, 65536):
                shown.extend(more)
        except OSError:
            os.close(terminal)

    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.to_thread(read))
        group.create_task(process.wait())
    assert process.returncode == 0
    assert b"Copied 1 file" in shown
    assert "MB" in shown.decode()
