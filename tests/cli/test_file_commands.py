"""The program's commands about files."""

from __future__ import annotations

import asyncio
import os
import pty
from pathlib import Path

import httpx
import pytest

from fennflow.files import TextContent
from fennflow.testing import Fault, S3Server
from shells import PROGRAM, Program, Shell

LONG = os.urandom(3 << 20)


def tree(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_files_are_listed(program: Program) -> None:
    program.put({"a.txt": "1", "letters/ann.txt": "Dear Ann", "letters/bob.txt": "Dear Bob"})
    assert program("ls").out.split() == ["letters/", "a.txt"]
    done = program("ls", "files:letters/")
    assert done.out.split() == ["letters/ann.txt", "letters/bob.txt"]
    done = program("ls", "-r", "files:")
    assert done.out.split() == ["a.txt", "letters/ann.txt", "letters/bob.txt"]
    done = program("ls", "-l")
    assert [line.split()[-1] for line in done.out.splitlines()] == ["path", "letters/", "a.txt"]
    assert "text/plain" in done.out
    rows = program("ls", "--json").json
    assert rows[0] == {"path": "letters/"}
    assert (rows[1]["path"], rows[1]["size"]) == ("a.txt", 1)


def test_files_are_described_and_written_out(program: Program) -> None:
    program.put({"a.txt": "Zoë", "b.txt": "!"})
    assert program("cat", "files:a.txt", ":/b.txt").out == "Zoë!"
    done = program("stat", "files:a.txt")
    assert "4 bytes" in done.out
    [info] = program("stat", "files:a.txt", "--json").json
    assert (info["media_type"], info["size"]) == ("text/plain", 4)
    done = program("cat", "files:none")
    assert (done.code, done.out) == (1, "")
    assert "NoSuchKeyException" in done.err


def test_a_directory_goes_in_and_comes_back_the_same(program: Program) -> None:
    source = program.directory / "in"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "long.bin").write_bytes(LONG)
    (source / "deep" / "er" / "note").write_text("no media type belongs to such name")
    (source / "empty.txt").touch()
    done = program("cp", "-r", "in", "files:box", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["files"] == 3
    assert done.json["bytes"] == len(LONG) + 34
    assert set(program.files()) == {"box/long.bin", "box/deep/er/note", "box/empty.txt"}
    done = program("cp", "-r", "files:box", "out")
    assert (done.code, done.out) == (0, "Copied 3 files, 3,145,762 bytes.\n")
    assert tree(program.directory / "out") == tree(source)


def test_a_directory_keeps_its_name_where_one_is_there_already(program: Program) -> None:
    """Like `cp -r`; `in/.` stands for its contents."""
    (program.directory / "in" / "deep").mkdir(parents=True)
    (program.directory / "in" / "deep" / "a.txt").write_text("a")
    (program.directory / "out").mkdir()
    assert program("cp", "-r", "in", "files:box").code == 0
    assert program("cp", "-r", "in/", "files:box").code == 0
    assert program("cp", "-r", "in/.", "files:new/").code == 0
    box = {"box/deep/a.txt": "a", "box/in/deep/a.txt": "a"}
    assert program.contents() == box | {"new/deep/a.txt": "a"}
    assert program("cp", "-r", "files:box/deep", "out").code == 0
    assert program("mv", "-r", "files:new/deep/a.txt", "out/b.txt").code == 0
    assert program("mv", "-r", "files:box/in", "files:box/deep").code == 0
    assert tree(program.directory / "out") == {"deep/a.txt": b"a", "b.txt": b"a"}
    assert program.contents() == {"box/deep/a.txt": "a", "box/deep/in/deep/a.txt": "a"}
    assert program("cp", "-r", "files:", "out/all").code == 0
    assert set(tree(program.directory / "out" / "all")) == set(program.contents())


def test_patterns_stand_for_the_files_that_match(program: Program) -> None:
    names = ("a/1.txt", "a/2.txt", "a/3.pdf", "a/b/4.txt", "[x].txt", "x.txt")
    program.put(dict.fromkeys(names, "x"))
    out = program.directory / "out"
    assert program("cp", "files:a/*.txt", "out").code == 0
    assert set(tree(out)) == {"1.txt", "2.txt"}
    assert program("cp", "files:**/?.txt", "files:all/").code == 0
    copies = {"all/1.txt", "all/2.txt", "all/4.txt", "all/x.txt"}
    assert set(program.files()) == {*names, *copies}
    assert program("cat", "files:a/[12].txt").out == "xx"
    assert program("stat", "files:[x].txt", "--json").json[0]["path"] == "[x].txt"
    assert program("rm", "--yes", "files:al*/*").out == "Deleted 4 files.\n"
    done = program("rm", "files:none*")
    assert (done.code, "No such file" in done.err) == (1, True)
    done = program("rm", "files:*")
    assert (done.code, "Delete 2 files" in done.err) == (1, True)
    assert program("rm", "-r", "--yes", "files:a*").out == "Deleted 4 files.\n"
    assert set(program.files()) == {"[x].txt", "x.txt"}


@pytest.mark.once
async def test_urls_for_others_are_printed(shell: Shell) -> None:
    async with shell.site.uow_class() as uow:
        for name in ("a.txt", "b.txt"):
            await uow.files.put(TextContent.from_content(name, filename=name))
    done = await shell("presign", "app:UOW", "files:?.txt", "--expires-in", "60")
    async with httpx.AsyncClient() as client:
        found = [(await client.get(line)).text for line in done.out.splitlines()]
        assert found == ["a.txt", "b.txt"]
        done = await shell("presign", "app:UOW", "--upload", "files:new.txt")
        url, *lines = done.out.splitlines()
        headers = dict(line.strip()[4:-1].split(": ", 1) for line in lines)
        answer = await client.put(url, content=b"3", headers=headers)
        assert answer.status_code == httpx.codes.OK
    done = await shell("presign", "app:UOW", "files:none", "--json")
    assert (done.code, done.out) == (1, "")


def test_files_move_in_out_and_inside(program: Program) -> None:
    (program.directory / "a.txt").write_text("1")
    done = program("mv", "a.txt", "files:dir/")
    assert (done.code, done.out) == (0, "Moved 1 file, 1 bytes.\n")
    assert not (program.directory / "a.txt").exists()
    assert program("mv", "files:dir/a.txt", "files:b.txt").code == 0
    assert program.contents() == {"b.txt": "1"}
    assert program("cp", "files:b.txt", "files:copies/").code == 0
    assert program("mv", "files:b.txt", ".").code == 0
    assert (program.directory / "b.txt").read_text() == "1"
    assert program.contents() == {"copies/b.txt": "1"}


def test_files_are_deleted_all_or_none(program: Program) -> None:
    program.put({"a.txt": "1", "b.txt": "2", "c/d.txt": "3", "c/e.txt": "4"})
    done = program("rm", "files:a.txt", "files:none.txt")
    assert done.code == 1
    assert "none.txt" in done.err
    assert len(program.files()) == 4
    done = program("rm", "files:a.txt", "--json")
    assert done.json["paths"] == ["files:a.txt"]
    assert program("rm", "-r", "--yes", "files:c").out == "Deleted 2 files.\n"
    assert set(program.files()) == {"b.txt"}
    assert program("rm", "-r", "--yes", "files:c").code == 1


@pytest.mark.once
async def test_what_fails_half_way_leaves_nothing(shell: Shell, moto: S3Server) -> None:
    (shell.directory / "in").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (shell.directory / "in" / name).write_text(name)
    async with shell.site.uow_class() as uow:
        for name in ("x.txt", "y.txt"):
            await uow.files.put(TextContent.from_content(name, filename=name))
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


def test_no_file_of_a_command_replaces_another_one_of_it(program: Program) -> None:
    for name in ("one", "two"):
        (program.directory / name).mkdir()
        (program.directory / name / "x.txt").write_text(name)
    program.put({"a/b.txt": "1", "a/c/b.txt": "2"})
    before = program.contents()
    for arguments in (
        ("mv", "one/x.txt", "two/x.txt", "files:dir/"),
        ("mv", "-r", "files:a", "files:a/c"),
    ):
        done = program(*arguments)
        assert done.code == 1, arguments
        assert "FilepathsCollisionError" in done.err
    assert program.contents() == before
    assert (program.directory / "one" / "x.txt").read_text() == "one"
    assert (program.directory / "two" / "x.txt").read_text() == "two"


def test_what_is_not_a_place_is_a_usage_error(program: Program) -> None:
    for arguments in (
        ("cat", "nothing:a"),
        ("cp", "a", "b"),
        ("rm", "a"),
        ("cp", "files:a", "flies:b"),
        ("cp", "flies:b", "files:a"),
    ):
        done = program(*arguments)
        assert done.code == 2, arguments
        assert "FIELD:PATH" in done.err
    done = program("cp", "no-such-file", "files:")
    assert done.code == 1
    assert "No such file" in done.err


@pytest.mark.once
async def test_progress_is_shown_on_a_terminal(shell: Shell) -> None:
    (shell.directory / "long.bin").write_bytes(LONG)
    terminal, side = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "cp", "app:UOW", "long.bin", "files:"),
        cwd=shell.directory,
        env={**shell.environment, "TERM": "xterm", "PYTHONWARNINGS": "error"},
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
