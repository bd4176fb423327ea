"""A row names its file."""

from __future__ import annotations

from django.db import models
from typing_extensions import override


class Letter(models.Model):
    """A letter."""

    title: models.CharField[str, str] = models.CharField(max_length=100, unique=True)
    scan = models.FileField(upload_to="scans", blank=True)

    @override
    def __str__(self) -> str:
        return self.title
