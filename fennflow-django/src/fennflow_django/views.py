"""A view that serves files of a storage."""

from __future__ import annotations

from django.core.exceptions import SuspiciousFileOperation
from django.core.files.storage import storages
from django.http import FileResponse, Http404, HttpRequest

from fennflow.exceptions import KeyException


def serve(request: HttpRequest, path: str, storage: str = "default") -> FileResponse:
    """Send a file, to everyone who knows its name: wrap it if there are files that not all may see.

    Args:
        request: of the client.
        path: name of the file.
        storage: its name in `STORAGES`.
    """
    del request
    try:
        file = storages[storage].open(path)
    except (FileNotFoundError, KeyException, SuspiciousFileOperation) as error:
        message = "There is no such file."
        raise Http404(message) from error
    return FileResponse(file, filename=path.rpartition("/")[2])
