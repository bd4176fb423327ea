"""The contract of a backend, and the configs that plugins provide, by name.

A backend is the source of truth: the catalog of committed objects and the journal of live
transactions. It does no object I/O. Every method is one transaction: on return all of it is
durable, or nothing has happened. The calls in the life of a transaction:

| method | called | rule |
| --- | --- | --- |
| `begin_writes` | before the first object request of each writing call | P1 P2 P3 |
| `note_upload` | before the first part of a multipart upload | P13 |
| `commit` | once, by the owner: the pivot | P4 P5 |
| `abort` | before anything is undone, and before each later attempt to finish | P5 P7 |
| `relocate` | after the copies of each batch of apply, before its deletions | P28 |
| `settle` | when some or all keys are finished | P6 P20 |
| `heartbeat` | by the owner, every third of `lease_ttl` | P22 |
| `claim` | by recovery, for transactions whose lease has run out | P24 |
| `add_jobs` | before a durable step, and when a savepoint with one is undone | P33 |
| `claim_jobs`, `keep_job`, `end_jobs` | before, during and after calls of compensations and hooks | P35 |
| `hold`, `take_held` | when a unit of work is held, and when another process decides it | P37 |
| `commits`, `commit_cursor` | by `UOW.commits()` | P38 |
| `join` | when a unit of work with `join=` is opened: the returned object then writes the pivot |
P5 |

The backend's clock decides when leases, kept locks and late writes expire.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fennflow.backends.contract import Backend, JoinedTransaction, Plan
from fennflow.backends.values import (
    FINISHED,
    AbortUpload,
    Area,
    Commit,
    CommittedTransaction,
    Copy,
    Decision,
    Delete,
    Fill,
    FillPart,
    Guarantees,
    Intent,
    Job,
    JournaledTransaction,
    LateWrite,
    ObjectKey,
    Outcome,
    Placement,
    Record,
    Settlement,
    Step,
    TransactionToken,
    WriteId,
    bad_cursor,
    changed_reads,
    conflict,
    dump_commit,
    dump_steps,
    load_commit,
    load_steps,
    locked,
    process_name,
)
from fennflow.plugins import config_class

if TYPE_CHECKING:
    from fennflow_bucket import BucketBackendConfig as BucketBackendConfig
    from fennflow_memory import InMemoryBackendConfig as InMemoryBackendConfig
    from fennflow_sqlalchemy import SqlalchemyBackendConfig as SqlalchemyBackendConfig
else:

    def __getattr__(name: str) -> object:
        if name == "SessionToken":
            from fennflow.backends._former_names import session_token

            return session_token()
        return config_class("backend", name, __name__)


__all__ = [
    "FINISHED",
    "AbortUpload",
    "Area",
    "Backend",
    "BucketBackendConfig",
    "Commit",
    "CommittedTransaction",
    "Copy",
    "Decision",
    "Delete",
    "Fill",
    "FillPart",
    "Guarantees",
    "InMemoryBackendConfig",
    "Intent",
    "Job",
    "JoinedTransaction",
    "JournaledTransaction",
    "LateWrite",
    "ObjectKey",
    "Outcome",
    "Placement",
    "Plan",
    "Record",
    "Settlement",
    "SqlalchemyBackendConfig",
    "Step",
    "TransactionToken",
    "WriteId",
    "bad_cursor",
    "changed_reads",
    "conflict",
    "dump_commit",
    "dump_steps",
    "load_commit",
    "load_steps",
    "locked",
    "process_name",
]
