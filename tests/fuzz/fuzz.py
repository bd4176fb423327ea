"""Coverage-guided search for input that breaks what reads it: `nox -s fuzz -- 10` for ten minutes each.

Each target takes what strangers can choose, and lets only our own exceptions out.
"""

from __future__ import annotations

import base64
import json
import sys
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from string import whitespace
from tempfile import mkdtemp
from uuid import UUID

import atheris

with atheris.instrument_imports(include=["fennflow", "fennflow_bucket"]):
    from fennflow.backends import ObjectKey, WriteId
    from fennflow.cli.downloads import check_local_name
    from fennflow.cli.terminal import Terminal
    from fennflow.config import ConfigDict, ReconcileConfig
    from fennflow.connectors import (
        Location,
        ObjectAttributes,
        StoredObject,
        check_attributes,
        headers_of,
    )
    from fennflow.connectors.metadata import decode, encode
    from fennflow.engine.differences import Policy, judge
    from fennflow.engine.stamps import stamp_of
    from fennflow.engine.tickets import Ticket, opened, signed
    from fennflow.exceptions import FennFlowException, UploadTicketException
    from fennflow.files import ContentFactory, JsonContent, TextContent, UrlContent
    from fennflow.paths import (
        StoragePath,
        check_key,
        check_prefix,
        decode_token,
        encode_token,
        join_key,
    )
    from fennflow.plugins import registry
    from fennflow.printable import without_credentials
    from fennflow.responses import ObjectInfo
    from fennflow.web import answer_for
    from fennflow_bucket.commands import COMMANDS, Entry
    from fennflow_bucket.log import DAMAGE, load_entry
    from fennflow_bucket.state import State

SESSION = "01890000-0000-7000-8000-000000000000"
TICKET = Ticket(
    ticket_id=SESSION, staging_key="s", namespace="n", key="k", deadline=2**31, max_size=1
)
POLICY = Policy(
    settings=ReconcileConfig(strategy="replace", orphans="adopt"),
    filling=False,
    dead_before=2e9,
    catalog_id="c",
)
STATE = State(Path(mkdtemp()) / "state.db", kept=False)
ARGUMENTS: dict[str, object] = {
    "id": SESSION, "token": 1, "name": "n", "value": "v", "area": ["n", ""], "begins": True,
    "records": [["n", "k", SESSION, 1, "[]"]], "removed": [["n", "k"]], "late": [], "steps": "[]",
    "hidden": "h", "keys": [["n", "k"]], "keep": [], "checked": [], "tokens": [[SESSION, 1]],
    "limit": 1, "intents": [], "jobs": [], "commit": None, "key": "k", "seconds": 1, "seq": 1,
    "upload": "u", "by": "web-1:1",
}  # fmt: skip
ODD_VALUES: list[object] = [
    *(
        None,
        0,
        -1,
        2**70,
        1e400,
        "",
        "\0",
        "\ud800",
        [],
        {},
        [[]],
        [{}],
        [None],
        [["n"]],
        [[1, 2, 3]],
    ),
    *([["n", "k", "t", 2**70, "x"]], [["n", {}]], "[1]", "{}", "null", "[" * 9999, True),
]
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def keys(data: atheris.FuzzedDataProvider) -> None:
    scope, path = data.ConsumeUnicode(40), data.ConsumeUnicode(1100)
    with suppress(FennFlowException):
        check_key(scope)
        key = check_key(join_key(scope, check_key(path)))
        assert key.startswith(f"{scope}/")
        assert 0 < len(key.encode()) <= 1024
        assert not {"", ".", ".."} & set(key.split("/"))


def prefixes(data: atheris.FuzzedDataProvider) -> None:
    """A prefix is one of keys, or refused: no database meets what it cannot store."""
    prefix, rest = data.ConsumeUnicode(200), data.ConsumeUnicode(200)
    with suppress(FennFlowException):
        check_key(prefix + rest)
        assert check_prefix(prefix) == prefix
    with suppress(FennFlowException):
        check_prefix(prefix)
        assert len(prefix.encode()) <= 1024
        assert "\0" not in prefix


def options(data: atheris.FuzzedDataProvider) -> None:
    """Accepted metadata is valid in a header and in the journal."""
    text = data.ConsumeUnicode(40)
    values = (
        text,
        text.encode(errors="replace"),
        [text],
        {text: text},
        None,
        1,
        data.ConsumeFloat(),
    )
    extra = {data.ConsumeUnicode(20): data.PickValueInList(list(values)), "CacheControl": text}
    attributes = ObjectAttributes(
        media_type=data.PickValueInList(["text/plain", data.ConsumeUnicode(40)]),
        metadata={data.ConsumeUnicode(9): data.ConsumeUnicode(9)},
        extra=extra,
    )
    for value in headers_of(extra).values():
        assert value.isascii()
        assert value.isprintable()
    with suppress(FennFlowException):
        check_attributes(attributes)
        assert attributes.media_type.isascii()
        assert attributes.media_type.isprintable()
        assert "\n" not in json.dumps(extra, allow_nan=False, ensure_ascii=False)
        assert text.isprintable()


def urls(data: atheris.FuzzedDataProvider) -> None:
    """A password is left out, however badly it is escaped; and no link runs as a script."""
    password = "".join(
        each for each in data.ConsumeUnicode(30) if each not in "\"'<>`" + whitespace
    )
    assert "Pl4in" not in without_credentials(
        f"at http://zoe:{''.join(password.split())}Pl4in@host/a"
    )
    with suppress(FennFlowException):
        scheme = data.PickValueInList(["", "http://", "HTTPS://", "javascript:", "http:"])
        link = UrlContent.from_content(scheme + data.ConsumeUnicode(40)).content
        assert link.lower().startswith(("http://", "https://"))
        assert link.isprintable()


def tokens(data: atheris.FuzzedDataProvider) -> None:
    text = data.ConsumeUnicode(200)
    with suppress(FennFlowException):
        start = decode_token(text)
        assert decode_token(encode_token(start)) == start
    right = signed(TICKET, b"key")
    payload, _, code = right.partition(".")
    changed = data.PickValueInList(
        [text, f"{payload}{text}.{code}", f"{text}.{code}", right + text]
    )
    with suppress(UploadTicketException):
        assert opened(changed, b"key") == TICKET
        assert changed == right


def metadata(data: atheris.FuzzedDataProvider) -> None:
    encoded = base64.urlsafe_b64encode(data.ConsumeBytes(1500)).decode()
    text = data.PickValueInList([encoded, data.ConsumeUnicodeNoSurrogates(300)])
    found = decode({"fennflow_encoded": text, data.ConsumeUnicodeNoSurrogates(9): "other"})
    for name, value in found.items():
        (name + value).encode()
    forged = {
        f"fennflow_{name}": data.PickValueInList([value, data.ConsumeUnicode(60)])
        for name, value in {
            "transaction": SESSION,
            "seq": "1",
            "catalog": "c",
            "type": "json",
        }.items()
    }
    extra = {data.ConsumeUnicode(9): data.ConsumeUnicode(40), **found, **forged}
    stored = StoredObject(
        location=Location("a"),
        etag="e",
        size=1,
        media_type=data.ConsumeUnicode(30),
        metadata=extra,
        headers={"Cache-Control": data.ConsumeUnicode(20)},
    )
    stamp = stamp_of(stored)
    assert stamp is None or 0 < stamp.write.seq < 1 << 63
    assert stamp is None or str(UUID(stamp.write.transaction_id)) == stamp.write.transaction_id
    verdict = judge(ObjectKey("bucket", "a"), stored, None, POLICY, write=WriteId(SESSION, 1))
    record = None if verdict is None else verdict.record
    if record is not None:
        assert (record.content_type, record.sha256, record.write.seq) == (None, None, 1)
        texts = {**record.metadata, **record.headers, record.media_type: ""}
        assert "\0" not in "".join([*texts, *texts.values()]).encode().decode()
    with suppress(FennFlowException):
        given = {data.ConsumeUnicodeNoSurrogates(9).lower(): data.ConsumeUnicodeNoSurrogates(40)}
        assert decode(encode(given)) == given


def ranges(data: atheris.FuzzedDataProvider) -> None:
    info = ObjectInfo(
        path=StoragePath(data.ConsumeUnicode(20)),
        size=data.ConsumeIntInRange(0, 1 << 50),
        media_type=data.PickValueInList(["text/plain", data.ConsumeUnicode(40)]),
        etag="e",
        headers={name: data.ConsumeUnicode(30) for name in ("Content-Encoding", "Cache-Control")},
        sha256=None,
        metadata={},
        created_at=NOW,
        modified_at=NOW,
    )
    headers = {
        "Range": "bytes=" * data.ConsumeBool() + data.ConsumeUnicode(60),
        "If-Range": data.ConsumeUnicode(9),
        "If-None-Match": data.ConsumeUnicode(40),
    }
    answer = answer_for(info, headers, download_as=data.ConsumeUnicodeNoSurrogates(20))
    assert 0 <= answer.start <= answer.end <= info.size
    for value in answer.headers.values():
        assert value.isascii()
        assert value.isprintable()


def contents(data: atheris.FuzzedDataProvider) -> None:
    media_type = data.PickValueInList(
        ["application/json", "text/plain", "text/x-uri", "", data.ConsumeUnicode(30)]
    )
    body = data.ConsumeBytes(4000)
    with suppress(FennFlowException):
        file = ContentFactory.from_bytes(media_type, body, filename=data.ConsumeUnicode(30) or None)
        assert file.data == body
        repr(file)
        if isinstance(file, (JsonContent, TextContent, UrlContent)):
            _ = file.content


def variants(data: atheris.FuzzedDataProvider) -> None:
    """What an object's metadata says of its class is as foreign as its bytes."""
    with suppress(FennFlowException):
        registry().content_class(data.ConsumeUnicode(40), data.ConsumeUnicode(40))


def configs(data: atheris.FuzzedDataProvider) -> None:
    names = list(ConfigDict.model_fields)
    with suppress(FennFlowException):
        ConfigDict(**{data.PickValueInList(names): data.ConsumeUnicode(30)})


def local_paths(data: atheris.FuzzedDataProvider) -> None:
    """What a file of the store is called must not lead out of a local directory."""
    name, windows = data.ConsumeUnicode(200), data.ConsumeBool()
    with suppress(FennFlowException):
        check_local_name(name, windows=windows)
        path = PureWindowsPath("C:/out", name) if windows else PurePosixPath("/out", name)
        assert path.parts[2:] == tuple(name.split("/"))
        assert path.is_relative_to("C:/out" if windows else "/out")
        assert ".." not in path.parts


def terminal(data: atheris.FuzzedDataProvider) -> None:
    """What is printed has no character that a terminal acts on."""
    texts = [data.ConsumeUnicode(60) for _ in range(3)]
    out = StringIO()
    with redirect_stdout(out):
        Terminal().line(texts[0])
        Terminal().message(texts[1], title=texts[2])
        Terminal().table((texts[0],), [(texts[1],), (texts[2],)])
    assert all(line.isprintable() for line in out.getvalue().split("\n"))


def entries(data: atheris.FuzzedDataProvider) -> None:
    """What is in the log of a bucket is applied, or is one of the errors that count as damage."""
    name = data.PickValueInList(list(COMMANDS))
    given = {**ARGUMENTS, data.PickValueInList(list(ARGUMENTS)): data.PickValueInList(ODD_VALUES)}
    given[data.PickValueInList(list(ARGUMENTS))] = data.ConsumeUnicode(20)
    STATE.begin()
    try:
        with suppress(FennFlowException, *DAMAGE):
            COMMANDS[name](Entry(STATE.writing, 1, 1, 1), given, None)
    finally:
        STATE.rollback()
    with suppress(FennFlowException, *DAMAGE):
        load_entry(zlib.compress(data.ConsumeBytes(200)), "log/0")


TARGETS: dict[str, Callable[[atheris.FuzzedDataProvider], None]] = {
    each.__name__: each
    for each in (
        *(keys, prefixes, tokens, metadata, options, ranges, contents, variants, configs, urls),
        *(local_paths, terminal, entries),
    )
}


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        print(*TARGETS, sep="\n")
        return
    target = TARGETS[sys.argv.pop(1)]
    atheris.Setup(sys.argv, lambda data: target(atheris.FuzzedDataProvider(data)))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
