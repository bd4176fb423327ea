"""Files are copied to local paths all or none, and nowhere else."""

from __future__ import annotations

import asyncio
import io
import os
import stat
from pathlib import Path

import pytest

from fennflow.cli.downloads import PendingDownloads, check_local_name
from fennflow.exceptions import FileException, FilepathsCollisionError, PathException
from shells import Program


def fill(program: Program, *paths: str) -> None:
    program.put({path: f"of {path}" for path in paths})


def tree(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def out(program: Program) -> Path:
    directory = program.directory / "out"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("name", ["../a", "b/../../a", "/etc/a", "a//b", "./a", "a/", "a\0b", ""])
def test_no_name_leads_out_of_the_destination(name: str) -> None:
    with pytest.raises(PathException, match="outside"):
        check_local_name(name, windows=False)
    check_local_name("b/a", windows=False)
    check_local_name("con/a\\b:c. ", windows=False)


@pytest.mark.parametrize(
    "name",
    [
        "..\\a", "C:a", "a:stream", "nul", "dir/CON.txt", "com1", "LPT\u00b9.log", "a.", "a ", "con .x",
        "a*", "\\\\server\\x", "conout$",
    ],
)  # fmt: skip
def test_names_that_windows_takes_for_something_else_are_refused(name: str) -> None:
    with pytest.raises(PathException, match="outside"):
        check_local_name(name, windows=True)
    for fine in ("b/a", "common.txt", "console", ".hidden", "nulls/com10"):
        check_local_name(fine, windows=True)


@pytest.mark.parametrize("verb", ["cp", "mv"])
@pytest.mark.parametrize("goal", ["../elsewhere", "real", "link", "nowhere"])
def test_no_link_inside_the_destination_is_followed(
    program: Program, out: Path, verb: str, goal: str
) -> None:
    fill(program, "k/sub/f.txt", "k/real/f.txt", "k/deep/er/link/f.txt")
    elsewhere = program.directory / "elsewhere"
    elsewhere.mkdir()
    (out / "real").mkdir()
    for link in (out / "sub", out / "deep" / "er" / "link"):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(link if goal == "link" else out / goal)
        done = program(verb, "-r", "files:k/.", "out")
        assert (done.code, done.out) == (1, "")
        assert "link" in done.err
        link.unlink()
    assert list(elsewhere.iterdir()) == []
    assert tree(out) == {}
    assert len(program.files()) == 3


def test_a_link_in_the_place_of_a_file_is_replaced(program: Program, out: Path) -> None:
    fill(program, "k/f.txt")
    (program.directory / "mine").write_text("mine")
    (out / "f.txt").symlink_to("../mine")
    assert program("cp", "-r", "files:k/.", "out").code == 0
    assert (program.directory / "mine").read_text() == "mine"
    assert tree(out) == {"f.txt": "of k/f.txt"}
    assert not (out / "f.txt").is_symlink()


def test_a_destination_that_is_a_link_is_where_the_user_said(program: Program) -> None:
    fill(program, "k/d/f.txt")
    (program.directory / "real").mkdir()
    (program.directory / "out").symlink_to("real")
    assert program("cp", "-r", "files:k/.", "out").code == 0
    assert tree(program.directory / "real") == {"d/f.txt": "of k/d/f.txt"}


@pytest.mark.parametrize("verb", ["cp", "mv"])
@pytest.mark.parametrize("way", ["both", "directory there", "file there", "a device"])
def test_what_cannot_have_its_place_stops_all_before_anything_is_replaced(
    program: Program, out: Path, verb: str, way: str
) -> None:
    fill(program, "c/Z", "c/a", "c/z", *(["c/a/b"] if way == "both" else []))
    (out / "Z").write_text("mine")
    if way == "directory there":
        (out / "a").mkdir()
    elif way == "file there":
        (out / "d").write_text("mine")
        fill(program, "c/d/e")
    elif way == "a device":
        os.mkfifo(out / "a")
    stored = program.files()
    before = sorted(out.rglob("*"))
    done = program(verb, "-r", "files:c/.", "out")
    assert (done.code, done.out) == (1, "")
    assert "FilepathsCollisionError" in done.err
    assert "Traceback" not in done.err
    assert sorted(out.rglob("*")) == before
    assert (out / "Z").read_text() == "mine"
    assert program.files() == stored


def test_names_that_the_file_system_takes_for_one_are_refused(
    program: Program, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(program, "k/Sub/f.txt", "k/sub/F.txt")
    opened = Path.open

    def caseless(path: Path, *arguments: object) -> object:
        return opened(Path(str(path).lower()), *arguments)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", caseless)
    monkeypatch.setattr(Path, "mkdir", _caseless_mkdir(Path.mkdir))
    done = program("mv", "-r", "files:k/.", "out")
    assert done.code == 1
    assert "FilepathsCollisionError" in done.err
    monkeypatch.undo()


def _caseless_mkdir(mkdir: object) -> object:
    def made(path: Path, *arguments: object, **options: object) -> None:
        mkdir(Path(str(path).lower()), *arguments, **options)  # type: ignore[operator]

    return made


@pytest.mark.parametrize("step", ["replace", "link"])
def test_a_rename_that_fails_brings_back_what_was_replaced(
    program: Program, out: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fill(program, "k/a", "k/b", "k/new/c")
    (out / "a").write_text("mine")
    (out / "b").write_text("mine")
    count = 0
    real = getattr(Path if step == "replace" else os, step)

    def failing(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(Path if step == "replace" else os, step, failing)
    done = program("mv", "-r", "files:k/.", "out")
    if step == "link":  # a file system without hard links
        assert done.code == 0
        assert tree(out) == {"a": "of k/a", "b": "of k/b", "new/c": "of k/new/c"}
        return
    assert (done.code, done.out) == (1, "")
    assert "No space left" in done.err
    assert tree(out) == {"a": "mine", "b": "mine"}
    assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
    assert len(program.files()) == 3


def test_a_commit_that_fails_brings_back_what_was_replaced(
    program: Program, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fennflow_sqlalchemy.backend import SqlalchemyBackend

    fill(program, "k/a", "k/new/b")
    (out / "a").write_text("mine")

    async def refuse(*_arguments: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(SqlalchemyBackend, "commit", refuse)
        assert program("mv", "-r", "files:k/.", "out").code == 1
    assert tree(out) == {"a": "mine"}
    assert [path.name for path in out.iterdir()] == ["a"]
    assert program("mv", "-r", "files:k/.", "out").code == 0
    assert tree(out) == {"a": "of k/a", "new/b": "of k/new/b"}
    assert program.files() == []


def test_what_cannot_be_brought_back_is_kept_and_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with PendingDownloads(tmp_path, durable=True) as downloads:
        downloads.reserve(["a"])
        asyncio.run(downloads.place())
        (tmp_path / "a").unlink()
        (tmp_path / "a").mkdir()
        with pytest.raises(FileException, match="are in") as caught:
            asyncio.run(downloads.restore())
    [old] = (downloads._directory / "old").iterdir()
    assert old.read_text() == "mine"
    assert str(old.parent) in str(caught.value)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    with PendingDownloads(tmp_path, durable=False) as downloads:
        with pytest.raises(FilepathsCollisionError):
            downloads.reserve(["a", "a"])
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_private_until_they_have_their_places(tmp_path: Path) -> None:
    with PendingDownloads(tmp_path, durable=False) as downloads:
        downloads.reserve(["a"])
        [directory] = tmp_path.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700


# --- local sources -----------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["cp", "mv"])
def test_links_in_a_local_directory_are_refused_or_followed(program: Program, verb: str) -> None:
    source = program.directory / "in"
    (source / "sub").mkdir(parents=True)
    (program.directory / "elsewhere").mkdir()
    (program.directory / "elsewhere" / "f.txt").write_text("elsewhere")
    (source / "sub" / "a.txt").write_text("a")
    (source / "link").symlink_to("../elsewhere")
    done = program(verb, "-r", "in", "files:k")
    assert done.code == 1
    assert "link" in done.err
    assert "--follow-links" in done.err
    assert program.files() == []
    assert program(verb, "-rL", "in", "files:k").code == 0
    assert program.files() == ["k/link/f.txt", "k/sub/a.txt"]


@pytest.mark.parametrize("way", ["loop", "broken", "pipe"])
def test_what_is_not_a_file_is_refused(program: Program, way: str) -> None:
    source = program.directory / "in"
    source.mkdir()
    (source / "a.txt").write_text("a")
    if way == "loop":
        (source / "link").symlink_to("../in")
    elif way == "broken":
        (source / "link").symlink_to("nowhere")
    else:
        os.mkfifo(source / "link")
    done = program("mv", "-rL", "in", "files:k")
    assert (done.code, done.out) == (1, "")
    assert str(Path("in", "link")) in done.err
    assert program.files() == []
    assert (source / "a.txt").exists()


def test_a_pipe_is_not_called_missing(program: Program) -> None:
    os.mkfifo(program.directory / "pipe")
    done = program("cp", "pipe", "files:k")
    assert done.code == 1
    assert "cat pipe | fennflow cp … -" in done.err.replace("\n", " ")


def test_a_source_that_was_changed_meanwhile_is_kept(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fennflow.cli import transfer

    (program.directory / "a.txt").write_text("old")
    done = transfer._Transfer.run

    def run_and_change(self: transfer._Transfer, *, quiet: bool) -> object:
        result = done(self, quiet=quiet)
        (program.directory / "a.txt").write_text("newer")
        return result

    monkeypatch.setattr(transfer._Transfer, "run", run_and_change)
    moved = program("mv", "a.txt", "files:")
    assert moved.code == 3
    assert "was changed" in moved.err
    assert (program.directory / "a.txt").read_text() == "newer"


# --- rm, and standard input and output ---------------------------------------------------------


def test_a_directory_is_deleted_after_a_question(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(program, "a", "d/b", "d/c")
    done = program("rm", "-r", "--dry-run", "files:")
    assert (done.code, done.out.split()) == (0, ["files:a", "files:d/b", "files:d/c"])
    assert program("rm", "-n", "files:a", "--json").json["paths"] == ["files:a"]
    monkeypatch.setattr("sys.stdin", io.StringIO("n\ny\n"))
    done = program("rm", "-r", "files:d")
    assert (done.code, done.out) == (1, "")
    assert "Delete 2 files of files:d?" in done.err
    assert len(program.files()) == 3
    assert program("rm", "-r", "files:d").out == "Deleted 2 files.\n"
    done = program("rm", "-r", "files:")
    assert done.code == 1
    assert "--yes" in done.err
    assert program.files() == ["a"]
    assert program("rm", "-r", "--yes", "files:").code == 0
    assert program.files() == []


def test_what_would_be_copied_or_moved_is_printed(program: Program) -> None:
    fill(program, "d/b", "d/c")
    (program.directory / "a.txt").write_text("1")
    for verb in ("cp", "mv"):
        done = program(verb, "-r", "--dry-run", "files:d", "out")
        assert done.out.splitlines() == ["files:d/b -> out/b", "files:d/c -> out/c"]
        assert program(verb, "-n", "files:d/b", "files:e").out == "files:d/b -> files:e\n"
        assert program(verb, "-n", "a.txt", "files:", "--json").json["paths"] == ["files:a.txt"]
    (program.directory / "out").write_text("a file is in the way")
    assert program("cp", "-rn", "files:d", "out").code == 1
    assert program("cp", "-n", "-", "files:x").code == 2
    assert program.files() == ["d/b", "d/c"]
    assert (program.directory / "a.txt").exists()


def test_a_dash_is_standard_input_or_output(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.write(write, b"from standard input")
    os.close(write)
    with os.fdopen(read) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        done = program("cp", "-", "files:b.txt")
    assert (done.code, done.out) == (0, "Copied 1 file, 19 bytes.\n")
    done = program("cp", "files:b.txt", "-")
    assert (done.code, done.out, done.err) == (0, "from standard input", "")
    for arguments in (
        ("cp", "-", "files:"),
        ("cp", "-", "files:d/"),
        ("cp", "-r", "files:", "-"),
        ("cp", "files:b.txt", "-", "--json"),
        ("cp", "-", "b"),
        ("mv", "files:b.txt", "-"),
        ("mv", "-", "files:c"),
    ):
        done = program(*arguments)
        assert (done.code, done.out) == (2, ""), arguments
    assert not (program.directory / "-").exists()
    assert program.files() == ["b.txt"]


def test_a_destination_with_a_name_that_is_too_long_is_an_error_of_ours(program: Program) -> None:
    fill(program, "a")
    done = program("cp", "files:a", "x" * 300)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("FileException: ")
