"""What `docs/django.md` adds to the settings of `startproject` is at the end."""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import make_url

from fennflow.connectors import S3ConnectorConfig

DEBUG = os.environ.get("DEBUG") == "yes"
SECRET_KEY = os.environ.get("SECRET_KEY", "an example has no secrets")
ALLOWED_HOSTS = ["localhost", "127.0.0.1"]
ROOT_URLCONF = "django_postbox.urls"
STATIC_URL = "static/"
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

url = make_url(os.environ.get("DATABASE_URL", "sqlite:///postbox.db"))
DATABASES: dict[str, dict[str, Any]] = {
    "default": {
        "ENGINE": f"django.db.backends.{url.get_backend_name().replace('sqlite', 'sqlite3')}",
        "NAME": url.database,
        "USER": url.username or "",
        "PASSWORD": url.password or "",
        "HOST": url.query.get("host", url.host or ""),
        "PORT": url.port or "",
        "ATOMIC_REQUESTS": True,  # each view is one transaction
    }
}
if url.get_backend_name() == "sqlite":
    # A transaction that has read could not write after another one has written.
    DATABASES["default"]["OPTIONS"] = {"transaction_mode": "IMMEDIATE"}

INSTALLED_APPS += ["fennflow_django", "django_postbox"]
STORAGES = {
    "default": {
        "BACKEND": "fennflow_django.FennFlowStorage",
        "OPTIONS": {
            "connector": S3ConnectorConfig(),
            "namespace": os.environ.get("BUCKET", "letters"),
            "base_url": "/media/",
        },
    },
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
}
