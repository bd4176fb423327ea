"""The program shows untrusted text as it is, without an effect on the terminal."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings

import pytest

from fennflow.cli import maintenance, terminal
from fennflow.cli.app import show_json
from fennflow.cli.terminal import stderr, stdout
from fennflow.paths import StoragePath
from fennflow.reports import Change, Difference, Finding, ReconcileReport, TransactionInfo
from shells import Program

NASTY = "x\x1b[2J\x9b2J\u202e[bold]y[/] :smile:\nAll is well."
SHOWN = "x\\x1b[2J\\x9b2J\\u202e[bold]y[/] :smile:\\nAll is well."
NAMES = ("plan[bold].txt", "due[red]x[/red].txt", "see[link=elsewhere]x[/link].txt", "[/].txt")


def test_texts_from_outside_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    stdout.line(NASTY)
    stdout.line(NASTY, style="bold", wrap=True)
    stdout.table((NASTY, "b"), [(NASTY, "2")])
    out = capsys.readouterr().out
    assert out.splitlines() == [SHOWN, SHOWN, f"{SHOWN}  b", f"{SHOWN}  2"]


def test_no_line_of_a_message_passes_for_one_of_the_program(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stderr.message(NASTY, title="Error")
    first, second = capsys.readouterr().err.splitlines()
    assert (first, second) == (f"Error: {SHOWN.partition(chr(92) + 'n')[0]}", "  All is well.")


def test_a_transaction_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    change = Change(namespace=NASTY, path=StoragePath(NASTY), kind="create", size=1, sha256=NASTY)
    for changes in ((), (change,)):
        info = TransactionInfo(
            transaction_id="1", state="held", age=1, lease_left=1, paths=(NASTY,), changes=changes
        )
        maintenance._show_transaction([info], "1", as_json=False)
        maintenance._list_transactions([info], as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert sum(SHOWN in line for line in lines) == 4


def test_json_is_the_same_value_and_holds_nothing_to_act_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {NASTY: [NASTY, "Zoë", "\U000e0061", "\ud800"]}
    show_json(value)
    out = capsys.readouterr().out
    assert json.loads(out) == value
    assert out[:-1].isprintable()
    assert "Zoë" in out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_is_the_same_value_whatever_characters_standard_output_has(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    stream = io.TextIOWrapper(out, encoding, errors="backslashreplace", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    value = {"Zoë→\U0001f600": "\x85\ud800"}
    show_json(value)
    assert json.loads(out.getvalue().decode(encoding)) == value


def test_a_report_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = Finding("bucket", StoragePath(NASTY), Difference.UNKNOWN)
    refused = Finding("bucket", StoragePath("a//b"), Difference.REFUSED, reason=NASTY)
    report = ReconcileReport(objects=1, findings=(unknown, refused))
    maintenance._show_report(NASTY, report)
    assert capsys.readouterr().out.splitlines() == [
        f"{SHOWN}: 1 objects, 0 records",
        f"  {SHOWN}: unknown",
        f"  a//b: refused: {SHOWN}",
    ]


def test_logs_warnings_and_tracebacks_are_escaped_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("library")
    logger.addHandler(handler)
    terminal.guard()
    try:
        try:
            raise ValueError(NASTY)  # noqa: TRY301 - it is what is logged
        except ValueError as error:
            logger.exception("It holds %s", NASTY)
            with monkeypatch.context() as patch:
                patch.setattr(logging, "raiseExceptions", False)
                logger.warning("%d does not fit", NASTY)
            terminal.show_traceback(error)
        sys.stderr.write(warnings.formatwarning(NASTY, UserWarning, "a.py", 1, ""))
    finally:
        logging.setLogRecordFactory(factory)
        logger.removeHandler(handler)
    err = capsys.readouterr().err
    assert f"It holds {SHOWN}" in err
    assert err.count("ValueError: x\\x1b[2J") == 2
    assert "UserWarning: x\\x1b[2J" in err
    assert all(line.isprintable() for line in err.splitlines())


def test_wrong_arguments_are_shown_as_they_are(program: Program) -> None:
    for arguments in ((f"--{NASTY}",), (NASTY,)):
        done = program("cat", *arguments)
        assert (done.code, done.out) == (2, "")
        assert "\x1b" not in done.err
        assert "[bold]y[/] :smile:" in done.err


def test_names_with_brackets_are_listed_whole(program: Program) -> None:
    (program.directory / "x.txt").write_text("x")
    for name in NAMES:
        assert program("cp", "x.txt", f"files:a-long-directory/{name}").code == 0
    paths = [f"a-long-directory/{name}" for name in NAMES]
    for arguments in (
        ("ls", "-lr"),
        ("ls", "-r", "files:"),
        ("stat", *(f":{each}" for each in paths)),
    ):
        out = program(*arguments).out
        assert [each for each in paths if each not in out] == []
    done = program("cat", "files:[bold]none\u202e")
    assert done.code == 1
    assert "[bold]none\\u202e" in done.err


def test_the_version_is_printed(program: Program) -> None:
    done = program("--version", target=False)
    assert (done.code, done.out) == (0, "fennflow 1.0.0\n")
    assert program("-h", target=False).code == 0
