"""Commands about plugins, guarantees, transactions, recovery and reconciliation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from fennflow import plugins as installed_plugins
from fennflow.backends import Guarantees
from fennflow.cli.app import NEEDS_ATTENTION, Json, fail, run, show_json
from fennflow.cli.stores import measured
from fennflow.cli.target import OptionalTarget, Target, load
from fennflow.cli.terminal import stderr, stdout
from fennflow.connectors import Capabilities
from fennflow.exceptions import PluginException, TransactionException
from fennflow.printable import without_credentials
from fennflow.reports import CommitInfo, Diagnosis, ReconcileReport, TransactionInfo
from fennflow.repositories.fields import areas_of
from fennflow.uow import UnitOfWork

SHOWN_FINDINGS = 20
SHARED = {"process": "in one process", "machine": "on one machine", "network": "everywhere"}


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (plugins, doctor, transactions, commits, recover, adopt, reconcile):
        app.command()(command)


def plugins(*, as_json: Json = False) -> None:
    """List the installed plugins, the distributions that provide them, and their errors."""
    found = sorted(installed_plugins.installed(), key=lambda plugin: plugin.name)
    broken = [plugin for plugin in found if plugin.error is not None]
    if as_json:
        show_json(
            [
                {
                    "name": plugin.name,
                    "distribution": plugin.distribution,
                    "version": plugin.version,
                    "module": plugin.module,
                    "state": _state(plugin),
                    "error": None if plugin.error is None else str(plugin.error),
                }
                for plugin in found
            ]
        )
    else:
        rows = [
            (plugin.name, plugin.distribution, plugin.version, plugin.module, _state(plugin))
            for plugin in found
        ]
        stdout.table(("plugin", "distribution", "version", "module", "state"), rows)
        for plugin in broken:
            stdout.line()
            stdout.message(str(plugin.error))
    conflict = _conflict()
    if conflict is not None:
        stderr.message(conflict)
    if broken or conflict:
        raise typer.Exit(NEEDS_ATTENTION)


def _state(plugin: installed_plugins.InstalledPlugin) -> str:
    if plugin.disabled:
        return "off"
    return "works" if plugin.error is None else "broken"


def _conflict() -> str | None:
    try:
        installed_plugins.registry()
    except PluginException as error:
        return str(error)
    return None


def doctor(
    target: OptionalTarget = None,
    *,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure a bucket without a unit of work: s3://bucket, gs://bucket, "
            "file:///srv/files/bucket. Credentials come from the environment.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="The S3-compatible server, for --store.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Connect to the database and the buckets, test what they enforce, and report the guarantees.

    It writes a few small objects under the reserved prefix, and removes them.
    """
    if target is not None and store is None:
        _diagnose(target, as_json=as_json)
    elif store is not None and target is None:
        checks = run(measured(store, endpoint))
        if as_json:
            show_json(checks)
        else:
            rows = [(each.name, each.result, each.detail) for each in checks]
            stdout.table((f"What {without_credentials(store)} does", "", ""), rows)
    else:
        message = "Name a unit of work (MODULE:CLASS), or a bucket with --store URL."
        raise typer.BadParameter(message)


def _diagnose(target: str, *, as_json: bool) -> None:
    diagnosis = run(load(target).diagnose())
    if as_json:
        show_json(diagnosis)
    else:
        _show_diagnosis(diagnosis)
    if diagnosis.needs_attention:
        raise typer.Exit(NEEDS_ATTENTION)


def _show_diagnosis(diagnosis: Diagnosis) -> None:
    if diagnosis.guarantees is not None:
        stdout.line("What is guaranteed", style="bold")
        stdout.table(("", ""), _promises(diagnosis.guarantees))
        stdout.line()
        stdout.line(
            f"The backend answers in {diagnosis.latency * 1000:.1f} ms; the journal holds "
            f"{diagnosis.transactions} transactions."
        )
    reached = {name: each for name, each in diagnosis.namespaces.items() if each.capabilities}
    if reached:
        stdout.line()
        stdout.line("What the buckets enforce", style="bold")
        rows = [_enforced(each.capabilities or Capabilities()) for each in reached.values()]
        names = [f"{name} ({each.latency * 1000:.0f} ms)" for name, each in reached.items()]
        stdout.table(("", *names), _transposed(rows))
    catalogs = [(name, each) for name, found in reached.items() for each in found.catalogs]
    if catalogs:
        stdout.line()
        stdout.line("Catalogs that write in the buckets", style="bold")
        stdout.table(
            ("bucket", "catalog", "prefixes", "program", "host", "since", "last used"),
            [
                (
                    name,
                    f"{each.catalog_id} (this one)" if each.own else each.catalog_id,
                    ", ".join(prefix or "(all)" for prefix in each.prefixes),
                    each.program,
                    each.host,
                    f"{each.since:%Y-%m-%d}",
                    f"{each.last_used:%Y-%m-%d}",
                )
                for name, each in catalogs
            ],
        )
    for title, lines in (("Wrong", diagnosis.problems), ("Could be better", diagnosis.advice)):
        if lines:
            stdout.line()
            stdout.line(title, style="bold")
            for line in lines:
                stdout.message(f"- {line}")
    if not diagnosis.problems:
        stdout.line()
        stdout.line("All is well.")


def _promises(guarantees: Guarantees) -> list[tuple[str, str]]:
    where = SHARED[guarantees.shared]
    return [
        ("atomic, isolated, never silent", where),
        ("crashes are recovered from", "yes" if guarantees.durable else "no"),
    ]


def _enforced(capabilities: Capabilities) -> dict[str, str]:
    def yes(value: object) -> str:
        return "yes" if value else "no"

    return {
        "conditional creation": yes(capabilities.conditional_create),
        "conditional deletion": {"batch": "yes", "single": "one by one", "none": "no"}[
            capabilities.conditional_delete
        ],
        "conditional copies": yes(capabilities.conditional_copy),
        "keeps versions": yes(capabilities.versioned),
    }


def _transposed(columns: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return [(name, *(column[name] for column in columns)) for name in columns[0]]


def transactions(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[show|commit|abort] MODULE:CLASS [ID]",
            help="The unit of work, as it is imported: app.storage:UOW. With show, commit or abort, the "
            "id of a transaction follows.",
        ),
    ],
    *,
    as_json: Json = False,
) -> None:
    """List the transactions that are open, held, or wait to be finished, oldest first.

    `show` lists what a held transaction would change; `commit` and `abort` decide it.
    """
    action = words.pop(0) if words[0] in {"show", "commit", "abort"} else "list"
    ids = [each for each in words if ":" not in each]
    targets = [each for each in words if ":" in each]
    if len(targets) != 1 or len(ids) != (action != "list"):
        message = "Give one unit of work (MODULE:CLASS), and with show, commit or abort one transaction id."
        raise typer.BadParameter(message)
    uow_class = load(targets[0])
    if action == "list":
        _list_transactions(run(uow_class.transactions()), as_json=as_json)
    elif action == "show":
        _show_transaction(run(uow_class.transactions()), ids[0], as_json=as_json)
    elif action == "commit":
        run(uow_class.commit_held(ids[0]))
        stdout.line(f"Committed {ids[0]}.")
    else:
        run(uow_class.abort_held(ids[0]))
        stdout.line(f"Undone: {ids[0]}.")


def _show_transaction(
    found: Sequence[TransactionInfo], transaction_id: str, *, as_json: bool
) -> None:
    shown = [each for each in found if each.transaction_id == transaction_id]
    if not shown:
        message = (
            f"No transaction {transaction_id} is open, held, or waits to be finished. "
            "fennflow transactions MODULE:CLASS lists those that are."
        )
        fail(TransactionException(message))
    if as_json:
        show_json(shown[0])
        return
    [info] = shown
    process = "" if info.process is None else f"; process {info.process}"
    stdout.line(f"{info.state}, {info.age:.0f} s old; {info.lease_left:.0f} s left{process}")
    rows = [
        (
            each.kind,
            f"{each.namespace}/{each.path}",
            "" if each.size is None else str(each.size),
            each.sha256 or "",
            "" if each.old_size is None else str(each.old_size),
            each.old_sha256 or "",
        )
        for each in info.changes
    ]
    if rows:
        stdout.table(("", "path", "bytes", "SHA-256", "bytes before", "SHA-256 before"), rows)
        return
    for path in info.paths:
        stdout.line(path)


def _list_transactions(found: Sequence[TransactionInfo], *, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    if not found:
        stdout.line("No transaction is open.")
        return
    rows = [
        (
            each.transaction_id,
            each.state,
            f"{each.age:.0f} s",
            f"{each.lease_left:.0f} s",
            each.process or "",
            ", ".join(each.paths[:3]) + (" …" if len(each.paths) > 3 else ""),  # noqa: PLR2004
        )
        for each in found
    ]
    stdout.table(("transaction", "state", "age", "lease left", "process", "paths"), rows)


def commits(
    target: Target,
    *,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="CURSOR",
            help="Start after this commit. Default: with the oldest one that is kept.",
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep waiting for new commits.")
    ] = False,
    poll: Annotated[
        float,
        typer.Option(min=0.1, metavar="SECONDS", help="Pause between two checks, with --follow."),
    ] = 5.0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print only JSON, one line for each commit."),
    ] = False,
) -> None:
    """List what was committed by any process, each commit once and in order, with its cursor.

    Keep the cursor of the last commit that you have processed, and continue with --after.
    """
    shown = run(_show_commits(load(target), after, poll if follow else None, as_json=as_json))
    if not (shown or as_json):
        stdout.line("No commits.")


async def _show_commits(
    uow_class: type[UnitOfWork], after: str | None, poll: float | None, *, as_json: bool
) -> int:
    """Print commits as they arrive, and return how many there were."""
    shown = 0
    async for commit in uow_class.commits(after=after, poll=poll):
        shown += 1
        if as_json:
            show_json(commit)
        else:
            _show_commit(commit)
    return shown


def _show_commit(commit: CommitInfo) -> None:
    stdout.line(
        f"{commit.committed_at:%Y-%m-%d %H:%M:%S} UTC  {commit.transaction_id}  {commit.cursor}"
    )
    for file in commit.records:
        stdout.line(f"  wrote    {file.namespace}/{file.path}  {file.size} bytes")
    for deleted in commit.deletions:
        stdout.line(f"  deleted  {deleted.namespace}/{deleted.path}")


def recover(target: Target, *, as_json: Json = False) -> None:
    """Finish or roll back transactions left by crashed processes, and clean up their leftovers.

    Compensations and hooks that are due are called, if the module registers their names. Exit code 3
    says that something was left for later: the store or the database was unreachable or refused; a
    compensation or a hook failed, or its name is not registered.
    """
    uow_class = load(target)
    report = run(uow_class.recover())
    if as_json:
        show_json(report)
    else:
        stdout.line(
            f"Rolled forward {report.rolled_forward}, compensated {report.compensated}, "
            f"pending {report.pending}; late writes checked {report.late_writes_checked}, swept {report.swept} objects "
            f"and {report.uploads} uploads. Compensations and hooks: {report.jobs_called} called, "
            f"{report.jobs_pending} pending."
        )
        for problem in report.problems:
            stdout.message(f"- {problem}")
        leased = [
            each.lease_left
            for each in run(uow_class.transactions())
            if each.state != "held" and each.lease_left > 0
        ]
        if leased:
            stdout.message(
                f"Transactions whose process is alive, or was alive recently: {len(leased)}. If it is gone, "
                f"recover again when its lease has ended, the first one in {min(leased):.0f} s."
            )
    if report.needs_attention:
        raise typer.Exit(NEEDS_ATTENTION)


def adopt(
    target: Target,
    *,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="How many objects to record at a time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Record in the catalog what the buckets hold; resume an interrupted run.

    This also happens when a lifespan begins, or at the first use of a bucket. Exit code 3
    says that some objects could not be recorded.
    """
    _reconcile(load(target), as_json=as_json, strategy="insert_missing", batch_size=batch_size)


def reconcile(
    target: Target,
    *,
    strategy: Annotated[
        Literal["fill_if_empty", "insert_missing", "replace"] | None,
        typer.Option(help="What to do about differences. Default: as configured."),
    ] = None,
    orphans: Annotated[
        Literal["report", "adopt", "delete"] | None,
        typer.Option(help="What to do about objects that FennFlow wrote and that have no record."),
    ] = None,
    adopt_catalog: Annotated[
        list[str] | None,
        typer.Option(
            help="Id of another catalog, whose objects are treated as this catalog's own."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="How many keys to examine and lock at a time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the catalog with the buckets, and correct differences.

    Exit code 3 says that differences remain, which were only reported.
    """
    _reconcile(
        load(target),
        as_json=as_json,
        strategy=strategy,
        orphans=orphans,
        adopt_catalogs=adopt_catalog or None,
        batch_size=batch_size,
    )


def _reconcile(uow_class: type[UnitOfWork], *, as_json: bool, **settings: Any) -> None:
    with _walking(len(areas_of(uow_class)), quiet=as_json) as on_progress:
        reports = run(uow_class.reconcile(on_progress=on_progress, **settings))
    if as_json:
        show_json(reports)
    else:
        for area, report in reports.items():
            _show_report(area, report)
    if any(report.needs_attention for report in reports.values()):
        raise typer.Exit(NEEDS_ATTENTION)


def _show_report(namespace: str, report: ReconcileReport) -> None:
    stdout.line(f"{namespace}: {report.objects} objects, {report.records} records")
    for counts in (report.differences, report.actions):
        if counts:
            stdout.line("  " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    for finding in report.findings[:SHOWN_FINDINGS]:
        done = f", {finding.action}" if finding.action else ""
        done += f" {finding.catalog_id}" if finding.catalog_id else ""
        done += f": {finding.reason}" if finding.reason else ""
        stdout.line(f"  {finding.path}: {finding.difference}{done}")
    more = sum(report.differences.values()) - SHOWN_FINDINGS
    if more > 0:
        stdout.line(f"  … and {more} more; --json shows a thousand")


@contextmanager
def _walking(buckets: int, *, quiet: bool) -> Generator[Callable[[ReconcileReport], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with stderr.progress(*columns, quiet=quiet) as progress:
        task = progress.add_task(f"Walking {buckets} buckets")

        def on_progress(report: ReconcileReport) -> None:
            progress.update(
                task, description=f"{report.objects:,} objects, {report.records:,} records"
            )

        yield on_progress
