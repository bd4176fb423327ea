"""A view that serves files of a storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from django.core.exceptions import SuspiciousFileOperation
from django.core.files.storage import storages
from django.http import FileResponse, Http404, HttpRequest

from fennflow.exceptions import KeyException
from fennflow.web import answer_for

if TYPE_CHECKING:
    from fennflow_django.files import StorageFile


def serve(request: HttpRequest, path: str, storage: str = "default") -> FileResponse:
    """Send a file to everyone who knows its name; wrap this view to restrict access.

    A file that a browser could run (HTML, SVG, and any type not known to be passive) is sent as a
    download.

    Args:
        request: the client's request.
        path: name of the file.
        storage: its name in `STORAGES`.
    """
    del request
    try:
        file = storages[storage].open(path)
    except (FileNotFoundError, KeyException, SuspiciousFileOperation) as error:
        message = "There is no such file."
        raise Http404(message) from error
    response = FileResponse(file)
    for name, value in answer_for(cast("StorageFile", file).info, {}).headers.items():
        if name != "Accept-Ranges":
            response[name] = value
    return response
