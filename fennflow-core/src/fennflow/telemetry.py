"""Telemetry of the engine: log records, and spans and metrics of OpenTelemetry.

The names follow OpenTelemetry's conventions for database clients, since a unit of work is to a
bucket what a transaction is to a database. Names that are not in these conventions begin with
`fennflow.`. Without `opentelemetry-api` (extra `otel`) there are only log records.

Source: opentelemetry.io, "Semantic conventions for database client spans" and "... metrics".
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from fennflow.printable import printable

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter, Histogram
    from opentelemetry.trace import Tracer

logger = logging.getLogger("fennflow")

SYSTEM = {"db.system.name": "fennflow"}


class _Instruments(NamedTuple):
    """The instruments of OpenTelemetry."""

    tracer: Tracer
    duration: Histogram
    events: Counter
    recovered: Counter


@cache
def _instruments() -> _Instruments | None:
    """Return the instruments; None if OpenTelemetry's API is not installed."""
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        return None
    meter = metrics.get_meter("fennflow")
    return _Instruments(
        tracer=trace.get_tracer("fennflow"),
        duration=meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of calls of repositories, of commits and of rollbacks.",
        ),
        events=meter.create_counter(
            "fennflow.events",
            unit="{event}",
            description="Log records, by protocol rule.",
        ),
        recovered=meter.create_counter(
            "fennflow.recovered",
            unit="{item}",
            description="What recovery did to transactions and objects, by its outcome.",
        ),
    )


def log_event(
    level: int,
    message: str,
    *args: object,
    rule: str,
    transaction: str | None = None,
    key: str | None = None,
    failed: BaseException | None = None,
) -> None:
    """Log a record, and count it.

    Args:
        level: of `logging`.
        message: with places for the arguments, as `logging` has them.
        args: for the message.
        rule: of the protocol.
        transaction: the id of the transaction that it is about, if any.
        key: bucket and key of the object that it is about, if any.
        failed: an exception whose traceback is logged with it.
    """
    extra = {"transaction": transaction, "key": key, "rule": rule}
    logger.log(level, message, *_shown(args), extra=extra, exc_info=failed, stacklevel=2)
    _count(level, rule)


def _shown(args: tuple[object, ...]) -> tuple[object, ...]:
    # Strangers may choose keys, and errors name keys: a line break must not start a new log record.
    return tuple(
        printable(str(arg)) if isinstance(arg, (str, BaseException)) else arg for arg in args
    )


def _count(level: int, rule: str) -> None:
    if instruments := _instruments():
        severity = logging.getLevelName(level).lower()
        instruments.events.add(1, {"fennflow.rule": rule, "fennflow.severity": severity})


def _complete(record: logging.LogRecord) -> bool:
    """Add the same attributes to log records of connectors and backends, and count them."""
    if not hasattr(record, "rule"):
        for name, value in {"rule": "plugin", "transaction": None, "key": None}.items():
            record.__dict__.setdefault(name, value)
        if isinstance(record.args, tuple):
            record.args = _shown(record.args)
        if not record.args:
            record.msg = printable(str(record.msg))
        _count(record.levelno, "plugin")
    return True


logger.addFilter(_complete)


def with_notes(error: BaseException) -> str:
    """Return the text of an exception and its notes."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])


def count_recovered(outcomes: Mapping[str, int]) -> None:
    """Count what a recovery did."""
    if instruments := _instruments():
        for outcome, number in outcomes.items():
            if number:
                instruments.recovered.add(number, {"fennflow.outcome": outcome})


@contextmanager
def operation(name: str, transaction: str, namespace: str | None = None) -> Generator[None]:
    """Trace and time what is done in the block, as one operation of a database client.

    Args:
        name: of the operation: few different ones, for instance `put`.
        transaction: the id of the transaction that does it.
        namespace: the bucket, if there is one.
    """
    instruments = _instruments()
    if instruments is None:
        yield
        return
    from opentelemetry.trace import SpanKind, StatusCode

    attributes = {**SYSTEM, "db.operation.name": name}
    if namespace is not None:
        attributes["db.collection.name"] = namespace
    started = time.perf_counter()
    with instruments.tracer.start_as_current_span(
        name if namespace is None else f"{name} {namespace}",
        kind=SpanKind.CLIENT,
        attributes={**attributes, "fennflow.transaction.id": transaction},
        record_exception=False,  # the handler decides whether it is logged
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except BaseException as error:
            attributes["error.type"] = type(error).__qualname__
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            instruments.duration.record(time.perf_counter() - started, attributes)
