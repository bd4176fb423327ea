"""What operators see: log records, spans, metrics."""

from __future__ import annotations

import importlib.util
import logging
import re
import subprocess
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fennflow import ReconcileConfig, UnitOfWork, telemetry
from fennflow.exceptions import NoSuchKeyException
from fennflow.files import TextContent
from fennflow.repositories import CrudRepository, RepoField
from stores import FullUOW, Store, raw_client

ROOT = Path(__file__).parents[2]


class UOW(UnitOfWork):
    notes = RepoField(CrudRepository, namespace="notes")


class Telemetry:
    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.tracer = tracers.get_tracer("user")
        meters = MeterProvider([self._reader])
        self.providers: Mapping[str, Any] = {"trace": tracers, "metrics": meters}

    def points(self, name: str) -> list[tuple[Mapping[str, Any], Any]]:
        data = self._reader.get_metrics_data()
        return [
            (dict(point.attributes or {}), point)
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Generator[Telemetry]:
    recorded = Telemetry()
    tracers, meters = recorded.providers["trace"], recorded.providers["metrics"]
    monkeypatch.setattr(trace, "get_tracer", tracers.get_tracer)
    monkeypatch.setattr(metrics, "get_meter", meters.get_meter)
    telemetry._instruments.cache_clear()
    yield recorded
    telemetry._instruments.cache_clear()


async def with_a_strangers_object(store: Store, key: str) -> type[FullUOW]:
    """Return units of work whose catalog does not know an object of another writer."""
    uow_class = store.uow(reconcile=ReconcileConfig(frequency="never"))
    assert store.server is not None
    async with raw_client(store.server) as client:
        await client.put_object(Bucket=store.namespace, Key=key, Body=b"another writer's")
    return uow_class


async def test_each_operation_is_a_span_and_is_timed(recorded: Telemetry) -> None:
    with recorded.tracer.start_as_current_span("request"):
        async with UOW() as uow:
            await uow.notes.put(TextContent.from_content("1", filename="a"))
            transaction = uow.notes._session._tx.transaction_id
            await uow.notes.get("a")
    spans = recorded.spans.get_finished_spans()
    assert [span.name for span in spans] == ["put notes", "get notes", "commit", "request"]
    assert all(span.parent == spans[3].context for span in spans[:3])
    assert dict(spans[0].attributes or {}) == {
        "db.system.name": "fennflow",
        "db.operation.name": "put",
        "db.collection.name": "notes",
        "fennflow.transaction.id": transaction,
    }
    assert spans[0].kind is trace.SpanKind.CLIENT
    timed = {
        attributes["db.operation.name"]: point.count
        for attributes, point in recorded.points("db.client.operation.duration")
    }
    assert timed == {"put": 1, "get": 1, "commit": 1}


async def test_an_operation_that_fails_names_its_exception(recorded: Telemetry) -> None:
    with pytest.raises(NoSuchKeyException):
        async with UOW() as uow:
            await uow.notes.get("nothing")
    get, rollback = recorded.spans.get_finished_spans()
    assert (get.attributes or {})["error.type"] == "NoSuchKeyException"
    assert get.status.status_code is trace.StatusCode.ERROR
    assert not get.events
    assert rollback.name == "rollback"
    assert rollback.status.is_ok
    errors = {
        attributes["db.operation.name"]: attributes.get("error.type")
        for attributes, _ in recorded.points("db.client.operation.duration")
    }
    assert errors == {"get": "NoSuchKeyException", "rollback": None}


async def test_what_is_logged_is_counted_by_its_rule(
    recorded: Telemetry, moto_store: Store
) -> None:
    uow_class = await with_a_strangers_object(moto_store, "a")
    async with uow_class() as uow:
        await uow.files.put(TextContent.from_content("1", filename="a"))
    counted = [attributes for attributes, _ in recorded.points("fennflow.events")]
    assert counted == [{"fennflow.rule": "P14", "fennflow.severity": "info"}]


async def test_what_recovery_did_is_counted(recorded: Telemetry) -> None:
    telemetry.count_recovered({"compensated": 2, "pending": 0})
    telemetry.count_recovered({"compensated": 1})
    [(attributes, point)] = recorded.points("fennflow.recovered")
    assert attributes == {"fennflow.outcome": "compensated"}
    assert point.value == 3


async def test_every_record_names_transaction_key_and_rule(
    moto_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fennflow")
    uow_class = await with_a_strangers_object(moto_store, "a")

    def fail() -> None:
        raise ValueError

    async with uow_class() as uow:
        uow.on_commit(fail)
        await uow.files.put(TextContent.from_content("1", filename="a"))
        transaction = uow.files._session._tx.transaction_id
    records: list[Any] = [record for record in caplog.records if record.name == "fennflow"]
    recorded = [(record.rule, record.transaction, record.key) for record in records]
    assert recorded == [
        ("P14", transaction, f"{moto_store.namespace}/a"),
        ("I8", transaction, None),
    ]
    assert records[1].exc_info
    assert {record.module for record in records} == {"writing", "callbacks"}


async def test_what_a_plugin_logs_has_the_same_attributes_and_is_counted(
    recorded: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("fennflow").warning("%s is left out of a listing (%d)", "a\nb", 1)
    [record] = caplog.records
    assert [record.__dict__[name] for name in ("rule", "transaction", "key")] == [
        "plugin",
        None,
        None,
    ]
    assert record.getMessage() == "a\\nb is left out of a listing (1)"
    counted = [attributes for attributes, _ in recorded.points("fennflow.events")]
    assert counted == [{"fennflow.rule": "plugin", "fennflow.severity": "warning"}]


def test_what_an_error_says_is_escaped_in_messages_too(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("Could not head a\nb\x1b[2J\u202e.")
    telemetry.log_event(logging.WARNING, "%s: %s", "It", error, rule="P27")
    logging.getLogger("fennflow").warning("It: %s", error)
    logging.getLogger("fennflow").warning(f"It: {error}")  # noqa: G004 - as a plugin may
    messages = {record.getMessage() for record in caplog.records}
    assert messages == {"It: Could not head a\\nb\\x1b[2J\\u202e."}


def test_the_engine_logs_only_through_what_names_transaction_key_and_rule() -> None:
    elsewhere = [
        path.name
        for path in ROOT.glob("fennflow-core/src/**/*.py")
        if "getLogger" in path.read_text() and path.name != "telemetry.py"
    ]
    assert elsewhere == []


def test_every_logged_rule_has_a_line_in_the_docs() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    recorded: set[str] = set()
    for path in ROOT.glob("fennflow-*/src/**/*.py"):
        for rules in re.findall(r'rule=("[^,\n]+)[,)]', path.read_text()):
            recorded |= set(re.findall(r'"(\w+)"', rules))
    assert {"P9", "P17", "P20"} <= recorded
    assert {rule for rule in recorded if f"| `{rule}` |" not in page} == set()


def test_without_opentelemetry_there_is_the_log_alone() -> None:
    assert importlib.util.find_spec("opentelemetry")
    program = (
        "import asyncio, sys; sys.modules['opentelemetry'] = None\n"
        "from fennflow import UnitOfWork\n"
        "from fennflow import telemetry\n"
        "from fennflow.files import TextContent\n"
        "from fennflow.repositories import CrudRepository, RepoField\n"
        "class UOW(UnitOfWork):\n    notes = RepoField(CrudRepository, namespace='notes')\n"
        "async def main():\n    async with UOW() as uow:\n"
        "        await uow.notes.put(TextContent.from_content('1', filename='a'))\n"
        "asyncio.run(main())\n"
        "telemetry.log_event(30, 'still %s', 'logged', rule='P9')\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    assert ran.stderr == "still logged\n"
