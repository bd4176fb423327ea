"""Files follow `transaction.atomic()` of Django, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import django
import pytest
from django.conf import settings
from django.core.exceptions import SuspiciousFileOperation
from django.core.files.base import ContentFile, File
from django.core.files.storage import storages
from django.core.management import CommandError, call_command
from django.core.management.base import SystemCheckError
from django.db import DatabaseError, IntegrityError, connections, transaction
from django.test import Client, TestCase, override_settings
from django.urls import re_path
from PIL import Image
from sqlalchemy.engine import make_url
from typing_extensions import override

from fennflow.connectors import InMemoryConnectorConfig, ObjectAttributes, PutRequest
from fennflow.exceptions import (
    ConfigException,
    FennFlowException,
    KeyException,
    RecordAlreadyExistsException,
    RecordLockedException,
    TransactionException,
)
from fennflow.sync.portal import close
from fennflow.testing import PostgresqlServer
from fennflow_sqlalchemy.backend import SqlalchemyBackend
from stores import Store

# Another plugin of pytest must not have configured it.
if not settings.configured:
    settings.configure(
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        INSTALLED_APPS=["django_letters", "fennflow_django"],
        ROOT_URLCONF=__name__,
        USE_TZ=True,
        SECRET_KEY="secret",
    )
    django.setup()

from django_letters.models import Letter
from fennflow_django import FennFlowStorage, backend_config, unit_of_work
from fennflow_django.upkeep import create_catalogs
from fennflow_django.views import serve

PSYCOPG2 = """
import json
import sys

sys.modules["psycopg"] = None  # as where it is not installed
import django
from django.conf import settings

from fennflow.connectors import InMemoryConnectorConfig

options = {"connector": InMemoryConnectorConfig(), "namespace": "files"}
settings.configure(
    DATABASES={"default": json.loads(sys.argv[1])},
    INSTALLED_APPS=["django_letters", "fennflow_django"],
    STORAGES={"default": {"BACKEND": "fennflow_django.FennFlowStorage", "OPTIONS": options}},
    USE_TZ=True,
)
django.setup()
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage, storages

storages.backends.update(settings.STORAGES)  # Django 4.2 has lost the options
from django.core.management import call_command
from django.db import connection, transaction

from django_letters.models import Letter


def save(title):
    letter = Letter(title=title)
    letter.scan.save(title, ContentFile(b"1"))


def fails(act):
    try:
        with transaction.atomic():
            act()
            raise KeyError
    except KeyError:
        pass


call_command("migrate", run_syncdb=True, verbosity=0)
with transaction.atomic():
    save("a")
    fails(lambda: save("b"))
    save("c")
fails(Letter.objects.all().delete)
with transaction.atomic():
    Letter.objects.get(title="a").delete()
with default_storage.unit_of_work() as uow:
    print(connection.Database.__name__, *uow.files.list())
"""
urlpatterns = [re_path(r"^media/(?P<path>.*)$", serve)]
numbers = itertools.count()


class StopError(Exception):
    """Leaves a block."""


@dataclass
class Site:
    """A Django database and a storage."""

    store: Store
    storage: FennFlowStorage

    def quiet(self) -> Site:
        """Wait until the engine has done what it does at first use, which writes to the database.

        SQLite refuses a transaction of Django's that has read, and begins to write at that moment.
        """
        self.storage.unit_of_work.recover()
        return self

    def save(self, title: str, body: bytes = b"Dear Ann") -> Letter:
        letter = Letter(title=title)
        letter.scan.save(f"{title}.txt", ContentFile(body), save=False)
        letter.save()
        return letter

    def objects(self) -> dict[str, bytes]:
        return asyncio.run(self.store.objects())

    def check(self, *titles: str) -> None:
        """Check that these are the rows, the records and the objects."""
        assert self.storage.unit_of_work.transactions() == []
        names = {f"scans/{title}.txt" for title in titles}
        assert set(Letter.objects.values_list("scan", flat=True)) == names
        assert set(self.objects()) == names
        with self.storage.unit_of_work() as uow:
            assert set(map(str, uow.files.list())) == names


@pytest.fixture(scope="module")
def postgresql_settings(postgresql: PostgresqlServer) -> dict[str, Any]:
    return settings_of(postgresql.new_database())


def settings_of(address: str) -> dict[str, Any]:
    url = make_url(address)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.database,
        "USER": url.username,
        "PASSWORD": url.password or "",
        "HOST": str(url.query.get("host", url.host or "")),
        "PORT": str(url.port or ""),
    }


@pytest.fixture(params=["sqlite", "postgresql"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[Site]:
    """Return a storage in memory whose catalog is in the database of the rows, both migrated."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "app.db"}
    if request.param == "postgresql":
        database = request.getfixturevalue("postgresql_settings")
    with use_database(database):
        with use_storage() as site:
            yield site.quiet()
    close()


@pytest.fixture
def sqlite_site(tmp_path: Path) -> Generator[Site]:
    with use_database({"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "app.db"}):
        with use_storage() as site:
            yield site.quiet()
    close()


@contextmanager
def use_database(database: dict[str, Any]) -> Generator[None]:
    del connections["default"]
    connections.settings = connections.configure_settings({"default": database})
    try:
        yield
    finally:
        connections["default"].close()


@contextmanager
def use_backends(named: dict[str, Any]) -> Generator[None]:
    with override_settings(STORAGES=named):
        storages.backends.update(named)  # Django 4.2 has lost the options
        yield


@contextmanager
def use_storage(**options: Any) -> Generator[Site]:
    store = Store(InMemoryConnectorConfig(name=f"django{next(numbers)}"), f"bucket-{next(numbers)}")
    options = {"connector": store.config, "namespace": store.namespace, **options}
    named: dict[str, Any] = {
        "default": {"BACKEND": "fennflow_django.FennFlowStorage", "OPTIONS": options},
        # Cannot be made here: there is no STATIC_URL.
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    with use_backends(named):
        call_command("migrate", run_syncdb=True, verbosity=0)
        storage = storages["default"]
        assert isinstance(storage, FennFlowStorage)
        yield Site(store, storage)
        # One statement: a transaction that reads first is refused while an engine writes.
        Letter.objects.all()._raw_delete("default")


def test_rows_and_files_commit_with_the_block(site: Site) -> None:
    with transaction.atomic():
        site.save("a")
        with transaction.atomic():
            site.save("b")
        assert site.storage.open("scans/b.txt").read() == b"Dear Ann"
    site.check("a", "b")


def test_an_exception_undoes_rows_and_files(site: Site) -> None:
    with pytest.raises(StopError), transaction.atomic():
        site.save("a")
        with transaction.atomic():
            site.save("b")
        raise StopError
    site.check()
    with transaction.atomic():
        site.save("a")
    site.check("a")


def test_a_nested_block_is_a_savepoint(site: Site) -> None:
    with transaction.atomic():
        site.save("a")
        with pytest.raises(StopError), transaction.atomic():
            site.save("b")
            with transaction.atomic():
                site.save("c")
            raise StopError
        assert not site.storage.exists("scans/b.txt")
        with pytest.raises(IntegrityError), transaction.atomic():
            site.save("a")
        site.save("d")
    site.check("a", "d")


def test_what_a_savepoint_did_before_the_first_file_counts_too(site: Site) -> None:
    with transaction.atomic():
        with pytest.raises(StopError), transaction.atomic():
            site.save("a")
            raise StopError
        with pytest.raises(StopError), transaction.atomic(), transaction.atomic(savepoint=False):
            site.save("b")
            raise StopError
        with transaction.atomic():
            site.save("c")
        # Django 6.1 has renamed it.
        sid = getattr(transaction, "savepoint_create", transaction.savepoint)()
        site.save("d")
        transaction.savepoint_rollback(sid)
        site.save("e")
        transaction.savepoint_rollback(sid)
        transaction.savepoint_commit(sid)
    site.check("c")


def test_a_marked_transaction_is_rolled_back_with_its_files(site: Site) -> None:
    with transaction.atomic():
        site.save("a")
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError):
            site.storage.delete("scans/a.txt")
    site.check()


def test_a_commit_that_fails_undoes_the_files(site: Site) -> None:
    connection = connections["default"]
    failing = mock.patch.object(type(connection), "_commit", side_effect=DatabaseError("no"))
    with failing, pytest.raises(DatabaseError, match="no"), transaction.atomic():
        site.save("a")
    site.check()


def test_a_decision_that_cannot_be_written_undoes_the_rows(site: Site) -> None:
    def refuse(*_: object) -> None:
        raise StopError

    pivot = "fennflow_sqlalchemy.backend.SqlalchemyBackend._pivot"
    with mock.patch(pivot, refuse), pytest.raises(StopError), transaction.atomic():
        site.save("a")
    site.check()


def test_several_storages_commit_together(site: Site) -> None:
    del site
    with use_storage() as first, use_storage() as second:
        stores = [first.quiet(), second.quiet()]
        with transaction.atomic():
            for store in stores:
                store.storage.save("x.txt", ContentFile(b"x"))
            with pytest.raises(StopError), transaction.atomic():
                for store in stores:
                    store.storage.save("y.txt", ContentFile(b"y"))
                raise StopError
        with pytest.raises(StopError), transaction.atomic():
            for store in stores:
                store.storage.save("z.txt", ContentFile(b"z"))
            raise StopError
        assert [store.objects() for store in stores] == [{"x.txt": b"x"}] * 2
        pivots = itertools.count()
        whole = SqlalchemyBackend._pivot

        def second_fails(*arguments: Any) -> None:
            if next(pivots) == 1:
                raise StopError
            whole(*arguments)

        with (
            mock.patch.object(SqlalchemyBackend, "_pivot", second_fails),
            pytest.raises(StopError),
            transaction.atomic(),
        ):
            for store in stores:
                store.storage.save("z.txt", ContentFile(b"z"))
        assert [store.objects() for store in stores] == [{"x.txt": b"x"}] * 2


def test_files_commit_at_once_outside_of_a_block(site: Site) -> None:
    name = site.storage.save("a.txt", ContentFile("Grüße"))
    assert site.storage.open(name).read() == "Grüße".encode()
    assert site.storage.open(name, "r").read() == "Grüße"
    assert site.storage.size(name) == 7
    assert site.storage.listdir("") == ([], ["a.txt"])
    site.storage.save("b/c.txt", ContentFile(b"c"))
    assert site.storage.listdir("") == (["b"], ["a.txt"])
    assert site.storage.listdir("b") == ([], ["c.txt"])
    assert site.storage.get_modified_time(name) >= site.storage.get_created_time(name)
    again = site.storage.save("a.txt", ContentFile(b"other"))
    assert again != name
    with site.storage.open(name, "wb") as file:
        file.write(b"new")
    with pytest.raises(StopError), site.storage.open(name, "w") as file:
        file.write("half")
        raise StopError
    assert site.storage.open(name).read() == b"new"
    site.storage.delete(name)
    with pytest.raises(FileNotFoundError):
        site.storage.open(name)
    with pytest.raises(FileNotFoundError):
        site.storage.size(name)


def test_a_large_file_is_read_block_by_block(site: Site) -> None:
    body = b"0123456789" * 100
    with mock.patch("fennflow_django.files.BLOCK", 64):
        with transaction.atomic():
            site.storage.save("a.bin", ContentFile(body))
            file = site.storage.open("a.bin")
            assert file.read(100) == body[:100]
        file.seek(-50, io.SEEK_END)
        assert file.read() == body[-50:]
        file.seek(0)
        assert b"".join(file.chunks(77)) == body


@pytest.mark.parametrize("site", ["postgresql"], indirect=True)  # two can write at a time
def test_a_name_that_is_being_taken_is_not_waited_for_for_long(site: Site) -> None:
    site.storage._config = site.storage._config.model_copy(update={"lock_timeout": 0.0})
    with transaction.atomic():
        site.storage.save("a.txt", ContentFile(b"1"))
        names: list[str] = []

        def other() -> None:
            with site.storage.unit_of_work() as uow:
                with pytest.raises(RecordLockedException):
                    uow.files.delete("a.txt")
            names.append(FennFlowStorage.save(site.storage, "a.txt", ContentFile(b"2")))
            connections["default"].close()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert names[0] != "a.txt"
    assert set(site.objects()) == {"a.txt", *names}


def test_images_and_their_sizes_work(site: Site) -> None:
    data = io.BytesIO()
    Image.new("RGB", (3, 2)).save(data, "PNG")
    with transaction.atomic():
        letter = site.save("a")
        letter.stamp.save("s.png", ContentFile(data.getvalue()))
        assert Letter.objects.get().stamp.width == 3
    assert Letter.objects.get().stamp.height == 2


def test_files_that_no_row_names_any_more_go_with_the_row(site: Site) -> None:
    site.save("a")
    site.save("b")
    with pytest.raises(StopError), transaction.atomic():
        Letter.objects.get(title="a").delete()
        raise StopError
    site.check("a", "b")
    with transaction.atomic():
        Letter.objects.get(title="a").delete()
        letter = Letter.objects.get(title="b")
        letter.scan.save("c.txt", ContentFile(b"new"))
        assert site.storage.exists("scans/c.txt")
    assert set(site.objects()) == {"scans/c.txt"}
    letter.scan = ""
    letter.save(update_fields=["title"])
    assert set(site.objects()) == {"scans/c.txt"}
    Letter.objects.create(title="twin", scan="scans/c.txt")
    letter.save()
    assert set(site.objects()) == {"scans/c.txt"}
    Letter.objects.all().delete()
    assert site.objects() == {}


def test_the_row_says_which_file_goes_with_it_and_not_the_instance(site: Site) -> None:
    kept = site.storage.save("kept.txt", ContentFile(b"kept"))
    letter = site.save("a")
    letter.scan = ContentFile(b"new", name=kept)  # as a form that is not valid leaves it
    letter.delete()
    assert set(site.objects()) == {kept}
    site.save("b")
    Letter.objects.only("title").get().delete()
    older = site.save("c")
    newer = Letter.objects.get()
    newer.scan.save("d.txt", ContentFile(b"new"))
    older.delete()
    assert set(site.objects()) == {kept}


def test_rows_that_a_manager_hides_keep_their_files(site: Site) -> None:
    site.save("a")
    Letter.objects.create(title="hidden", scan="scans/a.txt")
    hiding: Any = mock.Mock()
    hiding.using.return_value = Letter.objects.none()
    with mock.patch.dict(vars(Letter._meta), {"base_manager": hiding}):
        Letter.objects.get(title="a").delete()
    assert set(site.objects()) == {"scans/a.txt"}


def test_a_file_stays_whose_row_is_in_another_database_than_the_catalog(
    site: Site, tmp_path: Path
) -> None:
    site.save("a")
    other = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "other.db"}
    connections.settings["other"] = connections.configure_settings(
        {"default": other, "other": other}
    )["other"]
    try:
        call_command("migrate", run_syncdb=True, verbosity=0, database="other")
        Letter.objects.using("other").create(title="a", scan="scans/a.txt")
        Letter.objects.using("other").all().delete()
        assert set(site.objects()) == {"scans/a.txt"}
        Letter.objects.using("other").create(title="a", scan="scans/a.txt")
        elsewhere = mock.Mock(spec=["db_for_write"])
        elsewhere.db_for_write.return_value = "other"
        with override_settings(DATABASE_ROUTERS=[elsewhere]):
            Letter.objects.using("default").get().delete(using="default")
        assert set(site.objects()) == {"scans/a.txt"}
    finally:
        connections["other"].close()
        del connections["other"], connections.settings["other"]


def test_a_file_of_a_row_can_be_opened_more_than_once(site: Site) -> None:
    letter = site.save("a")
    for _ in range(2):
        with letter.scan.open() as file:
            assert file.read() == b"Dear Ann"
    with letter.scan.open("wb") as file:
        file.write(b"Dear Bob")
    with letter.scan.open("r") as file:
        assert file.read() == "Dear Bob"
    assert letter.scan.size == letter.scan.file.size == 8
    with pytest.raises(ValueError, match="rb\\+"):
        letter.scan.open("rb+")


def test_what_can_be_read_once_is_not_stored_in_part(site: Site) -> None:
    read, write = os.pipe()
    os.write(write, b"whole")
    os.close(write)

    def taken(*_: object, **__: object) -> None:
        os.read(read, 2)
        message = "taken"
        raise RecordAlreadyExistsException(message)

    with os.fdopen(read, "rb", buffering=0) as pipe, mock.patch.object(site.storage, "_put", taken):
        with pytest.raises(RecordAlreadyExistsException):
            site.storage.save("a.txt", File(pipe))
    assert site.objects() == {}


def test_unused_files_stay_if_that_is_asked_for(site: Site) -> None:
    site.storage.delete_unused = False
    site.save("a")
    Letter.objects.all().delete()
    assert set(site.objects()) == {"scans/a.txt"}


def test_an_app_that_is_not_installed_is_named_before_a_file_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("django.apps.apps.is_installed", lambda name: name != "fennflow_django")
    storage = FennFlowStorage(connector=InMemoryConnectorConfig(), namespace=f"n{next(numbers)}")
    with pytest.raises(ConfigException, match="INSTALLED_APPS"):
        storage.exists("a.txt")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"OPTIONS": {"connector": None}}, "connector"),
        ({"OPTIONS": {"connector": "no.such"}}, "no"),
        ({"OPTIONS": {"timout": 5}}, "timout"),
        ({"OPTIONS": {"using": "other"}}, "other"),
        ({"OPTIONS": {"prefix": "/a"}}, "prefix"),
        ({"BACKEND": "fennflow_django.Storage"}, "Storage"),
    ],
)
def test_a_storage_that_options_do_not_make_is_an_error_of_the_system_check(
    sqlite_site: Site, changed: dict[str, Any], words: str
) -> None:
    del sqlite_site
    call_command("check")
    before: Any = storages.backends["default"]
    options = {**before["OPTIONS"], **changed.get("OPTIONS", {})}
    options = {name: value for name, value in options.items() if value is not None}
    with use_backends({"default": {**before, **changed, "OPTIONS": options}}):
        with pytest.raises(SystemCheckError, match=rf"(?s)STORAGES\['default'\].*{words}"):
            call_command("check")


def test_a_unit_of_work_of_your_own_joins_the_block(site: Site) -> None:
    uow_class = site.storage.unit_of_work
    with pytest.raises(TransactionException, match="atomic"):
        unit_of_work(uow_class)
    with transaction.atomic():
        uow = unit_of_work(uow_class)
        assert unit_of_work(uow_class) is uow
        site.save("a")
        assert uow.files.exists("scans/a.txt")
    site.check("a")


def test_transactions_that_are_ended_by_hand_are_followed(site: Site) -> None:
    transaction.set_autocommit(False)
    try:
        site.save("a")
        transaction.rollback()
        site.save("b")
        transaction.commit()
        site.save("c")
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)
    site.check("b")


def test_a_connection_that_is_closed_takes_its_files_along(site: Site) -> None:
    with pytest.raises(StopError), transaction.atomic():
        site.save("a")
        connections["default"].close()
        raise StopError
    site.check()


def test_nothing_is_left_on_the_connection(site: Site) -> None:
    connection = connections["default"]
    with transaction.atomic():
        site.save("first")
    before = set(vars(connection))
    with transaction.atomic():
        site.save("a")
        assert set(vars(connection)) != before
    assert set(vars(connection)) == before


def test_callbacks_run_after_files_are_committed(site: Site) -> None:
    found: list[bool] = []

    def look() -> None:
        with site.storage.unit_of_work() as uow:
            found.append(uow.files.exists("scans/a.txt"))

    with transaction.atomic():
        site.save("a")
        transaction.on_commit(look)
    assert found == [True]


def test_a_callback_of_a_unit_of_work_stores_nothing_in_the_transaction_that_has_ended(
    site: Site,
) -> None:
    refused: list[TransactionException] = []

    def late() -> None:
        assert site.storage.exists("scans/none.txt") is False
        try:
            site.save("late")
        except TransactionException as error:
            refused.append(error)

    with transaction.atomic():
        unit_of_work(site.storage.unit_of_work).on_commit(late)
        site.save("a")
        transaction.on_commit(lambda: site.save("b"))
    with pytest.raises(StopError), transaction.atomic():
        unit_of_work(site.storage.unit_of_work).on_rollback(late)
        site.save("c")
        raise StopError
    assert ["transaction.on_commit" in str(error) for error in refused] == [True, True]
    site.check("a", "b")


def test_overwriting_is_possible_where_it_is_allowed(site: Site) -> None:
    with use_storage(allow_overwrite=True) as other:
        other.quiet()
        with transaction.atomic():
            assert other.storage.save("a.txt", ContentFile(b"1")) == "a.txt"
            assert other.storage.save("a.txt", ContentFile(b"2")) == "a.txt"
        assert other.objects() == {"a.txt": b"2"}


def test_urls_have_a_base_or_are_presigned(site: Site) -> None:
    site.storage.save("a b.txt", ContentFile(b"1"))
    with pytest.raises(FennFlowException):  # there are none of memory
        site.storage.url("a b.txt")
    site.storage._base_url = "/media/"
    assert site.storage.url("a b.txt") == "/media/a%20b.txt"
    assert site.storage.url("http:evil?#.txt") == "/media/http%3Aevil%3F%23.txt"


@pytest.mark.parametrize("name", ["../x", "a/../x", "..\\x", "/x", "//host/x", "a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_leads_nowhere(sqlite_site: Site, name: str) -> None:
    storage = sqlite_site.storage
    storage._base_url = "/media/"
    acts: list[Callable[[str], object]] = [
        storage.url,
        storage.size,
        storage.delete,
        storage.exists,
        storage.open,
        lambda name: storage.open(name, "wb"),
    ]
    for act in acts:
        with pytest.raises(SuspiciousFileOperation) as caught:  # Django answers with 400
            act(name)
        assert isinstance(caught.value, KeyException)
    for overwrite in (False, True):
        storage._allow_overwrite = overwrite
        with pytest.raises(SuspiciousFileOperation):
            storage.save(name, ContentFile(b"1"))
    assert sqlite_site.objects() == {}


def test_directories_outside_and_what_is_reserved_are_refused(sqlite_site: Site) -> None:
    storage = sqlite_site.storage
    with pytest.raises(SuspiciousFileOperation):
        storage.listdir("../x")
    with pytest.raises(SuspiciousFileOperation):
        storage.save(".fennflow/x", ContentFile(b"1"))


def test_a_file_has_the_name_that_is_returned(sqlite_site: Site) -> None:
    """Rows that name one file by two names would not protect it from each other."""
    storage = sqlite_site.storage
    for overwrite in (False, True):
        storage._allow_overwrite = overwrite
        assert storage.save("a\\b.txt", ContentFile(b"1")).startswith("a/b")


@pytest.mark.parametrize("name", ["../x", "/srv/x.txt", "a//b", ".fennflow/x", "x" * 1025])
def test_a_row_whose_text_names_no_file_can_be_changed_and_deleted(
    sqlite_site: Site, name: str
) -> None:
    del sqlite_site
    first, second = (Letter.objects.create(title=each, scan=name) for each in "ab")
    first.scan = "b.txt"
    first.save()
    second.delete()
    assert [str(each.scan) for each in Letter.objects.all()] == ["b.txt"]


def test_a_view_serves_files(site: Site) -> None:
    site.save("a")
    client = Client()
    response: Any = client.get("/media/scans/a.txt")
    assert b"".join(response.streaming_content) == b"Dear Ann"
    assert response["Content-Type"] == "text/plain"
    assert response["Content-Disposition"].startswith("inline")
    for name in ("x", "../x", "a//b"):
        assert client.get(f"/media/{name}").status_code == 404


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.xhtml", "a.unknown", "a"])
def test_a_view_sends_what_a_browser_could_run_as_a_download(sqlite_site: Site, name: str) -> None:
    sqlite_site.storage.save(name, ContentFile(b"<script>alert(1)</script>"))
    response: Any = Client().get(f"/media/{name}")
    assert b"".join(response.streaming_content) == b"<script>alert(1)</script>"
    assert response["Content-Disposition"].startswith("attachment")
    assert response["X-Content-Type-Options"] == "nosniff"


def test_a_test_case_rolls_files_back(site: Site) -> None:
    class TestLetters(TestCase):
        @classmethod
        @override
        def setUpTestData(cls) -> None:
            site.save("first")

        def test_one(self) -> None:
            with self.captureOnCommitCallbacks() as callbacks, transaction.atomic():
                site.save("a")
            assert callbacks == []
            assert site.storage.exists("scans/a.txt")
            assert site.storage.exists("scans/first.txt")

        def test_two(self) -> None:
            assert not site.storage.exists("scans/a.txt")
            assert site.storage.exists("scans/first.txt")
            site.save("a")

    suite = unittest.defaultTestLoader.loadTestsFromTestCase(TestLetters)
    result = suite.run(unittest.TestResult())
    assert (result.testsRun, result.errors, result.failures) == (2, [], [])
    site.check()


@pytest.mark.once
def test_it_works_on_psycopg2_too(postgresql: PostgresqlServer) -> None:
    database = json.dumps(settings_of(postgresql.new_database()))
    tests = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PSYCOPG2, database],
        env=os.environ | {"PYTHONPATH": tests},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "psycopg2 scans/c\n")


def test_migrations_leave_the_catalog_alone(site: Site) -> None:
    site.save("a")
    call_command("makemigrations", "fennflow_django", check=True, verbosity=0)
    call_command("migrate", "fennflow_django", "zero", verbosity=0)
    call_command("migrate", run_syncdb=True, verbosity=0)
    site.check("a")


def test_a_catalog_is_created_though_the_migration_ran_before_there_was_a_storage(
    tmp_path: Path,
) -> None:
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": tmp_path / "app.db"}
    with use_database(sqlite):
        with override_settings(STORAGES={}):
            call_command("migrate", run_syncdb=True, verbosity=0)
        with use_storage() as site:
            with transaction.atomic():
                Letter.objects.create(title="first")
                site.save("a")
            assert set(site.objects()) == {"scans/a.txt"}
            call_command("migrate", verbosity=0)
            # Like Django's runner for several processes.
            shutil.copy(tmp_path / "app.db", tmp_path / "copy.db")
    with sqlite3.connect(tmp_path / "copy.db") as copy:
        assert copy.execute("SELECT count(*) FROM django_letters_letter").fetchone() == (2,)
    copy.close()
    close()


def test_the_catalog_is_created_while_a_site_writes(tmp_path: Path) -> None:
    file = tmp_path / "app.db"
    with use_database({"ENGINE": "django.db.backends.sqlite3", "NAME": file}):
        with override_settings(STORAGES={}):
            call_command("migrate", run_syncdb=True, verbosity=0)
        with use_storage(), closing(sqlite3.connect(file, check_same_thread=False)) as another:
            another.execute("PRAGMA journal_mode = WAL")
            another.execute("BEGIN IMMEDIATE")
            another.execute("CREATE TABLE theirs (id INTEGER)")
            release = threading.Timer(0.5, another.commit)
            release.start()
            create_catalogs(connections["default"])  # waits until it may write
            release.join()
            another.execute("BEGIN IMMEDIATE")
            create_catalogs(connections["default"])  # has nothing to do, and waits for no one
            another.rollback()
    close()


def test_commands_look_after_storages(site: Site) -> None:
    for action, expected in {
        "recover": "rolled_forward=0",
        "reconcile": "objects=0",
        "doctor": "problems=()",
    }.items():
        output = io.StringIO()
        call_command("fennflow", action, stdout=output)
        assert expected in output.getvalue()
    with pytest.raises(CommandError, match="default"):
        call_command("fennflow", "doctor", storage="other")


def test_commands_end_with_a_code_where_something_is_wrong(site: Site) -> None:
    site.save("a")

    async def put_another() -> None:
        async with site.store.connector() as connector:
            attributes = ObjectAttributes(media_type="text/plain")
            await connector.put(PutRequest(site.store.namespace, "b\x85", attributes), b"theirs")

    asyncio.run(put_another())
    output = io.StringIO()
    with pytest.raises(CommandError, match="default") as caught:
        call_command("fennflow", "reconcile", stdout=output)
    assert caught.value.returncode == 3
    assert output.getvalue().rstrip().isprintable()


def test_the_first_file_may_follow_rows(site: Site) -> None:
    with transaction.atomic():
        Letter.objects.create(title="first")
        site.save("a")
    assert set(site.objects()) == {"scans/a.txt"}


def test_databases_that_cannot_hold_a_catalog_are_refused(tmp_path: Path) -> None:
    sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    with use_database(sqlite), pytest.raises(ConfigException, match="in memory"):
        backend_config()
    postgresql = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "a",
        "OPTIONS": {"service": "x"},
    }
    with use_database(postgresql), pytest.raises(ConfigException, match="'service'"):
        backend_config()
    postgresql["OPTIONS"] = {"sslmode": "require", "pool": True}
    postgresql |= {"HOST": "/run/db", "USER": "a@b", "PASSWORD": "p/w", "PORT": "5"}
    with use_database(postgresql):
        url = make_url(backend_config().url.get_secret_value())
    assert (url.username, url.password, url.port) == ("a@b", "p/w", 5)
    assert url.query == {"host": "/run/db", "sslmode": "require"}
