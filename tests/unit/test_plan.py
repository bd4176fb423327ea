"""The decisions of a transaction: pure functions."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from fennflow.backends import (
    AbortUpload,
    Copy,
    Decision,
    Delete,
    Intent,
    LateWrite,
    ObjectKey,
    Outcome,
    Placement,
    Record,
    Step,
    WriteId,
)
from fennflow.connectors import Capabilities, Location
from fennflow.engine.plan import (
    Write,
    choose_placement,
    outstanding,
    plan_commit,
    plan_compensation,
    staging_key,
    visible,
)

KEY = ObjectKey("bucket", "a")
STRONG = Capabilities(conditional_create=True, conditional_delete="batch", conditional_copy=True)
WEAK = Capabilities()
VERSIONED = replace(STRONG, versioned=True)
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(location: Location, *, etag: str = "e", seq: int = 1) -> Record:
    return Record(
        namespace="bucket",
        key="a",
        location=location,
        etag=etag,
        size=1,
        media_type="text/plain",
        created_at=NOW,
        modified_at=NOW,
        write=WriteId("s", seq),
    )


def write(placement: Placement, seq: int = 1, **changes: object) -> Write:
    target = f".fennflow/c/s/{seq}" if placement is Placement.STAGED else "a"
    intent = Intent(seq=seq, namespace="bucket", key="a", placement=placement, target=target)
    done: dict[str, object] = {"intent": intent, "sent": placement is not Placement.DELETE}
    if placement is not Placement.DELETE:
        version = f"v{seq}" if placement is Placement.VERSIONED else None
        done["record"] = record(Location(target, version), etag=f"e{seq}", seq=seq)
    return Write(**{**done, **changes})  # type: ignore[arg-type]


OLD = record(Location("a"), etag="old")


@pytest.mark.parametrize(
    ("before", "capabilities", "options", "expected"),
    [
        (None, STRONG, {}, Placement.DIRECT),
        (None, STRONG, {"hide_pending": True}, Placement.STAGED),
        (None, STRONG, {"written": True}, Placement.STAGED),
        (None, WEAK, {}, Placement.STAGED),
        (OLD, STRONG, {}, Placement.STAGED),
        (None, VERSIONED, {}, Placement.VERSIONED),
        (record(Location("a", "v0")), VERSIONED, {}, Placement.VERSIONED),
        # It is from before versioning was enabled: a new version would hide it from its readers.
        (OLD, VERSIONED, {}, Placement.STAGED),
    ],
)
def test_bytes_go_where_they_alter_nothing_committed(
    before: Record | None,
    capabilities: Capabilities,
    options: dict[str, bool],
    expected: Placement,
) -> None:
    chosen = choose_placement(
        before,
        capabilities=capabilities,
        **{"written": False, "hide_pending": False, **options},
    )
    assert chosen is expected


def test_the_staging_key_names_catalog_transaction_and_sequence() -> None:
    """P10."""
    assert (
        staging_key(".fennflow", "catalog", WriteId("transaction", 7))
        == ".fennflow/catalog/transaction/7"
    )


def test_a_transaction_of_plain_creates_has_no_steps() -> None:
    """P4."""
    commit = plan_commit("s", {KEY: [write(Placement.DIRECT)]}, {"bucket": STRONG}, {})
    assert list(commit.steps) == []
    assert [each.location for each in commit.records] == [Location("a")]


def test_copies_come_before_deletions_and_name_the_etag_of_the_record() -> None:
    """P17, P28."""
    commit = plan_commit("s", {KEY: [write(Placement.STAGED, before=OLD)]}, {"bucket": STRONG}, {})
    source = Location(".fennflow/c/s/1")
    assert list(commit.steps) == [
        Copy(seq=1, namespace="bucket", key="a", source=source, expected="old"),
        Delete(namespace="bucket", location=source, for_key="a"),
    ]


def test_a_later_write_makes_the_earlier_one_garbage() -> None:
    """P12."""
    commit = plan_commit(
        "s",
        {KEY: [write(Placement.VERSIONED, 1), write(Placement.VERSIONED, 2)]},
        {"bucket": VERSIONED},
        {},
    )
    assert [each.write.seq for each in commit.records] == [2]
    assert list(commit.steps) == [
        Delete(namespace="bucket", location=Location("a", "v1"), owner=WriteId("s", 1))
    ]


def test_a_copy_over_an_own_direct_write_replaces_it() -> None:
    commit = plan_commit(
        "s", {KEY: [write(Placement.DIRECT, 1), write(Placement.STAGED, 2)]}, {"bucket": STRONG}, {}
    )
    assert [type(step) for step in commit.steps] == [Copy, Delete]
    assert isinstance(commit.steps[0], Copy)
    assert commit.steps[0].expected == "e1"


def test_deleting_an_own_write_cancels_it() -> None:
    commit = plan_commit(
        "s",
        {KEY: [write(Placement.DIRECT, 1), write(Placement.DELETE, 2)]},
        {"bucket": STRONG},
        {},
    )
    assert (list(commit.records), list(commit.removed)) == ([], [])
    assert list(commit.steps) == [
        Delete(namespace="bucket", location=Location("a"), etag="e1", owner=WriteId("s", 1))
    ]


def test_a_retracted_write_counts_for_nothing_but_its_traces() -> None:
    """P8."""
    chain = [write(Placement.DIRECT, 1), write(Placement.STAGED, 2, retracted=True)]
    commit = plan_commit("s", {KEY: chain}, {"bucket": STRONG}, {})
    assert [each.write.seq for each in commit.records] == [1]
    assert list(commit.steps) == [
        Delete(namespace="bucket", location=Location(".fennflow/c/s/2"), for_key="a")
    ]
    assert visible(chain, None) == chain[0].record


def test_compensation_names_what_proves_that_the_object_is_ours() -> None:
    """P18: a version id, a staging key, or else the ETag and the stamp of the write."""
    known = [write(Placement.STAGED, 1), write(Placement.VERSIONED, 2), write(Placement.DIRECT, 3)]
    assert plan_compensation("s", known, {"bucket": STRONG}) == [
        Delete(namespace="bucket", location=Location(".fennflow/c/s/1"), for_key="a"),
        Delete(namespace="bucket", location=Location("a", "v2"), owner=WriteId("s", 2)),
        Delete(namespace="bucket", location=Location("a"), etag="e3", owner=WriteId("s", 3)),
    ]


def test_a_write_whose_answer_was_lost_counts_as_done() -> None:
    """P19, P20 a."""
    lost = write(Placement.DIRECT, 3, record=None, ambiguous=True)
    assert plan_compensation("s", [lost], {"bucket": STRONG}) == [
        Delete(namespace="bucket", location=Location("a"), owner=WriteId("s", 3))
    ]
    commit = plan_commit("s", {KEY: [lost]}, {"bucket": STRONG}, {})
    assert list(commit.late_writes) == [
        LateWrite(namespace="bucket", key="a", write=WriteId("s", 3))
    ]
    assert plan_compensation("s", [replace(lost, sent=False)], {"bucket": STRONG}) == []


def test_what_is_left_are_the_steps_of_keys_that_are_held() -> None:
    """P6, P7: a finished transaction has none."""
    staged = Delete(namespace="bucket", location=Location(".fennflow/c/s/1"), for_key="a")
    steps: list[Step] = [
        Copy(seq=1, namespace="bucket", key="a", source=staged.location, expected="e"),
        AbortUpload(namespace="bucket", key=".fennflow/c/s/2", upload_id="u", for_key="b"),
        staged,
        Delete(namespace="bucket", location=Location("b")),
    ]
    other: list[Step] = [Delete(namespace="bucket", location=Location("a"))]
    committed = Decision(outcome=Outcome.COMMITTED, keys=[KEY], steps=steps)
    assert outstanding(committed, other) == [steps[0], steps[2]]
    aborted = Decision(outcome=Outcome.ABORTED, keys=[KEY])
    assert outstanding(aborted, [*other, steps[3]]) == other
    for decision in (committed, aborted):
        assert outstanding(replace(decision, finished=True), other) == []


def test_an_unfinished_upload_is_aborted() -> None:
    """P13."""
    begun = write(Placement.DIRECT, 1, record=None, sent=False)
    begun = replace(begun, intent=replace(begun.intent, upload_id="u"))
    assert plan_compensation("s", [begun], {"bucket": STRONG}) == [
        AbortUpload(namespace="bucket", key="a", upload_id="u")
    ]


def test_staged_bytes_in_a_versioned_bucket_are_looked_for_if_their_version_is_unknown() -> None:
    lost = write(Placement.STAGED, 1, record=None, ambiguous=True)
    assert plan_compensation("s", [lost], {"bucket": VERSIONED}) == [
        Delete(
            namespace="bucket",
            location=Location(".fennflow/c/s/1"),
            owner=WriteId("s", 1),
            for_key="a",
        )
    ]
